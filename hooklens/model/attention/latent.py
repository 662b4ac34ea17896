"""Multi-head latent attention: queries, keys and values made of narrow latents of the stream."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import BlockConfig, MLAConfig
from hooklens.hooks import Call, HookPoint
from hooklens.hooks.foreign import Placed
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.attention.attention import Attention
from hooklens.model.attention.heads import HeadSource, project_heads
from hooklens.model.norm import Norm, norm
from hooklens.model.parts.adapted import Adapted
from hooklens.model.parts.declared import When, point, weight
from hooklens.model.parts.part import apply_linear
from hooklens.model.plan.positions import TokenPlan


def latent_of(block: BlockConfig) -> MLAConfig:
    """The description of a layer's latent attention."""
    attn = block.attn
    assert isinstance(attn, MLAConfig)
    return attn


_Q_LATENT = When(lambda block: latent_of(block).q_rank is not None, "its queries read the stream, through W_Q")
_Q_DIRECT = When(
    lambda block: latent_of(block).q_rank is None, "its queries are made of a latent, which W_DQ reads and W_UQ maps"
)
_NO_W_K = When(lambda block: False, "its keys are made of a latent, which W_DKV reads and W_UK maps, and of x W_KR")
_NO_W_V = When(lambda block: False, "its values are made of a latent, which W_DKV reads and W_UV maps")
_BIASED = "it has no bias there"
_Q_BIASED = When(lambda block: block.has_bias("q"), _BIASED)
_DQ_BIASED = When(lambda block: True, "", _Q_LATENT, _Q_BIASED)
_DIRECT_BIASED = When(lambda block: True, "", _Q_DIRECT, _Q_BIASED)
_KV_BIASED = When(lambda block: block.has_bias("k"), _BIASED)
_OF_HEAD_V = "batch pos head d_head_v"


class LatentAttention(Attention, kind="mla"):
    r"""Multi-head latent attention (Liu et al. 2024, arXiv:2405.04434, section 2.1); see `MLAConfig`.

        x -- W_DQ -- hook_q_latent -- q_latent_norm -- W_UQ -- hook_q -- [rotary, hook_rot_q] --------\
        x -- W_DKV - hook_kv_latent - kv_latent_norm - W_UK - \                                         scores - ...
        x -- W_KR -- hook_k_rope ---------------------------- hook_k -- [rotary, hook_rot_k] ----------/
                                      kv_latent_norm - W_UV -- hook_v ----------------------------------- hook_z -- W_O

    From there on it is any other attention, whose values have a width of their own. Every head's key begins with a copy
    of `hook_k_rope`, the entries that turn; the key-value cache holds keys and values, not latents.

    Copies of the stream for single heads (`hook_q_input`, ...) that somebody changed have latents of their own, which
    no point shows: the points of the latents show those of the stream itself, and what is changed there is added to
    the changed copies' latents, too.
    """

    q_down_proj: nn.Linear
    q_up_proj: nn.Linear
    kv_down_proj: nn.Linear
    k_rope_proj: nn.Linear
    k_up_proj: nn.Linear
    v_up_proj: nn.Linear
    W_DQ: Float[Tensor, "d_model d_q_latent"] = weight(
        "d_model d_q_latent", "d_q_latent d_model", module="q_down_proj", reads=True, bias="b_DQ", when=_Q_LATENT
    )
    b_DQ: Float[Tensor, " d_q_latent"] | None = weight("d_q_latent", module="q_down_proj", when=_DQ_BIASED)
    W_UQ: Float[Tensor, "head d_q_latent d_head"] = weight(
        "head d_q_latent d_head", "(head d_head) d_q_latent", module="q_up_proj", when=_Q_LATENT
    )
    W_Q: Float[Tensor, "head d_model d_head"] = weight(
        "head d_model d_head", "(head d_head) d_model", module="q_proj", reads=True, bias="b_Q", when=_Q_DIRECT
    )
    b_Q: Float[Tensor, "head d_head"] | None = weight(
        "head d_head", "(head d_head)", module="q_proj", when=_DIRECT_BIASED
    )
    W_DKV: Float[Tensor, "d_model d_kv_latent"] = weight(
        "d_model d_kv_latent", "d_kv_latent d_model", module="kv_down_proj", reads=True, bias="b_DKV"
    )
    b_DKV: Float[Tensor, " d_kv_latent"] | None = weight("d_kv_latent", module="kv_down_proj", when=_KV_BIASED)
    W_KR: Float[Tensor, "d_model d_rope"] = weight(
        "d_model d_rope", "d_rope d_model", module="k_rope_proj", reads=True, bias="b_KR"
    )
    b_KR: Float[Tensor, " d_rope"] | None = weight("d_rope", module="k_rope_proj", when=_KV_BIASED)
    W_UK: Float[Tensor, "head d_kv_latent d_nope"] = weight(
        "head d_kv_latent d_nope", "(head d_nope) d_kv_latent", module="k_up_proj"
    )
    W_UV: Float[Tensor, "head d_kv_latent d_head_v"] = weight(
        "head d_kv_latent d_head_v", "(head d_head_v) d_kv_latent", module="v_up_proj"
    )
    W_K = weight("kv_head d_model d_head", module="k_proj", when=_NO_W_K)
    b_K = weight("kv_head d_head", module="k_proj", when=_NO_W_K)
    W_V = weight("kv_head d_model d_head", module="v_proj", when=_NO_W_V)
    b_V = weight("kv_head d_head", module="v_proj", when=_NO_W_V)
    W_O: Float[Tensor, "head d_head_v d_model"] = weight(
        "head d_head_v d_model", "d_model (head d_head_v)", module="o_proj", writes=True, bias="b_O"
    )

    hook_q_latent: HookPoint = point(
        "batch pos d_q_latent", "what queries are made of, before its norm", when=_Q_LATENT
    )
    q_latent_norm: Norm | None = norm(
        "norm of the latent of queries",
        axes="batch pos d_q_latent",
        kind=lambda block: latent_of(block).norm,
        when=_Q_LATENT,
    )
    hook_kv_latent: HookPoint = point("batch pos d_kv_latent", "what keys and values are made of, before its norm")
    kv_latent_norm: Norm = norm(
        "norm of the latent of keys and values",
        axes="batch pos d_kv_latent",
        kind=lambda block: latent_of(block).norm,
    )
    hook_k_rope: HookPoint = point("batch pos d_rope", "what turns of the keys, the same for all heads; before rotary")
    hook_q, hook_k = Attention.hook_q, Attention.hook_k
    hook_v: HookPoint = point("batch pos kv_head d_head_v", "values, as attended to and cached")
    hook_rot_q, hook_rot_k = Attention.hook_rot_q, Attention.hook_rot_k
    hook_attn_scores, hook_pattern = Attention.hook_attn_scores, Attention.hook_pattern
    hook_z: HookPoint = point(_OF_HEAD_V, "pattern-weighted values")

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        self.latent = latent_of(block)

    def forward(
        self,
        q_input: HeadSource,
        k_input: HeadSource,
        v_input: HeadSource,
        plan: TokenPlan,
        call: Call,
        entry: HookedKeyValueCacheEntry | None = None,
        normed: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the stream.

        Args:
            q_input, k_input, v_input, plan, call, entry: as in any attention.
            normed: the normed stream, whose latents the hook points show. None: it is `v_input`; where that is copies
                for single heads, the points of the latents do not fire.
        """
        stream = v_input if normed is None and v_input.ndim == 3 else normed
        shown: dict[str, Tensor] = {}

        def compress(which: str, x: Tensor) -> Tensor:
            """A latent of the stream, as its point shows it, or of something else."""
            if stream is None:
                return self._compress(which, x, call)
            if which not in shown:
                shown[which] = self._show(which, stream, call)
            if x is stream:
                return shown[which]
            own = self._compress(which, x, call)
            if not self._listens(which, call):
                return own
            made_by_listeners = shown[which] - self._compress(which, stream, call)
            return own + (made_by_listeners if x.ndim == 3 else made_by_listeners[:, :, None])

        if self.latent.q_rank is not None:
            q_input = compress("q", q_input)
        of_keys, of_values = compress("kv", k_input), compress("kv", v_input)
        k_input = torch.cat([compress("rope", k_input), of_keys], -1)
        return super().forward(q_input, k_input, of_values, plan, call, entry)

    def project(
        self, letter: str, x: HeadSource, plan: TokenPlan, call: Call | None = None
    ) -> Float[Tensor, "batch pos heads width"]:
        """What enters `hook_q`, `hook_k` or `hook_v`, from the latents."""
        return self._project_latent(letter, x, call)

    def project_stream(self, letter: str, normed: HeadSource, call: Call) -> Float[Tensor, "batch pos heads width"]:
        """What enters `hook_q`, `hook_k` or `hook_v` where all heads, or each, read a stream; no point fires."""
        if letter == "q":
            latent = normed if self.latent.q_rank is None else self._compress("q", normed, call)
            return self._project_latent("q", latent)
        of_both = self._compress("kv", normed, call)
        if letter == "k":
            of_both = torch.cat([self._compress("rope", normed, call), of_both], -1)
        return self._project_latent(letter, of_both)

    def _project_latent(self, letter: str, x: HeadSource, call: Call | None = None) -> Tensor:
        """Heads of the latent of queries or values; of keys, behind what turns of them."""
        latent = self.latent
        if letter == "q":
            module = "q_proj" if latent.q_rank is None else "q_up_proj"
            return project_heads(x, self._modules[module], latent.d_head, call)
        if letter == "v":
            return project_heads(x, self._modules["v_up_proj"], latent.d_head_v, call)
        turning, of_keys = torch.split_with_sizes(x, [latent.d_rope, latent.kv_rank], -1)
        still = project_heads(of_keys, self._modules["k_up_proj"], latent.d_nope, call)
        turning = turning if x.ndim == 4 else turning[:, :, None]
        return torch.cat([turning.expand(*still.shape[:3], -1), still], -1)

    def _compress(self, which: str, x: HeadSource, call: Call) -> Tensor:
        """A latent behind its norm (`"q"`, `"kv"`), or what turns of the keys (`"rope"`); no point fires."""
        if which == "rope":
            return apply_linear(self._modules["k_rope_proj"], x)
        made = apply_linear(self._modules[f"{which}_down_proj"], x)
        return self._point_and_norm(which)[1].apply_beside(made, call)

    def _show(self, which: str, stream: Float[Tensor, "batch pos d_model"], call: Call) -> Tensor:
        """The same, as listeners leave it."""
        if which == "rope":
            return self.hook_k_rope(apply_linear(self._modules["k_rope_proj"], stream, call), call)
        point, norm = self._point_and_norm(which)
        out: Tensor = norm(point(apply_linear(self._modules[f"{which}_down_proj"], stream, call), call), call)
        return out

    def _listens(self, which: str, call: Call) -> bool:
        """Whether somebody listens where a latent, or what turns of the keys, is shown."""
        linear = self._modules["k_rope_proj" if which == "rope" else f"{which}_down_proj"]
        if isinstance(linear, Adapted) and linear.listens(call):
            return True
        if which == "rope":
            return self.hook_k_rope.listens(call)
        point, norm = self._point_and_norm(which)
        return point.listens(call) or norm.listens(call)

    def _point_and_norm(self, which: str) -> tuple[HookPoint | Placed, Norm | Placed]:
        """Where a latent is shown, and its norm."""
        if which == "kv":
            return self.hook_kv_latent, self.kv_latent_norm
        assert self.q_latent_norm is not None
        return self.hook_q_latent, self.q_latent_norm
