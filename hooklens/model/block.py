"""One transformer block, for every wiring."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.config import BlockConfig
from hooklens.hooks import Call, HookPoint
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.attention import Attention, HeadInput
from hooklens.model.declared import When, inner, point
from hooklens.model.mlp import MLP
from hooklens.model.norm import STREAM, Norm, norm
from hooklens.model.part import Part, find_part
from hooklens.model.positions import TokenPlan

_NORMS_BEFORE = When(lambda block: block.cfg.norm_before, "it has no norms before its branches")
_NORMS_AFTER = When(lambda block: block.cfg.norm_after, "it has no norms after its branches")
_OWN_MLP_NORM = When(
    lambda block: block.cfg.norm_before and not block.cfg.shared_norm, "its MLPs have no norm of their own"
)
_SEQUENTIAL = When(lambda block: block.cfg.wiring == "sequential", "its blocks are parallel")
_PER_HEAD, _PER_KV_HEAD = "batch pos head d_model", "batch pos kv_head d_model"


def _norm_of_attention(block: BlockConfig) -> str | None:
    return "ln1" if block.cfg.norm_before else None


def _norm_of_mlp(block: BlockConfig) -> str | None:
    return "ln2" if _OWN_MLP_NORM.holds(block) else _norm_of_attention(block)


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

    In every wiring `resid_post = resid_pre + attn_out + mlp_out`.
    """

    # The stream enters as the very tensor that left the block below.
    hook_resid_pre: HookPoint = point(STREAM, "the stream entering the block", shared=True)
    hook_attn_in: HookPoint = point(
        _PER_HEAD,
        "stream entering attention, a copy per head, before the norm; a key-value head reads the mean of the copies of "
        "its query heads",
        on_request=True,
    )
    hook_q_input: HookPoint = point(
        _PER_HEAD, "stream entering the queries, a copy per head, before the norm", on_request=True
    )
    hook_k_input: HookPoint = point(
        _PER_KV_HEAD, "stream entering the keys, a copy per key-value head, before the norm", on_request=True
    )
    hook_v_input: HookPoint = point(
        _PER_KV_HEAD, "stream entering the values, a copy per key-value head, before the norm", on_request=True
    )
    ln1: Norm | None = norm("norm before attention", when=_NORMS_BEFORE)
    attn: Attention = inner(
        lambda block: find_part("blocks.{i}.attn", block.attn),
        lambda block: block.of(block.attn),
        reads=_norm_of_attention,
    )
    ln1_post: Norm | None = norm("norm after attention", when=_NORMS_AFTER)
    hook_attn_out: HookPoint = point(STREAM, "what attention adds to the stream")
    hook_resid_mid: HookPoint = point(STREAM, "the stream between attention and MLP", when=_SEQUENTIAL)
    # The skip connection reads the same tensor.
    hook_mlp_in: HookPoint = point(
        STREAM, "stream entering the MLP, before the norm; an edit reaches the MLP only", shared=True
    )
    ln2: Norm | None = norm("norm before the MLP", when=_OWN_MLP_NORM)
    mlp: MLP = inner(
        lambda block: find_part("blocks.{i}.mlp", block.mlp), lambda block: block.of(block.mlp), reads=_norm_of_mlp
    )
    ln2_post: Norm | None = norm("norm after the MLP", when=_NORMS_AFTER)
    hook_mlp_out: HookPoint = point(STREAM, "what the MLP adds to the stream")
    hook_resid_post: HookPoint = point(STREAM, "the stream leaving the block")

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        self.is_parallel = self.cfg.wiring == "parallel"

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
        attn_out, normed = self._run_attention(resid_pre, plan, call, entry)
        if wanted is not None:
            resid_pre, attn_out = resid_pre[wanted][:, None], attn_out[wanted][:, None]
            normed = None if normed is None else normed[wanted][:, None]
            call = call.on(plan.choose_tokens(*wanted))
        if self.is_parallel:
            mlp_out = self._run_mlp(resid_pre, normed, call)
            return self.hook_resid_post(resid_pre + attn_out + mlp_out, call)
        resid_mid = self.hook_resid_mid(resid_pre + attn_out, call)
        # The MLP is where a block needs most memory.
        del attn_out, normed, resid_pre, resid
        return self.hook_resid_post(resid_mid + self._run_mlp(resid_mid, None, call), call)

    def _run_attention(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        plan: TokenPlan,
        call: Call,
        entry: HookedKeyValueCacheEntry | None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"] | None]:
        """What attention adds to the stream, and the normed stream where the MLP reads it, too."""
        normed = resid_pre if self.ln1 is None else self.ln1(resid_pre, call)
        q_input, k_input, v_input = self._head_inputs(resid_pre, normed, call)
        attn_out = self.attn(q_input, k_input, v_input, plan, call, entry)
        if self.ln1_post is not None:
            attn_out = self.ln1_post(attn_out, call)
        return self.hook_attn_out(attn_out, call), normed if self.cfg.shared_norm else None

    def _run_mlp(self, resid: Tensor, normed: Tensor | None, call: Call) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the stream; with a shared norm, `normed` is the output of `ln1`."""
        mlp_in, edited = resid, False
        if self.hook_mlp_in.listens(call):
            mlp_in, edited = self.hook_mlp_in.watch(resid, call)
        if self.ln2 is not None:
            mlp_in = self.ln2(mlp_in, call)
        elif normed is not None:
            mlp_in = self._renorm(mlp_in, resid, normed, call) if edited else normed
        mlp_out = self.mlp(mlp_in, call)
        if self.ln2_post is not None:
            mlp_out = self.ln2_post(mlp_out, call)
        return self.hook_mlp_out(mlp_out, call)

    def _head_inputs(self, resid: Tensor, normed: Tensor, call: Call) -> tuple[HeadInput, HeadInput, HeadInput]:
        """What queries, keys and values read: the normed stream, or where a listener changed it, copies per head."""
        points = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        listens = [one.listens(call) for one in points]
        all_listen = self.hook_attn_in.listens(call)
        if not (all_listen or any(listens)):
            return normed, normed, normed
        n_heads, n_kv_heads = self.cfg.n_heads, self.cfg.n_kv_heads
        attn_in, all_changed = None, False
        if all_listen:
            attn_in, all_changed = self.hook_attn_in.watch(_copy_per_head(resid, n_heads), call)
        inputs: list[HeadInput] = []
        for entrance, listened, heads in zip(points, listens, (n_heads, n_kv_heads, n_kv_heads), strict=True):
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

    def _renorm(self, changed: Tensor, resid: Tensor, normed: Tensor, call: Call) -> Tensor:
        """The norm of a changed copy of the stream; `ln1` has already fired on the stream itself.

        With listeners inside `ln1`, what they made of its output is added, so that an edit or a gradient there
        still counts; if they only watched, that is exactly nothing.
        """
        if self.ln1 is None:
            return changed
        renormed = self.ln1.apply_weights(changed)
        if not self.ln1.listens(call):
            return renormed
        made_by_listeners = _like(normed, changed) - _like(self.ln1.apply_weights(resid), changed)
        return renormed + made_by_listeners


def _copy_per_head(resid: Tensor, n_heads: int) -> Float[Tensor, "batch pos heads d_model"]:
    # Real copies: an expanded view could not be edited in place.
    return resid[:, :, None].repeat(1, 1, n_heads, 1)


def _like(stream: Tensor, copies: Tensor) -> Tensor:
    return stream[:, :, None] if copies.ndim == 4 else stream
