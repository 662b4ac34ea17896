"""The processes that share a network's blocks, and how a call runs through them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hooklens.errors import ConfigError, InputError
from hooklens.hooks.call import Call
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.decoder import Decoder, Processes
from hooklens.parallel.config import ParallelConfig, own_device
from hooklens.parallel.rows import OwnRows, RowsOfCache
from hooklens.parallel.spread import GradientSums
from hooklens.parallel.stages import StageRun, share_layers, trained_parameters
from hooklens.parallel.wire import DONE, Wire

if TYPE_CHECKING:
    from hooklens.model.plan.positions import TokenPlan


class BlockRunner(nn.Module):
    """Runs blocks inside of a module, which torch's sharded weights want around those that they belong to."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """What a function gives that runs the blocks."""
        return run(*arguments)


class SharedBlocks(Processes):
    """Runs the blocks of a network that several processes share.

    Args:
        decoder: the network.
        config: how they share it.
        mesh: the processes.

    Attributes:
        config: as given.
        mesh: as given.
        stages: the layers of each stage of the pipeline.
        stage: which of them this process has.
        sums: the parameters whose gradients are summed over processes.
        runner: what runs the blocks, where their weights lie in shares; None: the network.

    Raises:
        ConfigError: there are more stages than layers.
    """

    def __init__(self, decoder: Decoder, config: ParallelConfig, mesh: DeviceMesh) -> None:
        if config.pipeline > decoder.cfg.n_layers:
            raise ConfigError(
                f"pipeline={config.pipeline}: the network has {decoder.cfg.n_layers} layers, and each stage takes one "
                "at least; choose fewer stages"
            )
        self.config, self.mesh = config, mesh
        self.stages = share_layers(decoder.cfg.n_layers, config.pipeline)
        self.stage = mesh["pipeline"].get_local_rank()
        self.runner: BlockRunner | None = None
        self.sums = GradientSums(in_stages=config.pipeline > 1)
        self._decoder = decoder
        self._wire = Wire(mesh["pipeline"], own_device())
        self._row_mesh = _flatten_rows(mesh) if config.n_row_parts > 1 else None

    def run_blocks(
        self, stream: Tensor, plan: "TokenPlan", call: Call, cache: HookedKeyValueCache | None, layers: range
    ) -> Tensor:
        """The stream behind some blocks, in every process.

        Raises:
            InputError: dropout, which processes would draw each for itself.
        """
        if self._decoder.drops:
            raise InputError(
                "the model is in training mode with dropout, which the processes that share it would draw each for "
                "itself; call model.eval(), or load it with the dropouts of its config at 0"
            )
        rows = None
        held: Any = cache
        if self._row_mesh is not None:
            rows = OwnRows(self._row_mesh, len(stream), stream.device)
            stream, plan = rows.take(stream), plan.take_rows(rows.index)
            held = None if cache is None else RowsOfCache(cache, rows)
            call = call.through(rows)
        if self.config.pipeline == 1:
            run = self._decoder.run_layers if self.runner is None else partial(self.runner, self._decoder.run_layers)
            stream = run(stream, plan, call, held, layers.start, layers.stop)
        else:
            for stage, own in enumerate(self.stages):
                begin, end = max(own.start, layers.start), min(own.stop, layers.stop)
                if begin < end:
                    stream = self._run_stage(stage, range(begin, end), stream, plan, call, held, rows)
        return stream if rows is None else rows.gather(stream)

    def share_of_layer(self, layer: int, held: Tensor) -> Tensor:
        """What the stage that has a layer holds of it, in every stage."""
        if self.config.pipeline == 1:
            return held
        owner = next(stage for stage, own in enumerate(self.stages) if layer in own)
        if owner == self.stage:
            self._wire.send(owner, DONE, tensor=held)
            return held
        _, _, received = self._wire.receive(owner)
        assert received is not None
        return received

    def _run_stage(
        self,
        stage: int,
        layers: range,
        stream: Tensor,
        plan: "TokenPlan",
        call: Call,
        cache: Any,
        rows: OwnRows | None,
    ) -> Tensor:
        decoder, is_own = self._decoder, stage == self.stage
        if not is_own and cache is not None:
            _pass_over(cache, layers, stream.shape[1])
        blocks = decoder.block_list()[layers.start : layers.stop]
        run = StageRun(
            self._wire,
            stage,
            list(decoder.hook_points().values()),
            call,
            rows,
            self.sums,
            is_own=is_own,
        )

        def run_layers(entering: Tensor, call: Call) -> Tensor:
            return decoder.run_layers(entering, plan, call, cache, layers.start, layers.stop)

        return run.run(run_layers, stream, trained_parameters(blocks) if is_own else [])


def _pass_over(cache: Any, layers: range, n_new: int) -> None:
    """Count the new tokens in layers whose keys and values another process holds."""
    for layer in layers:
        entry = cache.entries[layer].hold_heads(0, 0)
        if not entry.frozen:
            entry.append_columns(n_new)


def _flatten_rows(mesh: DeviceMesh) -> DeviceMesh:
    """The processes that share the rows of a batch, along one dimension."""
    return mesh["data", "fully_sharded"]._flatten("rows")
