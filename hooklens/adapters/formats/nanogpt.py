"""nanoGPT's `ckpt.pt` (Karpathy 2022): `{"model": state dict, "model_args": sizes}`, with the optimiser's state beside.

GPT-2's network with its names, but all linear maps lie as `[out, in]`, names begin with `_orig_mod.` where the model
was compiled, and `bias=False` leaves out the biases of maps and norms. The MLP's GELU is the exact one, as in the code
since June 2023; a file does not tell whether it was trained before, with the tanh approximation.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from hooklens.adapters.conversion import HubModel, MemoryTensors
from hooklens.adapters.family import Family
from hooklens.adapters.files.disk import is_state, load_pickle
from hooklens.adapters.formats.place import Place
from hooklens.adapters.keys import Computed, ConfigMap, ConfigReader, FixedPositionKeys, Key
from hooklens.adapters.tables import BLOCK, decoder_rules, fused_qkv_rules, mlp_rules, norm_rules, out_rules
from hooklens.config import HookedConfig, LearnedPositions, NormConfig
from hooklens.errors import CheckpointError, join_names

_NAME = "ckpt.pt"
_LAYER = "transformer.h.{i}"


def _read_biases(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    bias = reader.get("bias", bool, True)
    flags = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), bias)
    return {**flags, "norm": NormConfig(kind="layer", eps=1e-5, bias=bias)}


def _write_biases(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"bias": fields["qkv_bias"]}


@lru_cache(maxsize=1)
def _family() -> Family:
    """Its config map and weight map. It is not among the supported families: nothing is written so."""
    return Family(
        name="nanogpt",
        model_types=("nanogpt",),
        architectures=("GPT",),
        base_prefix="transformer.",
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        config=ConfigMap(
            parts=(
                Key("vocab_size", "d_vocab", int),
                Key("n_embd", "d_model", int),
                Key("n_layer", "n_layers", int),
                Key("n_head", "n_heads", int),
                FixedPositionKeys(positions=LearnedPositions(), n_ctx="block_size", default_n_ctx=1024),
                Computed(("bias",), _read_biases, _write_biases),
            ),
            fixed={"act_fn": "gelu", "tied_unembed": True},
            inert=("dropout",),
            called="model_args",
        ),
        weights=decoder_rules(
            (
                *norm_rules(f"{_LAYER}.ln_1", f"{BLOCK}.ln1"),
                *fused_qkv_rules(f"{_LAYER}.attn.c_attn", order="blocked"),
                *out_rules(f"{_LAYER}.attn.c_proj"),
                *norm_rules(f"{_LAYER}.ln_2", f"{BLOCK}.ln2"),
                *mlp_rules(f"{_LAYER}.mlp", up="c_fc", down="c_proj"),
            ),
            embed="transformer.wte",
            pos_embed="transformer.wpe",
            final_norm="transformer.ln_f",
        ),
        weightless=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    )


class NanoGpt:
    """One file of nanoGPT.

    Args:
        place: the folder that it lies in.
        file: its name.
        model_args: its sizes.
        state: its tensors.
    """

    def __init__(self, place: Place, file: str, model_args: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        self._place, self._file, self._args, self._state = place, file, dict(model_args), state

    @property
    def place(self) -> Place:
        """The folder that the file lies in."""
        return self._place

    @property
    def names(self) -> Collection[str]:
        """The file."""
        return [self._file]

    @property
    def _where(self) -> str:
        return f"{self._place.where}/{self._file}"

    def read_network(self) -> HookedConfig:
        """The network that `model_args` describes.

        Raises:
            UnsupportedModelError: values that are missing or of another kind.
        """
        return _family().read_config(self._args, where=self._where)

    def open(self) -> HubModel:
        """The tensors, held against the network.

        Raises:
            CheckpointError: they are not those of this network.
        """
        return open_tensors(self._args, self._state, where=self._where)


def open_tensors(model_args: Mapping[str, Any], state: Mapping[str, Tensor], *, where: str) -> HubModel:
    """The tensors of a file, held against the network.

    Args:
        model_args: its sizes.
        state: its tensors.
        where: what texts of errors call it.

    Raises:
        CheckpointError: they are not those of this network.
        UnsupportedModelError: sizes that are missing or of another kind.
    """
    return HubModel(model_args, MemoryTensors(state), where=where, family=_family())


def find(place: Place, file: str | None) -> NanoGpt | None:
    """The checkpoint of a file, or of the `ckpt.pt` in a folder without `config.json`.

    Raises:
        CheckpointError: the file is no checkpoint of nanoGPT's, or damaged.
    """
    if file is None:
        names = place.names()
        if "config.json" in names or _NAME not in names:
            return None
        file = _NAME
    content = load_pickle(place.fetch([file]) / file)
    model_args = content.get("model_args") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not isinstance(model_args, Mapping) or not is_state(content.get("model")):
        found = join_names(sorted(map(str, content))[:20]) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{place.where}/{file}: is in none of the formats that one file can be in; expected nanoGPT's {{'model': "
            "tensors, 'model_args': sizes}, or a .pth file with TransformerLens's config.json or Meta's params.json "
            f"beside it, found {found or 'nothing'}"
        )
    return NanoGpt(place, file, model_args, content["model"])
