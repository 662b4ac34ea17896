"""What attention does to queries, keys and scores besides positions and norms."""

from dataclasses import dataclass
from typing import Literal

from hooklens.config.checks import check_counts, check_numbers, check_present

NormOver = Literal["head", "all_heads"]
AttentionBackend = Literal["auto", "sdpa", "explicit", "flex"]


@dataclass(frozen=True, kw_only=True)
class QueryTemperature:
    """A factor on queries that grows with their position: `1 + scale * ln(1 + floor((position + offset) / length))`.

    Attributes:
        scale: how fast it grows.
        length: positions over which it stays the same.
        offset: added to positions.
    """

    scale: float
    length: int
    offset: int = 0

    def __post_init__(self) -> None:
        check_present("query temperature", {"scale": self.scale, "length": self.length, "offset": self.offset})
        check_numbers("query temperature", {"scale": self.scale}, at_least=0.0)
        check_counts("query temperature", {"length": self.length})
        check_counts("query temperature", {"offset": self.offset}, at_least=0)
