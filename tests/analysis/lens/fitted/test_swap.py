"""The exchange of two coordinates."""

import torch
from torch.testing import assert_close

from hooklens.analysis.lens import SwapCoordinates
from tests.model.networks import make_model, random_tokens


def test_along_two_axes_it_exchanges_two_entries():
    model = make_model("rotary")
    tokens = random_tokens(2, 3)
    axes = 3 * torch.eye(12, dtype=torch.float64)[[2, 5]]
    _, plain = model.run_with_cache(tokens)
    _, swapped = model.run_with_cache(tokens, edits=[SwapCoordinates("blocks.1.hook_resid_pre", axes, pos=[0, -1])])
    expected = plain["resid_pre", 1].clone()
    expected[:, [0, 2], 2] = plain["resid_pre", 1][:, [0, 2], 5]
    expected[:, [0, 2], 5] = plain["resid_pre", 1][:, [0, 2], 2]
    assert_close(swapped["resid_pre", 1], expected)


def test_half_precision_is_rounded_once():
    model = make_model("rotary", dtype=torch.float32).to(torch.bfloat16)
    directions = torch.randn(2, 12)
    edit = SwapCoordinates("blocks.1.hook_resid_pre", directions)
    _, plain = model.run_with_cache(random_tokens(1, 3))
    _, swapped = model.run_with_cache(random_tokens(1, 3), edits=[edit])
    unit = (directions / directions.norm(dim=-1, keepdim=True)).double()
    x = plain["resid_pre", 1].double()
    c = x @ torch.linalg.pinv(unit)
    assert_close(swapped["resid_pre", 1], (x + (c.flip(-1) - c) @ unit).to(torch.bfloat16))
