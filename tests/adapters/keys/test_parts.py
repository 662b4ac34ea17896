import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.adapters.keys import ConfigReader, Key, score_scalar_key


@pytest.mark.parametrize(
    ("nullable", "config", "read"),
    [
        (True, {}, {"field": 5.0}),
        (True, {"key": None}, {}),
        (True, {"key": 2.0}, {"field": 2.0}),
        (False, {"key": None}, {"field": 5.0}),
    ],
)
def test_null_is_no_default_only_where_it_may_be(nullable, config, read) -> None:
    key, reader = Key("key", "field", float, default=5.0, nullable=nullable), ConfigReader(config)
    assert key.read(reader, {}) == read
    assert not reader.unused()


@settings(max_examples=60)
@given(st.integers(1, 4096) | st.floats(1e-3, 1e4))
def test_score_scalar_comes_back(scalar) -> None:
    """A whole number as one: transformers refuses another there."""
    key = score_scalar_key("scalar", default=256)
    read = key.read(ConfigReader({"scalar": scalar}), {})
    written = key.write(read)["scalar"]
    # One that is all but whole has the same inverse root, and comes back as whole, too.
    assert isinstance(written, int) or scalar != round(scalar)
    assert written == pytest.approx(scalar)
    assert key.read(ConfigReader({"scalar": written}), {}) == read
    assert key.write({"attn_scale": None}) == {"scalar": None}
