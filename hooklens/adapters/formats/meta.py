"""Meta's own files of Llama 2 and 3: `params.json` and `consolidated.00.pth`, `consolidated.01.pth`, ...

Peculiarities:
- Queries and keys pair neighbouring entries in the rotation; their rows are put into the order of the hub's files,
  which pair entries of the two halves.
- Of several files each holds a part of every map ("model parallel"): rows of maps into heads and neurons and of the
  unembedding, columns of maps out of them; of the embedding columns (Llama 2) or rows (Llama 3). Norms are in all.
- The MLP's width is two thirds of `4 dim`, times `ffn_dim_multiplier`, rounded up to a multiple of `multiple_of`.
- The context length stands nowhere: 4096 for Llama 2, 8192 for Llama 3, 131072 where frequencies are stretched
  (Llama 3.1 and later), 16384 where the base is neither's (Code Llama). It changes no number; `n_ctx=` sets another.
- `use_scaled_rope` says that frequencies are stretched and not how far: `rope_scaling_factor`, or, as in the published
  `config.json` files, 32 for the sizes of Llama 3.2 (`dim` 2048 and 3072) and 8 for others.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hooklens.adapters.choice import find_family
from hooklens.adapters.conversion import HubModel
from hooklens.adapters.families import load_families
from hooklens.adapters.files.disk import TensorHeader, header_of, load_state, read_json
from hooklens.adapters.formats.place import Place
from hooklens.adapters.keys import ConfigReader
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, UnsupportedModelError, join_names

_PARAMS = "params.json"
_FILES = r"consolidated\.\d+\.pth"
_BASE, _BASE_LLAMA3 = 10000.0, 500000.0
_SIZES_LLAMA32 = (2048, 3072)
# Names, and the axis along which the files hold parts; None: all hold the whole.
_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
_WEIGHTLESS = ("rope.freqs",)
_LAYER = r"layers\.(\d+)\.(.+)\.weight"


class MetaTensors:
    """The tensors of Meta's files under the hub's names and in its order of rows, put together one by one.

    Args:
        states: the tensors of each file, in order.
        config: the network in the hub's words.
        where: what to call the place in texts of errors.

    Raises:
        CheckpointError: the files hold other tensors than each other.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]], config: Mapping[str, Any], *, where: str) -> None:
        self._states, self._config = states, config
        names = {name for state in states for name in state}
        lacking = sorted(name for name in names if not all(name in state for state in states))
        if lacking:
            raise CheckpointError(
                f"{where}: tensors that only some of the {len(states)} files hold: {join_names(lacking)}. Download all "
                "of them again"
            )
        self._names = {_hub_name(name): name for name in states[0] if name not in _WEIGHTLESS}

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._names.keys()

    def header(self, name: str) -> TensorHeader:
        """The dtype and shape of a tensor."""
        stored = self._names[name]
        first = header_of(self._states[0][stored])
        axis = self._axis(stored)
        if axis is None or not first.shape:
            return first
        size = sum(state[stored].shape[axis] for state in self._states if state[stored].ndim > axis)
        return TensorHeader(first.dtype, (*first.shape[:axis], size, *first.shape[axis + 1 :]))

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor, in memory of its own where it had to be put together or its rows into another order."""
        stored = self._names[name]
        parts = [state[stored].detach() for state in self._states]
        axis = self._axis(stored)
        whole = parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, dim=axis)
        heads = {"attention.wq.weight": "num_attention_heads", "attention.wk.weight": "num_key_value_heads"}
        rotated = next((key for ending, key in heads.items() if stored.endswith(ending)), None)
        if rotated is None:
            return whole
        # Pair i of a head is rows 2i and 2i + 1 there, i and i + d_head / 2 here.
        return rearrange(whole, "(n i two) m -> (n two i) m", n=self._config[rotated], two=2)

    def _axis(self, stored: str) -> int | None:
        """The axis along which the files hold parts of a tensor."""
        if stored.endswith("norm.weight"):
            return None
        if stored == "tok_embeddings.weight":
            shape = self._states[0][stored].shape
            return 0 if len(shape) == 2 and shape[1] == self._config["hidden_size"] else 1
        return 1 if stored.endswith(_BY_COLUMNS) else 0


class MetaLlama:
    """A folder of Meta's.

    Args:
        place: which.
        weights: names of the files of weights, in order.
    """

    def __init__(self, place: Place, weights: Sequence[str]) -> None:
        self._place, self._weights = place, weights

    @property
    def place(self) -> Place:
        """The folder."""
        return self._place

    @property
    def names(self) -> Collection[str]:
        """`params.json` and the files of weights."""
        return [_PARAMS, *self._weights]

    def read_network(self) -> HookedConfig:
        """The network that `params.json` describes; the vocabulary's size may stand in the weights alone.

        Raises:
            UnsupportedModelError: values that are missing, of another kind, or not implemented.
        """
        config = self._read_config()[0]
        return find_family(config, load_families(), where=self._place.where).read_config(config, where=self._where)

    def open(self) -> HubModel:
        """The tensors, held against the network.

        Raises:
            CheckpointError: they are not those of this network.
        """
        self.read_network()
        config, states = self._read_config()
        states = states or self._load()
        config["tie_word_embeddings"] = "output.weight" not in states[0]
        where = self._place.where
        return HubModel(config, MetaTensors(states, config, where=where), where=where)

    @property
    def _where(self) -> str:
        return f"{self._place.where}/{_PARAMS}"

    def _load(self) -> list[Mapping[str, Tensor]]:
        folder = self._place.fetch(self._weights)
        return [load_state(folder / name) for name in self._weights]

    def _read_config(self) -> tuple[dict[str, Any], list[Mapping[str, Tensor]]]:
        """The config in the hub's words, and the tensors where they were needed for it."""
        params = read_json(self._place.fetch([_PARAMS]) / _PARAMS)
        reader = ConfigReader(params)
        d_model = reader.get("dim", int)
        n_heads = reader.get("n_heads", int)
        states: list[Mapping[str, Tensor]] = []
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": d_model,
            "num_hidden_layers": reader.get("n_layers", int),
            "num_attention_heads": n_heads,
            "num_key_value_heads": reader.get("n_kv_heads", int, n_heads),
            "intermediate_size": _width(reader, d_model),
            "rms_norm_eps": reader.get("norm_eps", float),
            **_read_positions(reader, d_model),
        }
        if params.get("vocab_size") == -1:
            # To be filled in from the tokenizer, in Meta's own code.
            reader.used.add("vocab_size")
            states = self._load()
            config["vocab_size"] = sum(state["output.weight"].shape[0] for state in states if "output.weight" in state)
        else:
            config["vocab_size"] = reader.get("vocab_size", int)
        reader.used.update({"max_batch_size", "max_seq_len"})
        problems = [*reader.problems, *(f"{key} is a key that HookLens does not know" for key in reader.unused())]
        if problems:
            raise UnsupportedModelError(
                f"{self._where}: describes a network that HookLens cannot build: {'; '.join(problems)}. Take the "
                "checkpoint in the hub's format"
            )
        return config, states


def _width(reader: ConfigReader, d_model: int) -> int:
    """The MLP's width; see Meta's `FeedForward`."""
    multiple: int = max(reader.get("multiple_of", int, 256), 1)
    width = int(2 * (4 * d_model) / 3)
    factor: float = reader.get("ffn_dim_multiplier", float, 1.0)
    return multiple * math.ceil(int(factor * width) / multiple)


def _read_positions(reader: ConfigReader, d_model: int) -> dict[str, Any]:
    base = reader.get("rope_theta", float, _BASE)
    if not reader.get("use_scaled_rope", bool, False):
        lengths = {_BASE: 4096, _BASE_LLAMA3: 8192}
        return {"rope_theta": base, "max_position_embeddings": reader.get("max_seq_len", int, lengths.get(base, 16384))}
    factor = reader.get("rope_scaling_factor", float, 32.0 if d_model in _SIZES_LLAMA32 else 8.0)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": reader.get("rope_high_freq_factor", float, 4.0),
        "original_max_position_embeddings": 8192,
    }
    return {
        "rope_theta": base,
        "rope_scaling": scaling,
        "max_position_embeddings": reader.get("max_seq_len", int, 131072),
    }


def _hub_name(name: str) -> str:
    """The hub's name of a tensor; one that is not known keeps its own, and is refused as unexpected."""
    found = re.fullmatch(_LAYER, name)
    if found is not None and found[2] in _INSIDE:
        return f"model.layers.{found[1]}.{_INSIDE[found[2]]}.weight"
    return _OUTSIDE.get(name, name)


def find(place: Place, file: str | None) -> MetaLlama | None:
    """The checkpoint in a folder with `params.json`, or of one of its files.

    Raises:
        CheckpointError: there is a `params.json`, and no weights, or not all of them.
    """
    names = place.names()
    if _PARAMS not in names or (file is not None and not re.fullmatch(_FILES, file)):
        return None
    weights = sorted(name for name in names if re.fullmatch(_FILES, name))
    if not weights or [int(name.split(".")[1]) for name in weights] != list(range(len(weights))):
        raise CheckpointError(
            f"{place.where}: holds {_PARAMS} and {join_names(weights) or 'no weights'}; expected "
            "consolidated.00.pth and on, none of them missing. Download them again"
        )
    return MetaLlama(place, weights)
