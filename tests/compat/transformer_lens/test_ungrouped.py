"""`ungroup_grouped_query_attention`: a copy of keys and values for each query head, as if each had its own.

Held against a network that has them: the same maps, repeated for each query head.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from hooklens.compat.transformer_lens import (
    HookedTransformer,
    HookedTransformerConfig,
    HookedTransformerKeyValueCache,
    patching,
)
from hooklens.compat.transformer_lens.components import GroupedQueryAttention
from tests.compat.transformer_lens.models import BASE, LLAMA, build, tokens

IDS = tokens()
POINTS = ("hook_k", "hook_v", "hook_rot_k")
# Both sum in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SETTINGS: dict[str, dict[str, Any]] = {"rotary": {}, "query-key norm": {"use_qk_norm": True}, "a single one": {}}


def pair(setting: str = "rotary") -> tuple[HookedTransformer, HookedTransformer]:
    """A network whose query heads share, ungrouped; and one of the same maps whose heads share nothing."""
    n_shared = 1 if setting == "a single one" else 2
    words = {**SETTINGS[setting], "n_key_value_heads": n_shared}
    grouped = build("llama", **words)
    grouped.set_ungroup_grouped_query_attention(True)
    plain = HookedTransformer(HookedTransformerConfig(**{**BASE, **LLAMA, **words, "n_key_value_heads": None}))
    state = {name.replace("attn._", "attn."): one for name, one in grouped.state_dict().items()}
    for name, one in state.items():
        if name.rpartition(".")[2] in ("W_K", "W_V", "b_K", "b_V"):
            state[name] = one.repeat_interleave(4 // n_shared, 0)
    plain.load_state_dict(state)
    return grouped, plain


@pytest.mark.parametrize("setting", SETTINGS)
def test_caches_hold_an_entry_for_each_query_head(setting: str) -> None:
    grouped, plain = pair(setting)
    logits, cache = grouped.run_with_cache(IDS)
    expected, plain_cache = plain.run_with_cache(IDS)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert set(cache) == set(plain_cache)
    for name, one in plain_cache.items():
        torch.testing.assert_close(cache[name], one, **CLOSE)
    assert cache["k", 0].shape == cache["v", 1].shape == cache["rot_k", 0].shape == (2, 7, 4, 4)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_an_edit_reaches_one_query_head(setting: str, point: str) -> None:
    def change(tensor: Tensor, hook: object) -> Tensor:
        assert tensor.shape == (2, 7, 4, 4)
        tensor = tensor.clone()
        tensor[:, 3, 1] += 1
        return tensor

    logits = [model.run_with_hooks(IDS, fwd_hooks=[(f"blocks.0.attn.{point}", change)]) for model in pair(setting)]
    torch.testing.assert_close(*logits, **CLOSE)
    assert not torch.allclose(logits[0], pair(setting)[0](IDS))


@pytest.mark.parametrize("point", POINTS)
def test_gradients_are_those_of_each_query_head(point: str) -> None:
    found = []
    for model in pair():
        gradients: list[Tensor] = []
        model.add_hook(f"blocks.1.attn.{point}", lambda grad, hook, kept=gradients: kept.append(grad), "bwd")
        model(IDS, return_type="loss").backward()
        found.append(gradients[0])
    assert found[0].shape == (2, 7, 4, 4)
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("point", ["hook_q_input", "hook_k_input", "hook_v_input"])
def test_split_inputs_are_copies_for_each_query_head(point: str) -> None:
    def change(tensor: Tensor, hook: object) -> Tensor:
        assert tensor.shape == (2, 7, 4, 16)
        scale = torch.linspace(0.5, 2, 4, dtype=tensor.dtype)
        return tensor * scale[:, None] + scale[:, None].flip(0)

    logits = []
    for model in pair():
        model.set_use_split_qkv_input(True)
        logits.append(model.run_with_hooks(IDS, fwd_hooks=[(f"blocks.1.{point}", change)]))
    torch.testing.assert_close(*logits, **CLOSE)


def test_patching_runs_over_query_heads() -> None:
    grouped, plain = pair()
    other = IDS.roll(1, 1)
    found = []
    for model in (grouped, plain):
        _, cache = model.run_with_cache(other)
        found.append(patching.get_act_patch_attn_head_k_by_pos(model, IDS, cache, lambda logits: logits[0, -1, 3]))
    assert found[0].shape == (2, 7, 4)
    # 1e-5: values are of the default dtype.
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_it_can_be_turned_off_again_and_texts_can_be_made() -> None:
    grouped, _ = pair()
    text = grouped.generate(IDS[:1], 5, do_sample=False, stop_at_eos=False, verbose=False)
    with pytest.raises(RuntimeError, match="without a cache"):
        grouped(IDS, past_kv_cache=_cache(grouped))
    grouped.set_ungroup_grouped_query_attention(False)
    assert grouped.run_with_cache(IDS)[1]["k", 0].shape == (2, 7, 2, 4)
    assert torch.equal(grouped.generate(IDS[:1], 5, do_sample=False, stop_at_eos=False, verbose=False), text)


def _cache(model: HookedTransformer) -> Any:
    return HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 2)


def test_a_part_by_itself_follows_its_config() -> None:
    cfg = HookedTransformerConfig(**{**BASE, **LLAMA, "ungroup_grouped_query_attention": True})
    part, stream = GroupedQueryAttention(cfg, "global", 0), torch.rand(2, 5, 16, dtype=torch.float64)
    seen: list[tuple[int, ...]] = []
    part.hook_k.add_hook(lambda tensor, hook: seen.append(tuple(tensor.shape)))
    out = part(stream, stream, stream)
    cfg.ungroup_grouped_query_attention = False
    torch.testing.assert_close(part(stream, stream, stream), out, **CLOSE)
    assert seen == [(2, 5, 4, 4), (2, 5, 2, 4)]


def test_where_each_head_has_its_own_nothing_changes() -> None:
    plain = build()
    before = plain(IDS)
    plain.set_ungroup_grouped_query_attention(True)
    assert torch.equal(plain(IDS), before)
