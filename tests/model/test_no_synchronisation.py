"""What runs on an accelerator does not wait for it: no step looks at the values of tensors."""

import contextlib
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hooklens import HookedKeyValueCache
from tests.model.networks import ALL_CONFIGS, make_model, random_tokens

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}


class LookedAtValuesError(AssertionError):
    """Somebody asked what a tensor holds."""


class NoLooks(TorchDispatchMode):
    """Fails at operations whose result in Python depends on what a tensor holds: `.item()`, `bool(...)`, masks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        indexed_by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or indexed_by_mask:
            raise LookedAtValuesError(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_looks():
    """On the CPU, `tolist` and `numpy` read memory past the dispatcher."""

    def refuse(tensor, *args):
        raise LookedAtValuesError("tolist or numpy")

    with NoLooks(), mock.patch.object(torch.Tensor, "tolist", refuse), mock.patch.object(torch.Tensor, "numpy", refuse):
        yield


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: (x > 0).nonzero(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
    ],
)
def test_the_guard_sees_what_waits(look):
    with pytest.raises(LookedAtValuesError), no_looks():
        look(torch.randn(3))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_a_planned_forward(network, grad):
    model, tokens = make_model(network), random_tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.set_grad_enabled(grad):
        plain, padded = model.make_plan(tokens), model.make_plan(tokens, mask)
        with no_looks():
            model.run(tokens, plain)
            model.run(tokens, padded)
            captured = model.capture()
            with captured:
                model.run(tokens, model.make_plan(tokens), logits_at=-1)


@pytest.mark.parametrize("network", ALL_CONFIGS)
@torch.no_grad()
def test_cached_steps(network):
    model, tokens = make_model(network), random_tokens(2, 8)
    cache = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=model.dtype)
    steps = []
    with no_looks():
        for step in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7], tokens[:, 7:]):
            steps.append(model.run(step, model.make_plan(step, None, None, cache), past_kv_cache=cache))
    # 1e-10: other shapes, other order of float64 sums.
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("left_padded", [True, False])
@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_calls_on_a_frozen_prefix(network, left_padded, grad):
    model, tokens = make_model(network), random_tokens(3, 4)
    mask = torch.tensor([[0, 1, 1, 1, 1]]) if left_padded else None
    prefix = model.prefill(random_tokens(1, 5, seed=7), **({} if mask is None else {"attention_mask": mask}))
    with torch.set_grad_enabled(grad), contextlib.ExitStack() as stack:
        stack.enter_context(no_looks())
        model.run(tokens, model.make_plan(tokens, None, None, prefix), past_kv_cache=prefix)
