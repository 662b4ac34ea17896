"""Strict interchange intervention training: a model learns to answer by a given circuit, and by nothing else.

A `KnownCircuit` with fresh weights is a claim: these edges, these variables, this algorithm. Training makes it true.
Each step draws prompts and other prompts of the task, and adds up

- the cross-entropy of plain runs with the algorithm's answers;
- that of runs with one variable taken from the other prompts, with what the algorithm answers when that variable has
  the other prompts' value (Geiger et al. 2022, "Inducing Causal Structure for Interpretable Neural Networks");
- in the same runs and in runs without an exchanged variable, edges outside the circuit carry what they carry on the
  other prompts, which must not change the answer. Gupta et al. 2024 ("InterpBench: Semi-Synthetic Transformers for
  Evaluating Mechanistic Interpretability Techniques"), whose strictness this is, exchange nodes outside the circuit;
  here it is edges, each row a random share of them, so that the circuit is one of edges.

Answers are smoothed by a hundredth (Szegedy et al. 2016), which fixes how far logits lie apart: what edges outside the
circuit do to them then costs, even where they change no answer.
"""

import copy
import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hooklens.arguments import read_flag, read_int, read_number, read_seed, reads, require
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.known.circuit import KnownCircuit
from hooklens.patching.known.exchange import Exchange
from hooklens.progress import progress_bar

_NO_ANSWER = -1
_SMOOTHING = 0.01
_WARM_UP = 20
_SMALLEST_FACTOR = 0.01
# Shares of edges are drawn up to more than 1, so that in a third of the rows all of them are exchanged.
_LARGEST_SHARE = 1.5
_COUNT = partial(read_int, least=1)


@reads(
    claim=partial(require, kind=KnownCircuit, expected="a KnownCircuit, whose model need not keep to it yet"),
    steps=_COUNT,
    batch_size=_COUNT,
    learning_rate=partial(read_number, expected="a number > 0", allows=lambda number: number > 0),
    weight_decay=partial(read_number, expected="a number >= 0", allows=lambda number: number >= 0),
    seed=read_seed,
    progress=read_flag,
)
def train(
    claim: KnownCircuit,
    *,
    steps: int = 400,
    batch_size: int = 256,
    learning_rate: float = 5e-3,
    weight_decay: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> KnownCircuit:
    """Train a copy of a model until it answers by its circuit; see the module for the loss.

    The learning rate of AdamW rises for 20 steps and falls by a cosine to a hundredth. How well the claim then holds is
    measured by `check`.

    Args:
        claim: model, circuit, variables and algorithm. Its model stays as it is; training goes on from its weights.
        steps: optimizer steps.
        batch_size: prompts of a step, each with another prompt.
        learning_rate: the largest.
        weight_decay: of AdamW.
        seed: draws prompts, variables and edges.
        progress: show a progress bar.

    Returns:
        The same circuit with a trained model, in evaluation mode.

    Raises:
        InputError: no claim, or numbers that are none; or heads of the model do not add to the stream one by one.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        model = copy.deepcopy(claim.model)
        trained = replace(claim, model=model)
        lesson = _Lesson(trained, batch_size, torch.Generator().manual_seed(seed))
        wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(requires_grad=True).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_factor, steps=steps))
        with progress_bar("training", range(steps), progress=progress, stays=True) as bar:
            for _ in bar:
                optimizer.zero_grad()
                loss = lesson.loss()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=float(loss.detach()), refresh=False)
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
    model.eval()
    return trained


def _factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * max(_SMALLEST_FACTOR, (1 + math.cos(math.pi * step / steps)) / 2)


class _Lesson:
    """What one step of training asks."""

    def __init__(self, known: KnownCircuit, n: int, generator: torch.Generator) -> None:
        self.known, self.n, self.generator = known, n, generator
        self.exchange = Exchange(known.model, known.variables)
        cfg, device = known.model.cfg, known.model.device
        self.outside = (Circuit.full(cfg).to_mask(cfg) & ~known.circuit.to_mask(cfg)).to(device)

    def loss(self) -> Tensor:
        """The loss on fresh prompts."""
        device = self.known.model.device
        tokens, others = (side.to(device) for side in self.known.draw(self.n, self.generator))
        source = self.exchange.take(others)
        shares = _LARGEST_SHARE * torch.rand(self.n, 1, 1, generator=self.generator)
        edges = self.outside & (torch.rand(self.n, *self.outside.shape, generator=self.generator) < shares).to(device)
        labels = self.known.answer(tokens)
        # In one row of so many no variable is exchanged.
        drawn = torch.randint(len(self.known.variables) + 1, (self.n,), generator=self.generator).to(device)
        exchanged = {name: drawn == number for number, name in enumerate(self.known.variables)}
        for name, rows in exchanged.items():
            values = {name: self.known.variables[name].value(others)}
            labels = torch.where(rows, self.known.answer(tokens, values), labels)
        logits = self.exchange.run(tokens, source, edges, exchanged)
        return _cross_entropy(source.logits, self.known.answer(others)) + _cross_entropy(logits, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the prompts that have an answer."""
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=_NO_ANSWER, label_smoothing=_SMOOTHING)
