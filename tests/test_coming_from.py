"""docs/coming_from.md: each line of its right-hand columns runs as it stands, and the two sides of some agree."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.documentation.pages import read_blocks

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text(encoding="utf-8")
[PREPARATION] = [block.code for block in read_blocks(PAGE)]
ROWS = [
    (title, there, here)
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    for there, here in re.findall(r"^\| (.+) \| (.+) \|$", body, re.MULTILINE)
    if here != "here"
]
LIBRARIES = ("TransformerLens 2.x", "TransformerLens 3.x and 4, the bridge", "nnsight", "baukit", "pyvene")


@pytest.fixture
def names() -> dict[str, Any]:
    made: dict[str, Any] = {}
    exec(PREPARATION, made)
    return made


def test_all_libraries_have_a_table() -> None:
    titles = [title for title, _, _ in ROWS]
    assert {*LIBRARIES, "Hooks of PyTorch"} == set(titles)
    assert min(titles.count(title) for title in set(titles)) >= 7
    assert PAGE.count("\n| ") == len(ROWS) + 6, "a row that the test does not read"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0][:18]}: {row[1][:40]}")
def test_the_right_hand_side_runs(row: tuple[str, str, str], names: dict[str, Any]) -> None:
    _, _, here = row
    code = re.fullmatch(r"`([^`]+)`", here)
    assert code is not None, here
    exec(code[1], names)


def test_the_line_about_names_runs(names: dict[str, Any]) -> None:
    [code] = re.findall(r"what differs: `([^`]+)`", PAGE)
    _, found = eval(code, names)
    assert list(found) == ["blocks.1.hook_mlp_out"]


def test_sides_that_can_be_run_here_agree(names: dict[str, Any]) -> None:
    """Against transformers, by hooks of PyTorch, what the table says of them."""
    model, ids, cache = names["model"], names["ids"], names["cache"]
    hf = model.to_hf().eval()
    with torch.no_grad():
        out = hf(ids, output_hidden_states=True)
    here = {there: here.strip("`") for _, there, here in ROWS}
    close = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(eval(here["`hf(x).logits`"], names), out.logits, **close)
    states = eval(here["`hf(x, output_hidden_states=True).hidden_states[2]`"], names)
    torch.testing.assert_close(states, out.hidden_states[2], **close)
    handle = hf.gpt_neox.layers[1].register_forward_hook(lambda module, args, output: 2 * output)
    doubled = hf(ids).logits
    handle.remove()
    torch.testing.assert_close(eval(here["a forward hook that returns another tensor"], names), doubled, **close)
    head = slice(3 * model.cfg.d_head, 4 * model.cfg.d_head)

    def cut(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[..., head] = 0
        return (z,)

    handle = hf.gpt_neox.layers[1].attention.dense.register_forward_pre_hook(cut)
    without = hf(ids).logits
    handle.remove()
    torch.testing.assert_close(eval(here["a head: a slice of what `o_proj` reads"], names), without, **close)
    assert torch.equal(
        eval(here["`layer.mlp.dense_4h_to_h.weight`"], names).T, hf.gpt_neox.layers[1].mlp.dense_4h_to_h.weight
    )
    assert torch.equal(cache["mlp_out", 1], eval(here["`llm.gpt_neox.layers[1].mlp.output.save()`"], names))
