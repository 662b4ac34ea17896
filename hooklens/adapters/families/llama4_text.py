"""The text decoder of Llama 4 (Meta AI 2025, "The Llama 4 herd").

Checkpoints: the text decoders of meta-llama/Llama-4-Scout-17B-16E and Llama-4-Maverick-17B-128E, which are multimodal,
their instruct versions, and fine-tunes saved as text only (`Llama4ForCausalLM`), whose `model_type` is `llama4_text`.

Peculiarities:
- Every fourth layer has no rotation and sees all positions; the others turn pairs that stand side by side, and a query
  sees the keys of its own chunk only (`attention_chunk_size`). `no_rope_layers` says 1 where a layer *has* rotation,
  and an empty list says as much as none; `layer_types` wins for the chunks.
- With `use_qk_norm`, queries and keys of the rotated layers are normed after the rotation, without a weight.
- With `attn_temperature_tuning`, which older files write as a number, queries of the layers without rotation grow
  with their position. transformers counts padding at that; HookLens does not.
- One expert sees a token, and the sigmoid of its logit multiplies what it reads. Beside it stands a shared one of the
  same width, `intermediate_size`; layers that `moe_layers` leaves out, or `interleave_moe_layer_step` where that is
  absent, have an MLP as wide as `intermediate_size_mlp`.
- Experts are stacked as `[in, out]`, the gate's columns before the linear half's.
- The rotary base is 500000 where the config is silent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooklens.adapters.family import Config, Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    ConfigReader,
    Derived,
    Key,
    MixtureKeys,
    PositionKeys,
    every_few_layers,
    layers_in,
    norm_key,
)
from hooklens.adapters.rules import Copy, Fused
from hooklens.adapters.tables import (
    BLOCK,
    Rules,
    gated_mlp_rules,
    llama_rules,
    router_rules,
    shared_expert_rules,
)
from hooklens.config import NoPositions, NormConfig, QueryTemperature, RotaryPositions

_FULL, _CHUNKED = "full_attention", "chunked_attention"
_TUNING, _LENGTH, _SCALE = "attn_temperature_tuning", "floor_scale", "attn_scale"


def _make_tuning_a_flag(config: Config) -> dict[str, Any]:
    """The temperature's switch as a flag, in place of the number 4 of older files."""
    tuning = config.get(_TUNING)
    return {**config, _TUNING: tuning != 0} if type(tuning) is int else dict(config)


def _settle(by_layer: Sequence[Any]) -> Any:
    """What holds of each layer, said once where they are alike."""
    return tuple(by_layer) if len(set(by_layer)) > 1 else next(iter(by_layer), None)


def _first(by_layer: Any) -> Any:
    each = by_layer if isinstance(by_layer, tuple) else (by_layer,)
    return next((one for one in each if one is not None), None)


@dataclass(frozen=True)
class _LayerKeys:
    """What depends on whether a layer has rotation: positions, chunks, norms of queries and keys, and temperature.

    Attributes:
        rotary: how the rotation is read.
    """

    rotary: PositionKeys

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads."""
        of_layers = ("no_rope_layers", "no_rope_layer_interval", "layer_types", "attention_chunk_size", "use_qk_norm")
        return (*self.rotary.keys, *of_layers, _TUNING, _LENGTH, _SCALE)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read the fields, layer by layer."""
        n_layers = len(reader.layers(fields.get("n_layers", 0)))
        rotated = self._read_rotated(reader, n_layers)
        kinds = reader.by_layer("layer_types", str, n_layers)
        if kinds is None:
            kinds = [_CHUNKED if turns else _FULL for turns in rotated]
        elif unknown := set(kinds) - {_FULL, _CHUNKED}:
            reader.reject("layer_types", f"of {_FULL!r} and {_CHUNKED!r} only; {sorted(unknown)} are not implemented")
        size = reader.get("attention_chunk_size", int, None if reader.is_null("attention_chunk_size") else 8192)
        is_normed, is_tuned = reader.get("use_qk_norm", bool, True), reader.get(_TUNING, bool, True)
        length, scale = reader.get(_LENGTH, int, 8192), reader.get(_SCALE, float, 0.1)
        read = self.rotary.read(reader, fields)
        if reader.problems:
            return {}
        positions = read["positions"]
        norm = NormConfig(kind="rms", eps=fields["norm"].eps, weight=False, bias=False) if is_normed else None
        temperature = QueryTemperature(scale=scale, length=length, offset=1) if is_tuned else None
        chunks = tuple(size if kind == _CHUNKED else None for kind in kinds)
        return {
            "n_ctx": read["n_ctx"],
            "positions": _settle([positions if turns else NoPositions() for turns in rotated]) or positions,
            "chunks": chunks if any(chunks) else None,
            "qk_norm": _settle([norm if turns else None for turns in rotated]),
            "qk_norm_after_rotary": is_normed and any(rotated),
            "query_temperature": _settle([None if turns else temperature for turns in rotated]),
        }

    @staticmethod
    def _read_rotated(reader: ConfigReader, n_layers: int) -> list[bool]:
        """Which layers have rotation: those that do not end a group of so many, where they are not listed."""
        listed = reader.by_layer("no_rope_layers", int, n_layers)
        interval = reader.get("no_rope_layer_interval", int, 4)
        if listed:
            return [flag != 0 for flag in listed]
        if interval == 0:
            reader.reject("no_rope_layer_interval", "a number of layers, at least 1")
        return [(layer + 1) % max(interval, 1) != 0 for layer in range(n_layers)]

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write all keys; layers that do not go together so differ from what is read back."""
        n_layers, positions = fields["n_layers"], fields["positions"]
        each = positions if isinstance(positions, tuple) else (positions,) * n_layers
        rotation = next((one for one in each if isinstance(one, RotaryPositions)), NoPositions())
        chunks = fields["chunks"] or (None,) * n_layers
        temperature = _first(fields["query_temperature"])
        numbers = {} if temperature is None else {_LENGTH: temperature.length, _SCALE: temperature.scale}
        return {
            **self.rotary.write({**fields, "positions": rotation}),
            "no_rope_layers": [int(isinstance(one, RotaryPositions)) for one in each],
            "layer_types": [_FULL if chunk is None else _CHUNKED for chunk in chunks],
            # transformers asks for a size where no layer has chunks, too.
            "attention_chunk_size": _first(chunks) or 8192,
            "use_qk_norm": _first(fields["qk_norm"]) is not None,
            _TUNING: temperature is not None,
            **numbers,
        }


def _read_sparse(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
    stepped = every_few_layers(reader, "interleave_moe_layer_step", n_layers)
    if not reader.has("moe_layers"):
        return stepped
    listed = layers_in(reader, "moe_layers", n_layers)
    return [layer in listed for layer in range(n_layers)]


def _write_sparse(is_sparse: Sequence[bool]) -> dict[str, Any]:
    return {"moe_layers": [layer for layer, sparse in enumerate(is_sparse) if sparse]}


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=128),
        Key("intermediate_size_mlp", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        _LayerKeys(PositionKeys(default_n_ctx=131072, default_base=5e5, layout="interleaved")),
        MixtureKeys(
            options=(
                Key("num_local_experts", "n_experts", int),
                Key("num_experts_per_tok", "experts_per_token", int),
                Key("intermediate_size", "d_expert", int),
                # A shared expert of another width differs from what is read back, and is refused there.
                Derived(lambda fields: {"d_shared": fields["d_expert"]}),
            ),
            fixed={"router": "sigmoid_input"},
            sparse=_read_sparse,
            sparse_keys=("moe_layers", "interleave_moe_layer_step"),
            write_sparse=_write_sparse,
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False},
    inert=(*INERT_ROUTER_KEYS, "cache_implementation", "for_llm_compressor", "router_jitter_noise"),
)

_FEED = "model.layers.{i}.feed_forward"
_EXPERTS, _OURS = f"{_FEED}.experts", f"{BLOCK}.mlp"

_FEED_FORWARD: Rules = (
    *gated_mlp_rules(_FEED),
    *router_rules(f"{_FEED}.router"),
    Fused(f"{_EXPERTS}.gate_up_proj", (f"{_OURS}.W_gate", f"{_OURS}.W_in"), "e m (s f) -> s e m f", part="moe"),
    Copy(f"{_EXPERTS}.down_proj", f"{_OURS}.W_out", part="moe"),
    *shared_expert_rules(f"{_FEED}.shared_expert"),
)

FAMILY = Family(
    name="llama4_text",
    model_types=("llama4_text",),
    architectures=("Llama4ForCausalLM", "Llama4TextModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(mlp=_FEED_FORWARD),
    dialects={"llama4_text": _make_tuning_a_flag},
)
