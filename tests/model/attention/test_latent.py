"""Latent attention against its definition, and what it shows, allows and refuses."""

import pytest
import torch

from hooklens import HookedCausalLM, HookedConfig, MLAConfig, NoPositions, PartConfig
from hooklens.config import AlibiPositions, NormConfig, RotaryPositions
from hooklens.errors import CacheError, ConfigError, TransformError
from hooklens.hooks import Call
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.attention.attend import attend, attend_explicitly, attend_in_parts
from hooklens.model.attention.kernels import Part
from hooklens.model.plan.positions import TokenPlan
from tests.annotations import unchecked
from tests.model.networks import RMS_NORM, Allocations, make_config, make_model, random_tokens
from tests.torch_version import takes_any_width

LATENT = MLAConfig(q_rank=5, kv_rank=8, d_nope=3, d_rope=2, d_head_v=4)
ROTARY = RotaryPositions(dim=2, layout="interleaved")
NETWORKS = {
    "with a latent of queries": make_config(norm=RMS_NORM, attn=LATENT, d_head=5, positions=ROTARY),
    "queries read the stream": make_config(
        norm=RMS_NORM, attn=MLAConfig(kv_rank=8, d_nope=3, d_rope=2, d_head_v=9, norm_eps=0.3), d_head=5,
        positions=RotaryPositions(dim=2),
    ),
}  # fmt: skip


def rms(x, norm):
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.norm.eps).sqrt() * norm.w


def turn(x, positions):
    """Pairs of the first two entries, of which there is one, by the angle of the position."""
    angle = torch.arange(x.shape[1], dtype=torch.float32)[None, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., 0], x[..., 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_it_is_its_definition(network):
    """From the paper's matrices, one after another; with one pair of entries both layouts of rotary are one."""
    model, ids = make_model(NETWORKS[network]), random_tokens(2, 6)
    _, cache = model.run_with_cache(ids, names_filter="*")
    attn, x = model.blocks[1].attn, rms(cache["resid_pre", 1], model.blocks[1].ln1)
    latent = attn.latent
    c_kv = rms(x @ attn.W_DKV + attn.b_DKV, attn.kv_latent_norm)
    if latent.q_rank is None:
        q = torch.einsum("bpm,nmh->bpnh", x, attn.W_Q) + attn.b_Q
    else:
        q = torch.einsum("bpl,nlh->bpnh", rms(x @ attn.W_DQ + attn.b_DQ, attn.q_latent_norm), attn.W_UQ)
    k_rope = turn((x @ attn.W_KR + attn.b_KR)[:, :, None], ROTARY)
    k_nope = torch.einsum("bpl,nlh->bpnh", c_kv, attn.W_UK)
    v = torch.einsum("bpl,nlh->bpnh", c_kv, attn.W_UV)
    q_rope, q_nope = turn(q[..., :2], ROTARY), q[..., 2:]
    products = torch.einsum("bqnh,bknh->bnqk", q_nope, k_nope) + torch.einsum("bqnh,bkh->bnqk", q_rope, k_rope[:, :, 0])
    scores = (products / 5**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    z = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v)
    out = torch.einsum("bpnh,nhm->bpm", z, attn.W_O) + attn.b_O
    # The tables of angles are made in float32.
    torch.testing.assert_close(cache["attn_scores", 1], scores, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache["attn_out", 1], out, rtol=1e-6, atol=1e-6)
    assert cache["v", 1].shape[-1] == cache["z", 1].shape[-1] == latent.d_head_v
    assert cache["k_rope", 1].shape == (2, 6, 2)
    assert cache["kv_latent", 1].shape == (2, 6, 8)


def test_what_it_shows_stands_in_the_table():
    table = HookedCausalLM(NETWORKS["with a latent of queries"]).hook_table().set_index("name")
    attn = [name.rpartition("attn.")[2] for name in table.index if name.startswith("blocks.0.attn.")]
    assert attn == [
        "hook_q_latent", "q_latent_norm.hook_scale", "q_latent_norm.hook_normalized", "hook_kv_latent",
        "kv_latent_norm.hook_scale", "kv_latent_norm.hook_normalized", "hook_k_rope", "hook_q", "hook_k", "hook_v",
        "hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern", "hook_z", "hook_result",
    ]  # fmt: skip
    assert table.loc["blocks.0.attn.hook_v"]["axes"] == ("batch", "pos", "kv_head", "d_head_v")
    assert table.loc["blocks.0.attn.hook_z"]["shape"] == ("batch", "pos", 4, 4)
    assert table.loc["blocks.0.attn.hook_k"]["shape"] == ("batch", "pos", 4, 5)
    assert table.loc["blocks.0.attn.hook_q_latent"]["axes"] == ("batch", "pos", "d_q_latent")


def test_weights_that_it_does_not_have_say_why():
    model = make_model(NETWORKS["with a latent of queries"])
    assert model.W_O.shape == (2, 4, 4, 12)
    for name in ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "OV", "QK"):
        with pytest.raises(ConfigError, match=r"layers \[0, 1\] have none: its \w+ are made of a latent, which W_D"):
            getattr(model, name)
    with pytest.raises(ConfigError, match="W_Q: layers"):
        model.all_composition_scores("Q")
    with pytest.raises(AttributeError, match="LatentAttention has no W_K here: its keys are made of a latent"):
        _ = model.blocks[0].attn.W_K
    mixed = make_model(make_config(attn=(LATENT, PartConfig(kind="attention")), d_head=5))
    with pytest.raises(
        ConfigError, match=r"W_O: layers \[0\] have none: it is \['head', 'd_head_v', 'd_model'\] there"
    ):
        _ = mixed.W_O


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_copies_of_the_stream_for_each_head_are_the_stream(network):
    """Heads that are handed copies, without the stream that they are copies of, as masked circuits do."""
    model, x = make_model(NETWORKS[network]), torch.randn(2, 6, 12, dtype=torch.float64)
    attn, plan = model.blocks[0].attn, TokenPlan(batch=2, n_new=6, device=torch.device("cpu"))
    copies = x[:, :, None].expand(-1, -1, 4, -1).contiguous()
    with unchecked():
        expected = attn(x, x, x, plan, Call(tokens=plan))
        torch.testing.assert_close(attn(copies, copies, copies, plan, Call(tokens=plan)), expected)
        for letter in "qkv":
            of_copies, of_stream = (attn.project_stream(letter, given, Call()) for given in (copies, x))
            torch.testing.assert_close(of_copies, of_stream)


def test_no_scores_are_made_where_nobody_asks():
    """PyTorch's fused kernel on the CPU wants values as wide as queries; else it makes all scores."""
    for cfg in NETWORKS.values():
        model = make_model(cfg.replace(n_ctx=64), dtype=torch.float32)
        ids = random_tokens(1, 48)
        with torch.no_grad():
            frozen = model.prefill(ids)
            with Allocations() as made:
                model(ids)
                model(ids[:, :13], past_kv_cache=frozen)
        for n_query, n_key in ((48, 48), (13, 48), (13, 61)):
            assert not [size for size in made.with_numel(4 * n_query * n_key) if n_key in size[1]]


@pytest.mark.parametrize("d_v", [3, 11])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_values_of_another_width_than_queries(d_v, softcap, n_kv_heads):
    """All at once, in parts with a shared past, and their gradients, against scores, pattern and values one by one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, weights = draw(2, 5, 4, 6), torch.randn(2, 5, 4, d_v, generator=generator, dtype=torch.float64)
    past, new = (Part(draw(rows, n, n_kv_heads, 6), draw(rows, n, n_kv_heads, d_v)) for rows, n in ((1, 7), (2, 5)))
    new = new._replace(is_causal=True)
    leaves = [q, past.k, past.v, new.k, new.v]
    options = {"score_scale": 0.4, "softcap": softcap}
    for run, explicit in (
        (lambda: attend(q, new.k, new.v, mask=None, is_causal=True, **options), [new]),
        (lambda: attend_in_parts(q, [past, new], **options), [past, new]),
    ):
        found, expected = run(), attend_explicitly(q, explicit, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        used = [leaf for leaf in leaves if len(explicit) == 2 or (leaf is not past.k and leaf is not past.v)]
        for one, other in zip(
            *(torch.autograd.grad((z * weights).sum(), used) for z in (found, expected)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "explicit", pytest.param("flex", marks=takes_any_width)])
@torch.no_grad()
def test_every_backend_gives_the_same(backend):
    ids, mask = random_tokens(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for cfg in NETWORKS.values():
        model = make_model(cfg)
        expected = model(ids, attention_mask=mask)
        model.set_attention_backend(backend)
        with unchecked():
            found = model(ids, attention_mask=mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-10, atol=1e-10)


def test_a_cache_entry_has_values_of_their_own_width():
    cfg = NETWORKS["with a latent of queries"]
    entry = HookedKeyValueCacheEntry.init_cache_entry(cfg, d_head_v=4)
    keys, values = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 4, 4)
    assert [tensor.shape[-1] for tensor in entry.append(keys, values)] == [5, 4]
    assert entry.head_shape == (4, 5, 4)
    with unchecked(), pytest.raises(CacheError, match=r"new values .* of width 4"):
        entry.append(keys, keys)
    model = make_model(cfg)
    other = make_model(cfg.replace(attn=MLAConfig(q_rank=5, kv_rank=8, d_nope=3, d_rope=2, d_head_v=7)))
    cache = model.prefill(random_tokens(1, 4))
    with pytest.raises(CacheError, match=r"\(2, 4, 5\) with values 4 wide, the model \(2, 4, 5\) with values 7 wide"):
        other(random_tokens(1, 2), past_kv_cache=cache)


def test_a_saved_cache_goes_on(tmp_path):
    model, ids = make_model(NETWORKS["queries read the stream"]), random_tokens(1, 9)
    cache = model.prefill(ids[:, :5])
    cache.save(tmp_path / "cache.safetensors")
    loaded = type(cache).load(tmp_path / "cache.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 5:], past_kv_cache=loaded), model(ids)[:, 5:])


def test_processing_folds_what_reads_the_stream_and_refuses_the_rest():
    model, ids = make_model(NETWORKS["with a latent of queries"]), random_tokens(2, 6)
    for options in ({"fold_ln": True}, {"fold_ln": True, "fold_value_biases": True, "center_unembed": True}):
        processed = model.process_weights(**options)
        torch.testing.assert_close(processed(ids).log_softmax(-1), model(ids).log_softmax(-1), rtol=1e-9, atol=1e-9)
        assert torch.equal(processed.blocks[0].ln1.w, torch.ones_like(processed.blocks[0].ln1.w))
        assert torch.equal(processed.blocks[0].attn.kv_latent_norm.w, model.blocks[0].attn.kv_latent_norm.w)
        assert processed.cfg.out_bias
    layered = make_config(
        attn=LATENT, d_head=5, positions=ROTARY, qkv_bias=False, norm=NormConfig(kind="layer", eps=1e-5)
    )
    model = make_model(layered)
    processed = model.process_weights(fold_ln=True, center_writing_weights=True)
    assert processed.blocks[0].attn.b_DKV is not None
    torch.testing.assert_close(processed(ids), model(ids), rtol=1e-9, atol=1e-9)
    with pytest.raises(TransformError, match=r"layers \[0, 1\] have latent attention, whose keys and values are made"):
        model.process_weights(refactor_factored_attn_matrices=True)


class TestConfig:
    def test_there_and_back(self):
        cfg = HookedConfig(
            d_model=12, n_layers=2, n_heads=4, d_vocab=23, n_ctx=32, positions=NoPositions(),
            attn=(PartConfig(kind="mla", options=LATENT.options), PartConfig(kind="attention")),
        )  # fmt: skip
        assert cfg.attn == (LATENT, PartConfig(kind="attention"))
        assert (cfg.d_head, cfg.head_shapes, cfg.cache_width) == (5, ((4, 5, 4), (4, 5, 5)), 76)
        assert HookedConfig.from_json(cfg.to_json()) == cfg
        assert hash(LATENT) == hash(MLAConfig(**LATENT.options))
        assert cfg.fingerprint != cfg.replace(attn=PartConfig(kind="attention")).fingerprint

    def test_all_that_does_not_go_together_is_told_at_once(self):
        with pytest.raises(ConfigError) as told:
            make_config(
                attn=LATENT, d_head=6, n_kv_heads=2, clip_qkv=1.0, k_bias=False, qk_norm=RMS_NORM,
                positions=(AlibiPositions(), RotaryPositions(dim=4)),
            )  # fmt: skip
        for text in (
            "n_kv_heads=2: latent attention has keys for each of n_heads=4",
            "clip_qkv=1.0: latent attention has no clipping",
            "k_bias and v_bias differ; keys and values of latent attention are made of one latent",
            "qk_norm in layers [0, 1]: latent attention norms its latents, not queries and keys",
            "d_head=6, and queries and keys of latent attention are d_nope + d_rope = 5 wide",
            "rotary dim 4, and latent attention has d_rope=2 entries that turn",
            "AlibiPositions(scaled=False, bfloat16=False): latent attention has rotary positions, or none of its own",
        ):
            assert text in str(told.value)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"kv_rank": 0}, "kv_rank=0; expected whole numbers from 1 on"),
            ({"q_rank": 1.5}, r"q_rank=1\.5; expected whole numbers"),
            ({"d_head_v": None}, "d_head_v must be given, found None"),
            ({"d_rope": 3}, "d_rope=3; entries turn in pairs, so it is even"),
            ({"norm_eps": -1.0}, r"norm_eps=-1\.0; expected finite numbers >= 0"),
        ],
    )
    def test_values_that_are_none(self, changes, message):
        with unchecked(), pytest.raises(ConfigError, match=message):
            MLAConfig(**{**LATENT.options, **changes})
