"""Faults of key-value caches."""

from tests.verification.mutation import Mutant

CACHES = (
    Mutant(
        "new keys are stored in reverse",
        "kv_cache.entry:HookedKeyValueCacheEntry._store",
        (("keys.data[:, past:length] = new_keys", "keys.data[:, past:length] = new_keys.flip(1)"),),
    ),
    Mutant(
        "the values of the last head are not stored",
        "kv_cache.entry:HookedKeyValueCacheEntry._store",
        (
            (
                "values.data[:, past:length] = new_values",
                "values.data[:, past:length] = torch.cat([new_values[:, :, :-1], 0 * new_values[:, :, -1:]], 2)",
            ),
        ),
    ),
    Mutant(
        "a buffer that grows loses its last column",
        "kv_cache.entry:HookedKeyValueCacheEntry._grow",
        (("grown[:, :length] = past", "grown.zero_()[:, : length - 1] = past[:, : length - 1]"),),
    ),
    Mutant(
        "a frozen entry is appended to",
        "kv_cache.entry:HookedKeyValueCacheEntry.append",
        (("if not self.frozen:", "if True:"),),
    ),
    Mutant(
        "what was rolled back is written over under its viewers",
        "kv_cache.entry:HookedKeyValueCacheEntry.roll_back",
        (("_Held(keys[:, :length], values[:, :length], length)", "_Held(keys, values, length)"),),
        stage="caches",
    ),
    Mutant(
        "crop keeps the last columns",
        "kv_cache.cache:HookedKeyValueCache.crop",
        (("lambda tensor: tensor[:, :n]", "lambda tensor: tensor[:, len(self) - n :]"),),
        stage="caches",
    ),
    Mutant(
        "select sorts the rows",
        "kv_cache.cache:HookedKeyValueCache.select",
        (("torch.tensor(index, device", "torch.tensor(sorted(index), device"),),
        stage="caches",
    ),
    Mutant(
        "an appended mask forgets that there is padding",
        "kv_cache.mask:ColumnMask.join",
        (("has_padding=hides)", "has_padding=False)"),),
    ),
    Mutant(
        "padding of new tokens is not noted",
        "kv_cache.columns:ColumnRecord._append_columns",
        (
            (
                "self._mask = self._mask.join(new, all_tokens=all_tokens)",
                "self._mask = self._mask.join(new | True, all_tokens=True)",
            ),
        ),
    ),
    Mutant(
        "a saved cache holds its keys twice",
        "kv_cache.storage:write_cache",
        (("entry.past_keys, entry.past_values", "entry.past_keys, entry.past_keys"),),
        stage="caches",
    ),
)
