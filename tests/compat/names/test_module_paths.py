"""Module paths of transformers' models, held against its modules: what they see and give, and what edits there do."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hooklens import HookedConfig
from hooklens.compat.names import translate
from hooklens.errors import HookNameError
from tests.annotations import unchecked
from tests.compat.names.transformers_runs import (
    IDS,
    all_variants,
    changed,
    load_pair,
    make_folder,
    record,
    variants_of,
)

FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "falcon", "mixtral", "olmo2", "bloom")
_REST = [pair for pair in all_variants() if pair[1] != variants_of(pair[0])[0] or pair[0] not in FAMILIES]


def translated(names: list[str], cfg: HookedConfig) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = translate(name, cfg, notation="transformers")
        except HookNameError:
            continue
    return found


def like(tensor: Tensor, ours: Tensor) -> Tensor:
    """A tensor of transformers in the shape of ours: heads apart and behind positions, one row repeated for all."""
    if tensor.numel() != ours.numel():
        return tensor.expand(len(ours), *tensor.shape[1:])
    if tensor.ndim == 4 and tensor.shape != ours.shape == tensor.transpose(1, 2).shape:
        return tensor.transpose(1, 2)
    return tensor.reshape(ours.shape)


def check_values(folder: Path, family: str) -> dict[str, str]:
    with unchecked():
        theirs, ours = load_pair(folder, family)
        seen = record(theirs)
        with torch.no_grad():
            _, cache = ours.run_with_cache(IDS, names_filter=["*", "hook_tokens"])
    found = translated(list(seen), ours.cfg)
    wrong = [
        (name, str(translation))
        for name, translation in found.items()
        # Both compute in float32, in other orders.
        if not torch.allclose(like(seen[name], cache[translation]), cache[translation], atol=1e-4, rtol=1e-4)
    ]
    assert wrong == []
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_see_and_give_what_the_hook_points_show(family: str, tmp_path: Path) -> None:
    variant = variants_of(family)[0]
    found = check_values(make_folder(tmp_path, family, variant), family)
    # The stream, both branches' sums, the last norm and the logits are known in all.
    assert {"hidden_states[0]", "hidden_states[1]", "hidden_states[-1]".replace("-1", "2"), "lm_head.output"} <= set(
        found
    )
    assert {"unembed.hook_in", "unembed.hook_out", "blocks.1.hook_resid_post"} <= set(found.values())
    assert any(name.endswith("hook_z") for name in found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), _REST)
def test_modules_of_all_variants_see_and_give_the_same(family: str, variant: str, tmp_path: Path) -> None:
    check_values(make_folder(tmp_path, family, variant), family)


def check_edits(folder: Path, family: str) -> None:
    """Noise added there and here gives the same logits, but where `edit` says that it does not."""
    with unchecked(), torch.no_grad():
        theirs, ours = load_pair(folder, family)
        seen = record(theirs)
        found = translated(list(seen), ours.cfg)
        plain = ours(IDS)
        wrong = []
        for name, translation in found.items():
            match = re.fullmatch(r"(.*)\.(input|output)(?:\[(\d)\])?", name)
            if match is None or not seen[name].is_floating_point():
                continue
            noise = 0.5 * seen[name].std() * torch.randn(seen[name].shape, generator=torch.Generator().manual_seed(1))
            with changed(theirs, match[1], match[2], int(match[3] or 0), noise):
                there = theirs(IDS).logits
            here = ours.run_with_hooks(IDS, fwd_hooks=[(translation, lambda x, hook, n=noise: x + like(n, x))])
            assert not torch.equal(here, plain), name
            is_alike = torch.allclose(here, there, atol=1e-4 * (1 + plain.std().item()), rtol=1e-3)
            if is_alike != (translation.edit == ""):
                wrong.append((name, str(translation), translation.edit))
        assert wrong == []


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "mixtral", "olmo2"])
def test_edits_reach_what_the_translation_says(family: str, tmp_path: Path) -> None:
    check_edits(make_folder(tmp_path, family, variants_of(family)[0]), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({family for family, _ in _REST}))
def test_edits_in_all_families_reach_what_the_translation_says(family: str, tmp_path: Path) -> None:
    check_edits(make_folder(tmp_path, family, variants_of(family)[-1]), family)
