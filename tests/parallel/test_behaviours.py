"""What networks that processes share do beside plain calls: experiments, errors, what they refuse."""

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import hooklens as hl
from hooklens.parallel import ParallelConfig, load
from hooklens.parallel.processes import SharedBlocks
from hooklens.parallel.tensor import TensorParallel
from tests.annotations import unchecked
from tests.parallel import behaviours
from tests.parallel.launching import SHARES_WEIGHTS, possible, run_in_processes

CONFIGS = possible([{"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"fully_sharded": 2}])


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """The findings of two processes, in each way of sharing."""
    return run_in_processes(2, behaviours.find_all, CONFIGS)


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS, ids=str)
class TestBehaviours:
    def test_experiments_give_the_same(self, config: dict[str, int], found: list[dict[str, Any]]) -> None:
        for of_process in found:
            if "pipeline" in config:
                told = of_process["sweep_in_stages", str(config)]
                assert "needs all layers in each process" in told
                continue
            apart = of_process["experiment", str(config)]
            assert set(apart) == {"resid_pre", "z", "attribution", "edit of one head"}
            # float64.
            assert max(apart.values()) < 1e-9

    def test_hook_that_raises_does_so_everywhere_and_the_next_call_works(
        self, config: dict[str, int], found: list[dict[str, Any]]
    ) -> None:
        """A process that only follows a stage waited for ever for word from one that had broken off."""
        for of_process in found:
            broken = of_process["break_off", str(config)]
            assert broken["raised"] == [
                "at blocks.0.attn.hook_z",
                "at blocks.1.hook_resid_post",
                "at blocks.3.hook_resid_pre",
            ]
            assert broken["apart"] < 1e-9

    def test_what_needs_all_weights_is_refused(self, config: dict[str, int], found: list[dict[str, Any]]) -> None:
        for of_process in found:
            told = of_process["refuse", str(config)]
            for name in ("save_pretrained", "to_hf", "process_weights", "load_state_dict", "initialize", "W_Q"):
                assert "several processes share this network" in told[name]
            assert "load the checkpoint whole" in told["dispatch"]
            assert "ParallelConfig(tensor=3" in told["load"]
            assert "takes 3" in told["load"]
            assert "give seed=" in told["generate"]
            holds_part = set(config) & {"tensor", "pipeline"}
            assert ("gather_cache" in told["cache.save"]) == bool(holds_part)


@pytest.mark.long
def test_parts_are_shown_where_they_are_asked_for(found: list[dict[str, Any]]) -> None:
    for of_process in found:
        shown = of_process["show_parts", "{'tensor': 2}"]
        assert shown["whole"][2] == shown["heads"] == 2 * shown["own"][2]
        assert shown["weight"] == "DTensor"
        assert shown["equal"]
        if not SHARES_WEIGHTS:
            continue
        rows = of_process["show_parts", "{'fully_sharded': 2}"]
        assert rows["weight"] == "DTensor"
        assert rows["equal"]


@pytest.mark.long
def test_gradient_through_what_a_hook_kept_in_a_stage_is_refused(found: list[dict[str, Any]]) -> None:
    """It ended where the stage began, so that earlier layers had a gradient that was wrong, or none."""
    told = [of_process["keep_inside", "{'pipeline': 2}"] for of_process in found]
    assert sum("inside a stage of the pipeline" in one for one in told) == 1


def test_process_that_was_started_by_itself_is_told_how() -> None:
    with pytest.raises(hl.HookLensError, match="torchrun --nproc-per-node=2"):
        load("bundled:tiny-llama", ParallelConfig(tensor=2))


def test_weights_in_shares_are_refused_where_gradients_would_be_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.6 failed with an AttributeError after the checkpoint had been opened."""
    monkeypatch.delattr(FSDPModule, "set_gradient_divide_factor", raising=False)
    with pytest.raises(hl.HookLensError, match=r"fully_sharded=2 needs a PyTorch whose fully_shard sums gradients"):
        load("no such folder", ParallelConfig(fully_sharded=2))


@pytest.mark.parametrize("size", [0, -1, True])
def test_sizes_are_positive_numbers(size: Any) -> None:
    with pytest.raises(hl.HookLensError, match="ParallelConfig: pipeline"):
        ParallelConfig(pipeline=size)


def test_heads_that_cannot_be_shared_are_told_with_their_layers() -> None:
    class Three:
        def size(self) -> int:
            return 3

    with torch.device("meta"):
        model = hl.HookedCausalLM.from_config_of("bundled:tiny-llama")
    with (
        unchecked(),
        pytest.raises(hl.HookLensError, match=r"4 heads \(layers \[0, 1, 2, 3\]\); .* cannot be shared equally by 3"),
    ):
        TensorParallel(model, Three())  # type: ignore[arg-type]


def test_more_stages_than_layers_are_refused() -> None:
    """A process without a layer loaded nothing, or failed later and elsewhere."""
    model = hl.HookedCausalLM.from_config_of("bundled:tiny-llama")
    with unchecked(), pytest.raises(hl.HookLensError, match="pipeline=5: the network has 4 layers"):
        SharedBlocks(model, ParallelConfig(pipeline=5), None)  # type: ignore[arg-type]
