"""A model's tensors by name, each read when it is asked for: what merging needs of a model that is not in memory."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hooklens.adapters import open_checkpoint
from hooklens.adapters.sources import OldFiles, open_files
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig
from hooklens.display import Displayed, Listing, Summary, merge_layers
from hooklens.errors import InputError, suggest_names
from hooklens.pool.arguments import Arguments, to_ours
from hooklens.pool.errors import WeightNameError
from hooklens.pool.loading import Request
from hooklens.pool.tokenizer import expand_source

_WHERE = ("revision", "subfolder", "variant", "token", "cache_dir", "local_files_only", "storage_options")


class LazyWeights(Displayed, Mapping[str, Tensor]):
    """The weights of a model by name, read one by one; each is there once, so a tied unembedding is not.

    Nothing that was read is kept: each reading gives a tensor of its own, and editing it changes no later one. What
    `hooklens.weights.merging` takes as a model; `HookedCausalLM.from_state_dict(merged, weights.cfg)` is a model again.

    Attributes:
        cfg: the network; None where names and tensors are transformers', as they lie in the files.
        transforms: the weight-processing steps that the weights have been through.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        read: Callable[[str], Tensor],
        *,
        cfg: HookedConfig | None = None,
        transforms: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.cfg = cfg
        self.transforms = transforms
        self._names = dict.fromkeys(names)
        self._read = read
        self._dtype = dtype
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise WeightNameError(f"{name!r} is no weight of the model.{suggest_names(str(name), self._names)}")
        read = self._read(name)
        dtype = self._dtype if read.is_floating_point() else None
        # Of pages of a file, or of a model in memory, a copy.
        return read.to(device=self._device, dtype=dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        return f"LazyWeights({len(self)} tensors)"

    def _summary(self) -> Summary:
        return Summary(
            title=f"LazyWeights of {len(self):,} tensors, each read when it is asked for",
            facts={
                "dtype": None if self._dtype is None else str(self._dtype).removeprefix("torch."),
                "device": None if self._device is None else str(self._device),
                "transforms": ", ".join(self.transforms) or None,
            },
            listing=Listing(
                columns=("weight", "tensors"),
                rows=[(name, n) for name, _, n in merge_layers((name, None) for name in self)],
                what="kinds of weights",
                more="list(weights) has all names",
            ),
        )


def open_lazily(asked: Request) -> LazyWeights:
    """The weights of a checkpoint, none of which is read yet.

    Args:
        asked: which; `hooked` says whether names are the field's, or those on disk.

    Raises:
        InputError: arguments that say more than where the checkpoint lies, dtype and device.
        HookLensError: what opening a checkpoint raises.
    """
    arguments = to_ours(asked.arguments, what=asked.what)
    source = arguments.pop("source")
    dtype, device = arguments.pop("dtype", "auto"), arguments.pop("device", None)
    wrong = sorted(name for name in arguments if name not in _WHERE and arguments[name] is not None)
    if wrong:
        raise InputError(
            f"{asked.what}: tensors read lazily take dtype, device and {', '.join(_WHERE)}, not {', '.join(wrong)}; "
            "leave it out, or load the model with lazy=False"
        )
    cast: dict[str, Any] = {
        "dtype": None if dtype == "auto" else dtype,
        "device": None if device is None else torch.device(device),
    }
    source = expand_source(source) if isinstance(source, str) else source
    if not asked.hooked:
        return _open_as_stored(source, arguments, what=asked.what, cast=cast)
    checkpoint = open_checkpoint(source, **arguments)
    return LazyWeights(
        _names_in(checkpoint.cfg),
        checkpoint.read,
        cfg=checkpoint.cfg,
        transforms=checkpoint.transforms,
        **cast,
    )


def _names_in(cfg: HookedConfig) -> tuple[str, ...]:
    """The names of a network's weights, each weight once."""
    return tuple(name for name in cfg.description.weights if not (cfg.tied_unembed and name == "unembed.W_U"))


def _open_as_stored(source: Any, arguments: Arguments, *, what: str, cast: Mapping[str, Any]) -> LazyWeights:
    files = open_files(source, **arguments)
    if isinstance(files, OldFiles):
        raise InputError(f"{what}: is in an old format, which transformers does not read; leave hooked=False out")
    tensors = files.weights()
    return LazyWeights(tuple(tensors.names()), lambda name: tensors.read(name, apart=True), **cast)


def lazily_of(model: HookedCausalLM) -> LazyWeights:
    """The weights of a model in memory, as copies."""
    weights = model.named_weights()
    return LazyWeights(_names_in(model.cfg), weights.__getitem__, cfg=model.cfg, transforms=model.transforms)
