"""Faults of positions, of what queries see, and of the loss."""

from tests.verification.mutation import Mutant

CHOICES = "positions and layers"

POSITIONS = (
    Mutant(
        "rotary is wrong past position 32",
        "model.attention.rotary:RotaryTables._compute_table",
        (
            (
                "torch.arange(n_positions, device=device).float()",
                "torch.arange(n_positions, device=device).float().clamp(max=32)",
            ),
        ),
        "interleaved",
    ),
    Mutant(
        "heads turn the other way",
        "model.attention.rotary:RotaryTables._turn",
        (("swapped, signed_sin)", "swapped, -signed_sin)"),),
        "interleaved",
    ),
    Mutant(
        "pairs are those of the other layout",
        "model.attention.rotary:RotaryTables._turn",
        (('if self.positions.layout == "half":', 'if self.positions.layout != "half":'),),
        "interleaved",
    ),
    Mutant(
        "entries that stand still are scaled",
        "model.attention.rotary:RotaryTables.rotate",
        (("table), still), -1)", "table), 1.01 * still), -1)"),),
        "interleaved",
    ),
    Mutant(
        "cached positions are off by one",
        "model.attention.rotary:RotaryTables._look_up",
        (
            (
                "columns = slice(plan.n_past, n_positions)",
                "off = min(plan.n_past, 1)\n        columns = slice(plan.n_past - off, n_positions - off)",
            ),
        ),
        "interleaved",
    ),
    Mutant(
        "padded rows get each other's angles",
        "model.attention.rotary:RotaryTables._look_up",
        (("positions = plan.positions", "positions = plan.positions.flip(0)"),),
        "interleaved",
    ),
    Mutant(
        "frequencies fall too slowly",
        "model.attention.rotary:rotary_frequencies",
        ((".float() / positions.dim", ".float() / (positions.dim + 1)"),),
        "interleaved",
    ),
    Mutant(
        "linear scaling multiplies",
        "model.attention.rotary:rotary_frequencies",
        (("return plain / scaling.factor, 1.0", "return plain * scaling.factor, 1.0"),),
        "rotary-linear",
    ),
    Mutant(
        "waves between long and short are not mixed but extrapolated",
        "model.attention.rotary:_llama3_frequencies",
        (("share = share.clamp(0, 1)", "share = share.clamp(0, 2)"),),
        "rotary-llama3",
    ),
    Mutant(
        "the base of dynamic scaling grows too slowly",
        "model.attention.rotary:_dynamic_frequencies",
        (("stretch ** (positions.dim / (positions.dim - 2))", "stretch"),),
        "rotary-dynamic",
    ),
    Mutant(
        "YaRN stretches the short waves",
        "model.attention.rotary:_yarn_frequencies",
        (("ramp / (scaling.factor * wave) + (1 - ramp) / wave", "(1 - ramp) / (scaling.factor * wave) + ramp / wave"),),
        "rotary-yarn",
    ),
    Mutant(
        "YaRN's factor on cosines is too large",
        "model.attention.rotary:_yarn_amplitude",
        (("0.1 * mscale", "0.2 * mscale"),),
        "rotary-yarn",
    ),
    Mutant(
        "padded rows begin at position 1",
        "model.plan.positions:TokenPlan._count_tokens",
        (("(self.key_mask.cumsum(1) - 1)", "self.key_mask.cumsum(1)"),),
    ),
    Mutant(
        "positions after a cache are off by one",
        "model.plan.positions:TokenPlan.positions",
        (
            (
                "torch.arange(self.n_past, self.n_keys, device=self.device)[None]",
                "torch.arange(self.n_past, self.n_keys, device=self.device)[None] - min(self.n_past, 1)",
            ),
        ),
    ),
    Mutant(
        "padding counts as distance in a window",
        "model.plan.positions:TokenPlan._place_keys",
        (
            (
                "return (self.key_mask.cumsum(1) - 1).clamp(min=0) * self.key_mask",
                "return torch.arange(self.n_keys, device=self.device)[None].expand_as(self.key_mask)",
            ),
        ),
        "windows",
    ),
    Mutant(
        "padding in the cache is forgotten",
        "model.plan.positions:TokenPlan._join_masks",
        (
            (
                "torch.cat([past.expand(self.batch, -1), new], dim=1)",
                "torch.cat([past.expand(self.batch, -1) | True, new], dim=1)",
            ),
        ),
    ),
    Mutant(
        "logits_at=-1 reads -2",
        "model.plan.positions:TokenPlan.choose_columns",
        (("return ChosenColumns(self, chosen)", "return ChosenColumns(self, [max(one - 1, 0) for one in chosen])"),),
        stage=CHOICES,
    ),
    Mutant(
        "logits_at=-1 reads -2 in padded rows",
        "model.plan.positions:TokenPlan.choose_columns",
        (("rows.append(real[places])", "rows.append(real[[max(place - 1, 0) for place in places]])"),),
        stage=CHOICES,
    ),
    Mutant(
        "a token sees the next one where there is a mask",
        "model.plan.visibility:Causal.hide",
        (("(key > query)", "(key > query + 1)"),),
    ),
    Mutant(
        "of two new tokens the first sees the second",
        "model.plan.visibility:Causal.acts",
        (("sides.n_new > 1", "sides.n_new > 2"),),
    ),
    Mutant(
        "a window is one too wide",
        "model.plan.visibility:Window.hide",
        (("key <= query - self.size", "key < query - self.size"),),
        "windows",
    ),
    Mutant(
        "a window of the layer is forgotten for the last query",
        "model.plan.visibility:Window.acts",
        (("self.size < max(", "self.size + 1 < max("),),
        "windows-of-19",
    ),
    Mutant(
        "padding is seen",
        "model.plan.visibility:Padding.hide",
        (("    return ~sides.key_mask[:, None, None", "    return ~(sides.key_mask | True)[:, None, None"),),
    ),
    Mutant(
        "padding in a frozen prefix is seen",
        "model.plan.visibility:Padding.hide",
        (("    return ~sides.past_mask[:, None, None", "    return ~(sides.past_mask | True)[:, None, None"),),
    ),
    Mutant(
        "the loss of padded rows is a mean over all columns",
        "model.loss:next_token_loss",
        (
            (
                "F.cross_entropy(*flat, ignore_index=_PREDICTS_NOTHING)",
                "F.cross_entropy(*flat, ignore_index=_PREDICTS_NOTHING, reduction='sum') / padded.numel()",
            ),
        ),
        stage="loss",
    ),
    Mutant(
        "a token behind padding is predicted by the padding",
        "model.loss:_predict_from_real",
        (("torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)", "(column - 1).expand_as(latest)"),),
        stage="loss",
    ),
)
