"""Text like what the bundled checkpoints were trained on."""

import random

from hooklens.bundled.corpus import sample_row


def make_texts(n: int, *, seed: int, length: int = 48) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(sample_row(rng, length=length).words) for _ in range(n)]
