"""One transformer block, for every wiring."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens.config import BlockConfig
from hooklens.hooks import Call, HookPoint
from hooklens.hooks.foreign import Placed
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.attention.attention import Attention
from hooklens.model.attention.heads import HeadInput
from hooklens.model.attention.latent import LatentAttention
from hooklens.model.mlp import MLP
from hooklens.model.norm import STREAM, Norm, norm
from hooklens.model.parts.declared import When, inner, point
from hooklens.model.parts.part import Part, find_part
from hooklens.model.plan.positions import TokenPlan

_ATTENDS = When(lambda block: block.attn is not None, "this layer has no attention")
_HAS_MLP = When(lambda block: block.mlp is not None, "this layer has no MLP")
_NORMED = When(lambda block: block.norm is not None, "this layer has no norms")
_NORMS_BEFORE = When(lambda block: block.norm_before, "it has no norms before its branches", _NORMED)
_NORMS_AFTER = When(lambda block: block.norm_after, "it has no norms after its branches", _NORMED)
_LN1_READ = When(lambda block: "ln1" in (block.attn_norm, block.mlp_norm), "this layer has no attention", _NORMS_BEFORE)
_LN1_POST = When(lambda block: True, "", _ATTENDS, _NORMS_AFTER)
_LN2_READ = When(lambda block: block.mlp_norm == "ln2", "its MLPs have no norm of their own", _HAS_MLP, _NORMS_BEFORE)
_LN2_POST = When(lambda block: True, "", _HAS_MLP, _NORMS_AFTER)
_STREAM_NORMED = When(lambda block: block.cfg.norm_stream, "its norms stand in its branches, not on the stream")
_LN1_STREAM = When(lambda block: True, "", _ATTENDS, _STREAM_NORMED)
_LN2_STREAM = When(lambda block: True, "", _HAS_MLP, _STREAM_NORMED)
_HAS_MID = When(lambda block: block.cfg.wiring == "sequential", "its blocks are parallel", _ATTENDS, _HAS_MLP)
_PER_HEAD, _PER_KV_HEAD = "batch pos head d_model", "batch pos kv_head d_model"


class Block(Part, place="blocks.{i}"):
    """Attention and MLP around the residual stream; norms where the configuration has them.

        sequential                                   parallel

        resid_pre ---+                               resid_pre ---+-----------+
            |        |                                   |        |           |
            |     [ln1] attn [ln1_post]                  |     [ln1] attn   [ln2, or the output of ln1] mlp
            |        | attn_out                          |        | attn_out  | mlp_out
        resid_mid = (+) --+                          resid_post = (+) --------+
            |             |
            |          mlp_in [ln2] mlp [ln2_post]
            |             | mlp_out
        resid_post = (+) -+

    In every wiring `resid_post = resid_pre + attn_out + mlp_out`; the factor `residual_scale` and dropout are in
    `attn_out` and `mlp_out`. With `norm_stream` (sequential) each sum goes through a norm first, `ln1_stream` or
    `ln2_stream`, so that `resid_mid = ln1_stream(resid_pre + attn_out)`. A layer without attention or without an MLP
    (`cfg.block(layer)`) lacks that branch with its norms and hook points, and `hook_resid_mid`; the attribute is None.
    """

    # The stream enters as the very tensor that left the block below.
    hook_resid_pre: HookPoint = point(STREAM, "the stream entering the block", shared=True)
    hook_attn_in: HookPoint = point(
        _PER_HEAD,
        "stream entering attention, a copy per head, before the norm; a key-value head reads the mean of the copies of "
        "its query heads",
        on_request=True,
        when=_ATTENDS,
    )
    hook_q_input: HookPoint = point(
        _PER_HEAD, "stream entering the queries, a copy per head, before the norm", on_request=True, when=_ATTENDS
    )
    hook_k_input: HookPoint = point(
        _PER_KV_HEAD,
        "stream entering the keys, a copy per key-value head, before the norm",
        on_request=True,
        when=_ATTENDS,
    )
    hook_v_input: HookPoint = point(
        _PER_KV_HEAD,
        "stream entering the values, a copy per key-value head, before the norm",
        on_request=True,
        when=_ATTENDS,
    )
    ln1: Norm | None = norm("norm before attention", when=_LN1_READ)
    attn: Attention = inner(
        lambda block: find_part("blocks.{i}.attn", block.attn),
        lambda block: block.of(block.attn),
        reads=lambda block: block.attn_norm,
        when=_ATTENDS,
    )
    ln1_post: Norm | None = norm("norm after attention", when=_LN1_POST)
    ln1_stream: Norm | None = norm("norm of the stream behind attention", when=_LN1_STREAM)
    hook_attn_out: HookPoint = point(STREAM, "what attention adds to the stream", when=_ATTENDS)
    hook_resid_mid: HookPoint = point(STREAM, "the stream between attention and MLP", when=_HAS_MID)
    # The skip connection reads the same tensor.
    hook_mlp_in: HookPoint = point(
        STREAM, "stream entering the MLP, before the norm; an edit reaches the MLP only", shared=True, when=_HAS_MLP
    )
    ln2: Norm | None = norm("norm before the MLP", when=_LN2_READ)
    mlp: MLP = inner(
        lambda block: find_part("blocks.{i}.mlp", block.mlp),
        lambda block: block.of(block.mlp),
        reads=lambda block: block.mlp_norm,
        when=_HAS_MLP,
    )
    ln2_post: Norm | None = norm("norm after the MLP", when=_LN2_POST)
    ln2_stream: Norm | None = norm("norm of the stream behind the MLP", when=_LN2_STREAM)
    hook_mlp_out: HookPoint = point(STREAM, "what the MLP adds to the stream", when=_HAS_MLP)
    hook_resid_post: HookPoint = point(STREAM, "the stream leaving the block")

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        self.has_attn, self.has_mlp, self.has_mid = block.attn is not None, block.mlp is not None, block.has_mid
        self.shares_norm = block.mlp_norm == "ln1"
        self.has_latents = isinstance(self.attn, LatentAttention)
        self.residual_scale, self.dropout = self.cfg.residual_scale, self.cfg.resid_dropout
        # Something stands between what a branch makes and what it adds.
        self.changes_branches = self.cfg.residual_scale != 1 or self.cfg.resid_dropout > 0 or block.norm_after
        # Without either branch the very tensor that entered leaves.
        self.hook_resid_post.shared = not (self.has_attn or self.has_mlp)

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        plan: TokenPlan,
        call: Call,
        entry: HookedKeyValueCacheEntry | None = None,
        *,
        wanted: tuple[Int[Tensor, " token"], Int[Tensor, " token"]] | None = None,
    ) -> Float[Tensor, "some_batch some_pos d_model"]:
        """The stream leaving the block.

        Args:
            resid: the stream entering it.
            plan: the tokens of this call.
            call: who listens.
            entry: this layer's past keys and values.
            wanted: rows and columns of the tokens whose stream is wanted; `[token 1 d_model]` comes back. The MLP
                runs for these only, so all points after attention see no others.
        """
        resid_pre = self.hook_resid_pre(resid, call)
        normed = resid_pre if self.ln1 is None else self.ln1(resid_pre, call)
        attn_out = None
        if self.has_attn:
            attn_out = self._run_attention(resid_pre, normed, plan, call, entry)
        elif entry is not None and not entry.frozen:
            entry.append_columns(resid_pre.shape[1])
        shared = normed if self.shares_norm else None
        del normed
        if wanted is not None:
            resid_pre = resid_pre[wanted][:, None]
            shared, attn_out = (None if x is None else x[wanted][:, None] for x in (shared, attn_out))
            call = call.on(plan.choose_tokens(*wanted))
        if self.has_mid and attn_out is not None:
            resid_mid = self.hook_resid_mid(_add(resid_pre, attn_out, self.ln1_stream, call), call)
            # The MLP is where a block needs most memory.
            del attn_out, resid_pre, resid
            mlp_out = self._run_mlp(resid_mid, None, call)
            return self.hook_resid_post(_add(resid_mid, mlp_out, self.ln2_stream, call), call)
        beside = self._run_mlp(resid_pre, shared, call) if self.has_mlp else None
        for out, ln in ((attn_out, self.ln1_stream), (beside, self.ln2_stream)):
            resid_pre = resid_pre if out is None else _add(resid_pre, out, ln, call)
        return self.hook_resid_post(resid_pre, call)

    def exit_norm(self, part: str) -> Norm | None:
        """The norm behind a branch, `"attn"` or `"mlp"`; None: there is none."""
        norm: Norm | None = getattr(self, "ln1_post" if part == "attn" else "ln2_post", None)
        return norm

    def run_mlp(self, stream: Float[Tensor, "batch pos d_model"], call: Call) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds when it reads a stream, without attention: `resid_mid`, in parallel blocks `resid_pre`."""
        normed = self.ln1(stream, call) if self.cfg.shared_norm and self.ln1 is not None else None
        return self._run_mlp(stream, normed, call)

    def _run_attention(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        normed: Float[Tensor, "batch pos d_model"],
        plan: TokenPlan,
        call: Call,
        entry: HookedKeyValueCacheEntry | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the stream."""
        q_input = k_input = v_input = normed
        if (
            call.hears(self.hook_attn_in)
            or call.hears(self.hook_q_input)
            or call.hears(self.hook_k_input)
            or call.hears(self.hook_v_input)
        ):
            q_input, k_input, v_input = self._head_inputs(resid_pre, normed, call)
        # Latents are shown of the stream itself.
        also = (normed,) if self.has_latents else ()
        attn_out = self.attn(q_input, k_input, v_input, plan, call, entry, *also)
        if self.changes_branches:
            attn_out = self._leave_branch(attn_out, self.ln1_post, call)
        return self.hook_attn_out(attn_out, call)

    def _run_mlp(self, resid: Tensor, normed: Tensor | None, call: Call) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the stream; with a shared norm, `normed` is the output of `ln1`."""
        mlp_in, edited = resid, False
        if call.hears(self.hook_mlp_in):
            mlp_in, edited = self.hook_mlp_in.watch(resid, call)
        if self.ln2 is not None:
            mlp_in = self.ln2(mlp_in, call)
        elif normed is not None:
            mlp_in = self._renorm(mlp_in, resid, normed, call) if edited else normed
        mlp_out = self.mlp(mlp_in, call)
        if self.changes_branches:
            mlp_out = self._leave_branch(mlp_out, self.ln2_post, call)
        return self.hook_mlp_out(mlp_out, call)

    def _leave_branch(self, out: Tensor, norm: Norm | Placed | None, call: Call) -> Float[Tensor, "batch pos d_model"]:
        """What a branch adds to the stream, given what it made."""
        if norm is not None:
            out = norm(out, call)
        if self.residual_scale != 1:
            out = out * self.residual_scale
        return F.dropout(out, self.dropout) if self.dropout and self.training else out

    def _head_inputs(self, resid: Tensor, normed: Tensor, call: Call) -> tuple[HeadInput, HeadInput, HeadInput]:
        """What queries, keys and values read: the normed stream, or where a listener changed it, copies per head."""
        points = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        listens = [call.hears(one) for one in points]
        all_listen = call.hears(self.hook_attn_in)
        attn_in, all_changed = None, False
        if all_listen:
            attn_in, all_changed = self.hook_attn_in.watch(_copy_per_head(resid, self.cfg.n_heads), call)
        inputs: list[HeadInput] = []
        for entrance, listened, heads in zip(points, listens, self._count_copies(), strict=True):
            changed = False
            if all_changed and attn_in is not None:
                copies = torch.unflatten(attn_in, 2, (heads, -1)).mean(3)
            elif listened:
                copies = _copy_per_head(resid, heads)
            else:
                inputs.append(normed)
                continue
            if listened:
                copies, changed = entrance.watch(copies, call)
            inputs.append(self._renorm(copies, resid, normed, call) if changed or all_changed else normed)
        return inputs[0], inputs[1], inputs[2]

    def _count_copies(self) -> tuple[int, int, int]:
        """How many copies of the stream queries, keys and values read where these are edited head by head."""
        return self.cfg.n_heads, self.cfg.n_kv_heads, self.cfg.n_kv_heads

    def _renorm(self, changed: Tensor, resid: Tensor, normed: Tensor, call: Call) -> Tensor:
        """The norm of a changed copy of the stream; `ln1` has already fired on the stream itself.

        With listeners inside `ln1`, what they made of its output is added, so that an edit or a gradient there
        still counts; if they only watched, that is exactly nothing.
        """
        if self.ln1 is None:
            return changed
        renormed = self.ln1.apply_beside(changed, call)
        if not self.ln1.listens(call):
            return renormed
        made_by_listeners = _like(normed, changed) - _like(self.ln1.apply_beside(resid, call), changed)
        return renormed + made_by_listeners


if TYPE_CHECKING:

    class Blocks(nn.ModuleList):
        """The blocks of a network, of which `nn.ModuleList` says only that they are modules."""

        @overload
        def __getitem__(self, idx: slice) -> "Blocks": ...
        @overload
        def __getitem__(self, idx: int) -> Block: ...
        def __getitem__(self, idx: int | slice) -> "Block | Blocks": ...
        def __iter__(self) -> Iterator[Block]: ...

else:
    Blocks = nn.ModuleList


def _add(stream: Tensor, out: Tensor, norm: Norm | Placed | None, call: Call) -> Float[Tensor, "batch pos d_model"]:
    """The stream behind a branch."""
    added = stream + out
    return added if norm is None else norm(added, call)


def _copy_per_head(resid: Tensor, n_heads: int) -> Float[Tensor, "batch pos heads d_model"]:
    # Real copies: an expanded view could not be edited in place.
    return resid[:, :, None].repeat(1, 1, n_heads, 1)


def _like(stream: Tensor, copies: Tensor) -> Tensor:
    return stream[:, :, None] if copies.ndim == 4 else stream
