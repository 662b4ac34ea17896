"""Faults of attention: kernels, heads, patterns, linear biases."""

from tests.verification.mutation import Mutant

EDITS = "single edits"

ATTENTION = (
    Mutant(
        "the scores that are shown have another scale",
        "model.attention.attend:compute_scores",
        (("alpha=score_scale)", "alpha=1.01 * score_scale)"),),
    ),
    Mutant(
        "the cap of the shown scores is not on the argument",
        "model.attention.attend:compute_scores",
        (("torch.tanh(scores / softcap)", "torch.tanh(scores)"),),
        "attn-softcap",
    ),
    Mutant(
        "shown scores with a linear bias lose the mask",
        "model.attention.attend:compute_scores",
        (("return scores if mask is None else scores + mask", "return scores"),),
        "alibi",
    ),
    Mutant(
        "the shown pattern sums to 1 over queries",
        "model.attention.attend:compute_pattern",
        (("torch.softmax(scores, -1,", "torch.softmax(scores, -2,"),),
    ),
    Mutant(
        "z from a changed pattern has its heads reversed",
        "model.attention.attend:weigh_values",
        (("v.shape[3]).transpose(1, 2)", "v.shape[3]).transpose(1, 2).flip(2)"),),
        stage=EDITS,
    ),
    Mutant(
        "copies for query heads alternate over key-value heads",
        "model.attention.attend:repeat_heads",
        (("heads.repeat_interleave(n_heads // n_kv_heads, dim=2)", "heads.repeat(1, 1, n_heads // n_kv_heads, 1)"),),
        "qk-rms-norm",
    ),
    Mutant(
        "prefix and suffix are merged without their log-sums",
        "model.attention.attend:_weigh",
        (("torch.sigmoid(log_ratio)", "torch.full_like(log_ratio, 0.5)"),),
    ),
    Mutant(
        "prefix and suffix are merged with the shares swapped",
        "model.attention.attend:_merge_all",
        (("total - log_sum", "log_sum - total"),),
    ),
    Mutant(
        "rows on a shared prefix get each other's results",
        "model.attention.attend:_merge_all",
        (
            (
                "z = z.reshape(batch, n_query, n_heads, z.shape[-1])",
                "z = z.reshape(batch, n_query, n_heads, z.shape[-1]).flip(0)",
            ),
        ),
    ),
    Mutant(
        "the fused kernel has another scale",
        "model.attention.attend:attend",
        (("scale=score_scale,\n        enable_gqa", "scale=1.01 * score_scale,\n        enable_gqa"),),
    ),
    Mutant(
        "what a mask hides is seen a little",
        "model.attention.attend:additive_mask",
        (("masked_fill(padded, -torch.inf)", "masked_fill(padded, -3.0)"),),
    ),
    Mutant(
        "a query that sees no key of the prefix counts one",
        "model.attention.kernels:attend_to_part",
        (("== -torch.inf, NOTHING)", "== -torch.inf, 0.0)"),),
        "windows",
    ),
    Mutant(
        "capped attention sees what the mask hides",
        "model.attention.kernels:_attend_in_chunks",
        (("scores = scores + mask", "scores = scores + 0 * mask.clamp(min=-1)"),),
        "attn-softcap",
    ),
    Mutant(
        "the cap of the scores is not on the argument",
        "model.attention.kernels:_score",
        (("torch.tanh(scores / rule.softcap)", "torch.tanh(scores)"),),
        "attn-softcap",
    ),
    Mutant(
        "the gradient of capped scores is not that of the cap",
        "model.attention.kernels:_differentiate_in_chunks",
        (("(1 - (scores / rule.softcap).square())", "(1 - (scores / rule.softcap).abs())"),),
        "attn-softcap",
        "gradients",
    ),
    Mutant(
        "on a frozen prefix later tokens are seen",
        "model.attention.kernels:_FlashOnCpu.forward",
        (("q, k, v, 0.0, is_causal,", "q, k, v, 0.0, False,"),),
    ),
    Mutant(
        "folded query heads come back in another order",
        "model.attention.grouping:HeadCalls.join",
        (("members.transpose(2, 3).reshape(batch, rows // self.group", "members.reshape(batch, rows // self.group"),),
        "qk-rms-norm",
    ),
    Mutant(
        "shown scores are those of reversed heads",
        "model.attention.grouping:by_group",
        (("heads = x.transpose(1, 2)", "heads = x.flip(2).transpose(1, 2)"),),
    ),
    Mutant(
        "heads are taken in reverse",
        "model.attention.heads:project_heads",
        (
            (
                "return apply_linear(linear, flat, call).view(batch, n_pos, -1, d_head)",
                "return apply_linear(linear, flat, call).view(batch, n_pos, -1, d_head).flip(2)",
            ),
        ),
    ),
    Mutant(
        "edited copies per head lose the bias",
        "model.attention.heads:project_heads",
        (("return heads if bias is None else heads + bias.view(-1, d_head)", "return heads"),),
        stage=EDITS,
    ),
    Mutant(
        "hook_q shows the heads reversed",
        "model.attention.attention:Attention.forward",
        (
            (
                'self.hook_q(self.project("q", q_input, plan, call), call)',
                'self.hook_q(self.project("q", q_input, plan, call).flip(2), call).flip(2)',
            ),
        ),
    ),
    Mutant(
        "hook_k shows twice its value",
        "model.attention.attention:Attention.forward",
        (
            (
                'self.hook_k(self.project("k", k_input, plan, call), call)',
                'self.hook_k(2 * self.project("k", k_input, plan, call), call) / 2',
            ),
        ),
    ),
    Mutant(
        "hook_rot_k shows keys before they are turned",
        "model.attention.attention:Attention.forward",
        (
            (
                "self.hook_rot_k(self.rotary.rotate(k, table), call)",
                "self.rotary.rotate(self.hook_rot_k(k, call), table)",
            ),
        ),
        "interleaved",
    ),
    Mutant(
        "an edit at hook_v is lost for the last head",
        "model.attention.attention:Attention.forward",
        (
            (
                'v = self.hook_v(self.project("v", v_input, plan, call), call)',
                'v = self.project("v", v_input, plan, call)\n'
                "    v = torch.cat([self.hook_v(v.clone(), call)[:, :, :-1], v[:, :, -1:]], 2)",
            ),
        ),
        stage=EDITS,
    ),
    Mutant(
        "an edit at hook_z acts on head 0 only",
        "model.attention.attention:Attention.forward",
        (
            (
                "return self._write(self.hook_z(self._attend(q, k, v, plan, call, entry), call), call)",
                "z = self._attend(q, k, v, plan, call, entry)\n"
                "    return self._write(torch.cat([self.hook_z(z.clone(), call)[:, :, :1], z[:, :, 1:]], 2), call)",
            ),
        ),
        stage=EDITS,
    ),
    Mutant(
        "an edit at hook_k is lost for the first token",
        "model.attention.attention:Attention.forward",
        (
            (
                'k = self.hook_k(self.project("k", k_input, plan, call), call)',
                'k = self.project("k", k_input, plan, call)\n'
                "    k = torch.cat([k[:, :1], self.hook_k(k.clone(), call)[:, 1:]], 1)",
            ),
        ),
        stage=EDITS,
    ),
    Mutant(
        "hook_attn_scores shows twice its value",
        "model.attention.attention:Attention._watch_pattern",
        (
            (
                "scores, scores_changed = self.hook_attn_scores.watch(scores, call)",
                "scores, scores_changed = self.hook_attn_scores.watch(2 * scores, call)\n        scores = scores / 2",
            ),
        ),
    ),
    Mutant(
        "hook_pattern shows the heads reversed",
        "model.attention.attention:Attention._watch_pattern",
        (
            (
                "pattern, pattern_changed = self.hook_pattern.watch(pattern, call)",
                "pattern, pattern_changed = self.hook_pattern.watch(pattern.flip(1), call)\n"
                "        pattern = pattern.flip(1)",
            ),
        ),
    ),
    Mutant(
        "an edit at hook_attn_scores is lost",
        "model.attention.attention:Attention._watch_pattern",
        (("return pattern, scores_changed or pattern_changed", "return pattern, pattern_changed"),),
        stage=EDITS,
    ),
    Mutant(
        "each head's result is another head's map",
        "model.attention.attention:Attention._results",
        (("z, self.W_O)", "z, self.W_O.flip(0))"),),
    ),
    Mutant(
        "hook_result shows the heads reversed",
        "model.attention.attention:Attention._write",
        (("self.hook_result.watch(result, call)", "self.hook_result.watch(result.flip(2), call)"),),
    ),
    Mutant(
        "an edit at hook_result loses the output bias",
        "model.attention.attention:Attention._write",
        (("summed = summed if bias is None else summed + bias", "pass"),),
        stage=EDITS,
    ),
    Mutant(
        "a changed pattern weighs a frozen prefix's values in reverse",
        "model.attention.heads:join_past",
        (("return past.append(k, v)", "keys, values = past.append(k, v)\n        return keys, values.flip(1)"),),
        stage=EDITS,
    ),
    Mutant(
        "a changed copy of a key is not turned",
        "model.attention.attention:Attention._watch_per_head",
        (("keys = self._place_keys(copies, table, call)", "keys = copies"),),
        "qk-rms-norm",
        EDITS,
    ),
    Mutant(
        "what listeners made of a turned key is lost where a copy was changed",
        "model.attention.heads:EditedHeads.take_over",
        (("self.keys + repeat_heads(k - self.plain, self.keys.shape[2])", "self.keys"),),
        "qk-rms-norm",
        "pairs of edits",
    ),
    Mutant(
        "a changed copy of a value is lost",
        "model.attention.attention:Attention._watch_per_head",
        (("values = copies", "values = repeat_heads(v, n_heads)"),),
        "qk-rms-norm",
        EDITS,
    ),
    Mutant(
        "a scaled linear bias is not scaled where it is shown",
        "model.attention.alibi:alibi_term",
        (("return term * score_scale if alibi.scaled else term", "return term"),),
        "alibi-scaled",
    ),
    Mutant(
        "a scaled linear bias is not scaled in the kernel",
        "model.attention.alibi:make_alibi_entries",
        (("1.0 if alibi.scaled else 1 / score_scale", "1 / score_scale"),),
        "alibi-scaled",
    ),
    Mutant(
        "slopes fall half as fast", "model.attention.alibi:alibi_slopes", (("(-8 / n_even)", "(-4 / n_even)"),), "alibi"
    ),
)
