"""Autoencoders beside SAELens's: the same latents and reconstructions, and files that go both ways.

Needs `pip install --no-deps -r tests/compat/requirements-sae.txt`.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from hooklens.sae import SAE

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("needs SAELens", allow_module_level=True)
# SAELens imports both, and needs neither for what is compared.
if importlib.util.find_spec("wandb") is None:
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
if importlib.util.find_spec("transformer_lens") is None:
    import hooklens.compat.transformer_lens.install  # noqa: F401
import sae_lens
from sae_lens import registry
from sae_lens.saes.sae import SAEMetadata

D_IN, D_SAE, N_HEADS = 24, 40, 4
POINTS = {"none": "blocks.1.hook_resid_post", "hook_z": "blocks.1.attn.hook_z"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", {"k": 5}),
    "topk_rescaled": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
}
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def make(architecture: str, **values: Any) -> Any:
    build, config = registry.SAE_CLASS_REGISTRY[architecture]
    sae = build(config(d_in=D_IN, d_sae=D_SAE, device="cpu", dtype="float64", **values))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
            if name == "threshold":
                parameter.abs_()
    return sae


@torch.no_grad()
def compare(theirs: Any, folder: Path, *, heads: bool = False) -> None:
    """Values to rounding in float64, and theirs again from the file that is written here."""
    theirs.save_model(str(folder / "theirs"))
    ours = SAE.load(str(folder / "theirs"))
    flat = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = flat.view(3, 5, N_HEADS, -1) if heads else flat
    expected = theirs(x)
    torch.testing.assert_close(ours.encode(flat), theirs.encode(x), atol=1e-10, rtol=0)
    torch.testing.assert_close(ours(flat).view_as(expected), expected, atol=1e-10, rtol=0)
    assert bool((ours.encode(flat) > 0).any())
    ours.save(str(folder / "ours"))
    again = sae_lens.SAE.load_from_disk(str(folder / "ours"), device="cpu")
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(x), expected, atol=1e-10, rtol=0)
    assert again.cfg.normalize_activations == theirs.cfg.normalize_activations
    assert again.cfg.reshape_activations == theirs.cfg.reshape_activations
    for name in ("model_name", "hook_name", "hook_name_out", "prepend_bos", "context_size"):
        assert again.cfg.metadata[name] == theirs.cfg.metadata[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("centres", [True, False])
@pytest.mark.parametrize("reshape", POINTS)
def test_autoencoders(kind: str, norm: str, *, centres: bool, reshape: str, tmp_path: Path) -> None:
    architecture, more = KINDS[kind]
    said = SAEMetadata(model_name="tiny", hook_name=POINTS[reshape], prepend_bos=True, context_size=8)
    theirs = make(
        architecture,
        normalize_activations=norm,
        apply_b_dec_to_input=centres,
        reshape_activations=reshape,
        metadata=said,
        **more,
    )
    compare(theirs, tmp_path, heads=reshape == "hook_z")


@pytest.mark.parametrize("architecture", TRANSCODERS)
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
def test_transcoders(architecture: str, norm: str, tmp_path: Path) -> None:
    said = SAEMetadata(
        model_name="tiny", hook_name="blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out"
    )
    theirs = make(architecture, d_out=16, normalize_activations=norm, apply_b_dec_to_input=False, metadata=said)
    compare(theirs, tmp_path)
