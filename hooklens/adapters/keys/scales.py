"""Config parts for the factors on the embedding, on what branches add to the stream, on scores and on logits."""

from hooklens.adapters.keys.parts import Key


def _encode_divisor(factor: float) -> float:
    """The number whose inverse a factor is: a whole one, where that gives the very factor again."""
    divisor = 1 / factor
    whole = float(round(divisor))
    return whole if whole and 1 / whole == factor else divisor


MULTIPLIER_KEYS = (
    Key(
        "embedding_multiplier",
        "embed_scale",
        float,
        default=1.0,
        decode=lambda factor: None if factor == 1 else factor,
        encode=lambda factor: 1.0 if factor is None else factor,
    ),
    Key("residual_multiplier", "residual_scale", float, default=1.0),
    # A scale that follows from the head size differs from what is read back, and is refused there.
    Key("attention_multiplier", "attn_scale", float, default=1.0),
    Key(
        "logits_scaling",
        "logits_scale",
        float,
        default=1.0,
        decode=lambda divisor: 1 / divisor if divisor else divisor,
        encode=_encode_divisor,
    ),
)
"""Granite's four factors, each 1 where the config is silent: that on scores stands in place of the inverse root of the
head size, and logits are divided by the last one."""
