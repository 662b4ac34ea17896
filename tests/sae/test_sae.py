"""Autoencoders against the formulas of their papers, written down plainly, and their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hooklens.errors import CheckpointError, ConfigError, InputError
from hooklens.sae import SAE, SAEConfig, SAETraining

D_IN, D_SAE = 6, 11
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "not_centred": {"apply_b_dec_to_input": False},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "topk": {"architecture": "topk", "k": 3},
    "topk_rescaled": {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True},
    "rescaled": {"normalize_activations": "constant_norm_rescale"},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "transcoder": {"d_out": 5, "training": SAETraining(hook_name="a", hook_name_out="b")},
    "normed_transcoder": {"d_out": 5, "normalize_activations": "layer_norm"},
    "rescaled_transcoder": {"d_out": 5, "normalize_activations": "constant_norm_rescale"},
    "skip": {"d_out": 5, "has_skip": True, "architecture": "jumprelu"},
}


def make(kind: str) -> SAE:
    sae = SAE(SAEConfig(d_in=D_IN, d_sae=D_SAE, **KINDS[kind])).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
            if name == "threshold":
                parameter.abs_()
    return sae


def vectors() -> Tensor:
    return torch.randn(2, 4, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of one vector, latent by latent."""
    cfg = sae.cfg
    mean, scale = torch.tensor(0.0), torch.tensor(1.0)
    if cfg.normalize_activations == "constant_norm_rescale":
        scale = x.norm() / D_IN**0.5
    if cfg.normalize_activations == "layer_norm":
        mean, scale = x.mean(), ((x - x.mean()) ** 2).sum().div(D_IN - 1).sqrt()
    eps = 1e-5 if cfg.normalize_activations == "layer_norm" else 0.0
    read = (x - mean) / (scale + eps)
    if cfg.apply_b_dec_to_input and not cfg.is_transcoder:
        read = read - sae.b_dec
    acts = torch.zeros(D_SAE, dtype=torch.float64)
    for latent in range(D_SAE):
        product = (read * sae.W_enc[:, latent]).sum()
        if cfg.architecture == "gated":
            magnitude = (product * sae.r_mag[latent].exp() + sae.b_mag[latent]).clamp(min=0)
            acts[latent] = magnitude if product + sae.b_gate[latent] > 0 else 0
            continue
        pre = product + sae.b_enc[latent]
        if cfg.architecture == "jumprelu":
            acts[latent] = pre if pre > sae.threshold[latent] and pre > 0 else 0
        elif cfg.architecture == "topk":
            acts[latent] = pre * (sae.W_dec[latent].norm() if cfg.rescale_acts_by_decoder_norm else 1)
        else:
            acts[latent] = max(pre, 0)
    if cfg.architecture == "topk":
        least = acts.sort(descending=True).values[cfg.k - 1]  # type: ignore[operator]
        acts = torch.where(acts >= least, acts.clamp(min=0), 0)
    out = sae.b_dec.clone()
    for latent in range(D_SAE):
        size = acts[latent] / (sae.W_dec[latent].norm() if cfg.rescale_acts_by_decoder_norm else 1)
        out = out + size * sae.W_dec[latent]
    if not cfg.is_transcoder:
        out = out * scale + mean
    return acts, out + sae.W_skip @ x if cfg.has_skip else out


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_reconstruction(kind: str) -> None:
    sae, x = make(kind), vectors()
    acts, out = sae.encode(x), sae(x)
    assert acts.shape == (2, 4, D_SAE)
    for row in range(2):
        for place in range(4):
            expected = by_hand(sae, x[row, place])
            torch.testing.assert_close(acts[row, place], expected[0])
            torch.testing.assert_close(out[row, place], expected[1])
    assert bool((acts > 0).any())
    assert bool((acts == 0).any())
    torch.testing.assert_close(sae.decode(acts, x), out)


@pytest.mark.parametrize("kind", ["rescaled", "layer_norm", "skip"])
def test_what_latents_were_read_of_is_asked_for(kind: str) -> None:
    with pytest.raises(InputError, match="give x="):
        make(kind).decode(torch.zeros(1, D_SAE))


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_round(kind: str, tmp_path: Path) -> None:
    sae = make(kind)
    sae.save(str(tmp_path))
    again = SAE.load(str(tmp_path))
    assert again.cfg.architecture == sae.cfg.architecture
    assert torch.equal(again(vectors()), sae(vectors()))
    assert again.dtype is torch.float64


def test_what_it_was_trained_on_is_kept(tmp_path: Path) -> None:
    training = SAETraining(
        model_name="gpt2", hook_name="blocks.1.hook_resid_post", prepend_bos=True, context_size=8,
        processing=("center_writing_weights",),
    )  # fmt: skip
    SAE(SAEConfig(d_in=3, d_sae=4, training=training)).save(str(tmp_path))
    assert SAE.load(str(tmp_path)).cfg.training == training


def test_older_files_of_sae_lens(tmp_path: Path) -> None:
    """What is in `metadata` today stood beside the rest."""
    sae = make("standard")
    save_file(
        {name: one.detach().contiguous() for name, one in sae.named_parameters()},
        str(tmp_path / "sae_weights.safetensors"),
    )
    config = {
        "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "hook_name": "blocks.8.hook_resid_pre",
        "model_name": "gpt2-small", "prepend_bos": True, "context_size": 128, "apply_b_dec_to_input": True,
        "activation_fn_str": "relu", "finetuning_scaling_factor": False, "normalize_activations": "none",
        "model_from_pretrained_kwargs": {"center_writing_weights": True}, "hook_head_index": None,
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    found = SAE.load(str(tmp_path))
    assert found.cfg.training.hook_name == "blocks.8.hook_resid_pre"
    assert found.cfg.training.processing == ("center_writing_weights",)
    assert torch.equal(found(vectors()), sae(vectors()))


def test_the_architecture_of_sae_lens_says_what_a_file_holds(tmp_path: Path) -> None:
    """An autoencoder whose metadata names an output point was taken for a transcoder, and not centred."""
    sae = make("standard")
    sae.save(str(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["hook_name_out"] = "blocks.1.hook_mlp_out"
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "normalize_activations": False}))
    found = SAE.load(str(tmp_path))
    assert not found.cfg.is_transcoder
    assert torch.equal(found(vectors()), sae(vectors()))


def test_files_say_of_which_layout_they_are(tmp_path: Path) -> None:
    """SAELens takes a file without its version for one of before 6.0, and loses what it was trained on."""
    make("skip").save(str(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["metadata"]["sae_lens_version"].startswith("6.")
    assert config["architecture"] == "jumprelu_skip_transcoder"
    # It refuses a transcoder that says otherwise.
    assert config["apply_b_dec_to_input"] is False


def test_a_transcoder_that_sae_lens_lacks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SAELens has no topk transcoders"):
        SAE(SAEConfig(d_in=3, d_sae=4, d_out=5, architecture="topk", k=2)).save(str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_transcoders_of_gemma_scope(tmp_path: Path) -> None:
    """They were loaded as autoencoders of no known place."""
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_7" / "width_16k" / "average_l0_9"
    folder.mkdir(parents=True)
    weights = {name: one.detach().numpy() for name, one in make("skip").named_parameters() if name != "W_skip"}
    np.savez(folder / "params.npz", **weights)
    found = SAE.load(str(folder))
    assert found.cfg.is_transcoder
    assert found.cfg.width_out == 5
    assert found.cfg.training.hook_name == "blocks.7.ln2.hook_normalized"
    assert found.cfg.training.hook_name_out == "blocks.7.hook_mlp_out"


@pytest.mark.parametrize("kind", ["sae", "transcoder", "affine"])
def test_gemma_scope_2(kind: str, tmp_path: Path) -> None:
    sae = make({"sae": "jumprelu", "transcoder": "skip", "affine": "skip"}[kind])
    weights = {name.replace("W_", "w_"): one.detach().clone() for name, one in sae.named_parameters()}
    skip = weights.pop("w_skip", torch.zeros(0))
    if kind == "affine":
        weights["affine_skip_connection"] = skip.T.contiguous()
    save_file(weights, str(tmp_path / "params.safetensors"))
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "type": "sae",
              "hf_hook_point_in": "model.layers.5.output"}  # fmt: skip
    if kind != "sae":
        config |= {"type": "transcoder", "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
                   "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, x = SAE.load(str(tmp_path)), vectors()
    pre = x @ sae.W_enc + sae.b_enc
    expected = pre.relu() * (pre > sae.threshold) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(found(x), expected + x @ skip.T if kind == "affine" else expected)
    trained = found.cfg.training
    assert trained.hook_name == ("blocks.5.hook_resid_post" if kind == "sae" else None)
    assert trained.hook_name_out == (None if kind == "sae" else "blocks.5.hook_mlp_out")


def test_cross_layer_ones_of_gemma_scope_2_are_refused(tmp_path: Path) -> None:
    weights = {"w_enc": torch.zeros(2, 3), "w_dec": torch.zeros(3, 4, 2)}
    save_file(weights, str(tmp_path / "params.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "jump_relu"}))
    with pytest.raises(ConfigError, match="several layers at once"):
        SAE.load(str(tmp_path))


def test_gemma_scope(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    sae = make("jumprelu")
    np.savez(folder / "params.npz", **{name: one.detach().numpy() for name, one in sae.named_parameters()})
    found = SAE.load(str(tmp_path / "gemma-scope-2b-pt-res"), subfolder="layer_20/width_16k/average_l0_71")
    assert found.cfg.training.hook_name == "blocks.20.hook_resid_post"
    x = vectors()
    pre = x @ sae.W_enc + sae.b_enc
    acts = pre.relu() * (pre > sae.threshold)
    torch.testing.assert_close(found(x), acts @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("kind", ["relu", "new", "gated", "jumprelu", "topk", "batch_topk"])
def test_dictionary_learning(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, E, D, b, b_enc = vectors(), draw(D_SAE, D_IN), draw(D_IN, D_SAE), draw(D_IN), draw(D_SAE)
    maps = {"encoder.weight": E, "decoder.weight": D}
    pre = (x - b) @ E.T + b_enc
    trainer: dict[str, Any] = {"submodule_name": "resid_post_layer_3", "lm_name": "tiny"}
    if kind == "relu":
        state, acts = {**maps, "encoder.bias": b_enc, "bias": b}, pre.relu()
    elif kind == "new":
        state, acts = {**maps, "encoder.bias": b_enc, "decoder.bias": b}, (x @ E.T + b_enc).relu()
    elif kind == "gated":
        r_mag, gate, magnitude = draw(D_SAE), draw(D_SAE), draw(D_SAE)
        state = {**maps, "decoder_bias": b, "r_mag": r_mag, "gate_bias": gate, "mag_bias": magnitude}
        product = (x - b) @ E.T
        acts = (product * r_mag.exp() + magnitude).relu() * (product + gate > 0)
    elif kind == "jumprelu":
        threshold = draw(D_SAE).abs()
        state = {
            "W_enc": E.T.contiguous(),
            "W_dec": D.T.contiguous(),
            "b_enc": b_enc,
            "b_dec": b,
            "threshold": threshold,
        }
        plain = x @ E.T + b_enc
        acts = plain * (plain > threshold)
    elif kind == "topk":
        state = {**maps, "encoder.bias": b_enc, "b_dec": b, "k": torch.tensor(2), "threshold": torch.tensor(-1.0)}
        best = pre.relu().topk(2)
        acts = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    else:
        state = {**maps, "encoder.bias": b_enc, "b_dec": b, "k": torch.tensor(2), "threshold": torch.tensor(0.9)}
        trainer["dict_class"] = "BatchTopKSAE"
        acts = pre.relu() * (pre > 0.9)
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    found = SAE.load(str(tmp_path))
    assert found.cfg.training.hook_name == "blocks.3.hook_resid_post"
    torch.testing.assert_close(found.encode(x), acts)
    torch.testing.assert_close(found(x), acts @ D.T + b)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        SAE.load(str(tmp_path / "none"))
    (tmp_path / "layer_1").mkdir()
    with pytest.raises(CheckpointError, match="its folders are 'layer_1'"):
        SAE.load(str(tmp_path))
    make("standard").save(str(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "architecture": "matching_pursuit"}))
    with pytest.raises(ConfigError, match="'matching_pursuit' is not implemented; known are standard"):
        SAE.load(str(tmp_path))
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "d_sae": 12}))
    with pytest.raises(CheckpointError, match=r"W_enc is \[6, 11\], expected \[6, 12\]"):
        SAE.load(str(tmp_path))


def test_configs_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"d_in is 0.*architecture is 'relu'.*k is 3"):
        SAEConfig(d_in=0, d_sae=4, architecture="relu", k=3)
    with pytest.raises(ConfigError, match="only a transcoder"):
        SAEConfig(d_in=3, d_sae=4, has_skip=True)


def test_it_trains() -> None:
    sae, x = make("jumprelu"), vectors()
    (sae(x) - x).pow(2).mean().backward()
    assert sae.W_dec.grad is not None
    assert bool(sae.W_enc.grad.any())  # type: ignore[union-attr]
