"""What a config says of the residual stream's two ends and of what is added to it, checked."""

from typing import TYPE_CHECKING

from hooklens.config.checks import check_numbers
from hooklens.errors import ConfigError

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig

DROPOUTS = ("embed_dropout", "attn_dropout", "resid_dropout")
_SCALES = ("logits_scale", "residual_scale")
_BIASES = {
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "mlp_bias": ("mlp_in_bias", "mlp_gate_bias", "mlp_out_bias"),
}
"""Flags of several maps, and the flags of single ones that say otherwise."""
BIASES_OF_ONE = tuple(own for several in _BIASES.values() for own in several)


def check_stream_numbers(cfg: "HookedConfig") -> None:
    """Refuse scales that are no factors and dropouts that are no probabilities.

    Raises:
        ConfigError: lists all of a kind.
    """
    check_numbers("config", {name: getattr(cfg, name) for name in _SCALES})
    missing = [name for name in (*_SCALES, *DROPOUTS) if getattr(cfg, name) is None]
    wrong = {name: value for name in DROPOUTS if (value := getattr(cfg, name)) is not None and not _is_share(value)}
    if missing:
        raise ConfigError(f"config: {', '.join(missing)} must be numbers, found None; 1.0 is no scale, 0.0 no dropout")
    if wrong:
        found = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ConfigError(f"config: {found}; expected the share of entries dropped, from 0 to below 1")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def settle_biases(cfg: "HookedConfig") -> None:
    """Write flags of single maps only where they differ from most of their group, so that equal networks are equal."""
    for group, names in _BIASES.items():
        of_all = getattr(cfg, group)
        asked = {name: of_all if getattr(cfg, name) is None else getattr(cfg, name) for name in names}
        of_all = sum(asked.values()) > len(asked) / 2
        object.__setattr__(cfg, group, of_all)
        for name, value in asked.items():
            object.__setattr__(cfg, name, None if value == of_all else value)


def has_bias(cfg: "HookedConfig", name: str) -> bool:
    """Whether the map of a flag of a single map (`"q_bias"`) has a bias."""
    own: bool | None = getattr(cfg, name)
    if own is not None:
        return own
    group: bool = getattr(cfg, next(group for group, names in _BIASES.items() if name in names))
    return group


def stream_problems(cfg: "HookedConfig") -> list[str]:
    """Combinations of a config that are no network."""
    problems = []
    if cfg.tied_unembed and cfg.d_vocab_out != cfg.d_vocab:
        problems.append(
            f"a tied unembedding has an entry for each of d_vocab={cfg.d_vocab} tokens, and d_vocab_out is "
            f"{cfg.d_vocab_out}; set tied_unembed=False"
        )
    if cfg.embed_scale_rounded and cfg.embed_scale is None:
        problems.append("embed_scale_rounded=True says how a factor is multiplied, and embed_scale is None")
    norms = cfg.norm if isinstance(cfg.norm, tuple) else (cfg.norm,)
    if cfg.norm_stream and (cfg.wiring != "sequential" or None in norms):
        problems.append("norm_stream needs wiring='sequential', and a norm in every layer")
    return problems


def refuse_other_outputs(cfg: "HookedConfig", what: str, error: type[Exception]) -> None:
    """Refuse what reads logits as predictions of tokens, in a network whose logits are of something else.

    Args:
        cfg: the network.
        what: who reads them, the subject of the message.
        error: what is raised.
    """
    if cfg.d_vocab_out != cfg.d_vocab:
        raise error(
            f"{what}: the logits of this network are of d_vocab_out={cfg.d_vocab_out} outputs, not of the "
            f"d_vocab={cfg.d_vocab} tokens that it reads, so they predict no token"
        )
