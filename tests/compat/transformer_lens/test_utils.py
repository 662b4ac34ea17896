"""2.x's utilities, against definitions, and against numbers that TransformerLens 2.18 gives."""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hooklens.compat.transformer_lens import FactoredMatrix, HookedTransformer, utils
from tests.torch_version import draws_tokens_anew


@functools.cache
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained("bundled:tiny-gpt-neox")


@pytest.mark.parametrize("given", [torch.ones(2, 3), [1, 2], (1.0, 2.0), 3, 2.5, True, "a", np.ones(2)])
def test_to_numpy(given: Any) -> None:
    found = utils.to_numpy(given)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == (given.tolist() if isinstance(given, Tensor | np.ndarray) else np.array(given).tolist())


def test_to_numpy_of_parameters_and_of_what_is_no_array() -> None:
    assert utils.to_numpy(nn.Parameter(torch.zeros(2))).tolist() == [0, 0]
    with pytest.raises(ValueError, match="invalid type"):
        utils.to_numpy({1: 2})


def test_slices() -> None:
    x = torch.arange(16).view(2, 8)
    for given, mode, expected in [
        (None, "identity", x), (3, "int", x[:, 3]), ((2,), "slice", x[:, :2]), ((1, 7, 3), "slice", x[:, 1:7:3]),
        ((None, 3), "slice", x[:, :3]), ([4, 1], "array", x[:, [4, 1]]), (torch.tensor([2]), "array", x[:, [2]]),
        (torch.tensor([True, False] * 4), "array", x[:, ::2]), (slice(5, None), "slice", x[:, 5:]),
    ]:  # fmt: skip
        chosen = utils.Slice(given)
        assert chosen.mode == mode
        assert torch.equal(chosen.apply(x, dim=-1), expected)
        if mode != "int":
            assert chosen.indices(8).tolist() == expected[0].tolist()
    assert utils.Slice(2).indices().tolist() == [2]
    assert torch.equal(utils.Slice.unwrap(3).apply(x, 1), x[:, [3]])
    with pytest.raises(ValueError, match="max_ctx"):
        utils.Slice([1]).indices()


def test_names_of_activations() -> None:
    for given, expected in [
        (("k", 6, "a"), "blocks.6.attn.hook_k"), (("pre", 2), "blocks.2.mlp.hook_pre"), (("embed",), "hook_embed"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"), (("k6",), "blocks.6.attn.hook_k"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"), (("scale",), "ln_final.hook_scale"),
        (("attn", 0), "blocks.0.attn.hook_pattern"), (("mlp_post", "1"), "blocks.1.mlp.hook_post"),
        (("resid_post", 3, "b"), "blocks.3.hook_resid_post"), (("blocks.0.hook_x",), "blocks.0.hook_x"),
        (("key", 1), "blocks.1.attn.hook_k"), (("attn_logits", 1), "blocks.1.attn.hook_attn_scores"),
    ]:  # fmt: skip
        assert utils.get_act_name(*given) == expected


def test_losses() -> None:
    logits, tokens = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, 4)
    torch.testing.assert_close(utils.lm_cross_entropy_loss(logits, tokens), each.mean())
    torch.testing.assert_close(utils.lm_cross_entropy_loss(logits, tokens, per_token=True), each)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    counts = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    torch.testing.assert_close(utils.lm_cross_entropy_loss(logits, tokens, mask), (each * counts).sum() / 5)
    torch.testing.assert_close(utils.lm_cross_entropy_loss(logits, tokens, mask, per_token=True), each * counts)
    hits = logits.argmax(-1)[:, :-1] == tokens[:, 1:]
    assert torch.equal(utils.lm_accuracy(logits, tokens, per_token=True), hits)
    assert utils.lm_accuracy(logits, tokens) == hits.float().mean()


SCORES = torch.linspace(-1, 1, 20).repeat(6, 1) * torch.arange(1, 7)[:, None]
PENALISED = {"freq_penalty": 2.0, "tokens": torch.arange(24).view(6, 4) % 20}


@draws_tokens_anew
@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({}, [17, 19, 18, 14, 17, 19]), ({"top_k": 3}, [17, 19, 18, 19, 17, 19]),
        ({"top_p": 0.5}, [17, 19, 18, 19, 19, 19]), ({"temperature": 0.5}, [17, 19, 18, 19, 19, 19]),
        (PENALISED, [17, 19, 18, 19, 13, 19]), ({"temperature": 0.0}, [19] * 6),
    ],
)  # fmt: skip
def test_draws_are_those_of_2x(options: dict[str, Any], drawn: list[int]) -> None:
    torch.manual_seed(0)
    before = SCORES.clone()
    assert utils.sample_logits(SCORES, **options).tolist() == drawn
    assert torch.equal(SCORES, before)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"freq_penalty": 1.0}])
def test_draws_refuse(options: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        utils.sample_logits(SCORES, **options)


def test_fresh_weights_are_those_of_2x() -> None:
    """A vector was taken to have as many inputs as outputs."""
    fans = [utils.calc_fan_in_and_fan_out(torch.empty(shape)) for shape in ((5,), (3, 4), (2, 25, 5))]
    assert fans == [(1, 5), (3, 4), (25, 10)]
    for shape in ((), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="1 to 3 axes"):
            utils.calc_fan_in_and_fan_out(torch.empty(shape))
    for name, drawn in {
        "xavier_uniform": [-0.002765, 0.198095, -0.30393], "xavier_normal": [-0.24003, -0.245684, -0.053424],
        "kaiming_uniform": [-0.005294, 0.379323, -0.581981], "kaiming_normal": [-0.459622, -0.470449, -0.102298],
    }.items():  # fmt: skip
        torch.manual_seed(0)
        weight = getattr(utils, f"init_{name}_")(torch.empty(2, 3, 4), gain=0.5)
        torch.testing.assert_close(weight.flatten()[:3], torch.tensor(drawn), rtol=0, atol=1e-6)


def test_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    square = torch.rand(3, 3) + 1
    assert [utils.is_square(x) for x in (square, square[:2], square[None])] == [True, False, False]
    assert [utils.is_lower_triangular(x) for x in (square, square.tril(), square[:2])] == [False, True, False]
    assert torch.equal(utils.transpose(square[:2]), square[:2].T)
    assert utils.get_corner(square, 2).shape == (2, 2)
    left, right = (FactoredMatrix(torch.rand(2, 4, 2), torch.rand(2, 2, 4)) for _ in range(2))
    torch.testing.assert_close(utils.get_corner(left, 2), left.AB[:2, :2, :2])
    expected = (left.AB[:, None] @ right.AB).norm(dim=(-2, -1))
    expected = expected / left.AB.norm(dim=(-2, -1))[:, None] / right.AB.norm(dim=(-2, -1))
    torch.testing.assert_close(utils.composition_scores(left, right), expected)
    torch.testing.assert_close(utils.composition_scores(left, right, broadcast_dims=False), expected.diagonal())
    utils.check_structure(torch.eye(3), torch.eye(3))
    utils.check_structure(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 2], [0, 4]]))
    assert capsys.readouterr().out == "PASSED\nrow mismatch: [0]\n"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [0, 1])
def test_masks_and_bos(side: str, bos: int) -> None:
    """Runs of pads at the padded end are masked; a BOS that is a pad is not."""
    tokenizer = SimpleNamespace(padding_side=side, bos_token_id=bos, pad_token_id=0, bos_token="<s>")
    row = [0, 0, bos, 5, 0, 6] if side == "left" else [bos, 5, 0, 6, 0, 0]
    tokens = torch.tensor([row])
    masked = [0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0]
    assert utils.get_attention_mask(tokenizer, tokens, prepend_bos=True).tolist() == [masked]
    if side == "left" and bos == 0:
        masked[2] = 0
    assert utils.get_attention_mask(tokenizer, tokens, prepend_bos=False).tolist() == [masked]
    without = [0, 0, 5, 0, 6] if side == "left" else row[1:]
    assert utils.get_tokens_with_bos_removed(tokenizer, tokens).tolist() == [without]
    assert utils.get_input_with_manually_prepended_bos(tokenizer, ["a"]) == ["<s>a"]
    assert utils.get_attention_mask(None, tokens, prepend_bos=True).all()


def test_small_things() -> None:
    assert utils.remove_batch_dim(torch.zeros(1, 3)).shape == (3,)
    assert utils.remove_batch_dim(torch.zeros(2, 3)).shape == (2, 3)
    stream = torch.rand(2, 3, 4)
    repeated = utils.repeat_along_head_dimension(stream, 5)
    assert torch.equal(repeated, stream[:, :, None].expand(-1, -1, 5, -1))
    assert repeated.is_contiguous()
    assert utils.repeat_along_head_dimension(stream, 5, clone_tensor=False).data_ptr() == stream.data_ptr()
    assert utils.get_cumsum_along_dim(torch.tensor([1, 2, 3]), 0, reverse=True).tolist() == [6, 5, 3]
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert utils.get_offset_position_ids(1, mask).tolist() == [[0, 0, 1, 2]]
    assert utils.filter_dict_by_prefix({"a.b": 1, "ab.c": 2, "a": 3}, "a") == {"b": 1}
    owner = SimpleNamespace(inner=SimpleNamespace(x=1))
    utils.set_nested_attr(owner, "inner.y", 2)
    utils.set_nested_attr(owner, "z", 3)
    assert [utils.get_nested_attr(owner, name) for name in ("inner.x", "inner.y", "z")] == [1, 2, 3]
    assert utils.is_library_available("math")
    assert not utils.is_library_available("no_such_package")
    assert utils.select_compatible_kwargs({"a": 1, "b": 2}, lambda a: a) == {"a": 1}
    with pytest.raises(ValueError, match="not supported"):
        utils.get_dataset("nonsense")
    frame = utils.logits_to_df(torch.arange(249.0), model().tokenizer, top_k=2)
    assert frame.token_index.tolist() == [248, 247]
    assert frame.logit.tolist() == [248, 247]
    torch.testing.assert_close(torch.tensor(frame.log_prob.tolist()), torch.arange(249.0).log_softmax(0)[[248, 247]])


def test_defaults_of_a_block() -> None:
    cfg, tokenizer = model().cfg, model().tokenizer
    with utils.LocallyOverridenDefaults(model(), prepend_bos=False, padding_side="left"):
        assert (cfg.default_prepend_bos, tokenizer.padding_side) == (False, "left")
    with utils.LocallyOverridenDefaults(model(), prepend_bos=None, padding_side=None):
        assert (cfg.default_prepend_bos, tokenizer.padding_side) == (True, "right")
    with pytest.raises(AssertionError, match="not a valid parameter"):
        utils.LocallyOverridenDefaults(model(), typo=1)
    with (
        pytest.raises(AssertionError, match="must be one of"),
        utils.LocallyOverridenDefaults(model(), padding_side="middle"),
    ):
        pass


def test_a_prompt_is_tested_in_print(capsys: pytest.CaptureFixture[str]) -> None:
    """What 2.18 prints of the same model."""
    utils.test_prompt("the cat", "dog", model(), prepend_space_to_answer=False, top_k=2)
    utils.test_prompt("the cat", [" the", "a"], model(), print_details=False)
    printed = capsys.readouterr().out.splitlines()
    logits = model()(model().to_tokens("the cat"))[0, -1]
    best = logits.topk(2)
    probs = logits.softmax(-1)
    answer = model().to_tokens("dog", prepend_bos=False)[0, 0]
    rank = int((logits > logits[answer]).sum())
    assert printed[:3] == [
        f"Tokenized prompt: {model().to_str_tokens('the cat')}",
        f"Tokenized answer: {model().to_str_tokens('dog', prepend_bos=False)}",
        "Performance on answer token:",
    ]
    assert printed[3] == (
        f"Rank: {rank: <8} Logit: {logits[answer].item():5.2f} Prob: {probs[answer].item():6.2%} "
        f"Token: |{model().to_string([int(answer)])}|"
    )
    for place, (score, token) in enumerate(zip(best.values, best.indices, strict=True)):
        text = model().to_string([int(token)])
        expected = f"Top {place}th token. Logit: {score.item():5.2f} Prob: {probs[token].item():6.2%} Token: |{text}|"
        assert printed[4 + place] == expected
    assert printed[6] == f"Ranks of the answer tokens: [('dog', {rank})]"
    assert printed[7].startswith("Ranks of the answer tokens: [[(")


@pytest.mark.parametrize("bos", [True, False])
def test_texts_become_rows_of_tokens(*, bos: bool) -> None:
    datasets = pytest.importorskip("datasets")
    text = "the cat sat on the mat " * 60
    data = datasets.Dataset.from_dict({"text": [text], "other": [1]})
    tokenizer = model().tokenizer
    rows = utils.tokenize_and_concatenate(data, tokenizer, max_length=16, add_bos_token=bos, num_proc=1)["tokens"][:]
    assert rows.shape[1] == 16
    if bos:
        assert (rows[:, 0] == tokenizer.bos_token_id).all()
    # Pieces are cut at white space, so that together they are the tokens of the text, up to the last row. This
    # tokenizer puts a BOS before each piece.
    whole = tokenizer(text)["input_ids"][1:]
    found = [one for one in rows[:, int(bos) :].flatten().tolist() if one != tokenizer.bos_token_id]
    assert found == whole[: len(found)]
    assert len(whole) - len(found) < 16
    [short] = utils.tokenize_and_concatenate(data, tokenizer, max_length=2000, add_bos_token=bos, num_proc=1)["tokens"]
    kept = [one for one in short.tolist() if one != tokenizer.bos_token_id]
    assert kept[: len(whole)] == whole
    assert set(kept[len(whole) :]) == {tokenizer.pad_token_id}
    assert len(short) == 2000
    assert utils.keep_single_column(data, "text").column_names == ["text"]
