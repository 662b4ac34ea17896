"""Caches that share memory, against plain tensors that share none."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import HookedKeyValueCache
from hooklens.errors import CacheError
from tests.kv_cache.test_cache import CFG, append_noise, fill, read
from tests.kv_cache.test_entry import draw, make_entry


@dataclass(frozen=True)
class Plain:
    """What a cache should hold: keys and values of all layers, and the mask, as tensors of their own."""

    parts: list[torch.Tensor]
    frozen: bool = False
    logits: torch.Tensor | None = None
    logits_of: list[torch.Tensor] | None = None

    def change(self, change, *, logits=None) -> "Plain":
        """With all tensors changed; the logits too, where they go on to hold."""
        parts = [change(part).clone() for part in self.parts]
        if logits is None or self.expected_logits() is None:
            return Plain(parts, self.frozen)
        return Plain(parts, self.frozen, logits(self.logits).clone(), parts)

    def expected_logits(self) -> torch.Tensor | None:
        """The logits, where the columns are those that they were given for."""
        return self.logits if self.logits is not None and same(self.parts, self.logits_of) else None


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check(cache: HookedKeyValueCache, plain: Plain) -> None:
    assert same(read(cache), plain.parts)
    assert cache.frozen == plain.frozen
    assert cache.has_padding == bool((~plain.parts[-1]).any())
    expected = plain.expected_logits()
    if expected is None:
        assert cache.last_logits is None
    else:
        assert torch.equal(cache.last_logits, expected)
    cache.check_consistent()


CHANGES = ["append", "append", "roll back", "roll back", "freeze", "unfreeze", "logits", "mask"]
PARTS = ["crop", "select", "slice", "expand", "clone", "copy"]
STEP = st.tuples(st.sampled_from(CHANGES + PARTS), st.integers(0, 3), st.integers(0, 50))


def take_step(pool: list[tuple[HookedKeyValueCache, Plain]], step: tuple[str, int, int]) -> None:  # noqa: PLR0912
    """One step on one cache of the pool; a cache that is made joins the pool."""
    name, which, number = step
    place = which % len(pool)
    cache, plain = pool[place]
    n, rows = len(cache), cache.batch_size
    if name == "append":
        before = read(cache)
        append_noise(cache, 1 + number % 2)
        if not plain.frozen:
            joined = [torch.cat([a, b[:, n:]], 1) for a, b in zip(before, read(cache), strict=True)]
            pool[place] = (cache, replace(plain, parts=joined))
    elif name == "roll back" and plain.frozen:
        with pytest.raises(CacheError, match="the cache is frozen: it cannot be rolled back"):
            cache.roll_back(number % (n + 1))
    elif name == "roll back":
        kept = max(0, n - number % 3)
        cache.roll_back(kept)
        pool[place] = (cache, replace(plain, parts=[part[:, :kept] for part in plain.parts]))
    elif name == "freeze":
        pool[place] = (cache.freeze(), replace(plain, frozen=True))
    elif name == "unfreeze":
        pool[place] = (cache.unfreeze(), replace(plain, frozen=False))
    elif name == "logits":
        logits = torch.randn(rows, CFG.d_vocab)
        cache.last_logits = logits
        pool[place] = (cache, replace(plain, logits=logits, logits_of=plain.parts))
    elif name == "mask" and not plain.frozen:
        mask = torch.ones(rows, n, dtype=torch.bool)
        if n:
            mask[number % rows, number % n] = False
        cache.previous_attention_mask = mask
        pool[place] = (cache, Plain([*plain.parts[:-1], mask.clone()]))
    elif name == "crop":
        kept = number % (n + 1)
        pool.append((cache.crop(kept), plain.change(lambda part: part[:, :kept], logits=lambda logits: logits)))
        if kept < n:
            pool[-1] = (pool[-1][0], replace(pool[-1][1], logits=None))
    elif name == "select":
        index = [(number + i) % rows for i in range(number % 3 + 1)]
        pool.append((cache.select(index), plain.change(lambda part: part[index], logits=lambda logits: logits[index])))
    elif name == "slice":
        index = slice(number % rows, None)
        pool.append((cache.select(index), plain.change(lambda part: part[index], logits=lambda logits: logits[index])))
    elif name == "expand" and rows == 1:
        index = [0] * (number % 3 + 1)
        made = cache.expand(len(index))
        pool.append((made, plain.change(lambda part: part[index], logits=lambda logits: logits[index])))
    elif name in ("clone", "copy"):
        made = cache.clone() if name == "clone" else cache.__copy__()
        pool.append((made, plain.change(lambda part: part, logits=lambda logits: logits)))


@settings(max_examples=150)
@given(steps=st.lists(STEP, min_size=4, max_size=20), batch=st.sampled_from([1, 2]), n=st.sampled_from([0, 3]))
def test_any_sequence_of_steps_agrees_with_plain_tensors(steps, batch, n):
    """After a roll-back, appended columns were written over those that crops and frozen snapshots still show."""
    first = HookedKeyValueCache.init_cache(CFG, batch_size=batch)
    append_noise(first, n)
    pool = [(first, Plain(read(first)))]
    views = []
    for step in steps:
        take_step(pool, step)
        entry = pool[step[1] % len(pool)][0].entries[-1]
        views.append((entry.past_keys, entry.past_keys.clone()))
        for cache, plain in pool:
            check(cache, plain)
        assert all(torch.equal(view, copy) for view, copy in views)


@pytest.mark.parametrize(
    "snapshot",
    [
        lambda cache: cache.crop(len(cache)).freeze(),
        lambda cache: cache.select(slice(None)),
        lambda cache: cache.expand(2),
        lambda cache: cache.to(dtype=torch.float32),
        lambda cache: cache.__copy__(),
    ],
)
def test_a_snapshot_outlives_a_roll_back(snapshot):
    cache = fill(1)
    append_noise(cache, 3)
    taken = snapshot(cache)
    before = read(taken)
    cache.roll_back(5)
    append_noise(cache, 3)
    assert same(read(taken), before)


def test_a_part_that_is_rolled_back_leaves_the_whole():
    """A crop had the room that its `roll_back` freed, in the memory of the cache it was made of."""
    cache = fill(1)
    before = read(cache)
    part = cache.crop(5)
    part.roll_back(2)
    append_noise(part, 3)
    assert same(read(cache), before)


def test_what_append_gave_outlives_a_roll_back():
    entry = make_entry(1, 3)
    keys, _ = entry.append(draw(1, 2, 5), draw(1, 2, 5))
    before = keys.clone()
    entry.roll_back(3)
    entry.append(draw(1, 2, 6), draw(1, 2, 6))
    assert torch.equal(keys, before)


def test_a_frozen_entry_cannot_be_rolled_back():
    entry = make_entry(1, 3, frozen=True)
    with pytest.raises(CacheError, match="a frozen entry cannot be rolled back"):
        entry.roll_back(3)
    cache = fill(frozen=True)
    with pytest.raises(CacheError, match=r"the cache is frozen: its mask cannot be set.*cache.crop\(n\)"):
        cache.previous_attention_mask = torch.ones(2, 5, dtype=torch.bool)


def test_appending_after_a_backward_pass_was_recorded():
    """Writing new columns into a buffer moved the counter of changes of all of it, and autograd refused the old ones.

    Queries may need gradients where keys and values do not (an adapter on queries only).
    """
    entry = make_entry(1, 1)
    entry.append(draw(1, 1, 3), draw(1, 1, 3))
    entry.append(draw(1, 1, 4), draw(1, 1, 4))
    q = torch.ones(3, requires_grad=True)
    keys, _ = entry.append(draw(1, 0), draw(1, 0))
    scores = keys @ q
    assert entry._held.keys.shape[1] > len(entry)
    entry.append(draw(1, 1, 5), draw(1, 1, 5))
    scores.sum().backward()
    torch.testing.assert_close(q.grad, keys.sum((0, 1, 2)))


def test_logits_hold_as_long_as_the_last_column_does():
    """They stayed after an append, as the logits at a position that was not the last."""
    cache = fill()
    logits = cache.last_logits
    append_noise(cache)
    assert cache.last_logits is None
    cache.roll_back(5)
    assert cache.last_logits is logits
    cache.roll_back(4)
    assert cache.last_logits is None
    append_noise(cache, 1)
    assert cache.last_logits is None
    cache.last_logits = logits
    cache.entries[0].append(draw_new(), draw_new())
    assert cache.last_logits is None
    cache.entries[0].roll_back(5)
    assert cache.last_logits is logits
    for entry in cache.entries:
        entry.roll_back(3)
        entry.append(draw_new(2), draw_new(2))
    cache.check_consistent()
    assert cache.last_logits is None
    cache.last_logits = logits
    cache.previous_attention_mask = cache.previous_attention_mask.clone()
    assert cache.last_logits is None


def draw_new(n: int = 1) -> torch.Tensor:
    return torch.randn(2, n, CFG.n_kv_heads, CFG.d_head)
