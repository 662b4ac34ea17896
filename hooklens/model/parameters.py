"""Giving a network its weights, and reading them by name.

A weight has two names: that of the field (`blocks.0.attn.W_Q`, in the logical shape), and that of the parameter which
holds it (`blocks.0.attn.q_proj.weight`, `[out, in]`). `named_weights()` has the first, `state_dict()` the second, as
PyTorch's tools expect. Whatever reads weights takes both, and what TransformerLens 2.x saved.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import CheckpointError, join_names, suggest_names
from hooklens.model.parts.part import read_weight
from hooklens.progress import progress_bar
from hooklens.weights.layout import hold, logical_view, to_stored
from hooklens.weights.names import bare_names
from hooklens.weights.offloaded import OffloadedTensor
from hooklens.weights.quantised import is_quantised_tensor
from hooklens.weights.transformer_lens import join_experts, move_input_biases, rename

if TYPE_CHECKING:
    from hooklens.model.decoder import Decoder
    from hooklens.model.placement.offloading import Offload
    from hooklens.model.placement.placement import Placement

_TIED = "unembed.W_U"


class ModelWeights(Mapping[str, Tensor]):
    """A network's weights under the field's names, read when asked for and shared, not copied.

    A tied `unembed.W_U` is among them, though it is no parameter of its own.
    """

    def __init__(self, decoder: "Decoder") -> None:
        self._decoder = decoder

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._decoder.cfg.description.weights:
            raise KeyError(name)
        path, _, part = name.rpartition(".")
        weight: Tensor = read_weight(self._decoder.get_submodule(path), part)
        return weight.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoder.cfg.description.weights)

    def __len__(self) -> int:
        return len(self._decoder.cfg.description.weights)


def fill_parameters(
    decoder: "Decoder",
    tensors: Iterable[tuple[str, Tensor | nn.Module]],
    *,
    device: "torch.device | str | Placement" = "cpu",
    dtype: torch.dtype | None = None,
    by_columns: bool = False,
    offload: "Offload | None" = None,
) -> None:
    """Put tensors in the place of a network's parameters, one after another.

    The network may lie on the `meta` device, so that at no time more than one copy of it exists. A tensor
    that already has the dtype, device and layout is used as it is. On several devices each goes straight to its own.

    Args:
        decoder: the network.
        tensors: weights by their names, of the field or of the parameters. A module takes the place of the linear map
            whose weight it has the name of: one of the same call that is quantised, and lies where it is to be.
        device: where to put them.
        dtype: of the weights; None: their own.
        by_columns: weights that lie by columns become parameters as they lie. Else all parameters lie by rows: two
            networks of equal weights compute equal numbers then, to the last bit, wherever the weights came from.
        offload: takes the weights of parts that do not lie where they compute; None: there are none.

    Raises:
        CheckpointError: a name the network does not have, a wrong shape, or a parameter left without tensor.
        InputError: a weight cannot be written to the disk.
    """
    declared = _held_weights(decoder.cfg)
    by_parameter = {weight.parameter: weight for weight in declared.values()}
    missing = set(declared)
    modules: dict[str, nn.Module] = dict(decoder.named_modules())

    with progress_bar("loading weights", tensors, total=len(declared), unit="tensor", progress=None) as bar:
        for name, given in bar:
            if name == _TIED and name not in declared:
                continue
            weight, is_stored = (by_parameter[name], True) if name in by_parameter else (declared.get(name), False)
            if weight is None:
                raise CheckpointError(f"the network has no parameter {name!r}.{suggest_names(name, declared)}")
            path, _, held_as = weight.parameter.rpartition(".")
            missing.discard(weight.name)
            if isinstance(given, nn.Module):
                modules[path] = _replace_map(decoder, path, given)
                continue
            wanted = weight.stored_shape if is_stored else weight.shape
            if tuple(given.shape) != wanted:
                raise CheckpointError(f"{name!r} has shape {list(given.shape)}; expected {list(wanted)}")
            # A weight of another model that is offloaded may not be changed with it.
            placed = given.bring().clone() if isinstance(given, OffloadedTensor) else given.detach()
            takes = offload is not None and offload.takes(name)
            if not takes:
                where = device.of_weight(name) if isinstance(device, Mapping) else torch.device(device)
                placed = placed.to(device=where, dtype=dtype)
            if placed.is_inference():
                placed = placed.clone()
            if not is_stored:
                placed = (hold if by_columns else to_stored)(placed, weight.stored, weight.axes)
            elif not placed.is_contiguous():
                placed = placed.contiguous()
            if offload is not None and takes:
                modules[path]._parameters[held_as] = offload.put(name, placed, dtype)
            else:
                modules[path]._parameters[held_as] = nn.Parameter(placed, requires_grad=placed.is_floating_point())
    if missing:
        raise CheckpointError(f"{len(missing)} parameters have no tensor: {join_names(sorted(missing))}")


def _replace_map(decoder: "Decoder", path: str, linear: nn.Module) -> nn.Module:
    """Put a linear map in the place of another, whose bias, filled or not, it takes over."""
    place, _, name = path.rpartition(".")
    part, old = decoder.get_submodule(place), decoder.get_submodule(path)
    linear._parameters["bias"] = old._parameters["bias"]
    linear.train(old.training)
    part._modules[name] = linear
    return linear


def _held_weights(cfg: HookedConfig) -> dict[str, DeclaredWeight]:
    """The weights that are parameters: all but a tied unembedding."""
    weights = cfg.description.weights
    return {name: weight for name, weight in weights.items() if not (cfg.tied_unembed and name == _TIED)}


def read_state(decoder: "Decoder", state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names of the parameters, from one under these names, the field's, or both.

    Raises:
        CheckpointError: weights of the field's names that have another shape, or a tied unembedding that differs from
            the embedding.
    """
    declared = _held_weights(decoder.cfg)
    named, bare = name_as_field(decoder.cfg, state), bare_names(state)
    state = {bare[name]: value for name, value in state.items()}
    check_tied({"embed.W_E": decoder.embed.W_E, **named}, tied_unembed=decoder.cfg.tied_unembed)
    translated, problems = {}, []
    for name, value in named.items():
        weight = declared.get(name)
        if weight is None:
            # What is not known is PyTorch's to report, but for the copy of a tied embedding.
            if name != _TIED:
                translated[name] = value
        elif tuple(value.shape) != weight.shape:
            problems.append(f"{name!r} is {list(value.shape)}, expected {list(weight.shape)}")
        elif weight.parameter in state:
            translated[weight.parameter] = state[weight.parameter]
        else:
            translated[weight.parameter] = to_stored(value, weight.stored, weight.axes)
    if problems:
        raise CheckpointError(f"weights of another shape than the network's: {'; '.join(problems)}")
    return translated


def name_as_field(cfg: HookedConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the field's names and in its shapes; shared, not copied.

    Prefixes of wrappers (`module.`, `_orig_mod.`), TransformerLens's names (`hooklens.weights.transformer_lens`), and
    its biases of 0, which say what their absence says, are understood.

    Raises:
        CheckpointError: a weight under two names, or quantised ones.
    """
    quantised = [name for name, value in state.items() if is_quantised_tensor(value)]
    if quantised:
        raise CheckpointError(
            f"weights given are quantised: {join_names(quantised)}. A state dict has what is stored of these, which "
            "only the map it comes from can read: load the checkpoint with quantize= once more, or give the state dict "
            "of model.dequantize()"
        )
    declared = _held_weights(cfg)
    by_parameter = {weight.parameter: weight for weight in declared.values()}
    named: dict[str, Tensor] = {}
    doubled = []
    bare = bare_names(state)
    if len(set(bare.values())) == len(bare):
        state = join_experts({bare[given]: value for given, value in state.items()})
    for given, value in state.items():
        known = rename(bare.get(given, given), cfg)
        if known is None:
            continue
        name, tensor = known, value.reshape(1) if ".act_fn." in given else value
        weight = by_parameter.get(name)
        if weight is not None and tuple(value.shape) == weight.stored_shape:
            name, tensor = weight.name, logical_view(value, weight.stored, weight.axes, weight.shape)
        elif weight is None and name not in declared and _is_zero_bias(name, value):
            continue
        if name in named:
            doubled.append(f"{name!r} (also as {given!r})" if given != name else repr(name))
        named[name] = tensor
    if doubled:
        raise CheckpointError(f"given under two names: {join_names(doubled)}; give each weight once")
    move_input_biases(named, cfg)
    return named


def _is_zero_bias(name: str, value: object) -> bool:
    return name.rpartition(".")[2].startswith("b_") and isinstance(value, Tensor) and not value.any()


def check_tied(state: Mapping[str, Tensor], *, tied_unembed: bool) -> None:
    """Refuse a state dict whose `W_U` is not the `W_E` it is said to be tied to.

    Raises:
        CheckpointError: the two differ.
    """
    if tied_unembed and _TIED in state and not torch.equal(state[_TIED], state["embed.W_E"].T):
        raise CheckpointError(
            "cfg.tied_unembed is True, but unembed.W_U is not the transpose of embed.W_E; "
            "set tied_unembed=False to keep both"
        )
