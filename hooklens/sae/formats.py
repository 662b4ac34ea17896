"""The files of autoencoders: SAELens's, Gemma Scope's and dictionary_learning's.

SAELens: `cfg.json` and `sae_weights.safetensors`. Peculiarities: what an autoencoder was trained on stands in
`metadata`, in older files beside the rest; batch top-k and Matryoshka ones are saved as JumpReLU; `hook_z` is read with
its heads beside each other.

Gemma Scope (Lieberum et al. 2024): `params.npz`; its folder says the layer and the point. JumpReLU, `b_dec` is not
subtracted from what is read. Transcoders read the MLP's normed input before the norm's weight.

Gemma Scope 2: `config.json`, which names modules of transformers, and `params.safetensors`. Its transcoders read the
norm's output behind its weight, which is no hook point.

dictionary_learning (Marks et al. 2024): `ae.pt` and `config.json`, linear maps as `[out, in]`. Batch top-k with a
threshold is JumpReLU with one threshold for all.
"""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooklens.errors import CheckpointError, ConfigError, join_names
from hooklens.optional import import_package
from hooklens.sae.config import SAEConfig, SAETraining

State = dict[str, Tensor]

_ARCHITECTURES = {
    "standard": "standard",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_STEPS = (
    "fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices",
)  # fmt: skip
_SCOPE_POINTS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z",
                 "transcoders": "ln2.hook_normalized"}  # fmt: skip
_SCOPE_2_POINTS = {
    "output": "hook_resid_post",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "post_attention_layernorm.output": "hook_attn_out",
    "self_attn.o_proj.input": "attn.hook_z",
}
_MODULES = {"resid_post": "hook_resid_post", "resid": "hook_resid_post", "mlp_out": "hook_mlp_out",
            "mlp": "hook_mlp_out", "attention_out": "hook_attn_out", "attn_out": "hook_attn_out",
            "attn": "hook_attn_out"}  # fmt: skip


class _Folder:
    """The files of a folder: on disk, on the hub, or behind a URL."""

    def __init__(
        self,
        source: str,
        subfolder: str | None,
        revision: str | None,
        token: str | None,
        options: Mapping[str, Any] | None,
    ) -> None:
        url, keywords = str(source), dict(options or {})
        if not Path(url).expanduser().exists() and "://" not in url and re.fullmatch(r"[\w.-]+/[\w.-]+", url):
            url = f"hf://{url}" if revision is None else f"hf://{url}@{revision}"
            keywords |= {} if token is None else {"token": token}
        self.where = url.rstrip("/") + ("" if subfolder is None else f"/{subfolder.strip('/')}")
        self._system, self._path = import_package("fsspec").core.url_to_fs(self.where, **keywords)

    def names(self) -> list[str]:
        """The names of its files."""
        try:
            found = self._system.ls(self._path, detail=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(
                f"{self.where}: there is no such folder; expected one with an autoencoder's files (on the hub: "
                "owner/name and subfolder=)"
            ) from error
        return [str(name).rstrip("/").rpartition("/")[2] for name in found]

    def read(self, name: str) -> bytes:
        """The content of a file."""
        content: bytes = self._system.cat_file(f"{self._path}/{name}")
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            CheckpointError: it is none.
        """
        try:
            values = json.loads(self.read(name))
        except ValueError as error:
            raise CheckpointError(f"{self.where}/{name}: no JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.where}/{name}: holds {type(values).__name__}; expected a JSON object")
        return values


def open_sae(
    source: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[SAEConfig, State]:
    """The config and the weights of an autoencoder, by the names of `SAE`.

    Raises:
        CheckpointError: the files are not there, are damaged, or in no known format.
        ConfigError: a kind that is not implemented.
    """
    folder = _Folder(source, subfolder, revision, token, storage_options)
    names = folder.names()
    if "cfg.json" in names and "sae_weights.safetensors" in names:
        return _open_sae_lens(folder)
    if "params.npz" in names:
        return _open_gemma_scope(folder)
    if "params.safetensors" in names and "config.json" in names:
        return _open_second_gemma_scope(folder)
    if "ae.pt" in names:
        return _open_dictionary(folder, names)
    below = [name for name in names if "." not in name]
    hint = f"; its folders are {join_names(below, limit=5)}: name one as subfolder=" if below else ""
    raise CheckpointError(
        f"{folder.where}: holds {join_names(names, limit=6) or 'nothing'}; expected cfg.json and "
        f"sae_weights.safetensors (SAELens), params.npz (Gemma Scope), config.json and params.safetensors "
        f"(Gemma Scope 2), or ae.pt and config.json (dictionary_learning){hint}"
    )


def _open_sae_lens(folder: _Folder) -> tuple[SAEConfig, State]:
    state = _load_safetensors(folder, "sae_weights.safetensors")
    given = folder.read_json("cfg.json")
    cfg = _read_sae_lens(given, folder.where)
    scale = state.pop("scaling_factor", None)
    if scale is not None and not bool((scale == 1).all()):
        raise ConfigError(f"{folder.where}: latents are scaled (scaling_factor), which is not implemented")
    return cfg, state


def _read_sae_lens(given: Mapping[str, Any], where: str) -> SAEConfig:
    said = {**given, **(given.get("metadata") or {})}
    kind = given.get("architecture", "standard")
    k = given.get("k") or (given.get("activation_fn_kwargs") or {}).get("k")
    is_topk = kind == "topk" or given.get("activation_fn_str", given.get("activation_fn")) == "topk"
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"{where}/cfg.json: architecture {kind!r} is not implemented; known are {', '.join(_ARCHITECTURES)}"
        )
    norm = given.get("normalize_activations") or "none"
    # Before there were several kinds it was yes or no.
    norm = "expected_average_only_in" if norm is True else norm
    steps = said.get("model_from_pretrained_kwargs")
    is_transcoder = "transcoder" in kind
    training = SAETraining(
        model_name=said.get("model_name"),
        hook_name=said.get("hook_name", said.get("hook_point")),
        # The architecture says whether it writes elsewhere.
        hook_name_out=said.get("hook_name_out") if is_transcoder else None,
        head=said.get("hook_head_index", said.get("hook_point_head_index")),
        prepend_bos=said.get("prepend_bos"),
        context_size=said.get("context_size"),
        processing=None if steps is None else tuple(step for step in _STEPS if steps.get(step)),
    )
    return SAEConfig(
        d_in=given["d_in"],
        d_sae=given["d_sae"],
        d_out=given.get("d_out") if is_transcoder else None,
        architecture="topk" if is_topk else _ARCHITECTURES[kind],
        k=k if is_topk else None,
        apply_b_dec_to_input=bool(given.get("apply_b_dec_to_input", True)) and not is_transcoder,
        normalize_activations=norm,
        rescale_acts_by_decoder_norm=bool(given.get("rescale_acts_by_decoder_norm", False)) and is_topk,
        has_skip="skip" in kind,
        training=training,
    )


def _open_gemma_scope(folder: _Folder) -> tuple[SAEConfig, State]:
    with import_package("numpy").load(io.BytesIO(folder.read("params.npz"))) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    layer = re.search(r"layer_(\d+)", folder.where)
    kind = re.search(r"-(res|mlp|att|transcoders)(?:$|[-/@])", folder.where)
    is_transcoder = kind is not None and kind[1] == "transcoders"
    name, name_out = None, None
    if layer and kind:
        name = f"blocks.{layer[1]}.{_SCOPE_POINTS[kind[1]]}"
        name_out = f"blocks.{layer[1]}.hook_mlp_out" if is_transcoder else None
    elif kind and kind[1] == "res" and "/embedding/" in folder.where:
        name = "hook_embed"
    (d_in, d_sae), d_out = state["W_enc"].shape, state["W_dec"].shape[-1]
    cfg = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out if is_transcoder else None,
        architecture="jumprelu",
        apply_b_dec_to_input=False,
        training=SAETraining(hook_name=name, hook_name_out=name_out, prepend_bos=True),
    )
    return cfg, state


def _open_second_gemma_scope(folder: _Folder) -> tuple[SAEConfig, State]:
    given = folder.read_json("config.json")
    if given.get("architecture") != "jump_relu":
        raise ConfigError(
            f"{folder.where}/config.json: architecture {given.get('architecture')!r} is not implemented; Gemma Scope 2 "
            "has 'jump_relu'"
        )
    stored = _load_safetensors(folder, "params.safetensors")
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    state = {names.get(name, name): one for name, one in stored.items() if name != "affine_skip_connection"}
    if missing := sorted({"W_enc", "W_dec"} - state.keys()):
        raise CheckpointError(f"{folder.where}/params.safetensors: {join_names(missing)} are missing")
    if state["W_enc"].ndim != 2 or state["W_dec"].ndim != 2:
        raise ConfigError(f"{folder.where}: it reads or gives several layers at once, which is not implemented")
    if "affine_skip_connection" in stored:
        # It stands as [in, out].
        state["W_skip"] = stored["affine_skip_connection"].T
    (d_in, d_sae), d_out = state["W_enc"].shape, state["W_dec"].shape[-1]
    is_transcoder = given.get("type") == "transcoder"
    training = SAETraining(
        model_name=given.get("model_name"),
        hook_name=_read_module(given.get("hf_hook_point_in")),
        hook_name_out=_read_module(given.get("hf_hook_point_out")) if is_transcoder else None,
        prepend_bos=True,
    )
    cfg = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out if is_transcoder else None,
        architecture="jumprelu",
        apply_b_dec_to_input=False,
        has_skip="W_skip" in state,
        training=training,
    )
    return cfg, state


def _read_module(name: str | None) -> str | None:
    """The hook point at a module's output or input; None where there is none, as behind a norm's weight."""
    found = re.search(r"layers\.(\d+)\.(.+)$", name or "")
    point = _SCOPE_2_POINTS.get(found[2]) if found else None
    return f"blocks.{found[1]}.{point}" if found and point else None


def _load_safetensors(folder: _Folder, name: str) -> State:
    try:
        state: State = import_package("safetensors.torch").load(folder.read(name))
    except Exception as error:
        raise CheckpointError(f"{folder.where}/{name}: cannot be read: {error}") from error
    return state


def _open_dictionary(folder: _Folder, names: list[str]) -> tuple[SAEConfig, State]:
    try:
        stored = torch.load(io.BytesIO(folder.read("ae.pt")), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder.where}/ae.pt: cannot be read as plain tensors: {error}") from error
    trainer = folder.read_json("config.json").get("trainer", {}) if "config.json" in names else {}
    found = re.match(r"(.+?)_layer_(\d+)$", str(trainer.get("submodule_name", "")))
    point = _MODULES.get(found[1]) if found else None
    training = SAETraining(
        model_name=trainer.get("lm_name"), hook_name=f"blocks.{found[2]}.{point}" if found and point else None
    )
    if "W_enc" in stored:
        state = dict(stored)
        d_in, d_sae = state["W_enc"].shape
        cfg = SAEConfig(d_in=d_in, d_sae=d_sae, architecture="jumprelu", apply_b_dec_to_input=False, training=training)
        return cfg, state
    state = {"W_enc": stored["encoder.weight"].T, "W_dec": stored["decoder.weight"].T}
    d_in, d_sae = state["W_enc"].shape
    more: dict[str, Any] = {}
    if "r_mag" in stored:
        state |= {"r_mag": stored["r_mag"], "b_gate": stored["gate_bias"], "b_mag": stored["mag_bias"]}
        state["b_dec"], more = stored["decoder_bias"], {"architecture": "gated"}
    else:
        state["b_enc"] = stored["encoder.bias"]
        bias = next((stored[name] for name in ("bias", "b_dec", "decoder.bias") if name in stored), None)
        state["b_dec"] = state["W_enc"].new_zeros(d_in) if bias is None else bias
        more = {"apply_b_dec_to_input": "decoder.bias" not in stored}
        if "k" in stored and "BatchTopK" in str(trainer.get("dict_class", trainer.get("trainer_class", ""))):
            state["threshold"] = stored["threshold"].to(state["b_enc"]).expand(d_sae)
            more["architecture"] = "jumprelu"
        elif "k" in stored:
            more |= {"architecture": "topk", "k": int(stored["k"])}
    return SAEConfig(d_in=d_in, d_sae=d_sae, training=training, **more), state


def write_sae(folder: str, cfg: SAEConfig, state: State) -> None:
    """Write an autoencoder as SAELens reads it.

    Raises:
        ConfigError: SAELens has none of this kind.
    """
    trained, kind = cfg.training, cfg.architecture
    if cfg.is_transcoder:
        if kind not in ("standard", "jumprelu"):
            raise ConfigError(f"save: SAELens has no {kind} transcoders; it reads standard and jumprelu ones")
        kind = {"standard": "", "jumprelu": "jumprelu_"}[kind] + ("skip_" if cfg.has_skip else "") + "transcoder"
    metadata = {
        # Of the layout: without it SAELens takes the file for an older one, and does not read what stands here.
        "sae_lens_version": "6.0.0",
        "model_name": trained.model_name,
        "hook_name": trained.hook_name,
        "hook_name_out": trained.hook_name_out,
        "hook_head_index": trained.head,
        "prepend_bos": trained.prepend_bos,
        "context_size": trained.context_size,
        "model_from_pretrained_kwargs": None if trained.processing is None else dict.fromkeys(trained.processing, True),
    }
    reads_heads = (trained.hook_name or "").endswith("hook_z") and trained.head is None
    values: dict[str, Any] = {
        "architecture": kind,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": str(state["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input and not cfg.is_transcoder,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": "hook_z" if reads_heads else "none",
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }
    if cfg.architecture == "topk":
        values |= {"k": cfg.k, "rescale_acts_by_decoder_norm": cfg.rescale_acts_by_decoder_norm}
    if cfg.is_transcoder:
        values["d_out"] = cfg.width_out
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    save = import_package("safetensors.torch").save_file
    save({name: one.contiguous().cpu() for name, one in state.items()}, str(place / "sae_weights.safetensors"))
    (place / "cfg.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
