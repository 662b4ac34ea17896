"""TransformerLens's own checkpoints (Nanda and Bloom 2022): `config.json` in its words, and a `.pth` state dict.

The toy models of the field are such: attention-only and SoLU models of one to twelve layers. Names and shapes of
weights are those of HookLens, the field's. Peculiarities:

- `normalization` (older) or `normalization_type`: LayerNorm or RMSNorm; `...Pre` has neither weight nor bias, since
  they were folded into the maps behind it. `final_rms` makes the last norm an RMSNorm. eps is 1e-5 where it is not
  given.
- Every map has a bias; files of before a bias was added to the library lack it, and it is 0.
- `shortformer_pos`: positions go to what queries and keys read.
- Masks and rotary tables are buffers, and no weights.
- The first files have other layouts; see `early_layouts`.
- Settings of the training run stand in the same file; they are not read.
- Where weights of earlier in training are there, they are in the folder `checkpoints`, and their names end with the
  number of steps or tokens.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from hooklens.adapters.files.disk import load_state, read_json
from hooklens.adapters.formats.early_layouts import in_todays_layout
from hooklens.adapters.formats.opened import FieldModel
from hooklens.adapters.formats.place import EARLIER, Place
from hooklens.adapters.keys import ConfigReader
from hooklens.config import (
    HookedConfig,
    LearnedPositions,
    NormConfig,
    ShortformerPositions,
)
from hooklens.errors import CheckpointError, ConfigError, UnsupportedModelError, join_names
from hooklens.weights.names import bare_names

_CONFIG = "config.json"
_NEEDED = ("d_model", "n_layers", "n_heads", "d_vocab", "n_ctx", "act_fn")
_BUFFERS = r"blocks\.\d+\.attn\.(mask|IGNORE|rotary_sin|rotary_cos)"
_SHARED_HEADS = r"\.attn\._([Wb]_[KV])$"
_NORMS = ("LN", "LNPre", "RMS", "RMSPre")
_ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "silu": "silu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "solu": "solu", "solu_ln": "solu_ln",
}  # fmt: skip
# Settings that change the network, with the values that leave it as it is.
_PINNED: Mapping[str, Any] = {
    "use_local_attn": False,
    "num_experts": None,
    "gated_mlp": False,
    "scale_attn_by_inverse_layer_idx": False,
    "use_qk_norm": False,
    "post_embedding_ln": False,
    "use_normalization_before_and_after": False,
    "use_NTK_by_parts_rope": False,
    "attn_scores_soft_cap": None,
    "output_logits_soft_cap": None,
}
# The flags of biases, by the biases that they give.
_BIASES = {
    "q_bias": "b_Q", "k_bias": "b_K", "v_bias": "b_V", "out_bias": "b_O", "mlp_in_bias": "b_in",
    "mlp_out_bias": "b_out", "unembed_bias": "b_U",
}  # fmt: skip


class TransformerLensModel:
    """One state dict of TransformerLens's.

    Args:
        place: the folder that holds `config.json`.
        weights: name of the `.pth` file.
    """

    def __init__(self, place: Place, weights: str) -> None:
        self._place, self._weights = place, weights

    @property
    def place(self) -> Place:
        """The folder that holds `config.json`."""
        return self._place

    @property
    def names(self) -> Collection[str]:
        """`config.json` and the file of weights."""
        return [_CONFIG, self._weights]

    def read_network(self) -> HookedConfig:
        """The network that `config.json` describes, with all biases.

        Raises:
            UnsupportedModelError: values that are missing, of another kind, or not implemented; all are listed.
        """
        where = f"{self._place.where}/{_CONFIG}"
        # -1 is its word for what is not given.
        config = {key: value for key, value in _read(self._place).items() if value not in (-1, -1.0)}
        reader = ConfigReader(config)
        fields = _read_fields(reader)
        for setting, harmless in _PINNED.items():
            if config.get(setting) not in (None, harmless):
                reader.reject(setting, f"{harmless!r}, or nothing")
        if not reader.problems:
            try:
                return HookedConfig(**fields)
            except ConfigError as error:
                reader.problems.append(str(error))
        raise UnsupportedModelError(
            f"{where}: describes a network that HookLens cannot build: {'; '.join(reader.problems)}"
        )

    def open(self) -> FieldModel:
        """The tensors, held against the network.

        Raises:
            CheckpointError: they are not those of this network.
        """
        cfg = self.read_network()
        stored = load_state(self._place.fetch([self._weights]) / self._weights)
        state = in_todays_layout(_rename(stored), n_heads=cfg.n_heads, n_layers=cfg.n_layers)
        where = f"{self._place.where}/{self._weights}"
        return FieldModel(_without_absent_biases(cfg, state), state, where=where)


def _read(place: Place) -> dict[str, Any]:
    return read_json(place.fetch([_CONFIG]) / _CONFIG)


def _read_fields(reader: ConfigReader) -> dict[str, Any]:
    """The fields of `HookedConfig`; what is wrong goes into the reader's problems."""
    sizes = {key: reader.get(key, int) for key in _NEEDED if key != "act_fn"}
    optional = {"d_head": "d_head", "d_mlp": "d_mlp", "n_key_value_heads": "n_kv_heads", "d_vocab_out": "d_vocab_out"}
    sizes |= {name: size for key, name in optional.items() if (size := reader.get(key, int, None)) is not None}
    key = "normalization" if reader.has("normalization") else "normalization_type"
    kind = reader.get(key, str, None)
    if kind is not None and kind not in _NORMS:
        reader.reject(key, f"one of {', '.join(map(repr, _NORMS))}, or null")
    act_fn = reader.get("act_fn", str, "relu")
    if act_fn not in _ACTIVATIONS:
        reader.reject("act_fn", f"one of {', '.join(map(repr, _ACTIVATIONS))}")
    eps = reader.get("eps", float, 1e-5)
    norm = _norm(kind, eps)
    final_rms = reader.get("final_rms", bool, False) and norm is not None
    direction = reader.get("attention_dir", str, "causal")
    if direction not in {"causal", "bidirectional"}:
        reader.reject("attention_dir", "'causal' or 'bidirectional'")
    scale = reader.get("attn_scale", float, None)
    is_scaled = reader.get("use_attn_scale", bool, True)
    return {
        **sizes,
        "attn_only": reader.get("attn_only", bool, False),
        "act_fn": _ACTIVATIONS.get(act_fn, "relu"),
        # The norm behind SoLU is a LayerNorm whatever the others are.
        "act_norm": _norm("LN" if kind == "LN" else "LNPre", eps) if act_fn == "solu_ln" else None,
        "causal": direction == "causal",
        "wiring": "parallel" if reader.get("parallel_attn_mlp", bool, False) else "sequential",
        "norm": norm,
        "final_norm": _norm("RMSPre" if kind in {"LNPre", "RMSPre"} else "RMS", eps) if final_rms else norm,
        "positions": _read_positions(reader),
        "attn_scale": 1.0 if not is_scaled else 1.0 / scale if scale else None,
        "unembed_bias": True,
    }


def _norm(kind: str | None, eps: float) -> NormConfig | None:
    if kind is None:
        return None
    has_weight = not kind.endswith("Pre")
    if kind.startswith("RMS"):
        return NormConfig(kind="rms", eps=eps, weight=has_weight, bias=False)
    return NormConfig(kind="layer", eps=eps, weight=has_weight, bias=has_weight)


def _read_positions(reader: ConfigReader) -> Any:
    kind = reader.get("positional_embedding_type", str, "standard")
    if reader.get("shortformer_pos", bool, False):
        kind = "shortformer"
    if kind not in {"standard", "shortformer"}:
        reader.reject("positional_embedding_type", "'standard' or 'shortformer'")
    return ShortformerPositions() if kind == "shortformer" else LearnedPositions()


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under HookLens names, without buffers."""
    bare = bare_names(state)
    return {
        re.sub(_SHARED_HEADS, r".attn.\1", bare[name]): tensor
        for name, tensor in state.items()
        if not re.fullmatch(_BUFFERS, bare[name])
    }


def _without_absent_biases(cfg: HookedConfig, state: Mapping[str, Tensor]) -> HookedConfig:
    """The network without the biases that no layer has in the file: they are 0."""
    declared, present = ({name.rpartition(".")[2] for name in names} for names in (cfg.description.weights, state))
    changes = {field: False for field, bias in _BIASES.items() if bias in declared - present}
    return cfg.replace(**changes) if changes else cfg


def find(
    place: Place, file: str | None, variant: str | None, *, above: Callable[[], Place] | None = None
) -> TransformerLensModel | None:
    """The checkpoint of a `.pth` file, or the last one in a folder, where `config.json` is in its words.

    Args:
        place: the folder.
        file: name of the file; None: the last one, or that of the variant.
        variant: what the name ends with: `"final"`, or the number of steps or tokens.
        above: gives the folder that this one lies in, where its `config.json` is that of the file.

    Raises:
        CheckpointError: there is no such file, or there are several of which none is the final one.
    """
    if _CONFIG not in place.names():
        # Weights of earlier in training lie below the config.
        return None if above is None else find(above(), f"{EARLIER}/{file}", variant)
    config = _read(place)
    if any(key in config for key in ("model_type", "architectures")) or not all(key in config for key in _NEEDED):
        return None
    return TransformerLensModel(place, _choose(place, variant) if file is None else file)


def _choose(place: Place, variant: str | None) -> str:
    """The name of the file that holds the weights."""
    every = sorted(name for name in place.names() if name.endswith(".pth"))
    beside = [name for name in every if "/" not in name]
    if variant is not None:
        found = [name for name in every if _is_of(variant, name)]
        expected = f"one .pth file whose name ends with {variant!r}. Give another variant, or the file itself"
    else:
        finals = [[name for name in names if name.endswith("final.pth")] for names in (beside, every)]
        found = finals[0] or beside or finals[1]
        expected = (
            "one .pth file, or one that ends with 'final.pth'. Give the file itself, or what it ends with as variant"
        )
    if len(found) != 1:
        raise CheckpointError(
            f"{place.where}: holds TransformerLens's config.json and {join_names(every) or 'no .pth'}; expected "
            f"{expected}"
        )
    return found[0]


def _is_of(variant: str, name: str) -> bool:
    """Whether a file's name ends with a variant; numbers may have zeros in front."""
    last = name.rpartition("/")[2].removesuffix(".pth").rpartition("_")[2]
    return last == variant or (last.isdecimal() and variant.isdecimal() and int(last) == int(variant))
