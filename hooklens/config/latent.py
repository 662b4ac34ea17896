"""Multi-head latent attention: how wide the latents are, and the parts of a head."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hooklens.config.block import BlockConfig, Option, PartConfig, read_part
from hooklens.config.checks import check_counts, check_numbers, check_present, refuse
from hooklens.config.norms import NormConfig
from hooklens.config.positions import AlibiPositions, RotaryPositions, ShortformerPositions

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig

_SIZES = ("kv_rank", "d_nope", "d_rope", "d_head_v")


@dataclass(frozen=True, kw_only=True)
class MLAConfig(PartConfig, kind="mla"):
    """Multi-head latent attention at attention's place: `HookedConfig(attn=MLAConfig(...))`.

    Liu et al. 2024 (arXiv:2405.04434), section 2.1. Keys and values of all heads are made of one latent of the
    stream, and so are, with a `q_rank`, queries of another; each latent goes through an RMSNorm of its own. The entries
    of a key that turn are no part of that: they are one vector for all heads. With `n` the latents' norms and `;`
    between the entries of a head, for a head:

        q = n(x W_DQ) W_UQ                 or, without a latent, x W_Q
        k = [x W_KR ; n(x W_DKV) W_UK]
        v = n(x W_DKV) W_UV

    The first `d_rope` entries of queries and keys turn, the other `d_nope` do not: `d_head` of the network is the sum
    of the two, the width of queries and keys, and its rotary positions have `dim=d_rope`. (The paper writes `W_QR` for
    the columns of `W_UQ` whose entries turn, and has them last.) There are as many key-value heads as heads.

    Attributes:
        q_rank: width of the latent of queries; None: queries read the stream.
        kv_rank: width of the latent of keys and values.
        d_nope: entries of a query or key that do not turn.
        d_rope: entries that turn, shared by the keys of all heads.
        d_head_v: width of a head's values.
        norm_eps: of the norms of the latents.

    Raises:
        ConfigError: values of a wrong kind.
    """

    kind: str = field(default="mla", init=False, repr=False)
    options: Mapping[str, Option] = field(default_factory=dict, init=False, repr=False)
    kv_rank: int
    d_nope: int
    d_rope: int
    d_head_v: int
    q_rank: int | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        given = vars(self)
        owner = "config: latent attention"
        check_present(owner, {name: given[name] for name in (*_SIZES, "norm_eps")})
        check_counts(owner, {name: given[name] for name in (*_SIZES, "q_rank")})
        check_numbers(owner, {"norm_eps": self.norm_eps}, at_least=0.0)
        refuse([f"d_rope={self.d_rope}; entries turn in pairs, so it is even"] if self.d_rope % 2 else [], owner)
        own = [spec.name for spec in dataclasses.fields(self) if spec.init]
        object.__setattr__(self, "options", {name: given[name] for name in own})
        super().__post_init__()

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.options.values())))

    @property
    def d_head(self) -> int:
        """Width of queries and keys."""
        return self.d_nope + self.d_rope

    @property
    def norm(self) -> NormConfig:
        """The kind of the norms of the latents."""
        return NormConfig(kind="rms", eps=self.norm_eps, bias=False)

    @property
    def sizes(self) -> Mapping[str, Option]:
        """The sizes of axes that the part brings."""
        own = {"d_kv_latent": self.kv_rank, "d_nope": self.d_nope, "d_rope": self.d_rope, "d_head_v": self.d_head_v}
        return own if self.q_rank is None else {**own, "d_q_latent": self.q_rank}


def find_latent(attn: Any) -> MLAConfig | None:
    """The first latent attention among what a network attends with; None where there is none."""
    parts = attn if isinstance(attn, tuple) else (attn,)
    return next((part for part in map(read_part, parts) if isinstance(part, MLAConfig)), None)


def latent_problems(cfg: "HookedConfig", blocks: Sequence[BlockConfig]) -> list[str]:
    """Latent attention that does not go with the rest of a network, in words.

    Args:
        cfg: the network.
        blocks: layers of every description that it has.
    """
    latents = [block for block in blocks if isinstance(block.attn, MLAConfig)]
    if not latents:
        return []
    problems = [
        f"{name}={value!r}: latent attention has {why}"
        for name, value, is_wrong, why in (
            ("n_kv_heads", cfg.n_kv_heads, cfg.n_kv_heads != cfg.n_heads, f"keys for each of n_heads={cfg.n_heads}"),
            ("clip_qkv", cfg.clip_qkv, cfg.clip_qkv is not None, "no clipping"),
        )
        if is_wrong
    ]
    if latents[0].has_bias("k") != latents[0].has_bias("v"):
        problems.append("k_bias and v_bias differ; keys and values of latent attention are made of one latent")
    normed = [block.layer for block in latents if block.qk_norm is not None]
    if normed:
        problems.append(f"qk_norm in layers {normed}: latent attention norms its latents, not queries and keys")
    for block in latents:
        problems += _problems_of(block.attn, block.positions, cfg)
    return list(dict.fromkeys(problems))


def _problems_of(attn: PartConfig | None, positions: object, cfg: "HookedConfig") -> list[str]:
    assert isinstance(attn, MLAConfig)
    problems = []
    if attn.d_head != cfg.d_head:
        problems.append(
            f"d_head={cfg.d_head}, and queries and keys of latent attention are d_nope + d_rope = {attn.d_head} wide; "
            "leave d_head out"
        )
    if isinstance(positions, RotaryPositions) and positions.dim != attn.d_rope:
        problems.append(f"rotary dim {positions.dim}, and latent attention has d_rope={attn.d_rope} entries that turn")
    if isinstance(positions, AlibiPositions | ShortformerPositions):
        problems.append(f"positions={positions!r}: latent attention has rotary positions, or none of its own")
    return problems
