"""What arguments choose is held against whole runs."""

import pytest
import torch

from hooklens.kv_cache import HookedKeyValueCache
from hooklens.verification.comparing.options import check_caches, check_chosen, check_loss
from hooklens.verification.probe import make_probe
from tests.annotations import unchecked
from tests.verification.networks import build


@pytest.mark.parametrize("name", ["windows", "alibi-scaled", "logits-softcap"])
def test_sound_networks_pass(name: str) -> None:
    probe = make_probe(build(name))
    with unchecked(), torch.no_grad():
        for check in (check_chosen, check_loss, check_caches):
            results = list(check(probe))
            assert results
            assert all(result.passed for result in results), [str(result) for result in results if not result.passed]


def test_a_cache_whose_rows_are_mixed_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    select = HookedKeyValueCache.select
    monkeypatch.setattr(
        HookedKeyValueCache, "select", lambda cache, rows: select(cache, rows[::-1] if rows == [2, 0] else rows)
    )
    with unchecked(), torch.no_grad():
        failed = {result.subject for result in check_caches(make_probe(build())) if not result.passed}

    assert failed == {
        f"select([2, 0]), {how}, {rows}" for how in ("frozen", "appended to") for rows in ("unpadded", "padded")
    }
