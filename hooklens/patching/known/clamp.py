"""A small transformer trained to compute `min(max(x, lower), upper)` by a circuit that is given.

Prompts are `x lower upper =`, three numbers and a sign; the answer is a number. The algorithm has two steps, and the
model's nodes are assigned to it so:

| variable | value | node | reads |
|---|---|---|---|
| `operands` | `x` and `lower`, as `x * n_values + lower` | a head of layer 0 | the embeddings, as values |
| `raised` | `max(x, lower)` | the MLP of layer 0 | the head of layer 0 |
| `upper` | `upper` | a head of layer 1 | the embeddings, as values |
| `answer` | `min(raised, upper)` | the MLP of layer 1 | the MLP of layer 0, the head of layer 1 |

The unembedding reads the answer. All other edges carry nothing that an answer depends on; among them are the queries
and keys of both heads, so these attend by position. Each variable lives in the whole output of its node at the last
position.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hooklens.arguments import read_device, read_dtype, read_flag, read_int, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig, LearnedPositions, NormConfig
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.known.circuit import Ids, KnownCircuit, KnownVariable, Values
from hooklens.patching.known.training import train
from hooklens.patching.metrics.of_answers import LogitDiff

_D_MODEL, _N_HEADS, _D_MLP = 48, 3, 128
_RMS_NORM = NormConfig(kind="rms", eps=1e-6, bias=False)


@reads(
    n_values=partial(read_int, least=3, most=64),
    steps=partial(read_int, least=1),
    seed=read_seed,
    dtype=read_dtype,
    device=read_device,
    progress=read_flag,
)
def train_small_algorithm(
    *,
    n_values: int = 6,
    steps: int = 400,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> KnownCircuit:
    """Train a two-layer transformer to compute `min(max(x, lower), upper)` by a known circuit.

    It takes 10 to 20 seconds on one core. `train` is what does it, for any model, algorithm and circuit.

    The model then answers every prompt rightly, with any variable exchanged and with all edges outside the circuit
    exchanged, too. These do move logits: the strongest of them, the head of layer 1 straight to the logits, has about a
    tenth of the effect of the circuit's weakest on a logit difference.

    Args:
        n_values: how many numbers there are; the sign `=` is the token behind them.
        steps: of training.
        seed: draws the weights, the heads that the circuit uses, and what is trained on.
        dtype: of the weights.
        device: where the model is trained and lies.
        progress: show a progress bar.

    Raises:
        InputError: no numbers, no floating dtype, or no device.

    Example:
        >>> known = patching.known.train_small_algorithm(progress=False)
        >>> patching.known.check(known).interchange["raised"]
        1.0
    """
    generator = torch.Generator().manual_seed(seed)
    lowest, highest = torch.randint(_N_HEADS, (2,), generator=generator).tolist()
    model = _make_model(n_values, seed).to(device=device, dtype=dtype).eval()
    head, last = f"a0.h{lowest}", f"a1.h{highest}"
    edges = [
        ("embed", f"{head}.v"),
        (head, "m0"),
        ("m0", "m1"),
        ("embed", f"{last}.v"),
        (last, "m1"),
        ("m1", "logits"),
    ]
    claim = KnownCircuit(
        name="clamp",
        model=model,
        circuit=Circuit(edges),
        metric=LogitDiff(),
        variables=_variables(model, lowest, highest, n_values),
        algorithm=partial(_clamp, n_values=n_values),
        draw=partial(_draw, n_values=n_values),
    )
    return train(claim, steps=steps, seed=seed, progress=progress)


def _make_model(n_values: int, seed: int) -> HookedCausalLM:
    cfg = HookedConfig(
        d_model=_D_MODEL,
        n_layers=2,
        n_heads=_N_HEADS,
        d_mlp=_D_MLP,
        d_vocab=n_values + 1,
        n_ctx=4,
        act_fn="relu",
        norm=_RMS_NORM,
        positions=LearnedPositions(),
    )
    with torch.random.fork_rng(devices=[]):
        model = HookedCausalLM(cfg)
    model.initialize(seed=seed)
    return model


def _draw(n: int, generator: torch.Generator, *, n_values: int) -> tuple[Ids, Ids]:
    """Any prompts, and any others."""
    numbers = torch.randint(n_values, (2, n, 3), generator=generator)
    clean, corrupted = torch.cat([numbers, torch.full((2, n, 1), n_values)], -1)
    return clean, corrupted


def _read_operands(tokens: Ids, n_values: int) -> Tensor:
    return tokens[:, 0] * n_values + tokens[:, 1]


def _clamp(tokens: Ids, values: Values, *, n_values: int) -> Tensor:
    """The algorithm, with some variables set."""
    if "answer" in values:
        return values["answer"]
    operands = values.get("operands", _read_operands(tokens, n_values))
    raised = values.get("raised", torch.maximum(operands // n_values, operands % n_values))
    return torch.minimum(raised, values.get("upper", tokens[:, 2]))


def _variables(model: HookedCausalLM, lowest: int, highest: int, n_values: int) -> dict[str, KnownVariable]:
    whole = torch.eye(_D_MODEL, device=model.device, dtype=model.dtype)
    found: dict[str, tuple[str, int | None, Callable[[Tensor], Tensor]]] = {
        "operands": ("blocks.0.attn.hook_result", lowest, partial(_read_operands, n_values=n_values)),
        "raised": ("blocks.0.hook_mlp_out", None, lambda tokens: tokens[:, :2].amax(-1)),
        "upper": ("blocks.1.attn.hook_result", highest, lambda tokens: tokens[:, 2]),
        "answer": ("blocks.1.hook_mlp_out", None, partial(_clamp, values={}, n_values=n_values)),
    }
    return {
        name: KnownVariable(name=name, hook_name=hook_name, basis=whole, pos=-1, head=head, read=read)
        for name, (hook_name, head, read) in found.items()
    }
