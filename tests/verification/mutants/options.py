"""Faults of options of attention and positions: sinks, clipping, norms of heads, positions in heads, long sequences."""

from tests.verification.mutation import Mutant

EDITS = "single edits"

OPTIONS = (
    Mutant(
        "sinks take the share of the keys",
        "model.attention.attend:_merge_all",
        (("torch.sigmoid(total - logits)", "torch.sigmoid(logits - total)"),),
        "sinks",
    ),
    Mutant(
        "the shown pattern leaves the sinks out",
        "model.attention.attention:Attention._watch_pattern",
        (("can_hide_all=can_hide_all, sinks=sinks", "can_hide_all=can_hide_all"),),
        "sinks",
    ),
    Mutant(
        "the gradient of attention leaves the sinks out of the softmax",
        "model.attention.attend:_merge_all",
        (("    total = torch.logaddexp(total, logits)", "    total = total + 0.0"),),
        "sinks",
        "gradients",
    ),
    Mutant(
        "keys are not clipped",
        "model.attention.attention:Attention.forward",
        (("k.clamp(-self.clip, self.clip)", "k"),),
        "qk-norm-over-all-heads",
    ),
    Mutant(
        "values are clipped on one side",
        "model.attention.attention:Attention.project",
        (("heads.clamp(-self.clip, self.clip)", "heads.clamp(max=self.clip)"),),
        "qk-norm-over-all-heads",
    ),
    Mutant(
        "edited copies of keys are not clipped",
        "model.attention.attention:Attention._place_keys",
        (("k = k.clamp(-self.clip, self.clip)", "k = k + 0"),),
        "qk-norm-over-all-heads",
        EDITS,
    ),
    Mutant(
        "a norm over all heads goes over each",
        "model.attention.head_norm:HeadNorm.apply_weights",
        (("x.shape[axis] for axis in self._axes", "x.shape[axis] for axis in self._axes[-1:]"),),
        "qk-norm-over-all-heads",
    ),
    Mutant(
        "copies of keys have the weights of other heads",
        "model.attention.head_norm:_like",
        (("weight.repeat_interleave(copies, 0)", "weight.repeat(copies, 1)"),),
        "qk-norm-over-all-heads",
        EDITS,
    ),
    Mutant(
        "an edited denominator is lost",
        "model.attention.head_norm:HeadNorm._forward_watched",
        (("scale, changed = self.hook_scale.watch(scale, call)", "self.hook_scale.watch(scale.clone(), call)"),),
        "qk-norm-per-head-after-rotary",
        EDITS,
    ),
    Mutant(
        "a norm behind the rotation stands before it, too",
        "model.attention.attention:Attention.forward",
        (("if not self.norms_last and self.q_norm", "if self.q_norm"),),
        "qk-norm-per-head-after-rotary",
    ),
    Mutant(
        "temperatures forget the positions before a cache's end",
        "model.attention.attention:Attention._temperature",
        (("plan.positions + kind.offset", "plan.positions - plan.n_past + kind.offset"),),
        "qk-norm-per-head-after-rotary",
    ),
    Mutant(
        "values read positions, too",
        "model.attention.attention:Attention.project",
        (('pos_embed is not None and letter != "v"', "pos_embed is not None"),),
        "shortformer",
    ),
    Mutant(
        "an edit of positions in heads is lost",
        "model.attention.attention:Attention.project",
        (("if positions is None:", "if True:"),),
        "shortformer",
        EDITS,
    ),
    Mutant(
        "sinusoidal positions count from 0",
        "model.embed:SinusoidalPosEmbed.forward",
        (("(positions + kind.offset)", "positions"),),
        "sinusoidal",
    ),
    Mutant(
        "the longest wave of sinusoidal positions is too short",
        "model.embed:SinusoidalPosEmbed.forward",
        (("n_pairs - 1 if kind.includes_base else n_pairs", "n_pairs"),),
        "sinusoidal",
    ),
    Mutant(
        "chunks begin one position late",
        "model.plan.visibility:Chunk.hide",
        (
            (
                "sides.key_positions[:, None, None, :] // self.size",
                "(sides.key_positions[:, None, None, :] - 1) // self.size",
            ),
        ),
        "sinusoidal",
    ),
    Mutant(
        "long sequences turn as short ones do",
        "model.attention.rotary:_longrope_frequencies",
        (("scaling.long_factors if is_long else", "scaling.short_factors if is_long else"),),
        "rotary-longrope",
    ),
    Mutant(
        "longrope's factor on cosines grows with the length",
        "model.attention.rotary:_longrope_amplitude",
        (("1 + math.log(scaling.factor) /", "1 + 2 * math.log(scaling.factor) /"),),
        "rotary-longrope",
    ),
)
