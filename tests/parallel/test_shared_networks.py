"""Networks that processes share, against the same network in one process: everything is equal."""

import random
from pathlib import Path
from typing import Any

import pytest

from hooklens import HookedCausalLM
from tests.adapters.families.checks import save
from tests.adapters.families.drawing import draw_config, families, model_type_of
from tests.checkpoints import VARIANTS, save_variant
from tests.parallel.comparing import compare_checkpoints
from tests.parallel.launching import possible, run_in_processes

TWO = possible([{"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"fully_sharded": 2}])
FOUR = possible(
    [
        {"tensor": 4},
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "data": 2},
        {"pipeline": 2, "data": 2},
        {"data": 2, "fully_sharded": 2},
        {"tensor": 2, "fully_sharded": 2},
        {"data": 4},
        {"fully_sharded": 4},
    ]
)
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Norms of single heads; of all heads together; sinks, windows and experts.
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 12, **_SIZES},
    "olmo2": _SIZES,
    "gpt_oss": {
        **_SIZES,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def compare(sources: list[Path], configs: list[dict[str, int]], *, n: int, n_edits: int | None = None) -> set[str]:
    """What was compared, in all processes alike; fails where something differs."""
    given = run_in_processes(n, compare_checkpoints, [str(one) for one in sources], configs, n_edits)
    assert [problems for results in given for *_, problems, _ in results if problems] == []
    assert len(given) == n
    assert len(given[0]) == len(sources) * len(configs)
    return set.intersection(*(set(worst) for results in given for *_, worst in results))


COMPARED = {
    "logits",
    "hook points",
    "edits",
    "gradients of activations",
    "gradients of parameters",
    "generation",
    "frozen prefix",
    "growing cache",
    "cached keys",
    "cached values",
    "gathered cache",
    "other calls",
    "late start",
    "one row",
}


def test_each_way_of_sharing_gives_what_one_process_gives(folder: Path) -> None:
    """Of one variant, a large part of which is shared in each way; the slow tests have all variants."""
    assert compare([save_variant("llama-gqa", folder / "llama-gqa")], TWO, n=2, n_edits=6) == COMPARED


def test_parts_of_other_families_are_shared(folder: Path) -> None:
    sources = [save(folder / family, family, **config) for family, config in _FAMILIES.items()]
    sources.append(save_variant("falcon-rw-6-heads", folder / "falcon-rw-6-heads"))
    compare(sources, [{"tensor": 2}], n=2, n_edits=6)


def test_stages_beside_rows(folder: Path) -> None:
    """Sums of parameters' gradients were taken twice in a pipeline, whose stages have backward passes of their own."""
    source = save_variant("neox-sequential", folder / "stages beside rows")
    compare([source], [{"pipeline": 2, "data": 2}], n=4, n_edits=1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_with_an_edit_at_every_point(variant: str, folder: Path) -> None:
    assert compare([save_variant(variant, folder / f"{variant} all")], TWO, n=2) == COMPARED


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_checkpoints_of_every_family(family: str, folder: Path) -> None:
    """Drawn at random, as in the tests of families; transformers or HookLens may refuse what was drawn."""
    for seed in range(8):
        try:
            config = draw_config(family, random.Random(seed))
            kind = config.pop("model_type", model_type_of(family))
            source = save(folder / f"{family} {seed}", kind, **config)
            HookedCausalLM.from_config_of(source)
            break
        except Exception:
            continue
    else:
        pytest.skip("nothing that was drawn can be loaded")
    compare([source], TWO, n=2, n_edits=6)


@pytest.mark.slow
@pytest.mark.parametrize("config", FOUR, ids=str)
def test_four_processes(config: dict[str, int], folder: Path) -> None:
    names = ("llama-gqa", "falcon-7b", "neox-sequential")
    sources = [save_variant(name, folder / f"{name} {config}") for name in names]
    if config != {"tensor": 2, "fully_sharded": 2}:
        # Norms of single heads, which is refused there.
        sources.append(save(folder / f"qwen3 {config}", "qwen3", **_FAMILIES["qwen3"]))
    compare(sources, [config], n=4, n_edits=12)
