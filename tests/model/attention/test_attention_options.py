"""Options of attention and positions in calls: caches, halves, padding, weight processing, decompositions."""

import pytest
import torch
from torch.testing import assert_close

from hooklens import HookedKeyValueCache
from hooklens.config import (
    NoPositions,
    NormConfig,
    PartConfig,
    QueryTemperature,
    RotaryPositions,
    RotaryScaling,
    ShortformerPositions,
    SinusoidalPositions,
)
from hooklens.errors import CacheError, ConfigError, InputError, TransformError
from tests.annotations import unchecked
from tests.model.networks import RMS_NORM, make_config, make_model, pad_rows, random_tokens

LONGROPE = RotaryPositions(
    dim=6,
    scaling=RotaryScaling(
        kind="longrope", factor=4.0, original_n_ctx=8, short_factors=(1.0, 1.5, 2.0), long_factors=(1.5, 3.0, 6.0)
    ),
)


class TestLongrope:
    model = make_model(make_config(positions=LONGROPE))

    def test_a_sequence_past_the_original_length_turns_differently_from_its_first_token_on(self):
        ids = random_tokens(1, 12)
        short, long = self.model(ids[:, :8]), self.model(ids)[:, :8]
        assert (short - long).abs().max() > 1e-3

    @torch.no_grad()
    def test_a_long_prompt_is_gone_on_from(self):
        """Keys of a long sequence were refused as those of dynamic scaling are, though they stay as they are."""
        ids = random_tokens(2, 16)
        kv = HookedKeyValueCache.init_cache(self.model.cfg, batch_size=2, dtype=torch.float64)
        parts = [self.model(part, past_kv_cache=kv) for part in ids.split([10, 1, 1, 4], 1)]
        assert_close(torch.cat(parts, 1), self.model(ids), rtol=0, atol=1e-12)
        prompt = random_tokens(1, 10)
        with_cache, without = (
            self.model.generate(prompt, max_new_tokens=6, do_sample=False, use_past_kv_cache=uses, verbose=False)
            for uses in (True, False)
        )
        assert torch.equal(with_cache, without)

    @torch.no_grad()
    def test_a_cache_of_a_short_sequence_is_not_gone_on_from_past_the_original_length(self):
        kv = self.model.prefill(random_tokens(1, 6))
        assert_close(
            self.model(random_tokens(1, 2, seed=2), past_kv_cache=kv),
            self.model(torch.cat([random_tokens(1, 6), random_tokens(1, 2, seed=2)], 1))[:, 6:],
            rtol=0, atol=1e-12,
        )  # fmt: skip
        with pytest.raises(CacheError, match=r"'longrope': past 8 tokens .* the 6 cached keys do not fit"):
            self.model(random_tokens(1, 3, seed=2), past_kv_cache=kv)

    @torch.no_grad()
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_rows_turn_by_their_own_length(self, side):
        rows = [random_tokens(1, n, seed=n)[0] for n in (12, 8, 5)]
        ids, mask = pad_rows(rows, side)
        logits = self.model(ids, attention_mask=mask)
        for row, found, own in zip(rows, logits, mask.bool(), strict=True):
            assert_close(found[own], self.model(row[None])[0], rtol=0, atol=1e-12)
        if side == "left":
            more, kv = (
                random_tokens(3, 1, seed=9),
                HookedKeyValueCache.init_cache(self.model.cfg, batch_size=3, dtype=torch.float64),
            )
            self.model(ids, attention_mask=mask, past_kv_cache=kv)
            # The row of 8 tokens would be a long one with the next.
            with pytest.raises(CacheError, match="do not fit"):
                self.model(more, past_kv_cache=kv)

    @torch.no_grad()
    def test_documents_turn_by_their_own_length(self):
        documents = [random_tokens(1, n, seed=n) for n in (10, 4)]
        packed = self.model(torch.cat(documents, 1), document_ids=torch.tensor([0] * 10 + [1] * 4))
        apart = torch.cat([self.model(one) for one in documents], 1)
        assert_close(packed, apart, rtol=0, atol=1e-12)

    def test_factors_that_do_not_fit_are_refused(self):
        factors = {"short_factors": (1.0, 2.0), "long_factors": (1.0, 2.0)}
        options = {"kind": "longrope", "factor": 2.0, "original_n_ctx": 8}
        with pytest.raises(ConfigError, match="2 factors; expected one for each of the 3 frequencies of rotary dim 6"):
            RotaryPositions(dim=6, scaling=RotaryScaling(**options, **factors))
        with pytest.raises(ConfigError, match=r"short_factors=None; expected a tuple of numbers, one for each"):
            RotaryScaling(**options)
        with pytest.raises(ConfigError, match=r"long_factors: frequency 1=-2.0; expected finite numbers above 0"):
            RotaryScaling(**options, short_factors=(1.0, 2.0), long_factors=(1.0, -2.0))
        with pytest.raises(ConfigError, match="'yarn' has no short_factors: leave them out"):
            RotaryScaling(kind="yarn", factor=2.0, original_n_ctx=8, short_factors=(1.0,))


class TestShortformer:
    cfg = make_config(positions=ShortformerPositions(offset=1), windows=(None, 4), n_kv_heads=2)
    model = make_model(cfg)

    def test_queries_and_keys_read_positions_behind_the_norm_and_values_do_not(self):
        ids = random_tokens(2, 6)
        _, cache = self.model.run_with_cache(ids)
        for layer, block in enumerate(self.model.block_list()):
            normed = block.ln1(cache["resid_pre", layer])
            placed = normed + self.model.W_pos[:6]
            for letter, read in (("q", placed), ("k", placed), ("v", normed)):
                W, b = (getattr(block.attn, f"{kind}_{letter.upper()}") for kind in "Wb")
                expected = torch.einsum("bpm,nmh->bpnh", read, W) + b
                assert_close(cache[letter, layer], expected, rtol=0, atol=1e-12)
        assert torch.equal(cache["resid_pre", 0], cache["embed"])

    def test_the_stream_is_the_sum_of_what_is_written(self):
        _, cache = self.model.run_with_cache(random_tokens(2, 6))
        parts, labels = cache.decompose_resid(return_labels=True)
        assert "pos_embed" not in labels
        assert_close(parts.sum(0), cache["resid_post", 1], rtol=0, atol=1e-12)

    @torch.no_grad()
    def test_a_call_that_begins_above_makes_and_shows_positions(self):
        ids, fired = random_tokens(2, 6), []
        double = [("hook_pos_embed", lambda tensor, hook: fired.append(1) or tensor * 2)]
        below = self.model.run_with_hooks(ids, fwd_hooks=double, stop_at_layer=1)
        above = self.model.run_with_hooks(below, fwd_hooks=double, start_at_layer=1)
        assert len(fired) == 2
        assert_close(above, self.model.run_with_hooks(ids, fwd_hooks=double), rtol=0, atol=1e-12)
        assert (above - self.model(ids)).abs().max() > 1e-3

    @torch.no_grad()
    def test_with_a_cache_and_padding(self):
        rows = [random_tokens(1, n, seed=n)[0] for n in (7, 4)]
        ids, mask = pad_rows(rows, "left")
        kv = HookedKeyValueCache.init_cache(self.cfg, batch_size=2, dtype=torch.float64)
        first = self.model(ids[:, :5], attention_mask=mask[:, :5], past_kv_cache=kv)
        logits = torch.cat([first, self.model(ids[:, 5:], past_kv_cache=kv)], 1)
        for row, found, own in zip(rows, logits, mask.bool(), strict=True):
            assert_close(found[own], self.model(row[None])[0], rtol=0, atol=1e-12)

    def test_weight_processing(self):
        with pytest.raises(TransformError, match=r"fold_ln: shortformer positions .* are added behind the norm"):
            self.model.process_weights(fold_ln=True)
        ids = random_tokens(2, 6)
        centred = self.model.process_weights(center_writing_weights=True, fold_value_biases=True)
        assert torch.equal(centred.W_pos, self.model.W_pos)
        assert_close(centred(ids), self.model(ids), rtol=0, atol=1e-11)


def test_sinks_take_their_part_of_every_row():
    model, ids = make_model(make_config(attn_sinks=True)), random_tokens(2, 6)
    _, cache = model.run_with_cache(ids)
    for layer, block in enumerate(model.block_list()):
        weights = cache["attn_scores", layer].exp()
        expected = weights / (weights.sum(-1, keepdim=True) + block.attn.sinks.exp()[:, None, None])
        assert_close(cache["pattern", layer], expected, rtol=0, atol=1e-12)
    for step, words in (("fold_value_biases", "sums to less than 1"), ("refactor_factored_attn_matrices", "sinks")):
        with pytest.raises(TransformError, match=words):
            model.process_weights(**{step: True})
    unbiased = make_model(make_config(attn_sinks=True, qkv_bias=False))
    refactored = unbiased.process_weights(refactor_factored_attn_matrices=True, fold_ln=False)
    assert_close(refactored(ids), unbiased(ids), rtol=0, atol=1e-10)


def test_sinks_train():
    """Their gradient, of the fused way, is that of finite differences."""
    model, ids = make_model(make_config(attn_sinks=True, n_kv_heads=2)), random_tokens(2, 6)
    sinks = model.block_list()[0].attn.sinks
    model(ids, return_type="loss").backward()
    with torch.no_grad():
        for head in range(4):
            found = []
            for step in (1e-6, -1e-6):
                sinks[head] += step
                found.append(model(ids, return_type="loss"))
                sinks[head] -= step
            # Differences of numbers near 3 with 16 digits, over 2e-6.
            assert abs(float(found[0] - found[1]) / 2e-6 - float(sinks.grad[head])) < 1e-8


def test_clipped_values_do_not_fold():
    model = make_model(make_config(clip_qkv=0.5))
    for step in ("fold_value_biases", "refactor_factored_attn_matrices"):
        with pytest.raises(TransformError, match=r"clipped .*cfg\.clip_qkv=0\.5"):
            model.process_weights(**{step: True})
    ids = random_tokens(2, 6)
    assert_close(model.process_weights(fold_ln=True)(ids), model(ids), rtol=0, atol=1e-11)


def test_a_norm_over_all_heads_has_one_denominator_that_each_head_may_change():
    cfg = make_config(qk_norm=RMS_NORM, qk_norm_over="all_heads", n_kv_heads=2)
    model, ids = make_model(cfg), random_tokens(2, 5)
    _, cache = model.run_with_cache(ids)
    q, scale = cache["q", 0], cache["scale", 0, "q_norm"]
    assert scale.shape == (2, 5, 4, 1)
    assert_close(scale[:, :, 0, 0], (q.flatten(2).square().mean(-1) + 1e-6).sqrt(), rtol=0, atol=1e-12)
    assert torch.equal(scale, scale[:, :, :1].expand_as(scale))

    def double_one(tensor, hook):
        tensor[:, :, 2] *= 2

    _, edited = model.run_with_cache(ids, fwd_hooks=[("blocks.0.attn.q_norm.hook_scale", double_one)])
    difference = (edited["z", 0] - cache["z", 0]).abs().amax((0, 1, 3))
    # The others are rounded anew.
    changed = [bool(moved > 1e-9) for moved in difference]
    assert changed == [False, False, True, False]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"qk_norm_over": "all_heads"}, "qk_norm_over='all_heads' says how .* normed, and qk_norm is None"),
        ({"qk_norm": RMS_NORM, "qk_norm_over": "group"}, "qk_norm_over is 'group'; expected one of"),
        ({"qk_norm": RMS_NORM, "qk_norm_over": "all_heads", "qk_norm_per_head": True}, "qk_norm_per_head: .* leave it"),
        ({"windows": (3, None), "chunks": (2, 2)}, r"layers \[0\] have a window and a chunk"),
        ({"chunks": (2,)}, "chunks has 1 entries for 2 layers"),
        ({"chunks": 3}, "chunks=3; expected a tuple with one for each layer"),
        ({"attn_scale": (0.5,)}, "attn_scale has 1 entries for 2 layers"),
        ({"attn_scale": (0.5, -1.0)}, "attn_scale: layer 1=-1.0; expected finite numbers above 0"),
        ({"clip_qkv": -1.0}, "clip_qkv=-1.0; expected finite numbers above 0"),
        ({"positions": SinusoidalPositions(), "d_model": 13}, "come in pairs: d_model=13"),
        ({"positions": (ShortformerPositions(), ShortformerPositions())}, "one table for all layers"),
        ({"positions": (SinusoidalPositions(), SinusoidalPositions())}, "sinusoidal positions enter below the blocks"),
        ({"attn_sinks": 1}, "attn_sinks=1; expected True or False"),
        ({"query_temperature": 0.3}, r"query_temperature=0.3; expected QueryTemperature\(...\) or None"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(changes, text):
    with unchecked(), pytest.raises(ConfigError, match=text):
        make_config(**changes)


@pytest.mark.parametrize("changes", [{"attn": None}, {"attn": (None, None)}, {"n_layers": 0}])
def test_positions_for_queries_and_keys_need_a_layer_that_has_some(changes):
    """Their table was made, filled a hook point, and was read by nothing: an edit of `hook_pos_embed` was lost."""
    with pytest.raises(ConfigError, match=r"no layer has attention; give NoPositions\(\)"):
        make_config(positions=ShortformerPositions(), **changes)
    make_config(positions=ShortformerPositions(), attn=(None, PartConfig(kind="attention")))


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError, match="a window and a chunk") as error:
        make_config(windows=(3, 3), chunks=(2, 2), qk_norm_per_head=True, positions=SinusoidalPositions(), d_model=13)
    assert "qk_norm is None" in str(error.value)
    assert "come in pairs" in str(error.value)


def test_positions_with_a_cache_are_refused_under_chunks():
    model = make_model(make_config(positions=RotaryPositions(dim=6), chunks=(4, None)))
    with pytest.raises(InputError, match="sliding windows and chunks need the positions of the cached keys"):
        model(random_tokens(1, 2), positions=torch.tensor([3, 4]), past_kv_cache=model.prefill(random_tokens(1, 3)))


@torch.no_grad()
def test_norms_with_a_weight_for_each_head_in_half_precision_are_taken_in_float32():
    for over in ("head", "all_heads"):
        cfg = make_config(
            qk_norm=NormConfig(kind="rms", eps=1e-6, bias=False), qk_norm_over=over, qk_norm_per_head=over == "head"
        )
        norm = make_model(cfg, dtype=torch.bfloat16).block_list()[0].attn.q_norm
        x = torch.randn(2, 5, 4, 6).bfloat16()
        axes = (-1,) if over == "head" else (-2, -1)
        wide = x.float()
        expected = wide / (wide.square().mean(axes, keepdim=True) + 1e-6).sqrt() * norm.w.float()
        # One rounding of the result, of 2^-9.
        assert ((norm(x).float() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()


def test_fixed_positions_pass_weight_processing():
    """They keep their mean over d_model, which every LayerNorm takes out."""
    model, ids = make_model(make_config(positions=SinusoidalPositions())), random_tokens(2, 6)
    processed = model.process_weights(fold_ln=True, center_writing_weights=True, fold_value_biases=True)
    assert_close(processed(ids), model(ids), rtol=0, atol=1e-10)
    assert torch.equal(
        processed.run_with_cache(ids)[1]["hook_pos_embed"], model.run_with_cache(ids)[1]["hook_pos_embed"]
    )
    with pytest.raises(ConfigError, match="only learned positions have a table"):
        _ = model.W_pos


def test_options_are_written_and_read_back():
    cfg = make_config(
        positions=(LONGROPE, NoPositions()),
        qk_norm=(RMS_NORM, None),
        qk_norm_per_head=True,
        qk_norm_after_rotary=True,
        attn_sinks=True,
        clip_qkv=2.0,
        chunks=(None, 4),
        windows=(3, None),
        attn_scale=(0.5, None),
        query_temperature=(None, QueryTemperature(scale=0.1, length=4, offset=1)),
    )
    for one in (
        cfg,
        make_config(positions=ShortformerPositions(offset=2)),
        make_config(positions=SinusoidalPositions()),
    ):
        again = type(one).from_json(one.to_json())
        assert again == one
        assert hash(again) == hash(one)
        assert again.fingerprint == one.fingerprint
    assert cfg.take_layers([1]).block(0).query_temperature == QueryTemperature(scale=0.1, length=4, offset=1)
    with pytest.raises(ConfigError, match=r"attn_scale differs by layer: cfg.block\(layer\).score_scale"):
        _ = cfg.score_scale
