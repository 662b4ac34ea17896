r"""Steering in the weights: a model that does by itself what edits do.

- **A constant addition** to the stream moves into a bias that writes there: `b_O` for `hook_attn_out` and
  `hook_resid_mid`, `b_out` for `hook_mlp_out`, `hook_resid_post`, and the next block's `hook_resid_pre`. All that
  comes behind the point is as in the edited run.
- **Directional ablation** everywhere (`ablate_everywhere`) moves into all maps that write to the stream: with `u` the
  direction, of length 1, each loses its part along it, `W <- W - W u u^T`, biases and position embeddings included
  (Arditi et al. 2024, section 4.1). What they write then never lies along `u`, and neither does the stream. A tied
  unembedding is untied: as a reader it keeps its value.

Both are refused where they would not be the edited run: the text says why.
"""

from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_number, read_one_of, reads, refusal, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig, SinusoidalPositions
from hooklens.evaluation.fingerprint import hash_values, tensor_fingerprint
from hooklens.hooks.names import select_names
from hooklens.steering.errors import SteeringError
from hooklens.steering.provenance import STEERS
from hooklens.steering.vectors import SteeringVector
from hooklens.weights.draft import WeightDraft
from hooklens.weights.steps import ProcessingStep


@reads(
    SteeringError,
    model=partial(require, kind=HookedCausalLM, expected="a HookedCausalLM"),
    vector=partial(require, kind=SteeringVector, expected="a SteeringVector, such as vectors['resid_post', 3]"),
    how=partial(read_one_of, options=("add", "ablate")),
    strength=partial(read_number, expected="a finite number"),
)
def bake(
    model: HookedCausalLM, vector: SteeringVector, *, how: Literal["add", "ablate"] = "add", strength: float = 1.0
) -> HookedCausalLM:
    """A new model with a steering vector in its weights; this one stays as it is.

    `model.transforms` of the new one records what was done, with a hash of the vector, and `save_pretrained` keeps it.

    Args:
        model: is copied.
        vector: of the stream.
        how: `"add"` as `vector.edits(strength=...)` does at all positions, or `"ablate"` as
            `ablate_everywhere(model, vector)` does.
        strength: how many times the vector is added; `"ablate"` knows nothing but 1.

    Raises:
        SteeringError: a vector of another model's shape, at a point that is no place of the stream, or zero.
        TransformError: this architecture has no place for it, or has been processed otherwise than the one the vector
            was made from; the text says why.
    """
    vector.check(model)
    if vector.direction.shape != (model.cfg.d_model,):
        raise refusal(vector, "vector", f"a direction of the stream, [{model.cfg.d_model}] at one point", SteeringError)
    if not bool(vector.direction.any()):
        raise SteeringError(f"the direction at {vector.name!r} is zero: there is nothing to bake")
    if how == "ablate":
        if strength != 1:
            raise SteeringError(f"how='ablate' removes all that lies along the direction; strength is {strength}")
        return model.change_weights([_ablation(vector)], what="steering.bake")
    return model.change_weights([_addition(model.cfg, vector, strength)], what="steering.bake")


def _addition(cfg: HookedConfig, vector: SteeringVector, strength: float) -> ProcessingStep:
    """The step that adds a vector to the bias that writes it.

    Raises:
        SteeringError: the point is no place of the stream that a constant can be added to.
    """
    layer, bias = _find_bias(cfg, vector.name)
    name = f"blocks.{layer}.{bias}"

    def change(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
        if prefix == f"blocks.{layer}.":
            added = strength / cfg.residual_scale * vector.direction.to(draft.read(name))
            draft.write(name, draft.read(name) + added)

    return ProcessingStep(
        name=f"{STEERS} add {_hash(vector.direction, strength)} at {vector.name}",
        change=change,
        find_obstacles=partial(_obstacles_to_adding, name=name, layer=layer),
    )


def _find_bias(cfg: HookedConfig, point: str) -> tuple[int, str]:
    """The block and the bias behind which the stream has moved by what is added at a point."""
    [name] = select_names(point, list(cfg.description.points), n_layers=cfg.n_layers)
    _, number, *rest = name.split(".") if name.startswith("blocks.") else ("", "-1", name)
    layer, word = int(number), rest[0] if len(rest) == 1 else ""
    block = {"hook_attn_out": "attn.b_O", "hook_resid_mid": "attn.b_O", "hook_mlp_out": "mlp.b_out"}
    if word in block:
        return layer, block[word]
    if word == "hook_resid_pre" and layer > 0:
        layer, word = layer - 1, "hook_resid_post"
    if word == "hook_resid_post":
        # Without an MLP attention writes last.
        return layer, "mlp.b_out" if cfg.block(layer).mlp is not None else "attn.b_O"
    raise SteeringError(
        f"no bias writes what is added at {point!r}; expected a vector at resid_pre (from layer 1 on), resid_mid, "
        "resid_post, attn_out or mlp_out"
    )


def _obstacles_to_adding(cfg: HookedConfig, *, name: str, layer: int) -> list[str]:
    obstacles = []
    weight = cfg.description.weights.get(name)
    if weight is None:
        why = cfg.description.absent.get(name)
        obstacles.append(
            f"there is no {name}{f' ({why})' if why else ''}: the architecture has no bias there that a constant could "
            "be added to; keep the edit"
        )
    elif weight.axes != ("d_model",):
        obstacles.append(f"{name} has axes {list(weight.axes)}: which of them act depends on the token; keep the edit")
    if cfg.block(layer).norm_after:
        obstacles.append(f"cfg.norm_after in layer {layer}: a norm stands between {name} and the stream; keep the edit")
    return obstacles


def _ablation(vector: SteeringVector) -> ProcessingStep:
    def change(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
        for name, weight in draft.declared.items():
            if weight.writes:
                old = draft.read(name)
                unit = vector.direction.double()
                unit = (unit / unit.norm()).to(old)
                draft.write(name, _without(old, unit, weight.axes.index("d_model")))

    return ProcessingStep(
        name=f"{STEERS} ablate {_hash(vector.direction, 1.0)}",
        change=change,
        find_obstacles=_obstacles_to_ablating,
        # The embedding changes as a writer, and the unembedding stays as a reader.
        change_config=lambda cfg: cfg.replace(tied_unembed=False),
    )


def _without(weight: Float[Tensor, "..."], unit: Float[Tensor, " d_model"], axis: int) -> Float[Tensor, "..."]:
    """A weight without what it writes along a direction."""
    last = weight.movedim(axis, -1)
    return (last - (last @ unit)[..., None] * unit).movedim(-1, axis)


def _obstacles_to_ablating(cfg: HookedConfig) -> list[str]:
    obstacles = []
    if layers := [block.layer for block in cfg.blocks if block.norm_after]:
        some = "" if len(layers) == cfg.n_layers else f" in layers {layers}"
        obstacles.append(
            f"cfg.norm_after is True{some}: norms, not weights, write to the stream, and turn what is written"
        )
    if cfg.embed_norm is not None:
        obstacles.append("cfg.embed_norm: a norm, not weights, writes the embedding to the stream")
    if isinstance(cfg.positions, SinusoidalPositions):
        obstacles.append(
            "positions are sinusoidal (cfg.positions): a fixed table, no weight, writes them to the stream"
        )
    known = {"attention", "mla", "mlp", "moe"}
    parts = [part for block in cfg.blocks for part in (block.attn, block.mlp) if part is not None]
    if others := sorted({part.kind for part in parts} - known):
        obstacles.append(f"parts of the kinds {others} may write to the stream by other ways than their weights")
    return obstacles


def _hash(direction: Tensor, strength: float) -> str:
    return hash_values(tensor_fingerprint(direction), float(strength))
