"""Activations of MLPs by name, and what else an MLP's neurons are made with."""

from typing import TYPE_CHECKING, Literal, get_args

from hooklens.config.checks import check_choice
from hooklens.config.norms import NormConfig

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig

Activation = Literal[
    "relu",
    "relu2",
    "gelu",
    "gelu_tanh",
    "gelu_new",
    "gelu_fast",
    "gelu_quick",
    "silu",
    "solu",
    "solu_ln",
    "xielu",
    "clamped_swiglu",
    "identity",
    "tanh",
    "sigmoid",
]
# Both are known names of the tanh approximation; `gelu_fast` rounds a constant to ten digits, which moves no float32.
_OTHER_NAMES: dict[str, Activation] = {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


def read_activation(name: object) -> Activation:
    """The one name of an activation.

    Raises:
        ConfigError: no activation is called so.
    """
    check_choice("config: act_fn", name, get_args(Activation))
    return _OTHER_NAMES.get(name, name)  # type: ignore[call-overload, no-any-return]


def settle_activation(cfg: "HookedConfig") -> list[str]:
    """Fill in what an activation needs and nobody gave; what does not go with it comes back."""
    given = vars(cfg)
    problems = []
    if cfg.act_fn == "solu_ln":
        if given["act_norm"] is None:
            own = cfg.norm if isinstance(cfg.norm, NormConfig) and cfg.norm.kind == "layer" else None
            object.__setattr__(cfg, "act_norm", own or NormConfig(kind="layer", eps=1e-5))
        if cfg.gated_mlp:
            problems.append("act_fn='solu_ln' norms the neurons of an MLP without gate; set gated_mlp=False")
    elif given["act_norm"] is not None:
        problems.append(f"act_norm is the norm of act_fn='solu_ln', and act_fn is {cfg.act_fn!r}; leave act_norm out")
    if cfg.act_fn == "clamped_swiglu":
        for name, usual in (("swiglu_limit", SWIGLU_LIMIT), ("swiglu_alpha", SWIGLU_ALPHA)):
            if given[name] is None:
                object.__setattr__(cfg, name, usual)
        if not cfg.gated_mlp:
            problems.append("act_fn='clamped_swiglu' is a gate's: it needs gated_mlp=True")
    elif unused := [name for name in ("swiglu_limit", "swiglu_alpha") if given[name] is not None]:
        problems.append(f"{', '.join(unused)} belong to act_fn='clamped_swiglu', and act_fn is {cfg.act_fn!r}")
    return problems
