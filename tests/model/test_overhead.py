"""What a call costs besides arithmetic, counted: functions of the package and operators that a layer takes.

Time depends on the machine and its load, counts do not. A bound here is what a layer takes; an option that a network
lacks has no share in it. Counts are of calls as users make them: the tests' checks of annotations would have a share.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion

import hooklens
from hooklens.config import RotaryPositions
from tests.annotations import unchecked
from tests.model.networks import RMS_NORM, make_config, make_model, random_tokens
from tests.torch_version import takes_groups

PACKAGE = str(Path(hooklens.__file__).parent)
WIRINGS = {
    "sequential, gated, RMS": {
        "norm": RMS_NORM, "gated_mlp": True, "act_fn": "silu", "positions": RotaryPositions(dim=6),
        "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    },
    "parallel, part of a head turns": {"wiring": "parallel", "positions": RotaryPositions(dim=2)},
    "parallel, shared norm, one key-value head": {
        "wiring": "parallel", "shared_norm": True, "n_kv_heads": 1, "positions": RotaryPositions(dim=6),
        "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    },
}  # fmt: skip
CALLS = {
    "plain": lambda model, ids: model(ids),
    "caching everything": lambda model, ids: model.run_with_cache(ids),
    "caching the stream": lambda model, ids: model.run_with_cache(ids, names_filter="resid_post"),
}
# Older versions of PyTorch give a root mean square by four operators, not two.
MORE_FOR_RMS = 0 if TorchVersion(torch.__version__) >= TorchVersion("2.9") else 4
# Functions and operators of a layer, by wiring and call.
TAKES = {
    ("sequential, gated, RMS", "plain"): (80, 28),
    ("sequential, gated, RMS", "caching everything"): (131, 40 + MORE_FOR_RMS),
    ("sequential, gated, RMS", "caching the stream"): (81, 28),
    ("parallel, part of a head turns", "plain"): (78, 30),
    ("parallel, part of a head turns", "caching everything"): (121, 40),
    ("parallel, part of a head turns", "caching the stream"): (79, 30),
    ("parallel, shared norm, one key-value head", "plain"): (73, 25),
    ("parallel, shared norm, one key-value head", "caching everything"): (108, 35),
    ("parallel, shared norm, one key-value head", "caching the stream"): (74, 25),
}


class CountOperators(TorchFunctionMode):
    """Counts what the package asks of PyTorch; reading an attribute of a tensor is no operator."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ != "__get__":
            self.counted[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_functions(run):
    """Calls of functions that stand in the package, those without a name of their own left out."""
    counted = Counter()

    def listen(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            counted[code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(listen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return counted


def count_operators(run):
    with CountOperators() as mode:
        run()
    return mode.counted


def per_layer(count, wiring, call):
    """What the second layer adds."""
    counted = []
    for n_layers in (1, 2):
        model = make_model(make_config(n_layers=n_layers, **WIRINGS[wiring]), dtype=torch.float32)
        ids = random_tokens(1, 6)
        with torch.no_grad():
            # Tables of positions and of hook points are made in the first call.
            CALLS[call](model, ids)
            counted.append(count(lambda model=model, ids=ids: CALLS[call](model, ids)))
    return counted[1] - counted[0]


@takes_groups
@pytest.mark.parametrize(("wiring", "call"), TAKES)
def test_what_a_layer_takes(wiring, call):
    """Each new option had cost a layer of every network another call or two, until the sum was felt."""
    with unchecked():
        functions, operators = per_layer(count_functions, wiring, call), per_layer(count_operators, wiring, call)
    assert functions.total() <= TAKES[wiring, call][0], functions
    assert operators.total() <= TAKES[wiring, call][1], operators
