"""The patching functions of TransformerLens 2.x, by their names, on the sweep engine.

Each patches the activations of a clean run, held in a cache, into the corrupted run and gives a tensor of the
metric with one axis per index. `patching_metric` maps the logits `[batch pos d_vocab]` of one patched batch to a
number, or is a metric of this package, whose values are averaged over the batch. Where a function is named after
`k` or `v`, heads are key-value heads.

`patching.sweep` does the same with labels, and needs no cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.arguments import reads
from hooklens.axes import get_act_name
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.hooks import HookPoint
from hooklens.hooks.call import thread_listeners
from hooklens.patching.errors import MetricError
from hooklens.patching.metrics.metric import Cells, Metric, Positions, Values
from hooklens.patching.runs.checks import check_model, check_source
from hooklens.patching.runs.sites import Grid, grid, lay_out
from hooklens.patching.sweeps.patch_setters import SETTERS, make_df_from_ranges
from hooklens.patching.sweeps.sweep import sweep
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar

if TYPE_CHECKING:
    import pandas

PatchingMetric = Metric | Callable[[Tensor], Tensor | float]
PatchSetter = Callable[[Tensor, Sequence[int], Tensor], Tensor]
Tokens = Int[Tensor, "batch pos"]
Cache = Mapping[str, Tensor]
Mask = Int[Tensor, "batch pos"]

_AXES = ("layer", "pos", "head", "head_index", "src_pos", "dest_pos")
_OF_HEADS = ("z", "q", "k", "v", "pattern")


@dataclass(frozen=True, eq=False)
class _OfBatch(Metric):
    """A function from the logits of a batch to one number, which every pair is given."""

    fn: Callable[[Tensor], Tensor | float]
    _: KW_ONLY
    pos: Positions = None

    @property
    def needs_all_pairs(self) -> bool:
        return True

    def measure(self, logits: Cells) -> Values:
        values = [_read_number(self.fn(cell), cell) for cell in logits]
        dtype = wide_dtype(logits.dtype)
        stacked = torch.stack([value.to(logits.device, dtype) for value in values])
        return stacked[:, None].expand(-1, logits.shape[1])


def _read_number(value: Tensor | float, logits: Tensor) -> Float[Tensor, ""]:
    number = torch.as_tensor(value)
    if number.numel() != 1:
        raise MetricError(
            f"patching_metric returned shape {list(number.shape)} for logits {list(logits.shape)} [batch pos d_vocab]; "
            "expected a single number: average over the batch"
        )
    return number.reshape(())


@reads()
def generic_activation_patch(
    model: HookedCausalLM,
    corrupted_tokens: Tokens,
    clean_cache: Cache,
    patching_metric: PatchingMetric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: "pandas.DataFrame | None" = None,
    return_index_df: bool = False,  # noqa: FBT001, FBT002
    *,
    attention_mask: Mask | None = None,
) -> "Tensor | tuple[Tensor, pandas.DataFrame]":
    """Patch by a function: one run per index, from the patched layer on.

    A patch setter of this package over all indices of its axes is one sweep, as in the functions beside this one, where
    nothing is out of the ordinary: a causal network in evaluation mode, without hooks or padding, and a clean run of as
    many rows and positions. Where hooks are attached to the model, they act in each run, which is whole then.

    Args:
        model: the model.
        corrupted_tokens: ids of the run that is patched.
        clean_cache: activations of the clean run.
        patching_metric: from logits to a number.
        patch_setter: `patch_setter(corrupted_activation, index, clean_activation)` gives the patched activation;
            it may write into the one it is handed.
        activation_name: a hook word such as `"resid_pre"`.
        index_axis_names: the axes to run over, `"layer"` first: `"pos"`, `"head"` or `"head_index"`, `"dest_pos"`,
            `"src_pos"`.
        index_df: the indices, one per row, in place of all of them.
        return_index_df: give the table of indices, too.
        attention_mask: real tokens (1) of padded ids; None: as in a call of the model.

    Returns:
        The metric, one axis per index axis; with `index_df` one value per row.

    Raises:
        InputError: both or neither of `index_axis_names` and `index_df`, or an axis that is none.
        MetricError: the metric gives several numbers.
        TransformError: the cache of a model with other processing.
    """
    if (index_axis_names is None) == (index_df is None):
        raise InputError("generic_activation_patch takes either index_axis_names or index_df")
    if index_df is None:
        assert index_axis_names is not None
        sizes = [_size(axis, model, corrupted_tokens, activation_name) for axis in index_axis_names]
        index_df = make_df_from_ranges(sizes, index_axis_names)
        shape = sizes
    else:
        shape = [len(index_df)]
    indices = index_df.to_numpy().tolist()
    check_source(model, clean_cache)
    layers = sorted({index[0] for index in indices})
    measure = _as_function(patching_metric)
    mask = _mask_of(model, corrupted_tokens) if attention_mask is None else attention_mask
    ready = _find_sweep(activation_name, patch_setter, index_axis_names or ())
    if ready is not None and _can_sweep(model, corrupted_tokens, clean_cache, activation_name, mask):
        swept = ready(model, corrupted_tokens, clean_cache, patching_metric, attention_mask=mask)
        result = swept.to(torch.get_default_dtype())
        return (result, index_df) if return_index_df else result
    # A hook at the stream that a run starts from would have acted in it already.
    starts = not thread_listeners() and all(point.own is None for point in model.hook_points().values())
    values = []
    with torch.no_grad():
        entering = [f"blocks.{layer}.hook_resid_pre" for layer in layers if starts]
        streams = (
            model.run_with_cache(corrupted_tokens, names_filter=entering, attention_mask=mask)[1] if starts else {}
        )
        with progress_bar("patching", indices, unit="cell", progress=True) as bar:
            for index in bar:
                name = get_act_name(activation_name, index[0])
                hook = _Setter(patch_setter, index, clean_cache[name])
                logits = model.run_with_hooks(
                    streams[f"blocks.{index[0]}.hook_resid_pre"] if starts else corrupted_tokens,
                    fwd_hooks=[(name, hook)],
                    start_at_layer=index[0] if starts else None,
                    attention_mask=mask,
                )
                values.append(float(_read_number(measure(logits), logits)))
    result = torch.tensor(values, device=model.device).view(*shape)
    return (result, index_df) if return_index_df else result


class _Setter:
    """A patch setter as a hook."""

    def __init__(self, fn: PatchSetter, index: Sequence[int], clean: Tensor) -> None:
        self.fn, self.index, self.clean = fn, index, clean

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        return self.fn(tensor.clone(), self.index, self.clean)


def _as_function(metric: PatchingMetric) -> Callable[[Tensor], Tensor | float]:
    if isinstance(metric, Metric):
        return lambda logits: metric(logits).mean()
    return metric


def _mask_of(model: HookedCausalLM, tokens: Tensor) -> Tensor | None:
    """The mask that a call of the model gives ids."""
    mask = tokenization.read_tokens(tokens, model.tokenizer, d_vocab=model.cfg.d_vocab).attention_mask
    return None if mask is None else mask.to(model.device)


def _size(axis: str, model: HookedCausalLM, tokens: Tensor, activation_name: str) -> int:
    if axis not in _AXES:
        raise InputError(f"index_axis_names: no axis is called {axis!r}; expected {join_names(_AXES)}")
    if axis == "layer":
        return model.cfg.n_layers
    if axis in ("head", "head_index"):
        return model.cfg.n_kv_heads if activation_name in ("k", "v", "rot_k") else model.cfg.n_heads
    return tokens.shape[-1]


def _patch(
    model: HookedCausalLM,
    corrupted_tokens: Tokens,
    clean_cache: Cache,
    metric: PatchingMetric,
    sites: Sequence[Grid],
    mask: Mask | None,
) -> list[Float[Tensor, "..."]]:
    """The values of several grids, all on the same unpatched runs."""
    mask = _mask_of(model, corrupted_tokens) if mask is None else mask
    if mask is not None and not bool(mask[:, 0].all()):
        raise InputError(
            "corrupted_tokens are padded on the left: columns are no positions; pad both prompts on the right, "
            "or use patching.sweep, which needs no cache"
        )
    result = sweep(
        model,
        corrupted_tokens,
        corrupted_tokens,
        list(sites),
        metric if isinstance(metric, Metric) else _OfBatch(metric),
        source=clean_cache,
        attention_mask=mask,
    )
    arrays = [lay_out(one, model, [corrupted_tokens.shape[-1]]) for one in sites]
    parts = torch.split(result.values.flatten(), [len(array.cells) for array in arrays])
    shapes = [[len(labels) for labels in array.axes.values()] for array in arrays]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@runtime_checkable
class _Patch(Protocol):
    """The metric with one kind of activation patched over a grid."""

    def __call__(
        self,
        model: HookedCausalLM,
        corrupted_tokens: Tokens,
        clean_cache: Cache,
        patching_metric: PatchingMetric,
        *,
        attention_mask: Mask | None = None,
    ) -> Float[Tensor, "..."]: ...


_SWEEPS: dict[tuple[str, str], _Patch] = {}
"""The sweeps that give what `generic_activation_patch` does, by activation and axes."""


def _find_sweep(activation_name: str, patch_setter: PatchSetter, axis_names: Sequence[str]) -> _Patch | None:
    """The sweep that gives what a patch setter does over all indices of some axes, where there is one."""
    # Heads have two names.
    axes = " ".join("head" if name == "head_index" else name for name in axis_names)
    is_own = SETTERS.get((activation_name == "pattern", axes)) is patch_setter
    return _SWEEPS.get((activation_name, axes)) if is_own else None


def _can_sweep(
    model: HookedCausalLM, tokens: Tensor, clean_cache: Cache, activation_name: str, mask: Tensor | None
) -> bool:
    """Whether nothing is out of the ordinary: hooks, training, padding, a clean run of other rows or positions."""
    try:
        check_model(model, allow_training=False)
    except InputError:
        return False
    if thread_listeners() or not (mask is None or bool(mask.all())):
        return False
    names = [get_act_name(activation_name, layer) for layer in range(model.cfg.n_layers)]
    pos_axis = 2 if activation_name == "pattern" else 1
    held = [clean_cache[name].shape for name in names if name in clean_cache]
    return len(held) == len(names) and all((shape[0], shape[pos_axis]) == tokens.shape for shape in held)


def _make(word: str, index: str, **spans: str) -> _Patch:
    """A function that patches one kind of activation over a grid."""
    site = grid(word, **spans)  # type: ignore[arg-type]
    # Patterns list heads before positions.
    heads_first = word == "pattern" and "dest_pos" in index

    @reads()
    def patch(
        model: HookedCausalLM,
        corrupted_tokens: Tokens,
        clean_cache: Cache,
        patching_metric: PatchingMetric,
        *,
        attention_mask: Mask | None = None,
    ) -> Tensor:
        [values] = _patch(model, corrupted_tokens, clean_cache, patching_metric, [site], attention_mask)
        return values.transpose(1, 2) if heads_first else values

    patch.__doc__ = f"""The metric with the clean `{word}` patched in, `[{index}]`.

    Args:
        model: the model.
        corrupted_tokens: ids of the run that is patched, `[batch pos]`.
        clean_cache: activations of the clean run.
        patching_metric: from logits to a number.
        attention_mask: real tokens (1) of padded ids; None: as in a call of the model.
    """
    _SWEEPS[word, index.replace("kv_head", "head")] = patch
    return patch


get_act_patch_resid_pre = _make("resid_pre", "layer pos")
get_act_patch_resid_mid = _make("resid_mid", "layer pos")
get_act_patch_attn_out = _make("attn_out", "layer pos")
get_act_patch_mlp_out = _make("mlp_out", "layer pos")
get_act_patch_attn_head_out_by_pos = _make("z", "layer pos head", positions="each")
get_act_patch_attn_head_q_by_pos = _make("q", "layer pos head", positions="each")
get_act_patch_attn_head_k_by_pos = _make("k", "layer pos kv_head", positions="each")
get_act_patch_attn_head_v_by_pos = _make("v", "layer pos kv_head", positions="each")
get_act_patch_attn_head_pattern_by_pos = _make("pattern", "layer head dest_pos", positions="each")
get_act_patch_attn_head_pattern_dest_src_pos = _make(
    "pattern", "layer head dest_pos src_pos", positions="each", sources="each"
)
get_act_patch_attn_head_out_all_pos = _make("z", "layer head")
get_act_patch_attn_head_q_all_pos = _make("q", "layer head")
get_act_patch_attn_head_k_all_pos = _make("k", "layer kv_head")
get_act_patch_attn_head_v_all_pos = _make("v", "layer kv_head")
get_act_patch_attn_head_pattern_all_pos = _make("pattern", "layer head")


@reads()
def get_act_patch_attn_head_all_pos_every(
    model: HookedCausalLM,
    corrupted_tokens: Tokens,
    clean_cache: Cache,
    metric: PatchingMetric,
    *,
    attention_mask: Mask | None = None,
) -> Float[Tensor, "patch_type layer head"]:
    """Every head over all positions: output, query, key, value and pattern, in this order.

    With fewer key-value heads than heads the rest of the rows of keys and values is 0.
    """
    sites = [grid(word) for word in _OF_HEADS]
    return _stack_heads(_patch(model, corrupted_tokens, clean_cache, metric, sites, attention_mask))


@reads()
def get_act_patch_attn_head_by_pos_every(
    model: HookedCausalLM,
    corrupted_tokens: Tokens,
    clean_cache: Cache,
    metric: PatchingMetric,
    *,
    attention_mask: Mask | None = None,
) -> Float[Tensor, "patch_type layer pos head"]:
    """Every head at each position: output, query, key, value and pattern (by destination), in this order.

    With fewer key-value heads than heads the rest of the rows of keys and values is 0.
    """
    sites = [grid(word, positions="each") for word in _OF_HEADS]
    return _stack_heads(_patch(model, corrupted_tokens, clean_cache, metric, sites, attention_mask))


@reads()
def get_act_patch_block_every(
    model: HookedCausalLM,
    corrupted_tokens: Tokens,
    clean_cache: Cache,
    metric: PatchingMetric,
    *,
    attention_mask: Mask | None = None,
) -> Float[Tensor, "patch_type layer pos"]:
    """Every block at each position: the stream entering it, attention's output and the MLP's, in this order."""
    sites = [grid(word) for word in ("resid_pre", "attn_out", "mlp_out")]
    return torch.stack(_patch(model, corrupted_tokens, clean_cache, metric, sites, attention_mask))


def _stack_heads(results: list[Tensor]) -> Tensor:
    n_heads = max(result.shape[-1] for result in results)
    return torch.stack([F.pad(result, (0, n_heads - result.shape[-1])) for result in results])
