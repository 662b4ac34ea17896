"""`LlamaConfig` of xlstm-jax, field by field, and the network that it describes."""

import ast
import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from hooklens.arguments import (
    MOST_ENTRIES,
    Reader,
    optional,
    read_flag,
    read_int,
    read_number,
    read_one_of,
    refusal,
    show,
)
from hooklens.config import DROPOUTS, HookedConfig, NormConfig, Origin, RotaryPositions
from hooklens.errors import ConfigError, HookLensError, UnsupportedModelError, suggest_names

ORIGIN = "xlstm-jax"
"""The origin of a config that was read here (`Origin.family`)."""

_REQUIRED: Any = object()
_BLOCK_EPS, _QK_EPS = 1e-6, 1e-6
_BACKENDS = ("xla", "pallas_triton", "cudnn")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_GATHER_DTYPES = ("float32", "bfloat16", "float16")


class Field(NamedTuple):
    """A field of a config of xlstm-jax.

    Attributes:
        name: its name there.
        read: its reader (`hooklens.arguments`).
        default: what it is where it is left out.
        hydra: what xlstm-jax's Hydra configs call it, where that is another name.
    """

    name: str
    read: Reader
    default: Any = _REQUIRED
    hydra: str | None = None


def _maybe(reader: Reader) -> Reader:
    """A reader that takes None, and the text "None", which `to_dict` of xlstm-jax writes for it."""
    read = optional(reader)

    def read_maybe(given: object, *, what: str, error: type[HookLensError]) -> Any:
        return read(None if given == "None" else given, what=what, error=error)

    return read_maybe


def _number(expected: str, allows: Callable[[float], bool]) -> Reader:
    return partial(read_number, expected=expected, allows=allows)


_SIZE = partial(read_int, least=1, most=MOST_ENTRIES)
_POSITIVE = _number("a number above 0", lambda number: number > 0)


def _read_names(given: object, *, what: str, error: type[HookLensError]) -> list[str]:
    if isinstance(given, list | tuple) and all(isinstance(name, str) for name in given):
        return list(given)
    raise refusal(given, what, "a list of names of modules", error)


def _read_name(given: object, *, what: str, error: type[HookLensError]) -> str:
    if isinstance(given, str):
        return given
    raise refusal(given, what, "a name", error)


PARALLEL = (
    Field("data_axis_size", read_int, -1),
    Field("fsdp_axis_size", read_int, 1),
    Field("pipeline_axis_size", read_int, 1),
    Field("model_axis_size", read_int, 1),
    Field("data_axis_name", _read_name, "dp"),
    Field("fsdp_axis_name", _read_name, "fsdp"),
    Field("pipeline_axis_name", _read_name, "pp"),
    Field("model_axis_name", _read_name, "tp"),
    Field("remat", _read_names, []),
    Field("fsdp_modules", _read_names, []),
    Field("fsdp_min_weight_size", partial(read_int, least=0), 2**18),
    Field("fsdp_gather_dtype", _maybe(partial(read_one_of, options=_GATHER_DTYPES)), None),
    Field("fsdp_grad_scatter_dtype", _maybe(partial(read_one_of, options=_GATHER_DTYPES)), None),
    Field("tp_async_dense", read_flag, default=False),
)
"""The fields of `ParallelConfig`: how the work is spread over devices, and what is computed twice to save memory."""


def _read_parallel(given: object, *, what: str, error: type[HookLensError]) -> Any:
    """What was given, once it is known to be a `ParallelConfig`: its fields by name, itself, or its `repr`."""
    fields: object = given
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        fields = given = dataclasses.asdict(given)
    elif isinstance(given, str):
        fields = _parse_repr(given)
    if not isinstance(fields, Mapping):
        raise refusal(given, what, "the fields of a ParallelConfig by name, or its text 'ParallelConfig(...)'", error)
    problems: list[str] = []
    read = _read_fields(fields, PARALLEL, problems, f"{what}.")
    if read.get("model_axis_size", 1) != 1:
        problems.append(
            f"{what}.model_axis_size is {show(read['model_axis_size'])}, expected 1: its attention and MLP are never "
            "spread over a model axis"
        )
    if problems:
        raise error("; ".join(problems))
    return given if isinstance(given, str) else dict(fields)


def _parse_repr(text: str) -> dict[str, Any] | None:
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "ParallelConfig" or call.args:
            return None
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        return None


def _describe_parallel() -> str:
    """The default `ParallelConfig` as text, which is what `to_dict` of xlstm-jax makes of it."""
    return f"ParallelConfig({', '.join(f'{field.name}={field.default!r}' for field in PARALLEL)})"


FIELDS = (
    Field("vocab_size", _SIZE),
    Field("embedding_dim", _SIZE),
    Field("num_blocks", _SIZE),
    Field("head_dim", _SIZE, 128),
    Field("qk_norm", read_flag, default=False, hydra="add_qk_norm"),
    Field("causal", read_flag, default=True),
    Field("theta", _POSITIVE, 1e4),
    Field("ffn_multiple_of", _SIZE, 64),
    Field("ffn_dim_multiplier", _maybe(_number("a number >= 0", lambda number: number >= 0)), 1.0),
    Field("use_bias", read_flag, default=False),
    Field("scan_blocks", read_flag, default=True),
    Field("attention_backend", partial(read_one_of, options=_BACKENDS), "xla"),
    Field("mask_across_document_boundaries", read_flag, default=False, hydra="reset_at_document_boundaries"),
    Field("dtype", partial(read_one_of, options=_DTYPES), "float32"),
    Field("dropout_rate", _number("a number from 0 on, below 1", lambda number: 0 <= number < 1), 0.0),
    Field("add_embedding_dropout", read_flag, default=False),
    Field("logits_soft_cap", _maybe(_POSITIVE), None),
    Field("parallel", _read_parallel, _describe_parallel()),
)
"""The fields of `LlamaConfig`.

Of those that are no field of `HookedConfig`, `scan_blocks` says how the parameter tree is laid out, `dtype` in which
dtype xlstm-jax computes (its parameters are float32, and HookLens computes in the dtype of the weights), and
`attention_backend` and `parallel` by which means: they change no number but by rounding, and are kept for the way back.
"""

_HYDRA = {field.hydra: field.name for field in FIELDS if field.hydra is not None}


def _read_fields(given: Mapping[Any, Any], known: tuple[Field, ...], problems: list[str], path: str) -> dict[str, Any]:
    """The given fields as plain values; what is wrong with them goes into `problems`."""
    by_name = {field.name: field for field in known}
    read = {}
    for name, value in given.items():
        if name not in by_name:
            nearest = suggest_names(str(name), [*by_name, *(_HYDRA if not path else ())])
            problems.append(f"{path}{name} is no field that HookLens knows.{nearest}")
            continue
        try:
            read[name] = by_name[name].read(value, what=f"{path}{name}", error=ConfigError)
        except ConfigError as found:
            problems.append(str(found))
    return read


def _rename_hydra(given: Mapping[Any, Any], problems: list[str]) -> dict[Any, Any]:
    """The config under the names of `LlamaConfig`."""
    named = dict(given)
    for hydra, name in _HYDRA.items():
        if hydra not in named:
            continue
        value = named.pop(hydra)
        if name in named and named[name] != value:
            problems.append(
                f"{hydra}={show(value)} and {name}={show(named[name])} are one field; leave one of them out"
            )
        named.setdefault(name, value)
    if len(set(_HYDRA) & set(given)) and given.get("logits_soft_cap") not in (None, "None"):
        problems.append(
            f"logits_soft_cap is {show(given['logits_soft_cap'])} in a Hydra config, which xlstm-jax does not hand on: "
            "the network was trained without. Set it to None, or name all fields as LlamaConfig does to have the cap"
        )
    return named


def read_values(config: object) -> dict[str, Any]:
    """All fields of a `LlamaConfig` by name, those that are left out with their defaults.

    Args:
        config: the fields by name, as `LlamaConfig.to_dict` or xlstm-jax's Hydra configs have them, or that as JSON.

    Raises:
        ConfigError: fields are missing, unknown, or hold what they cannot; all are listed.
    """
    given = config
    if isinstance(config, str):
        try:
            given = json.loads(config)
        except json.JSONDecodeError as error:
            raise ConfigError(f"xlstm-jax config: the text is no JSON: {error}") from error
    if not isinstance(given, Mapping):
        raise refusal(given, "xlstm-jax config", "the fields of a LlamaConfig by name, or JSON of them", ConfigError)
    problems: list[str] = []
    read = _read_fields(_rename_hydra(given, problems), FIELDS, problems, "")
    absent = [field.name for field in FIELDS if field.default is _REQUIRED and field.name not in given]
    problems += [f"{name} is missing" for name in absent]
    values = {**{field.name: field.default for field in FIELDS if field.name not in given}, **read}
    problems += _check_heads(values.get("embedding_dim"), values.get("head_dim"))
    if problems:
        raise ConfigError("xlstm-jax config: " + "; ".join(problems))
    return {field.name: values[field.name] for field in FIELDS}


def _check_heads(width: object, head: object) -> list[str]:
    """What is wrong with the width of the heads; None stands for what is wrong by itself."""
    problems = []
    if isinstance(width, int) and isinstance(head, int) and width % head:
        problems.append(f"embedding_dim={width} is no multiple of head_dim={head}, and all heads together are as wide")
    if isinstance(head, int) and head % 2:
        problems.append(f"head_dim={head} is odd, and rotary turns pairs of entries")
    return problems


def mlp_width(embedding_dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The neurons of an MLP: 8/3 of the stream's width, times a factor (None and 0 are 1), rounded up to a multiple."""
    width = int(8 * embedding_dim / 3)
    if multiplier:
        width = int(width * multiplier)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def read_xlstm_config(config: object, *, n_ctx: int = 8192) -> HookedConfig:
    """The network that a `LlamaConfig` describes; see `HookedConfig.from_xlstm`.

    Raises:
        ConfigError: fields are missing, unknown, or hold what they cannot; all are listed.
    """
    values = read_values(config)
    n_heads = values["embedding_dim"] // values["head_dim"]
    norm = NormConfig(kind="rms", eps=_BLOCK_EPS, bias=False)
    return HookedConfig(
        d_model=values["embedding_dim"],
        n_layers=values["num_blocks"],
        n_heads=n_heads,
        d_head=values["head_dim"],
        d_mlp=mlp_width(values["embedding_dim"], values["ffn_multiple_of"], values["ffn_dim_multiplier"]),
        d_vocab=values["vocab_size"],
        n_ctx=n_ctx,
        act_fn="silu",
        gated_mlp=True,
        norm=norm,
        qk_norm=NormConfig(kind="rms", eps=_QK_EPS, bias=False) if values["qk_norm"] else None,
        positions=RotaryPositions(dim=values["head_dim"], base=float(values["theta"]), layout="interleaved"),
        qkv_bias=values["use_bias"],
        out_bias=values["use_bias"],
        mlp_bias=values["use_bias"],
        attn_scale=n_heads**-0.5,
        logits_softcap=values["logits_soft_cap"],
        causal=values["causal"],
        document_mask=values["mask_across_document_boundaries"],
        resid_dropout=values["dropout_rate"],
        embed_dropout=values["dropout_rate"] if values["add_embedding_dropout"] else 0.0,
        init_scheme="wang",
        origin=Origin(family=ORIGIN, hub_config=json.dumps(values)),
    )


def write_values(cfg: HookedConfig) -> dict[str, Any]:
    """The fields of the `LlamaConfig` that describes a network, as plain values.

    What changes no number is as in the config that it was read from, where there is one.

    Raises:
        UnsupportedModelError: no `LlamaConfig` describes it; the fields that stand against it are listed.
    """
    known = {field.name: field.default for field in FIELDS}
    if cfg.origin is not None and cfg.origin.family == ORIGIN:
        known = json.loads(cfg.origin.hub_config)
    base = cfg.positions.base if isinstance(cfg.positions, RotaryPositions) else known["theta"]
    written: dict[str, Any] = {
        **known,
        "vocab_size": cfg.d_vocab,
        "embedding_dim": cfg.d_model,
        "num_blocks": cfg.n_layers,
        "head_dim": cfg.d_head,
        "qk_norm": cfg.qk_norm is not None,
        "causal": cfg.causal,
        "theta": base,
        "use_bias": cfg.qkv_bias,
        "mask_across_document_boundaries": cfg.document_mask,
        "dropout_rate": cfg.resid_dropout,
        "logits_soft_cap": cfg.logits_softcap,
    }
    if cfg.resid_dropout:
        written["add_embedding_dropout"] = cfg.embed_dropout > 0
    sizing = (written["ffn_multiple_of"], written["ffn_dim_multiplier"])
    if mlp_width(cfg.d_model, *sizing) != cfg.d_mlp:
        # Half a neuron above the width: what is cut off is never one too few.
        written |= {"ffn_multiple_of": 1, "ffn_dim_multiplier": (cfg.d_mlp + 0.5) / int(8 * cfg.d_model / 3)}
    try:
        read_back = read_xlstm_config(written, n_ctx=cfg.n_ctx)
    except ConfigError as error:
        raise UnsupportedModelError(f"no LlamaConfig of xlstm-jax describes this network: {error}") from error
    ours, theirs = ({spec.name: getattr(one, spec.name) for spec in _FIELDS_OF_NETWORK} for one in (cfg, read_back))
    differing = [f"{name}={ours[name]!r} (there {theirs[name]!r})" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise UnsupportedModelError(
            f"no LlamaConfig of xlstm-jax describes this network: {', '.join(differing)}. Change these fields back, or "
            "keep the model in HookLens' own format (state_dict and cfg.to_json())"
        )
    return written


# How fresh weights are drawn is no part of a LlamaConfig; what training drops is.
_FIELDS_OF_NETWORK = [
    spec
    for spec in dataclasses.fields(HookedConfig)
    if (spec.compare and spec.name != "init_std") or spec.name in DROPOUTS
]


def write_xlstm_config(cfg: HookedConfig) -> dict[str, Any]:
    """The fields of the `LlamaConfig`, as its `to_dict` gives them; see `HookedConfig.to_xlstm`.

    Raises:
        UnsupportedModelError: no `LlamaConfig` describes the network.
    """
    return {name: "None" if value is None else value for name, value in write_values(cfg).items()}
