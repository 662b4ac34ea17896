"""Drawn checkpoints of every family: the network of transformers, or a refusal, and never another network.

`HOOKLENS_RANDOM_CHECKPOINTS` says how many are drawn of each family, anew in each run; the default is a few, always the
same.
"""

import os
import random
import time
import warnings

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, TOLERANCE, load_reference, save
from tests.adapters.families.drawing import draw_config, families, model_type_of, spell_as_before
from tests.annotations import unchecked

N_DRAWN = int(os.environ.get("HOOKLENS_RANDOM_CHECKPOINTS", "2"))
SEED = time.time_ns() if "HOOKLENS_RANDOM_CHECKPOINTS" in os.environ else 0
# Longer than the windows and the lengths that scaled rotations were made for.
N_TOKENS = 23


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_a_drawn_checkpoint_is_the_network_of_transformers(family: str, tmp_path) -> None:
    tokens = torch.randint(D_VOCAB, (2, N_TOKENS), generator=torch.Generator().manual_seed(0))
    for number in range(N_DRAWN):
        seed = f"{family} {SEED} {number}"
        rng = random.Random(seed)
        folder = tmp_path / str(number)
        with unchecked(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = draw_config(family, rng)
                save(folder, model_type_of(family), seed=number, **config)
                if rng.random() < 0.5:
                    spell_as_before(folder, rng)
                expected = load_reference(folder, torch.float32)(tokens, use_cache=False).logits
            except Exception:
                # No network: transformers tells so by exceptions of many types, some of them from the forward.
                continue
            try:
                model = HookedCausalLM.from_pretrained(folder)
            except UnsupportedModelError:
                continue
            if not expected.isfinite().all():
                continue
            error = float((model(tokens) - expected).abs().max() / expected.std())
        assert error <= 2 * TOLERANCE[torch.float32], (seed, config, error)


def test_most_of_what_is_drawn_is_a_network(tmp_path) -> None:
    """Else the test above would compare nothing."""
    rng = random.Random(0)
    made = 0
    for number, family in enumerate(families()):
        try:
            save(tmp_path / str(number), model_type_of(family), **draw_config(family, rng))
        except Exception:
            continue
        with unchecked(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                HookedCausalLM.from_pretrained(tmp_path / str(number))
            except UnsupportedModelError:
                continue
        made += 1
    assert made >= 0.8 * len(families())
