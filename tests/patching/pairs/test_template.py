import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.config import RotaryPositions
from hooklens.errors import InputError
from hooklens.patching import LogitDiff, Pair, stack_pairs
from tests.annotations import unchecked
from tests.model.networks import make_config

TEMPLATE = "When {a} and {b} went to the store , {s} gave a drink to"


@pytest.fixture(scope="module")
def model():
    tokenizer = build_tokenizer(n_ctx=32)
    torch.manual_seed(0)
    return HookedCausalLM(make_config(d_vocab=len(tokenizer), positions=RotaryPositions(dim=6)), tokenizer)


def make_pair(model, subject="John", other="Mary"):
    return Pair.from_template(
        model,
        TEMPLATE,
        clean={"a": "Mary", "b": "John", "s": subject},
        corrupted={"a": "Mary", "b": "John", "s": other},
    )


def test_positions_have_names(model):
    pair = make_pair(model)
    # Position 0 is the BOS.
    assert pair.clean_tokens[1] == "When"
    assert pair.clean_tokens[pair.position("{a}.last")] == "Mary"
    assert pair.clean_tokens[pair.position("s.first")] == "John"
    assert pair.position("end") == len(pair.clean) - 1
    assert pair.differing == [pair.position("s.last")]
    assert "John -> Mary" in str(pair)
    assert len(pair.labels) == len(pair.clean)
    assert pair.labels[pair.differing[0]] == "John → Mary"
    opening = Pair.from_template(model, "{a} went to the store", clean={"a": "Mary"}, corrupted={"a": "John"})
    assert opening.position("a.first") == 1


def test_pairs_in_a_batch_go_through_a_sweep(model):
    short = Pair.from_text(model, "John gave a drink to", "Mary gave a drink to")
    clean, corrupted, mask = stack_pairs([make_pair(model), short])
    assert mask.sum(1).tolist() == [len(make_pair(model).clean), len(short.clean)]
    grid = patching.grid("resid_pre", positions=[-1, 1])
    result = patching.sweep(
        model, clean, corrupted, grid, LogitDiff("Mary", "John"), attention_mask=mask, progress=False
    )
    texts = patching.sweep(
        model, "John gave a drink to", "Mary gave a drink to", grid, LogitDiff("Mary", "John"), progress=False
    )
    torch.testing.assert_close(result.per_pair[..., 1], texts.per_pair[..., 0], rtol=0, atol=1e-6)


def test_refusals(model):
    with pytest.raises(InputError, match=r"clean prompt has 6 tokens .* corrupted one 5 .* as many tokens"):
        Pair.from_text(model, "John gave a drink to", "John gave a drink")
    with pytest.raises(InputError, match=r"template has the fields \['a'\], corrupted fills \['a', 'b'\]"):
        Pair.from_template(model, "{a} gave", clean={"a": "John"}, corrupted={"a": "Mary", "b": "John"})
    with pytest.raises(InputError, match=r"fields \['a', 'b'\] take other positions"):
        Pair.from_template(
            model,
            "{a} and {b}",
            clean={"a": "John", "b": "Mary John"},
            corrupted={"a": "John Mary", "b": "Mary"},
        )
    with pytest.raises(InputError, match=r"no position is called 's.lost'. Did you mean 's.last'"):
        make_pair(model).position("s.lost")
    with pytest.raises(InputError, match="at least one pair"):
        stack_pairs([])


def test_pairs_of_ids():
    pair = Pair(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]))
    assert pair.differing == [1]
    assert str(pair) == "1 | 2 -> 5 | 3"
    assert pair.position("end") == 2
    with unchecked(), pytest.raises(InputError, match="the clean prompt has 3 tokens, the corrupted one 2"):
        Pair(torch.tensor([1, 2, 3]), torch.tensor([1, 5]))
    with unchecked(), pytest.raises(InputError, match=r"got str; Pair\.from_text\(model, clean, corrupted\)"):
        Pair("Mary", "John")
