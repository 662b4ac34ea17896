"""torchao's int8 weights as transformers saves them, against the formula entry by entry."""

import json

import pytest
import torch
from torch import Tensor

from hooklens.adapters.dequantised.config import read_quantisation
from hooklens.adapters.dequantised.torchao import TorchaoInt8
from hooklens.adapters.kept import Rows
from hooklens.errors import CheckpointError, UnsupportedModelError
from hooklens.model.parts.scaled import ScaledLinear
from tests.adapters.dequantised.packing import open_tensors, random_rows


def a_weight(n_groups: int, *, zeros: bool) -> tuple[dict[str, Tensor], Tensor]:
    """What is stored of a weight [4, 6], and the weight."""
    rows = [[number - 128 for number in row] for row in random_rows(4, 6, 8, seed=0)]
    scales = torch.rand(4, n_groups, generator=torch.Generator().manual_seed(1)) + 0.5
    points = torch.tensor(random_rows(4, n_groups, 3, seed=2)) if zeros else torch.zeros(4, n_groups)
    weight = torch.empty(4, 6)
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            group = j // (6 // n_groups)
            weight[i, j] = scales[i, group] * (number - points[i, group])
    state = {
        "a._weight_qdata": torch.tensor(rows, dtype=torch.int8),
        "a._weight_scale": scales,
        "a._weight_zero_point": points.to(torch.int8),
    }
    return state, weight


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("zeros", [False, True])
def test_weights(n_groups, zeros) -> None:
    state, weight = a_weight(n_groups, zeros=zeros)
    read = open_tensors(state, TorchaoInt8())
    assert list(read.names()) == ["a.weight"]
    assert read.header("a.weight") == ("float32", (4, 6))
    assert torch.equal(read.read("a.weight"), weight)


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("zeros", [False, True])
def test_kept_rows(n_groups, zeros) -> None:
    """The library's own where a row has one scale and no zero point."""
    state, weight = a_weight(n_groups, zeros=zeros)
    read, rows = open_tensors(state, TorchaoInt8()), Rows(torch.tensor([3, 1]), is_whole=False)
    assert read.why_not_kept("a.weight", rows) is None
    kept = read.keep("a.weight", rows)
    assert (kept.layout, kept.shape) == ("scaled" if zeros or n_groups > 1 else "int8 rows", (2, 6))
    if kept.layout == "scaled":
        made = ScaledLinear(kept.settings["kind"], d_in=6, **kept.tensors).dequantise()
    else:
        made = kept.tensors["entries"].float() * kept.tensors["scales"][:, None]
    assert torch.equal(made, weight[[3, 1]])


def test_without_zero_points() -> None:
    state, weight = a_weight(1, zeros=False)
    del state["a._weight_zero_point"]
    assert torch.equal(open_tensors(state, TorchaoInt8()).read("a.weight"), weight)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a._weight_scale", torch.ones(4, 4), r"int8 \[4, 6\] with scales \[4, 4\]"),
        ("a._weight_scale", torch.ones(3, 1), r"int8 \[4, 6\] with scales \[3, 1\]"),
        ("a._weight_qdata", torch.ones(4, 6), r"float32 \[4, 6\]"),
        ("a._weight_zero_point", torch.ones(1, 4), r"zero points are \[1, 4\], expected \[4, 1\]"),
    ],
)
def test_tensors_that_do_not_fit_together(name, value, message) -> None:
    state, _ = a_weight(1, zeros=False)
    with pytest.raises(CheckpointError, match=message):
        open_tensors({**state, name: value}, TorchaoInt8())


def test_configs() -> None:
    config = {
        "quantization_config": {
            "quant_method": "torchao",
            "quant_type": {"default": {"_data": {"group_size": None}, "_type": "Int8WeightOnlyConfig", "_version": 2}},
        }
    }
    assert isinstance(read_quantisation(config, where="here")[1], TorchaoInt8)
    for other in ("int8_weight_only", {"default": {"_type": "Int4WeightOnlyConfig"}}, 3, None):
        changed = json.loads(json.dumps(config))
        changed["quantization_config"]["quant_type"] = other
        with pytest.raises(UnsupportedModelError, match=r"quant_type is .*expected Int8WeightOnlyConfig"):
            read_quantisation(changed, where="here")
