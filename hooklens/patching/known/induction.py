"""An induction circuit whose weights are set by hand.

The model has two layers of attention and nothing else. On a prompt `BOS x1 ... xn A`, where `A` is one of the `x`, it
answers with the token that followed `A` before (Olsson et al. 2022, "In-context Learning and Induction Heads"; Elhage
et al. 2021, "A Mathematical Framework for Transformer Circuits"):

1. The *previous-token head* of layer 0 attends from each position to the one before, and copies the token there.
2. The *induction head* of layer 1 attends from the last position to where the previous token is the last position's own
   token, and copies the token there into what the unembedding reads.

So five edges carry all that differs between two prompts: `embed -> previous.v`, `previous -> induction.k`,
`embed -> induction.q`, `embed -> induction.v`, `induction -> logits`. Positions are the same in both prompts, so
`embed -> previous.q` and `embed -> previous.k` carry no difference, though the head reads positions there; under
`ablation="mean"` or `"zero"` they are needed, too.

**The stream** is a sum of orthogonal subspaces, turned by a random rotation so that no axis means anything:

| subspace | directions | holds | written by | read by |
|---|---|---|---|---|
| token | one per token | the token here | `W_E` | previous.v, induction.q, induction.v |
| position | one per position | the position | `W_pos` | previous.q, previous.k |
| previous | one per token | the token before | the previous-token head | induction.k |
| answer | one per token | the token to answer with | the induction head | `W_U` |
| idle | 15 | what idle heads write | idle heads | nobody but idle heads |

One more direction, that of equal entries, stays empty, so that the stream's mean is zero and a LayerNorm centres
nothing away.

**The weights.** Codes are unit vectors, so scores are `sharpness` at the match and 0 elsewhere, where the sharpness is
12 for the previous-token head and 6 for the induction head: over 12 keys its match has a weight of 0.97, far enough
from 1 that gradients pass. `W_U` reads the answer with a factor of 10. In each layer the head of the circuit stands
among the others at a place that the seed draws. The others have random `W_Q`, `W_K` and `W_V` that read the whole
stream. Two of them are *idle*: they write into the idle subspace. One is *noisy*: it writes into the whole stream,
`noise` times what a head of the circuit writes. There are no biases.

With a norm, its weight is the typical scale of the stream at its place (of the seed's own prompts), so that what it
gives is nearly the stream itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_device, read_dtype, read_number, read_one_of, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig, LearnedPositions, NormConfig
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.known.circuit import Ids, KnownCircuit, KnownVariable, Values
from hooklens.patching.metrics.of_answers import LogitDiff

_N_TOKENS, _N_CTX, _N_IDLE, _N_HEADS = 32, 16, 15, 4
_D_MODEL = 1 + 3 * _N_TOKENS + _N_CTX + _N_IDLE
_BOS = 0
# Tokens between the BOS and the one that is asked for.
_N_LISTED = 10
_SHARPNESS_OF_POSITIONS, _SHARPNESS_OF_TOKENS, _LOGIT = 12.0, 6.0, 10.0
_IDLE_SCALE = 0.5

Norm = Literal["layer", "rms"] | None
Weights = dict[str, Tensor]


@reads(
    seed=read_seed,
    norm=partial(read_one_of, options=("layer", "rms", None)),
    noise=partial(read_number, expected="a number >= 0", allows=lambda number: number >= 0),
    dtype=read_dtype,
    device=read_device,
)
def induction(
    *,
    seed: int = 0,
    norm: Norm = None,
    noise: float = 0.05,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> KnownCircuit:
    """A model that copies what followed a token before, by a previous-token head and an induction head.

    Variables are `"token"` (the token at each position but the last, as the induction head copies it), `"previous"`
    (the token before each position), `"query"` (the last token, which is looked for), and `"answer"`. All live at the
    entrance of layer 1, but for the answer at its end; the direction of token `t` is `basis[t]`.

    Args:
        seed: draws the rotation, the places of heads, and the weights of those outside the circuit.
        norm: the kind of the norms; None: none.
        noise: what the noisy head of each layer writes, as a share of what a head of the circuit does.
        dtype: of the weights, which are computed in float64.
        device: where the model lies.

    Raises:
        InputError: no seed, an unknown norm, a negative noise, no floating dtype, or no device.

    Example:
        >>> known = patching.known.induction()
        >>> found = patching.discover_circuit(known.model, known.pairs(16), metric=known.metric, threshold=0.5)
        >>> found.circuit == known.circuit
        True
    """
    generator = torch.Generator().manual_seed(seed)
    spaces = _Subspaces(generator)
    previous, matching = torch.randint(_N_HEADS, (2,), generator=generator).tolist()
    weights = {"embed.W_E": spaces.token, "pos_embed.W_pos": spaces.position, "unembed.W_U": _LOGIT * spaces.answer.T}
    weights |= _attention(0, previous, _previous_token_head(spaces), spaces, noise, generator)
    weights |= _attention(1, matching, _induction_head(spaces), spaces, noise, generator)
    if norm is not None:
        weights |= _norm_weights(weights, generator, norm)
    model = _build(weights, norm).to(device=device, dtype=dtype).eval()
    heads = f"a0.h{previous}", f"a1.h{matching}"
    return KnownCircuit(
        name="induction",
        model=model,
        circuit=Circuit(
            [
                ("embed", f"{heads[0]}.v"),
                (heads[0], f"{heads[1]}.k"),
                ("embed", f"{heads[1]}.q"),
                ("embed", f"{heads[1]}.v"),
                (heads[1], "logits"),
            ]
        ),
        metric=LogitDiff(),
        variables=_variables(spaces, model),
        algorithm=_look_up,
        draw=_draw,
    )


class _Subspaces:
    """Orthonormal codes: rows of a random rotation, each a direction of the stream."""

    def __init__(self, generator: torch.Generator) -> None:
        drawn = torch.randn(_D_MODEL, _D_MODEL, generator=generator, dtype=torch.float64)
        # The first direction is the one of equal entries, and stays empty.
        drawn[:, 0] = 1.0
        rows = torch.linalg.qr(drawn).Q.T[1:]
        sizes = [_N_TOKENS, _N_CTX, _N_TOKENS, _N_TOKENS, _N_IDLE]
        self.token, self.position, self.previous, self.answer, self.idle = rows.split(sizes)


def _previous_token_head(spaces: _Subspaces) -> list[Tensor]:
    """`W_Q`, `W_K`, `W_V`, `W_O`: position i looks for position i - 1, and the first for itself."""
    before = spaces.position.new_zeros(_D_MODEL, _N_TOKENS)
    here = before.clone()
    here[:, :_N_CTX] = spaces.position.T
    before[:, : _N_CTX - 1] = spaces.position[1:].T
    before[:, 0] += spaces.position[0]
    return [before, _SHARPNESS_OF_POSITIONS * here, spaces.token.T, spaces.previous]


def _induction_head(spaces: _Subspaces) -> list[Tensor]:
    """`W_Q`, `W_K`, `W_V`, `W_O`: a token looks for where it is the previous one."""
    return [spaces.token.T, _SHARPNESS_OF_TOKENS * spaces.previous.T, spaces.token.T, spaces.answer]


def _attention(
    layer: int, place: int, head: list[Tensor], spaces: _Subspaces, noise: float, generator: torch.Generator
) -> Weights:
    """The weights of a layer: the circuit's head at its place, and around it one noisy head and idle ones."""
    others = [_random_head(spaces.idle, _IDLE_SCALE, generator) for _ in range(_N_HEADS - 2)]
    others.append(_random_head(torch.cat(list(vars(spaces).values())), noise, generator))
    order = torch.randperm(len(others), generator=generator).tolist()
    stacked = [others[index] for index in order]
    stacked.insert(place, head)
    names = ("W_Q", "W_K", "W_V", "W_O")
    return {
        f"blocks.{layer}.attn.{name}": torch.stack(tensors)
        for name, tensors in zip(names, zip(*stacked, strict=True), strict=True)
    }


def _random_head(
    directions: Float[Tensor, "direction d_model"], scale: float, generator: torch.Generator
) -> list[Tensor]:
    """A head that reads the whole stream, and writes vectors of about a length into the span of some directions."""
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    # What it reads of a stream of about unit length has about unit length, too.
    W_Q, W_K, W_V = (draw(_D_MODEL, _N_TOKENS) / _N_TOKENS**0.5 for _ in range(3))
    W_O = draw(_N_TOKENS, len(directions)) @ directions / len(directions) ** 0.5
    return [W_Q, W_K, W_V, scale * W_O]


def _norm_weights(weights: Weights, generator: torch.Generator, norm: Norm) -> Weights:
    """Norm weights that undo the norms: the stream's own scale on some prompts, without any norm."""
    tokens, _ = _draw(64, generator)
    places = {
        "blocks.0.ln1": "blocks.0.hook_resid_pre",
        "blocks.1.ln1": "blocks.1.hook_resid_pre",
        "ln_final": "blocks.1.hook_resid_post",
    }
    with torch.no_grad():
        _, cache = _build(weights, None).run_with_cache(tokens, names_filter=list(places.values()))
    scales = {place: cache[name].square().mean(-1).sqrt().mean() for place, name in places.items()}
    filled = {f"{place}.w": scale.expand(_D_MODEL).clone() for place, scale in scales.items()}
    if norm == "layer":
        filled |= {f"{place}.b": torch.zeros(_D_MODEL, dtype=torch.float64) for place in places}
    return filled


def _build(weights: Weights, norm: Norm) -> HookedCausalLM:
    cfg = HookedConfig(
        d_model=_D_MODEL,
        n_layers=2,
        n_heads=_N_HEADS,
        d_head=_N_TOKENS,
        d_vocab=_N_TOKENS,
        n_ctx=_N_CTX,
        attn_only=True,
        attn_scale=1.0,
        norm=None if norm is None else NormConfig(kind=norm, eps=1e-6, bias=norm == "layer"),
        positions=LearnedPositions(),
        qkv_bias=False,
        out_bias=False,
    )
    return HookedCausalLM.from_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, cfg)


def _draw(n: int, generator: torch.Generator) -> tuple[Ids, Ids]:
    """Prompts `BOS x1 ... xn A`, and others of the same tokens in another order, with any of them asked for."""
    chosen = 1 + torch.rand(n, _N_TOKENS - 1, generator=generator).argsort(-1)[:, :_N_LISTED]
    sides = []
    for _ in range(2):
        listed = chosen.gather(1, torch.rand(n, _N_LISTED, generator=generator).argsort(-1))
        # The last token listed has nothing behind it to answer with.
        asked = listed.gather(1, torch.randint(_N_LISTED - 1, (n, 1), generator=generator))
        sides.append(torch.cat([torch.full_like(asked, _BOS), listed, asked], 1))
    return sides[0], sides[1]


def _before(tokens: Ids) -> Ids:
    """The token before each position, and at the first its own."""
    return torch.cat([tokens[:, :1], tokens[:, :-1]], 1)


_READ: dict[str, Callable[[Tensor], Tensor]] = {
    "token": lambda tokens: tokens[:, :-1],
    "previous": _before,
    "query": lambda tokens: tokens[:, -1],
}


def _look_up(tokens: Ids, values: Values) -> Tensor:
    """The algorithm: the token at the first position, before the last, whose previous token is the one asked for."""
    if "answer" in values:
        return values["answer"]
    token, previous, query = (values[name] if name in values else read(tokens) for name, read in _READ.items())
    matches = (previous == query[:, None])[:, :-1]
    answers = token.gather(1, matches.int().argmax(1, keepdim=True))[:, 0]
    return answers.masked_fill(~matches.any(1), -1)


def _variables(spaces: _Subspaces, model: HookedCausalLM) -> dict[str, KnownVariable]:
    entrance, end = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
    # The last position's token is the query, which shares the tokens' subspace.
    found = {
        "token": (entrance, spaces.token, slice(None, -1)),
        "previous": (entrance, spaces.previous, None),
        "query": (entrance, spaces.token, -1),
        "answer": (end, spaces.answer, -1),
    }
    return {
        name: KnownVariable(
            name=name,
            hook_name=hook_name,
            basis=basis.to(device=model.device, dtype=model.dtype),
            pos=pos,
            read=_READ.get(name, partial(_look_up, values={})),
        )
        for name, (hook_name, basis, pos) in found.items()
    }
