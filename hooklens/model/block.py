"""One transformer block, for every wiring."""

from jaxtyping import Float, Int
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.hooks import HookedModule, HookPoint
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.attention import Attention, HeadInput
from hooklens.model.mlp import MLP
from hooklens.model.norm import Norm
from hooklens.model.positions import TokenPlan
from hooklens.model.rotary import CosSin, RotaryTables


class Block(HookedModule):
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

    def __init__(self, cfg: HookedConfig, layer: int, rotary: RotaryTables | None) -> None:
        super().__init__()
        self.cfg = cfg
        # The stream enters as the very tensor that left the block below.
        self.hook_resid_pre = HookPoint(shared=True)
        self.hook_attn_in = HookPoint()
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.ln1 = Norm(cfg.norm, cfg.d_model) if cfg.norm_before else None
        self.attn = Attention(cfg, layer, rotary)
        self.ln1_post = Norm(cfg.norm, cfg.d_model) if cfg.norm_after else None
        self.hook_attn_out = HookPoint()
        self.is_parallel = cfg.wiring == "parallel"
        if not self.is_parallel:
            self.hook_resid_mid = HookPoint()
        # The skip connection reads the same tensor.
        self.hook_mlp_in = HookPoint(shared=True)
        self.ln2 = Norm(cfg.norm, cfg.d_model) if cfg.norm_before and not cfg.shared_norm else None
        self.mlp = MLP(cfg)
        self.ln2_post = Norm(cfg.norm, cfg.d_model) if cfg.norm_after else None
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        plan: TokenPlan,
        rotary_table: CosSin | None,
        entry: HookedKeyValueCacheEntry | None = None,
        *,
        wanted: tuple[Int[Tensor, " token"], Int[Tensor, " token"]] | None = None,
    ) -> Float[Tensor, "some_batch some_pos d_model"]:
        """The stream leaving the block.

        Args:
            resid: the stream entering it.
            plan: the tokens of this call.
            rotary_table: cosines and sines of this call's positions.
            entry: this layer's past keys and values.
            wanted: rows and columns of the tokens whose stream is wanted; `[token 1 d_model]` comes back. The MLP
                runs for these only, so all points after attention see no others.
        """
        resid_pre = self.hook_resid_pre(resid)
        attn_out, normed = self._run_attention(resid_pre, plan, rotary_table, entry)
        if wanted is not None:
            resid_pre, attn_out = resid_pre[wanted][:, None], attn_out[wanted][:, None]
            normed = None if normed is None else normed[wanted][:, None]
        if self.is_parallel:
            mlp_out = self._run_mlp(resid_pre, normed)
            return self.hook_resid_post(resid_pre + attn_out + mlp_out)
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        # The MLP is where a block needs most memory.
        del attn_out, normed
        return self.hook_resid_post(resid_mid + self._run_mlp(resid_mid, None))

    def _run_attention(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        plan: TokenPlan,
        rotary_table: CosSin | None,
        entry: HookedKeyValueCacheEntry | None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"] | None]:
        """What attention adds to the stream, and the normed stream where the MLP reads it, too."""
        normed = resid_pre if self.ln1 is None else self.ln1(resid_pre)
        q_input, k_input, v_input = self._head_inputs(resid_pre, normed)
        attn_out = self.attn(q_input, k_input, v_input, plan, rotary_table, entry)
        if self.ln1_post is not None:
            attn_out = self.ln1_post(attn_out)
        return self.hook_attn_out(attn_out), normed if self.cfg.shared_norm else None

    def _run_mlp(self, resid: Tensor, normed: Tensor | None) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the stream; with a shared norm, `normed` is the output of `ln1`."""
        mlp_in, edited = self.hook_mlp_in.watch(resid) if self.hook_mlp_in.listening else (resid, False)
        if self.ln2 is not None:
            mlp_in = self.ln2(mlp_in)
        elif self.cfg.shared_norm and normed is not None:
            mlp_in = self._renorm(mlp_in, resid, normed) if edited else normed
        mlp_out = self.mlp(mlp_in)
        if self.ln2_post is not None:
            mlp_out = self.ln2_post(mlp_out)
        return self.hook_mlp_out(mlp_out)

    def _head_inputs(self, resid: Tensor, normed: Tensor) -> tuple[HeadInput, HeadInput, HeadInput]:
        """What queries, keys and values read: the normed stream, or where a listener changed it, copies per head."""
        points = (self.hook_attn_in, self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if not (points[0].listening or points[1].listening or points[2].listening or points[3].listening):
            return normed, normed, normed
        n_heads, n_kv_heads = self.cfg.n_heads, self.cfg.n_kv_heads
        attn_in, all_changed = None, False
        if self.hook_attn_in.listening:
            attn_in, all_changed = self.hook_attn_in.watch(_copy_per_head(resid, n_heads))
        inputs: list[HeadInput] = []
        for point, heads in zip(points[1:], (n_heads, n_kv_heads, n_kv_heads), strict=True):
            changed = False
            if all_changed and attn_in is not None:
                copies = attn_in.view(*attn_in.shape[:2], heads, -1, attn_in.shape[3]).mean(3)
            elif point.listening:
                copies = _copy_per_head(resid, heads)
            else:
                inputs.append(normed)
                continue
            if point.listening:
                copies, changed = point.watch(copies)
            inputs.append(self._renorm(copies, resid, normed) if changed or all_changed else normed)
        return inputs[0], inputs[1], inputs[2]

    def _renorm(self, changed: Tensor, resid: Tensor, normed: Tensor) -> Tensor:
        """The norm of a changed copy of the stream; `ln1` has already fired on the stream itself.

        With listeners inside `ln1`, what they made of its output is added, so that an edit or a gradient there
        still counts; if they only watched, that is exactly nothing.
        """
        if self.ln1 is None:
            return changed
        renormed = self.ln1.apply_weights(changed)
        if not self.ln1.listening:
            return renormed
        made_by_listeners = _like(normed, changed) - _like(self.ln1.apply_weights(resid), changed)
        return renormed + made_by_listeners


def _copy_per_head(resid: Tensor, n_heads: int) -> Float[Tensor, "batch pos heads d_model"]:
    # Real copies: an expanded view could not be edited in place.
    return resid[:, :, None].repeat(1, 1, n_heads, 1)


def _like(stream: Tensor, copies: Tensor) -> Tensor:
    return stream[:, :, None] if copies.ndim == 4 else stream
