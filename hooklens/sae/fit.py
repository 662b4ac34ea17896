"""Whether an autoencoder fits a model: widths, and as far as known what it was trained on."""

from typing import Any

from torch import nn

from hooklens.config import HookedConfig
from hooklens.sae.config import SAEConfig

# Steps that change what passes a point, by how its name ends; the others move weights, and no activation.
_MOVES_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "hook_embed", "hook_pos_embed")


def explain_misfit(cfg: SAEConfig, model: nn.Module, name: str, name_out: str, *, thorough: bool) -> list[str]:
    """All that stands against an autoencoder in a model.

    Args:
        cfg: the autoencoder.
        model: the model.
        name, name_out: the hook points that it reads and gives.
        thorough: also hold the model against what it was trained on.
    """
    network: Any = getattr(model, "cfg", None)
    if not isinstance(network, HookedConfig):
        return []
    problems = []
    for at, width, word in ((name, cfg.d_in, "reads"), (name_out, cfg.width_out, "gives")):
        found = _width(network, at, cfg.training.head)
        if found is not None and found != width:
            problems.append(f"it {word} vectors of width {width}, and {at!r} has {found}")
    return problems + (_differences(cfg, model, network, name) if thorough else [])


def _width(network: HookedConfig, name: str, head: int | None) -> int | None:
    """The width of what is read at a point; heads beside each other unless one is chosen."""
    site = network.description.points.get(name)
    if site is None:
        return None
    axes = [axis for axis in site.axes if axis not in ("batch", "pos")]
    if head is not None and len(axes) == 2:
        axes = axes[1:]
    size = 1
    for axis in axes:
        size *= network.size(axis)
    return size


def _differences(cfg: SAEConfig, model: Any, network: HookedConfig, name: str) -> list[str]:
    trained, problems = cfg.training, []
    if trained.context_size is not None and trained.context_size > network.n_ctx:
        problems.append(f"it was trained on {trained.context_size} tokens, and the model takes {network.n_ctx}")
    if trained.processing is not None:
        moves = "center_writing_weights"
        is_stream = name.endswith(_MOVES_STREAM)
        if is_stream and (moves in trained.processing) != (moves in getattr(model, "transforms", ())):
            verb = "had" if moves in trained.processing else "had not"
            problems.append(
                f"the model it was trained on {verb} been through {moves}, and this one "
                f"{'has not' if verb == 'had' else 'has'}: activations differ by their mean; "
                f"{'use model.process_weights(center_writing_weights=True)' if verb == 'had' else 'load it anew'}"
            )
    puts_bos = _puts_bos(model)
    if trained.prepend_bos is not None and puts_bos is not None and trained.prepend_bos != puts_bos:
        problems.append(
            f"it was trained {'with' if trained.prepend_bos else 'without'} a BOS before each text, and this model's "
            f"texts have {'one' if puts_bos else 'none'}; set model.default_prepend_bos = {trained.prepend_bos}"
        )
    return problems


def _puts_bos(model: Any) -> bool | None:
    """Whether the model's texts start with a BOS where nobody says so; None where there is none."""
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    said = getattr(model, "default_prepend_bos", None)
    if said is not None:
        return bool(said)
    return bool(tokenizer.encode("")[:1] == [bos])  # type: ignore[union-attr]
