"""Tests of hooklens.pool.copying."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hooklens import HookedCausalLM
from hooklens.pool.copying import KeptModels, clone_lazily, copy_on_write, copy_with
from tests.checkpoints import build_variant

TOKENS = torch.arange(6)[None]


def address(tensor: Tensor) -> int:
    """Where a tensor's memory is; `data_ptr` counts as a write, after which memory is shared no more."""
    return torch._C._data_address(tensor)


def make_model() -> HookedCausalLM:
    return HookedCausalLM.from_pretrained("bundled:tiny-llama", dtype="float64")


def step(model: nn.Module) -> None:
    model(TOKENS, return_type="loss").backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def set_entry(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0, 0, 0] = 7.0


def add_by_data(model: nn.Module) -> None:
    model.blocks[0].mlp.in_proj.weight.data.add_(1.0)


def write_through_numpy(model: nn.Module) -> None:
    model.embed.table.weight.detach().numpy()[0, 0] = 7.0


def cast_in_place(model: nn.Module) -> None:
    model.to(torch.float32)


def load_state(model: nn.Module) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("write", [step, set_entry, add_by_data, write_through_numpy, cast_in_place, load_state])
@pytest.mark.parametrize("written", ["copy", "original"])
def test_memory_is_shared_until_one_of_the_two_is_written_to(write: Callable[[nn.Module], None], written: str) -> None:
    model, untouched = make_model(), make_model()
    copied = copy_on_write(model)
    assert torch.equal(copied(TOKENS), model(TOKENS))
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    assert all(address(one) == address(other) for one, other in pairs)
    changed, kept = (copied, model) if written == "copy" else (model, copied)
    write(changed)
    for name, parameter in kept.named_parameters():
        assert torch.equal(parameter, untouched.get_parameter(name)), name
    assert any(one.dtype != other.dtype or not torch.equal(one, other)
               for one, other in zip(changed.parameters(), kept.parameters(), strict=True))  # fmt: skip


def test_only_what_is_written_to_is_copied() -> None:
    model = make_model()
    copied = copy_on_write(model)
    set_entry(copied)
    apart = [name for name, one in copied.named_parameters() if address(one) != address(model.get_parameter(name))]
    assert apart == ["blocks.1.attn.q_proj.weight"]


def test_hooks_and_settings_are_copied() -> None:
    model = make_model()
    seen: list[str] = []
    model.add_hook("blocks.0.hook_resid_post", lambda tensor, hook: seen.append(hook.name))
    model.embed.table.weight.requires_grad_(False)
    copied = copy_on_write(model)
    assert (copied.cfg, copied.transforms, copied.generation_config) == (
        model.cfg,
        model.transforms,
        model.generation_config,
    )
    assert not copied.embed.table.weight.requires_grad
    assert copied.blocks[0].attn.q_proj.weight.requires_grad
    copied(TOKENS)
    assert seen == ["blocks.0.hook_resid_post"]
    copied.reset_hooks()
    model(TOKENS)
    assert len(seen) == 2


def test_tied_weights_of_transformers_stay_tied() -> None:
    model = build_variant("llama-tied")
    copied = copy_on_write(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert torch.equal(copied(TOKENS).logits, model(TOKENS).logits)


def test_copies_made_under_inference_mode_can_be_trained() -> None:
    model = make_model()
    with torch.inference_mode():
        copied = copy_on_write(model)
    step(copied)
    assert torch.equal(model(TOKENS), make_model()(TOKENS))


def test_what_pytorch_cannot_share_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor mapped from a file cannot be shared so, nor any by a PyTorch without that function."""
    mapped = HookedCausalLM.from_pretrained("bundled:tiny-llama").embed.table.weight.detach()
    copied = clone_lazily(mapped)
    assert torch.equal(copied, mapped)
    assert address(copied) != address(mapped)
    monkeypatch.setattr(torch.Tensor, "_lazy_clone", property())
    plain = torch.ones(3)
    copied = clone_lazily(plain)
    copied[0] = 2
    assert plain[0] == 1


def test_a_cast_copy_leaves_the_model_alone() -> None:
    model = build_variant("neox-parallel")
    copied = copy_with(model, lambda tensor: tensor.to(torch.bfloat16))
    assert (copied.dtype, model.dtype) == (torch.bfloat16, torch.float32)
    shared = copy_with(model, lambda tensor: tensor)
    pairs = zip(shared.parameters(), model.parameters(), strict=True)
    assert all(one is not other and one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert shared.config is not model.config


def small(*values: float) -> nn.Module:
    module = nn.Linear(1, len(values))
    module.weight = nn.Parameter(torch.tensor(values, dtype=torch.float32)[:, None])
    module.bias = nn.Parameter(torch.zeros(len(values)))
    return module


def test_the_models_that_were_loaded_last_are_kept() -> None:
    kept, loads = KeptModels(2), []

    def load(name: str) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            assert len(kept) < 2
            loads.append(name)
            return small(1, 2)

        return made

    for name in ("a", "b", "a", "c", "a", "b"):
        kept.get(name, load(name))
    assert loads == ["a", "b", "c", "b"]
    assert len(kept) == 2


def test_a_kept_model_is_never_handed_out() -> None:
    kept = KeptModels(1)
    first = kept.get("a", lambda: small(1, 2))
    with torch.no_grad():
        first.weight[0] = 5
    first.extra = nn.Linear(1, 1)
    again = kept.get("a", lambda: small(3, 4))
    assert again.weight.flatten().tolist() == [1, 2]
    assert not hasattr(again, "extra")


def test_weights_with_equal_bits_share_memory() -> None:
    kept = KeptModels(4)
    first = kept.get("a", lambda: small(1, 0.0))
    second = kept.get("b", lambda: small(1, 0.0))
    other = kept.get("c", lambda: small(1, -0.0))
    undefined = [kept.get(name, lambda: small(1, float("nan"))) for name in "de"]
    assert address(second.weight) == address(first.weight)
    assert address(other.weight) != address(first.weight)
    assert address(other.bias) == address(first.bias)
    assert address(undefined[0].weight) == address(undefined[1].weight)


def test_what_is_let_go_is_freed() -> None:
    kept = KeptModels(1)
    seen = []

    def load() -> nn.Module:
        model = small(1)
        seen.append(weakref.ref(model))
        return model

    kept.get("a", load)
    assert seen[0]() is not None
    kept.get("b", load)
    assert seen[0]() is None
    assert seen[1]() is not None
