"""What the code of docs/saes.md computes is what the page says."""

import re
from pathlib import Path

import torch

from tests.documentation.pages import read_blocks

PAGE = (Path(__file__).parents[2] / "docs" / "saes.md").read_text(encoding="utf-8")


def test_its_code_computes_what_it_says() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in read_blocks(PAGE):
        exec(block.code, names)
    assert names["cache"]["blocks.1.hook_resid_post.hook_sae_acts"].shape[-1] == 512  # type: ignore[index]
    assert not torch.equal(names["edited"], names["logits"])  # type: ignore[arg-type]
    assert not torch.equal(names["changed"], names["logits"])  # type: ignore[arg-type]
    assert 0 < len(names["exact"]) <= 20  # type: ignore[arg-type]


def test_it_lists_every_point() -> None:
    from hooklens.sae.splice import _POINTS

    assert set(re.findall(r"^\| `(hook_\w+)`", PAGE, re.MULTILINE)) == set(_POINTS)
