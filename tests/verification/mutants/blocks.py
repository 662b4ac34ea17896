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
                "resid_mid = self.hook_resid_mid(resid_pre + attn_out, call)",
                "skip = resid_pre + attn_out\n        resid_mid = self.hook_resid_mid(skip.clone(), call)",
            ),
            ("self.hook_resid_post(resid_mid + self._run_mlp", "self.hook_resid_post(skip + self._run_mlp"),
        ),
        stage=EDITS,
    ),
    Mutant(
        "the skip connection of a parallel block is that of attention",
        "model.block:Block.forward",
        (("else resid_pre + out", "else (attn_out if out is attn_out else resid_pre) + out"),),
        "gated-parallel",
    ),
    Mutant(
        "hook_resid_post shows the stream before the last token is added",
        "model.block:Block.forward",
        (
            (
                "return self.hook_resid_post(resid_mid + self._run_mlp(resid_mid, None, call), call)",
                "post = resid_mid + self._run_mlp(resid_mid, None, call)\n"
                "        return self.hook_resid_post(post.roll(1, 1), call).roll(-1, 1)",
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
        (("wide.pow(2).mean(-1", "wide.pow(2).sum(-1"),),
        "norms-around",
    ),
    Mutant(
        "an edited norm does not centre",
        "model.norm:Norm._forward_watched",
        (("(wide if mean is None else wide - mean)", "wide"),),
        stage=EDITS,
    ),
    Mutant(
        "an edited norm loses its bias",
        "model.norm:Norm._forward_watched",
        (("return scaled if self.b is None else scaled + self.b", "return scaled"),),
        stage=EDITS,
    ),
    Mutant(
        "the epsilon is too large",
        "model.norm:Norm.apply_weights",
        (
            (
                "return F.rms_norm(x, self.size, self._gain(), self.norm.eps)",
                "return F.rms_norm(x, self.size, self._gain(), 0.1 + self.norm.eps)",
            ),
        ),
        "norms-around",
    ),
    Mutant(
        "a weight that acts as 1 + w acts as w",
        "model.norm:Norm._gain",
        (("return 1.0 + gain if gain is not None and self.norm.unit_offset else gain", "return gain"),),
        "norms-around",
    ),
    Mutant(
        "hook_pre shows twice its value",
        "model.mlp:MLP._activate",
        (
            (
                'self.hook_pre(apply_linear(maps["in_proj"], x), call))',
                'self.hook_pre(2 * apply_linear(maps["in_proj"], x), call) / 2)',
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
                'return gate * self.hook_pre_linear(apply_linear(maps["in_proj"], x), call)',
                'linear = apply_linear(maps["in_proj"], x)\n    edited = self.hook_pre_linear(linear.clone(), call)\n'
                "    return gate * torch.cat([edited[..., :-1], linear[..., -1:]], -1)",
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
                'gate = self.act(self.hook_pre(apply_linear(maps["gate_proj"], x), call))',
                'gate = self.act(self.hook_pre(apply_linear(maps["in_proj"], x), call))',
            ),
        ),
        "gated-sequential",
    ),
    Mutant("the quick GELU has another constant", "model.mlp:_gelu_quick", (("1.702", "1.7"),), "gated-parallel"),
    Mutant(
        "the squared ReLU squares first",
        "model.mlp:_relu_squared",
        (("F.relu(x).square()", "F.relu(x.square())"),),
        "relu2",
    ),
    Mutant(
        "the factor on the embedding is off",
        "model.embed:Embed.forward",
        (("torch.tensor(self.cfg.embed_scale, dtype", "torch.tensor(self.cfg.embed_scale + 0.01, dtype"),),
        "embed-scale",
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
        (("self._multiply(self.hook_in(x, call))", "self._multiply((self.hook_in(x, call), x)[1])"),),
        stage=EDITS,
    ),
    Mutant(
        "capped logits are not scaled back",
        "model.decoder:Decoder._unembed_stream",
        (("cap * torch.tanh(logits / cap)", "torch.tanh(logits / cap)"),),
        "logits-softcap",
    ),
    Mutant(
        "an edit at hook_pos_embed is lost for the last position",
        "model.decoder:Decoder._embed_tokens",
        (
            (
                "stream = stream + self.hook_pos_embed("
                "self.pos_embed(plan.positions).expand_as(stream).contiguous(), call)",
                "placed = self.pos_embed(plan.positions).expand_as(stream).contiguous()\n"
                "        edited = self.hook_pos_embed(placed.clone(), call)\n"
                "        stream = stream + torch.cat([edited[:, :-1], placed[:, -1:]], 1)",
            ),
        ),
        stage=EDITS,
    ),
    Mutant(
        "stop_at_layer stops a layer early",
        "model.decoder:Decoder._run_blocks",
        (("range(start, stop)", "range(start, stop - (0 < stop < self.cfg.n_layers))"),),
        stage=CHOICES,
    ),
)
