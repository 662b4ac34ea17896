"""What an old format gives: a network, and its tensors under HookLens names."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from hooklens.adapters.conversion import check_layers, config_of_length, crop_positions
from hooklens.adapters.formats.place import Place
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, join_names

FLOATS = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


@runtime_checkable
class OpenedModel(Protocol):
    """A checkpoint whose config and tensors have been held against each other."""

    cfg: HookedConfig

    def tensors(self, layers: Sequence[int] | None = None, *, n_ctx: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """HookLens names and tensors in their logical shapes; see `hooklens.adapters.Checkpoint`."""
        ...


@runtime_checkable
class OldCheckpoint(Protocol):
    """A checkpoint in an old format."""

    @property
    def place(self) -> Place:
        """The folder that it lies in."""
        ...

    @property
    def names(self) -> Collection[str]:
        """The names of its own files there."""
        ...

    def read_network(self) -> HookedConfig:
        """The network, by the config alone where the format has one."""
        ...

    def open(self) -> OpenedModel:
        """The checkpoint, its weights mapped into memory."""
        ...


class FieldModel:
    """Tensors that have HookLens names already.

    Args:
        cfg: the network.
        state: its weights in their logical shapes.
        where: what to call the place in texts of errors.

    Raises:
        CheckpointError: they are not the weights of this network; all that is wrong is listed.
    """

    def __init__(self, cfg: HookedConfig, state: Mapping[str, Tensor], *, where: str) -> None:
        self.cfg, self._state = cfg, state
        weights = cfg.description.weights
        missing = [name for name in weights if name not in state]
        unexpected = [name for name in state if name not in weights]
        both = [name for name in weights if name in state]
        misshapen = [
            f"{name!r} is {list(state[name].shape)}, expected {list(weights[name].shape)}"
            for name in both
            if tuple(state[name].shape) != weights[name].shape
        ]
        others = [f"{name!r} is {state[name].dtype}" for name in both if str(state[name].dtype) not in FLOATS]
        problems = [f"missing tensors: {join_names(missing)}"] if missing else []
        problems += [f"unexpected tensors: {join_names(unexpected)}"] if unexpected else []
        problems += [f"tensors of another shape: {'; '.join(misshapen[:20])}"] if misshapen else []
        problems += [f"tensors that are no floating-point weights: {'; '.join(others[:20])}"] if others else []
        if problems:
            raise CheckpointError(
                f"{where}: the config describes another network than the tensors: {'. '.join(problems)}. Check that "
                "they belong together and that the download is whole"
            )

    def tensors(self, layers: Sequence[int] | None = None, *, n_ctx: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """HookLens names and tensors in their logical shapes, one by one.

        Raises:
            InputError: a layer does not exist or is given twice, or there are fewer learned positions.
        """
        taken = range(self.cfg.n_layers) if layers is None else check_layers(layers, self.cfg.n_layers)
        return self._iterate(taken, config_of_length(self.cfg, n_ctx))

    def _iterate(self, taken: Sequence[int], cfg: HookedConfig) -> Iterator[tuple[str, Tensor]]:
        for name in self._state:
            if not name.startswith("blocks."):
                yield name, crop_positions([name], [self._state[name].detach()], cfg)[0]
        for new, old in enumerate(taken):
            inside = f"blocks.{old}."
            for name in self._state:
                if name.startswith(inside):
                    yield f"blocks.{new}.{name.removeprefix(inside)}", self._state[name].detach()
