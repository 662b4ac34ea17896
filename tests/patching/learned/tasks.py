"""Indirect objects on a bundled model, as pairs that bring their answers along."""

import random

from hooklens import HookedCausalLM
from hooklens.patching import Pair

NAMES = ["Mary", "Anna", "Lucy", "Emma", "Alice", "Sarah", "Laura", "Kate", "Helen"]
NAMES += ["Susan", "John", "Tom", "Peter", "Paul", "James", "David", "Simon", "Martin"]
TEMPLATE = "When {first} and {second} went to the store, {subject} gave a drink to"


def indirect_objects(model: HookedCausalLM, n: int, *, seed: int) -> list[Pair]:
    names = [name for name in NAMES if len(model.to_str_tokens(f" {name}", prepend_bos=False)) == 1]
    draw = random.Random(seed)
    pairs = []
    for index in range(n):
        giver, taker = draw.sample(names, 2)
        first, second = (taker, giver) if index % 2 else (giver, taker)
        fields = {"first": first, "second": second}
        filled = Pair.from_template(
            model, TEMPLATE, clean={**fields, "subject": giver}, corrupted={**fields, "subject": taker}
        )
        pairs.append(Pair(filled.clean, filled.corrupted, answer=f" {taker}", wrong=f" {giver}"))
    return pairs
