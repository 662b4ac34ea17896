import pytest
import torch

from hooklens.adapters.families import load_families
from hooklens.adapters.family import Family
from hooklens.adapters.keys import ConfigMap
from hooklens.adapters.rules import Copy, Fused
from hooklens.adapters.tables import BLOCK, expert_rules, fused_conv1d_qkv_rules, mlp_rules, stacked_expert_rules
from hooklens.config import HookedConfig, MoEConfig, NoPositions, PartConfig

MIXED = HookedConfig(
    d_model=6,
    n_layers=2,
    n_heads=2,
    d_mlp=10,
    d_vocab=7,
    n_ctx=8,
    positions=NoPositions(),
    act_fn="silu",
    gated_mlp=True,
    mlp_bias=False,
    mlp=(PartConfig(kind="mlp"), MoEConfig(n_experts=3, experts_per_token=2, d_expert=4)),
)
FAMILY = Family(
    name="mixed",
    model_types=("mixed",),
    architectures=("MixedForCausalLM",),
    base_prefix="model.",
    embedding="embed.weight",
    head="head.weight",
    config=ConfigMap(parts=()),
    weights=(
        *mlp_rules("h.{i}.mlp", up="up", down="down", gate="gate"),
        *expert_rules("h.{i}.mlp.experts.{e}", up="up", down="down", gate="gate"),
    ),
    in_memory=stacked_expert_rules("h.{i}.mlp.experts"),
)


def test_dense_layers_and_mixtures_in_one_network_have_their_own_rules() -> None:
    names = [name for bound in FAMILY.bind_rules(MIXED) for name in bound.hubs]
    assert names[:3] == ["h.0.mlp.up.weight", "h.0.mlp.down.weight", "h.0.mlp.gate.weight"]
    assert names[3:] == [f"h.1.mlp.experts.{e}.{part}.weight" for part in ("gate", "up", "down") for e in range(3)]


def test_experts_in_tensors_of_their_own_are_stacked_and_taken_apart() -> None:
    disk = {name: torch.randn(*_shape(name)) for bound in FAMILY.bind_rules(MIXED, [1]) for name in bound.hubs}
    for bound in FAMILY.bind_rules(MIXED, [1]):
        (loaded,) = bound.load(disk.__getitem__, MIXED)
        assert (
            loaded.shape == MIXED.description.weights[f"{BLOCK.format(i=1)}.mlp.{bound.ours[0].split('.')[-1]}"].shape
        )
        for expert, name in enumerate(bound.hubs):
            assert torch.equal(loaded[expert], disk[name].T)
            assert torch.equal(bound.save(name, (loaded,), MIXED), disk[name])
        # As a mixture holds them, so that nothing is copied again.
        assert loaded.mT.is_contiguous()


def _shape(name: str) -> tuple[int, int]:
    return (6, 4) if ".down." in name else (4, 6)


def test_names_in_memory_are_told_from_those_on_disk() -> None:
    in_memory = [name for bound in FAMILY.bind_rules(MIXED, in_memory=True) for name in bound.hubs]
    assert in_memory[3:] == ["h.1.mlp.experts.gate_up_proj", "h.1.mlp.experts.down_proj"]
    assert FAMILY.is_in_memory(in_memory)
    assert not FAMILY.is_in_memory([name for bound in FAMILY.bind_rules(MIXED) for name in bound.hubs])
    assert not any(family.is_in_memory(["model.layers.0.mlp.gate_proj.weight"]) for family in load_families())


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (Fused("hub", ("a", "b"), "(s f) m -> s m f"), (8, 6)),
        (Fused("hub", ("a", "b"), "e m (f s) -> s e m f"), (3, 6, 8)),
        (Fused("hub", ("q", "v", "k"), "(b s n h) m -> s (b n) m h", blocks=2), (36, 6)),
        (Copy("hub", "a", "(e f) m -> e m f"), (12, 6)),
    ],
)
def test_patterns_are_permutations_with_their_own_inverse(rule, shape) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parts = rule.load(tensor, MIXED)
    assert torch.equal(torch.cat([part.flatten() for part in parts]).sort().values, tensor.flatten())
    assert torch.equal(rule.save(parts, MIXED), tensor)


def test_a_conv1d_of_queries_keys_and_values_is_three_blocks_of_columns() -> None:
    cfg = HookedConfig(d_model=6, n_layers=1, n_heads=2, d_vocab=7, n_ctx=8, positions=NoPositions())
    weight, bias = fused_conv1d_qkv_rules("attn")
    disk = torch.randn(6, 18)
    for place, loaded in enumerate(weight.load(disk, cfg)):
        for head in range(2):
            start = 6 * place + 3 * head
            assert torch.equal(loaded[head], disk[:, start : start + 3])
    assert torch.equal(weight.save(weight.load(disk, cfg), cfg), disk)
    assert torch.equal(torch.cat(bias.load(disk[0], cfg)).flatten(), disk[0])
    assert torch.equal(bias.save(bias.load(disk[0], cfg), cfg), disk[0])
