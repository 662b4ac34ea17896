"""What a model has besides its network and weights, and hands on to the models that are made of them."""

from typing import Any


def hand_on_settings(model: Any, made: Any) -> None:
    """Give a model the settings of generation and text of the one that it is made of."""
    made.generation_config = dict(model.generation_config)
    made.default_prepend_bos = model.default_prepend_bos
