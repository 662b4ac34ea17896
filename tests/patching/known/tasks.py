"""A claim of one layer that trains in two seconds: the last position answers with the first token."""

import torch

from hooklens import HookedCausalLM
from hooklens.config import HookedConfig, LearnedPositions, NormConfig
from hooklens.patching import Circuit, LogitDiff
from hooklens.patching.known import KnownCircuit, KnownVariable

N_TOKENS = 4


def make_claim(*, seed=0) -> KnownCircuit:
    """Fresh weights, of which head 1 alone is to carry the answer."""
    cfg = HookedConfig(
        d_model=16,
        n_layers=1,
        n_heads=2,
        d_mlp=16,
        d_vocab=N_TOKENS,
        n_ctx=3,
        norm=NormConfig(kind="rms", eps=1e-6, bias=False),
        positions=LearnedPositions(),
    )
    model = HookedCausalLM(cfg)
    model.initialize(seed=seed)
    copied = KnownVariable(
        name="copied",
        hook_name="blocks.0.attn.hook_result",
        basis=torch.eye(16),
        pos=-1,
        head=1,
        read=lambda tokens: tokens[:, 0],
    )
    return KnownCircuit(
        name="copy",
        model=model.eval(),
        circuit=Circuit([("embed", "a0.h1.v"), ("a0.h1", "logits")]),
        metric=LogitDiff(),
        variables={"copied": copied},
        algorithm=lambda tokens, values: values.get("copied", tokens[:, 0]),
        draw=lambda n, generator: tuple(torch.randint(N_TOKENS, (2, n, 3), generator=generator)),
    )
