import pytest

from hooklens.adapters.keys import ConfigReader, WindowKeys, late_layers

LATE = WindowKeys(default=7, switch="on", slides=late_layers("first", 2), slides_keys=("first",))


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({}, None),
        ({"on": True}, (None, None, 7)),
        ({"on": True, "first": 0, "sliding_window": 5}, (5, 5, 5)),
        ({"on": True, "first": 3}, None),
        ({"on": True, "first": 0, "sliding_window": 0}, None),
        ({"on": True, "first": 0, "sliding_window": None}, None),
        ({"on": False, "layer_types": ["sliding_attention"] * 3}, None),
        ({"on": True, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, (7, None, None)),
    ],
)
def test_layers_slide_from_one_on(config, windows) -> None:
    reader = ConfigReader(config)
    assert LATE.read(reader, {"n_layers": 3}) == {"windows": windows}
    assert not reader.problems
    assert not reader.unused()


@pytest.mark.parametrize("windows", [None, (None, 7, None), (3, 3, 3)])
@pytest.mark.parametrize("nullable", [True, False])
@pytest.mark.parametrize("switch", [None, "on"])
def test_windows_read_back_as_written(windows, nullable, switch) -> None:
    """Where null cannot be run, a network without windows keeps a size that no layer has."""
    part = WindowKeys(default=4, switch=switch, nullable=nullable)
    written = part.write({"windows": windows, "n_layers": 3})
    assert part.read(ConfigReader(written), {"n_layers": 3}) == {"windows": windows}
    assert (written["sliding_window"] is None) == (windows is None and nullable)
