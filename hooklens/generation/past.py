"""What stands before the inputs of a call: the tokens in a key-value cache, which text goes on from."""

from hooklens import tokens as tokenization
from hooklens.generation.model import GeneratingModel
from hooklens.kv_cache import HookedKeyValueCache


def read_past(model: GeneratingModel, input: object, cache: HookedKeyValueCache | None) -> list[list[int]] | None:
    """The tokens that text goes on from, one row for each text or one for all; None where none stand before it.

    Ids are run as they are, so for them nothing is looked up.

    Raises:
        CacheError: the cache is another model's, serves other rows, or does not know its tokens.
    """
    if cache is None or not len(cache) or not tokenization.is_text(input):
        return None
    n_texts = 1 if isinstance(input, str) else len(input)  # type: ignore[arg-type]
    cache.check_fits(
        model.cfg,
        transforms=model.transforms,
        adapters=model.active_adapters,
        device=model.cache_device,
        dtype=model.dtype,
        batch=n_texts,
    )
    return cache.token_rows()
