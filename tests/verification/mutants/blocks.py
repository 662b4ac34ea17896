"""Faults of the stream, norms, MLPs and embeddings."""

from tests.verification.mutation import Mutant

EDITS = "single edits"
CHOICES = "positions and layers"

BLOCKS = (
    Mutant(
        "an edit at hook_resid_mid misses the skip connection",
        "model.block:Block.forward",
        (
            (
                "resid_mid = self.hook_resid_mid(_add(resid_pre, attn_out, self.ln1_stream, call), call)",
                "skip = resid_pre + attn_out\n        resid_mid = self.hook_resid_mid(skip.clone(), call)",
            ),
            ("_add(resid_mid, mlp_out", "_add(skip, mlp_out"),
        ),
        stage=EDITS,
    ),
    Mutant(
        "the skip connection of a parallel block is that of attention",
        "model.block:Block.forward",
        (("else _add(resid_pre, out,", "else _add(attn_out if out is attn_out else resid_pre, out,"),),
        "gated-parallel",
    ),
    Mutant(
        "hook_resid_post shows the stream before the last token is added",
        "model.block:Block.forward",
        (
            (
                "return self.hook_resid_post(_add(resid_mid, mlp_out, self.ln2_stream, call), call)",
                "post = resid_mid + mlp_out\n        return self.hook_resid_post(post.roll(1, 1), call).roll(-1, 1)",
            ),
        ),
    ),
    Mutant(
        "a key-value head reads the copy of one query head",
        "model.block:Block._head_inputs",
        (("(heads, -1)).mean(3)", "(heads, -1))[:, :, :, 0]"),),
        "qk-rms-norm",
        EDITS,
    ),
    Mutant(
        "an edit at hook_attn_in is lost",
        "model.block:Block._head_inputs",
        (("if changed or all_changed else normed", "if changed else normed"),),
        stage=EDITS,
    ),
    Mutant(
        "copies per head show twice the stream",
        "model.block:_copy_per_head",
        (("return resid[:, :, None]", "return 2 * resid[:, :, None]"),),
    ),
    Mutant(
        "an edit at hook_mlp_in is lost where the norm is shared",
        "model.block:Block._run_mlp",
        (("self._renorm(mlp_in, resid, normed, call) if edited else normed", "normed"),),
        "gated-shared-norm",
        EDITS,
    ),
    Mutant(
        "what listeners made inside the norm is lost where a copy of the stream was changed",
        "model.block:Block._renorm",
        (("return renormed + made_by_listeners", "return renormed"),),
        stage="pairs of edits",
    ),
    Mutant(
        "hook_scale shows twice its value",
        "model.norm:Norm._forward_watched",
        (
            (
                "scale, changed = self.hook_scale.watch(scale, call)",
                "scale, changed = self.hook_scale.watch(2 * scale, call)\n        scale = scale / 2",
            ),
        ),
    ),
    Mutant(
        "the shown root mean square is a root of a sum",
        "model.norm:Norm._run_with_statistics",
        (
            ("wide.pow(2).mean(-1", "wide.pow(2).sum(-1"),
            ("return out, None, inverse_scale.reciprocal()", "return out, None, x.norm(dim=-1, keepdim=True)"),
        ),
        "norms-around",
    ),
    Mutant(
        "an edited norm does not centre",
        "model.norm:Norm._divide",
        (("(wide if mean is None else wide - mean)", "wide"),),
        stage=EDITS,
    ),
    Mutant(
        "an edited norm loses its bias",
        "model.norm:Norm._weigh_divided",
        (("scaled if bias is None else scaled + bias", "scaled"),),
        stage=EDITS,
    ),
    Mutant(
        "the epsilon is too large",
        "model.norm:Norm.apply_weights",
        (
            (
                "torch.rms_norm(wide, self.size, self._gain(), norm.eps)",
                "torch.rms_norm(wide, self.size, self._gain(), 0.1 + norm.eps)",
            ),
        ),
        "norms-around",
    ),
    Mutant(
        "a weight that acts as 1 + w acts as w",
        "model.norm:Norm._gain",
        (("return 1.0 + gain if self.norm.unit_offset else gain", "return gain"),),
        "norms-around",
    ),
    Mutant(
        "hook_pre shows twice its value",
        "model.mlp:MLP._activate",
        (
            (
                'self.hook_pre(apply_linear(maps["in_proj"], x, call), call))',
                'self.hook_pre(2 * apply_linear(maps["in_proj"], x, call), call) / 2)',
            ),
        ),
    ),
    Mutant(
        "hook_post shows twice its value",
        "model.mlp:MLP.forward",
        (("self.hook_post(self._activate(x, call), call)", "self.hook_post(2 * self._activate(x, call), call) / 2"),),
    ),
    Mutant(
        "an edit of the last neuron is lost",
        "model.mlp:MLP._activate",
        (
            (
                'linear = self.hook_pre_linear(apply_linear(maps["in_proj"], x, call), call)',
                'raw = apply_linear(maps["in_proj"], x, call)\n    edited = self.hook_pre_linear(raw.clone(), call)\n'
                "    linear = edited.clone()\n    linear[..., -1:] = raw[..., -1:]",
            ),
        ),
        "gated-sequential",
        EDITS,
    ),
    Mutant(
        "the gate and the linear half are swapped",
        "model.mlp:MLP._activate",
        (
            (
                'gate = act(self.hook_pre(apply_linear(maps["gate_proj"], x, call), call))',
                'gate = act(self.hook_pre(apply_linear(maps["in_proj"], x, call), call))',
            ),
        ),
        "gated-sequential",
    ),
    Mutant(
        "the quick GELU has another constant", "model.activations:_gelu_quick", (("1.702", "1.7"),), "gated-parallel"
    ),
    Mutant(
        "the squared ReLU squares first",
        "model.activations:_relu_squared",
        (("F.relu(x).square()", "F.relu(x.square())"),),
        "relu2",
    ),
    Mutant(
        "the factor on the embedding is off",
        "model.embed:Embed.forward",
        (("scale_in(self.cfg.embed_scale, ", "scale_in(self.cfg.embed_scale + 0.01, "),),
        "embed-scale",
    ),
    Mutant(
        "the factor on branches is left out where a norm follows them",
        "model.block:Block._leave_branch",
        (("out = norm(out, call)", "return norm(out, call)"),),
        "scales",
    ),
    Mutant(
        "the stream's norm is left out of the skip connection",
        "model.block:_add",
        (("norm(added, call)", "norm(out, call) + stream"),),
        "norms-on-stream",
    ),
    Mutant(
        "the factor on the logits leaves out the bias",
        "model.embed:Unembed._scale",
        (("logits * self.cfg.logits_scale", "(logits - self.b_U) * self.cfg.logits_scale + self.b_U"),),
        "scales",
    ),
    Mutant(
        "the embedding is scaled behind its norm",
        "model.embed:Embed.forward",
        (("self.ln(embedded, call)", "self.ln(embedded / self.cfg.embed_scale, call) * self.cfg.embed_scale"),),
        "scales",
    ),
    Mutant(
        "the neurons' norm shows what it was given",
        "model.mlp:MLP._activate",
        (("self.ln(self.hook_mid(neurons, call), call)", "neurons + 0 * self.ln(self.hook_mid(neurons, call), call)"),),
        "solu-ln",
    ),
    Mutant(
        "the exponential side of xIELU lacks its half",
        "model.activations:xielu",
        (("(0.5 + F.softplus(alpha_n))", "F.softplus(alpha_n)"),),
        "xielu",
    ),
    Mutant(
        "the linear half of a clamped SwiGLU is clamped on one side",
        "model.activations:clamp_linear_half",
        (("linear.clamp(-limit, limit)", "linear.clamp(max=limit)"),),
        "clamped-swiglu",
    ),
    Mutant(
        "the offset of learned positions is left out",
        "model.embed:PosEmbed.forward",
        (("positions + self.offset if self.offset else positions", "positions"),),
        "learned-offset-tied",
    ),
    Mutant(
        "an edit at unembed.hook_in is lost",
        "model.embed:Unembed.forward",
        (("self._multiply(self.hook_in(x, call), call)", "self._multiply((self.hook_in(x, call), x)[1], call)"),),
        stage=EDITS,
    ),
    Mutant(
        "capped logits are not scaled back",
        "model.embed:Unembed.cap",
        (("cap * torch.tanh(logits / cap)", "torch.tanh(logits / cap)"),),
        "logits-softcap",
    ),
    Mutant(
        "an edit at hook_pos_embed is lost for the last position",
        "model.decoder:Decoder._embed_positions",
        (
            (
                "return self.hook_pos_embed(embedded if kept is None else embedded * kept, call)",
                "edited = self.hook_pos_embed(embedded.clone(), call)\n"
                "    return torch.cat([edited[:, :-1], embedded[:, -1:]], 1)",
            ),
        ),
        stage=EDITS,
    ),
    Mutant(
        "stop_at_layer stops a layer early",
        "model.decoder:Decoder.run_layers",
        (("range(start, stop)", "range(start, stop - (0 < stop < self.cfg.n_layers))"),),
        stage=CHOICES,
    ),
)
