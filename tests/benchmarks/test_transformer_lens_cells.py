"""Cells in the way of notebooks, run with TransformerLens and with the import layer: both print the same.

Needs a TransformerLens that has HookedTransformer, 2.16 to 3.9 (`pip install "transformer-lens==3.9.*"`). Texts are
equal, and numbers to two thousandths: they are float32 of two implementations, printed with four digits.
"""

import contextlib
import copy
import functools
import importlib
import io
import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformer_lens.HookedTransformer", reason="needs transformer-lens 2.16 to 3.9")
import transformer_lens as real

import hooklens.compat.transformer_lens as layer
from tests.benchmarks.transformer_lens_cells import CELLS, TEXT

# 3.9 has it under another name, and its modules are there once they are imported.
for module in ("evals", "head_detector", "hook_points", "patching", "utils"):
    importlib.import_module(f"transformer_lens.{module}")
if not hasattr(real, "HookedTransformerKeyValueCache"):
    real.HookedTransformerKeyValueCache = real.TransformerLensKeyValueCache

_NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")
TOLERANCE = 2e-3


@functools.cache
def models() -> tuple[Any, Any]:
    """The same weights and tokenizer in both, unprocessed."""
    ours = layer.HookedTransformer.from_pretrained_no_processing("bundled:tiny-gpt-neox", device="cpu")
    known = vars(real.HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=4, d_head=4, d_vocab=5, act_fn="relu"))
    words = {name: value for name, value in ours.cfg.to_dict().items() if name in known}
    theirs = real.HookedTransformer(real.HookedTransformerConfig(**words), tokenizer=copy.deepcopy(ours.tokenizer))
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def printed(package: Any, model: Any, code: str) -> str:
    """What a cell prints."""
    names = {"tl": package, "model": model, "TEXT": TEXT, "torch": torch, "functools": functools, "copy": copy}
    names["importlib"] = importlib
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    # Only what graphs hold tells whose tensor it was.
    return re.sub(r",?\s*(grad_fn=<[^>]*>|requires_grad=True)", "", out.getvalue())


def _joins_tokens() -> bool:
    return len(models()[0].to_str_tokens("When Mary")) < 3


@pytest.mark.parametrize("name", CELLS)
def test_cells_print_the_same(name: str) -> None:
    if any(word in CELLS[name] for word in ("to_str_tokens", "test_prompt")) and _joins_tokens():
        pytest.skip("to_str_tokens of 2.x gives one text with the transformers that is installed")
    expected, found = (
        printed(package, model, CELLS[name]) for package, model in zip((real, layer), models(), strict=True)
    )
    assert _NUMBER.sub("#", found).split() == _NUMBER.sub("#", expected).split()
    numbers = [[float(one) for one in _NUMBER.findall(text)] for text in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=TOLERANCE, abs=TOLERANCE)
    assert expected.strip()
