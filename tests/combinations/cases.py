"""What is drawn at random: a network, padded rows, how they are run, edits, hooks, and what is watched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hooklens.config import (
    AlibiPositions,
    HookedConfig,
    LearnedPositions,
    MoEConfig,
    NoPositions,
    NormConfig,
    PartConfig,
    QueryTemperature,
    RotaryPositions,
    RotaryScaling,
    ShortformerPositions,
    SinusoidalPositions,
)
from tests.annotations import unchecked
from tests.combinations.edits import EditCase, HookCase, draw_edits, draw_hooks
from tests.combinations.reference import of_layer

D_VOCAB, N_CTX = 7, 32
NORMS = st.sampled_from(
    [
        NormConfig(kind="layer", eps=1e-5),
        NormConfig(kind="layer", eps=1e-5, bias=False),
        NormConfig(kind="rms", eps=1e-5, bias=False),
        NormConfig(kind="rms", eps=1e-5, bias=False, unit_offset=True),
        NormConfig(kind="layer", eps=1e-5, unit_offset=True, wide_weight=True),
        NormConfig(kind="layer", eps=1e-5, weight=False, bias=False),
        NormConfig(kind="layer", eps=1e-5, weight=False),
        NormConfig(kind="rms", eps=1e-5, weight=False, bias=False),
    ]
)
# Every row of the tests is short.
LONGROPE = RotaryScaling(
    kind="longrope", factor=2.0, original_n_ctx=64, attention_factor=1.25, short_factors=(1.5,), long_factors=(4.0,)
)
ATTENTION, MLP = PartConfig(kind="attention"), PartConfig(kind="mlp")
# Biases of the router, so that a stream of zeros chooses experts by them and not by how it is rounded.
MIXTURE = MoEConfig(
    n_experts=4, experts_per_token=2, d_expert=3, gate_norm=1.0, router_bias=True, expert_bias=True, d_shared=2,
    act_fn="silu",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Columns that are run together: which of them are tokens, `[rows][columns]`."""

    mask: tuple[tuple[bool, ...], ...]

    @property
    def lengths(self) -> list[int]:
        return [sum(row) for row in self.mask]

    @property
    def width(self) -> int:
        return len(self.mask[0])


@dataclass(frozen=True)
class Case:
    """One combination.

    Attributes:
        cfg, dtype, seed: the network; the seed is that of weights, tokens and values, too.
        scheme: `"once"`; `"grow"`, each part appended to a cache; `"frozen"`, the first part a frozen prefix of the
            same rows; `"shared"`, the first part a frozen prefix of one row that serves all.
        parts: columns, in order.
        spread: positions are given, and advance by this much; None: they are counted.
        starts: by part and row, whether each token starts a document; None: nothing is said of documents.
        says_ids: documents are said by ids, not by borders.
        restarts: counted positions start anew in each document.
        logits_at: of the last call.
        half: run blocks below this one and from this one on in two calls; None: in one.
        edits, hooks: what acts.
        delivery: `"call"`, `"with"` or `"add"`.
        names: points to capture.
        pos_slice, kept_dtype: how they are kept.
        gradient: None, `"loss"` (`incl_bwd` and the model's own loss), or with a loss of the caller's `"capture"` (a
            `with` block) or `"hooks"` (backward hooks, which fire after the call).
        mode: `"no_grad"`, `"inference"` or `"grad"` around calls without a backward pass.
        threaded: another thread runs the same model meanwhile.
        says_mask: hand over a mask also where it hides nothing.
    """

    cfg: HookedConfig
    dtype: torch.dtype
    seed: int
    scheme: str
    parts: tuple[Part, ...]
    spread: int | None
    starts: tuple[tuple[tuple[bool, ...], ...], ...] | None
    says_ids: bool
    restarts: bool
    logits_at: Any
    half: int | None
    edits: tuple[EditCase, ...]
    hooks: tuple[HookCase, ...]
    delivery: str
    names: tuple[str, ...]
    pos_slice: Any
    kept_dtype: torch.dtype | None
    gradient: str | None
    mode: str
    threaded: bool
    says_mask: bool

    @property
    def n_rows(self) -> int:
        return len(self.parts[-1].mask)

    @property
    def n_given(self) -> int:
        """How many parts are a frozen prefix."""
        return 1 if self.scheme in ("frozen", "shared") else 0

    def generator(self, more: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1000 + more)

    def tokens(self, *, altered: Sequence[int] = ()) -> list[list[list[int]]]:
        """Tokens by part and row, those of altered rows different everywhere."""
        generator = self.generator()
        drawn = []
        for part in self.parts:
            rows = [torch.randint(D_VOCAB, (n,), generator=generator).tolist() for n in part.lengths]
            is_common = self.scheme == "shared" and not drawn
            change = [] if is_common else altered
            drawn.append([[(t + 1) % D_VOCAB for t in row] if i in change else row for i, row in enumerate(rows)])
        return drawn

    def positions(self) -> list[list[int]] | None:
        """The position of each token of each row; None: 0, 1, 2, ..."""
        documents = self.documents()
        if self.spread is None and (documents is None or not self.restarts):
            return None
        if self.spread is None:
            return [[i - row.index(document) for i, document in enumerate(row)] for row in documents]
        lengths = [
            sum(part.lengths[0 if len(part.mask) == 1 else i] for part in self.parts) for i in range(self.n_rows)
        ]
        return [[self.spread * i + (1 if i else 0) for i in range(n)] for n in lengths]

    def documents(self) -> list[list[int]] | None:
        """The document of each token of each row, counted along it."""
        if self.starts is None:
            return None
        rows = []
        for row in range(self.n_rows):
            flags = [flag for part in self.starts for flag in part[0 if len(part) == 1 else row]]
            rows.append([sum(flags[1 : i + 1]) for i in range(len(flags))])
        return rows


@st.composite
def draw_config(draw) -> HookedConfig:
    n_layers = draw(st.integers(1, 3))
    n_heads = draw(st.sampled_from([1, 2, 4]))
    d_head = draw(st.sampled_from([2, 4]))
    wiring = draw(st.sampled_from(["sequential", "parallel"]))
    causal = draw(st.integers(0, 4)) > 0
    around = draw(draw_parts(n_layers, wiring))
    of_layer = st.one_of(
        st.just(NoPositions()),
        st.builds(AlibiPositions, scaled=st.booleans()) if causal else st.nothing(),
        st.builds(
            RotaryPositions,
            dim=st.sampled_from([2, d_head]),
            base=st.sampled_from([10000.0, 20.0]),
            layout=st.sampled_from(["half", "interleaved"]),
            scaling=st.sampled_from([None, RotaryScaling(kind="linear", factor=3.0)]),
        ),
        st.just(RotaryPositions(dim=2, scaling=LONGROPE)),
    )
    positions = draw(
        st.one_of(
            of_layer,
            st.builds(LearnedPositions, offset=st.sampled_from([0, 2])),
            st.builds(ShortformerPositions, offset=st.sampled_from([0, 2])),
            st.builds(
                SinusoidalPositions,
                layout=st.sampled_from(["interleaved", "half"]),
                includes_base=st.booleans(),
                offset=st.sampled_from([0, 2]),
            ),
            st.tuples(*[of_layer] * n_layers),
        )
    )
    attns = around["attn"] if isinstance(around["attn"], tuple) else (around["attn"],)
    if isinstance(positions, ShortformerPositions) and not any(attns):
        positions = NoPositions()
    tied = draw(st.booleans())
    reach = draw(draw_reach(n_layers))
    return HookedConfig(
        d_model=6,
        d_mlp=5,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if n_heads % n == 0])),
        d_head=d_head,
        **draw(draw_activation()),
        wiring=wiring,
        **around,
        positions=positions,
        **draw(draw_biases()),
        unembed_bias=not tied and draw(st.booleans()),
        attn_scale=draw_by_layer(draw, st.sampled_from([None, 0.7]), n_layers),
        attn_softcap=draw(st.sampled_from([None, 2.0])),
        logits_softcap=draw(st.sampled_from([None, 3.0])),
        **reach,
        attn_sinks=draw(st.booleans()),
        clip_qkv=draw(st.sampled_from([None, 0.8])),
        query_temperature=draw_by_layer(draw, st.sampled_from([None, QueryTemperature(scale=0.4, length=2)]), n_layers),
        embed_scale=draw(st.sampled_from([None, 1.5])),
        embed_norm=draw(st.none() | NORMS),
        d_embed=draw(st.sampled_from([None, None, 4, 6])),
        d_vocab_out=D_VOCAB if tied else draw(st.sampled_from([None, None, 3])),
        residual_scale=draw(st.sampled_from([1.0, 1.0, 0.6])),
        logits_scale=draw(st.sampled_from([1.0, 1.0, 1.4])),
        tied_unembed=tied,
        causal=causal,
        document_mask=draw(st.integers(0, 3)) > 0,
    )


@st.composite
def draw_reach(draw, n_layers: int) -> dict[str, Any]:
    """Windows and chunks, at most one of them in a layer."""
    size = st.sampled_from([None, 1, 2, 3])
    windows = draw(st.one_of(st.none(), st.tuples(*[size] * n_layers)))
    chunks = draw(st.one_of(st.none(), st.tuples(*[st.sampled_from([None, 2, 3])] * n_layers)))
    if windows is not None and chunks is not None:
        chunks = tuple(None if window is not None else chunk for window, chunk in zip(windows, chunks, strict=True))
    return {"windows": windows, "chunks": chunks}


@st.composite
def draw_activation(draw) -> dict[str, Any]:
    """An activation, a gate where it goes with it, and what else it needs."""
    often = ["relu", "relu2", "gelu", "gelu_tanh", "gelu_quick", "silu"]
    act_fn = draw(
        st.sampled_from([*often, "solu", "solu_ln", "xielu", "clamped_swiglu", "identity", "tanh", "sigmoid"])
    )
    if act_fn == "solu_ln":
        return {"act_fn": act_fn, "act_norm": draw(st.none() | NORMS)}
    if act_fn == "clamped_swiglu":
        limit = draw(st.sampled_from([None, 0.5]))
        return {
            "act_fn": act_fn,
            "gated_mlp": True,
            "swiglu_limit": limit,
            "swiglu_alpha": draw(st.sampled_from([None, 1.0])),
        }
    return {"act_fn": act_fn, "gated_mlp": draw(st.booleans())}


@st.composite
def draw_biases(draw) -> dict[str, bool | None]:
    """Biases of all maps of a kind, or of some of them."""
    several = {name: draw(st.booleans()) for name in ("qkv_bias", "out_bias", "mlp_bias")}
    one = ("q_bias", "k_bias", "v_bias", "mlp_in_bias", "mlp_gate_bias", "mlp_out_bias")
    return {**several, **({name: draw(st.none() | st.booleans()) for name in one} if draw(st.booleans()) else {})}


def draw_by_layer(draw, one: st.SearchStrategy, n_layers: int) -> Any:
    """A value for all layers, or one for each."""
    return draw(st.one_of(one, st.tuples(*[one] * n_layers)))


@st.composite
def draw_parts(draw, n_layers: int, wiring: str) -> dict[str, Any]:
    """What the layers have: attention, MLPs, norms of which kind and where."""
    norm = draw_by_layer(draw, NORMS if draw(st.booleans()) else NORMS | st.none(), n_layers)
    norm_before = draw_by_layer(draw, st.booleans(), n_layers)
    norms = norm if isinstance(norm, tuple) else (norm,) * n_layers
    befores = norm_before if isinstance(norm_before, tuple) else (norm_before,) * n_layers
    can_share = wiring == "parallel" and None not in norms and all(befores)
    after = draw_by_layer(draw, st.booleans(), n_layers)
    if None in norms:
        after = tuple(one is not None and draw(st.booleans()) for one in norms)
    fields = {"norm": norm, "norm_before": norm_before, "norm_after": after}
    if isinstance(norm, tuple) or draw(st.booleans()):
        fields["final_norm"] = draw(NORMS | st.none())
    lacks = draw(st.booleans())
    return {
        **fields,
        "shared_norm": can_share and draw(st.booleans()),
        "norm_stream": wiring == "sequential" and None not in norms and draw(st.integers(0, 3)) == 0,
        **draw(draw_qk_norm(n_layers)),
        "attn": draw_by_layer(draw, st.sampled_from([ATTENTION, None]), n_layers) if lacks else ATTENTION,
        "mlp": draw_by_layer(draw, st.sampled_from([MLP, MIXTURE, None] if lacks else [MLP, MLP, MIXTURE]), n_layers),
    }


@st.composite
def draw_qk_norm(draw, n_layers: int) -> dict[str, Any]:
    """Norms of queries and keys: over what, with which weights, and where."""
    norm = draw_by_layer(draw, st.none() | NORMS, n_layers)
    if norm is None or (isinstance(norm, tuple) and not any(norm)):
        return {"qk_norm": norm}
    over = draw(st.sampled_from(["head", "all_heads"]))
    return {
        "qk_norm": norm,
        "qk_norm_over": over,
        "qk_norm_per_head": over == "head" and draw(st.booleans()),
        "qk_norm_after_rotary": draw(st.booleans()),
    }


@st.composite
def draw_part(draw, n_rows: int, *, at_least: int, longest: int = 4) -> Part:
    """Ragged rows, padded on the left, on the right, in between, or not at all."""
    padding = draw(st.sampled_from(["none", "left", "right", "between"]))
    if padding == "none":
        n = draw(st.integers(max(at_least, 1), longest))
        return Part(((True,) * n,) * n_rows)
    lengths = [draw(st.integers(at_least, longest)) for _ in range(n_rows)]
    width = max(1, *lengths) + (draw(st.integers(0, 1)) if padding == "between" else 0)
    rows = []
    for n in lengths:
        if padding == "between":
            order = draw(st.permutations(range(width)))
            rows.append(tuple(column in order[:n] for column in range(width)))
        else:
            tokens, rest = (True,) * n, (False,) * (width - n)
            rows.append(rest + tokens if padding == "left" else tokens + rest)
    return Part(tuple(rows))


def attending(cfg: HookedConfig) -> list[int]:
    return [layer for layer in range(cfg.n_layers) if of_layer(cfg.attn, layer) is not None]


def kinds_of_positions(cfg: HookedConfig) -> list[object]:
    """The kinds that something reads."""
    is_embedded = isinstance(cfg.positions, LearnedPositions | SinusoidalPositions | ShortformerPositions)
    embedded = [cfg.positions] if is_embedded else []
    return [*embedded, *(of_layer(cfg.positions, layer) for layer in attending(cfg))]


def reads_positions(cfg: HookedConfig) -> bool:
    tempered = any(of_layer(cfg.query_temperature, layer) is not None for layer in attending(cfg))
    return has_reach(cfg) or tempered or not all(isinstance(kind, NoPositions) for kind in kinds_of_positions(cfg))


def has_reach(cfg: HookedConfig) -> bool:
    """Whether a window or a chunk hides keys by their positions."""
    return any(
        sizes is not None and any(sizes[layer] is not None for layer in attending(cfg))
        for sizes in (cfg.windows, cfg.chunks)
    )


def _may_spread(cfg: HookedConfig, scheme: str) -> bool:
    kinds = kinds_of_positions(cfg)
    counted = has_reach(cfg) or any(isinstance(kind, AlibiPositions) for kind in kinds)
    return reads_positions(cfg) and (scheme == "once" or not counted)


@st.composite
def draw_neighbours(draw, cfg: HookedConfig) -> list[str]:
    """The points that a case is about: all, those of a block, or those around its keys, which meet more often so."""
    inside_mixtures = (".router.", ".experts.", ".shared.")
    sites = cfg.description.points.items()
    points = [name for name, site in sites if not (site.discrete or any(word in name for word in inside_mixtures))]
    block = f"blocks.{draw(st.integers(0, cfg.n_layers - 1))}."
    near = [name for name in points if name.startswith(block)]
    words = ("attn_in", "k_input", "hook_k", "k_per_head", "rot_k", "ln1.hook", "k_norm.hook")
    keys = [name for name in near if any(word in name for word in words)]
    return draw(st.sampled_from([points, points, near, keys or near]))


def draw_logits_at(draw, shortest: int) -> Any:
    """Positions that every row of the call has."""
    n = draw(st.integers(1, shortest))
    return draw(
        st.one_of(
            st.integers(-shortest, shortest - 1),
            st.just(slice(-n, None)),
            st.just(slice(None, n)),
            st.lists(st.integers(0, shortest - 1), min_size=1, unique=True),
        )
    )


@st.composite
def draw_case(draw) -> Case:
    # The check of annotations looks at random items of lists, which would be another source of chance.
    with unchecked():
        return draw(_draw_case())


@st.composite
def _draw_case(draw) -> Case:
    cfg = draw(draw_config())
    n_rows = draw(st.integers(1, 3))
    scheme = draw(st.sampled_from(["once", "grow", "frozen", "shared"])) if cfg.causal else "once"
    first = draw(draw_part(1 if scheme == "shared" else n_rows, at_least=1, longest=6 if scheme == "once" else 4))
    n_more = 0 if scheme == "once" else draw(st.integers(1, 2)) if scheme == "grow" else 1
    parts = (first, *(draw(draw_part(n_rows, at_least=draw(st.sampled_from([0, 1])))) for _ in range(n_more)))
    last = parts[-1]
    # In low precision two experts may change their places.
    is_low = draw(st.integers(0, 5)) == 0 and MIXTURE not in (block.mlp for block in cfg.blocks)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16])) if is_low else torch.float64
    gradient = None if scheme == "grow" or is_low else draw(st.sampled_from([None, "loss", "capture", "hooks"]))
    # Positions in queries and keys are made, watched and edited in each half, which has tests of its own.
    may_halve = scheme != "grow" and not isinstance(cfg.positions, ShortformerPositions)
    half = draw(st.one_of(st.none(), st.integers(0, cfg.n_layers))) if may_halve else None
    starts = draw(_draw_starts(parts)) if draw(st.booleans()) else None
    predicts = _n_predicted(parts, scheme, starts) > 0 and last.width > (0 if scheme != "once" else 1)
    if gradient == "loss" and (half is not None or not predicts or cfg.d_vocab_out != cfg.d_vocab):
        gradient = "capture"
    takes_some = gradient != "loss" and min(last.lengths) > 0
    logits_at = draw_logits_at(draw, min(last.lengths)) if takes_some and draw(st.booleans()) else None
    points = draw(draw_neighbours(cfg))
    names = draw(st.lists(st.sampled_from(points), min_size=1, max_size=6, unique=True))
    pos_slice = None
    if logits_at is None and scheme != "grow" and gradient != "hooks":
        column = st.integers(0, last.width - 1)
        pos_slice = draw(st.one_of(st.none(), column, st.lists(column, min_size=1, unique=True)))
    lengths = [sum(p.lengths[0 if len(p.mask) == 1 else i] for p in parts) for i in range(n_rows)]
    edits = draw(draw_edits(cfg, points, lengths, last.width, scheme=scheme, narrowed=logits_at is not None))
    mode = draw(st.sampled_from(["no_grad", "inference", "grad"]))
    in_place = gradient is None and mode != "grad"
    delivery = draw(st.sampled_from(["call", "with", "add"])) if scheme != "grow" else "call"
    # What is added belongs to the model, so it would act in the other thread, too.
    threaded = delivery != "add" and draw(st.integers(0, 3)) == 0
    return Case(
        cfg=cfg,
        dtype=dtype,
        seed=draw(st.integers(0, 10**6)),
        scheme=scheme,
        parts=parts,
        spread=draw(st.sampled_from([None, 1, 2])) if _may_spread(cfg, scheme) and max(lengths) < 15 else None,
        starts=starts,
        says_ids=draw(st.booleans()),
        restarts=draw(st.booleans()),
        logits_at=logits_at,
        half=half,
        edits=edits,
        hooks=draw(draw_hooks(points, scheme=scheme, in_place=in_place)),
        delivery=delivery,
        names=tuple(names),
        pos_slice=pos_slice,
        kept_dtype=draw(st.sampled_from([None, torch.float32])),
        gradient=gradient,
        mode=mode,
        threaded=threaded,
        says_mask=draw(st.booleans()),
    )


@st.composite
def _draw_starts(draw, parts: tuple[Part, ...]) -> tuple[tuple[tuple[bool, ...], ...], ...]:
    """Which tokens start a document, by part and row; a part may have none."""
    flag = st.sampled_from([True, False, False])
    return tuple(
        tuple(draw(st.tuples(*[flag if some else st.just(False)] * n)) for n in part.lengths)
        for part, some in ((part, draw(st.booleans())) for part in parts)
    )


def _n_predicted(parts: tuple[Part, ...], scheme: str, starts: Any) -> int:
    """Tokens of the last part that something predicts: the token before, or a prefix's last logits."""
    flags = [(False,) * n for n in parts[-1].lengths] if starts is None else starts[-1]
    return sum(not flag for row in flags for flag in (row[1:] if scheme == "once" else row))


def stack_rows(values: list[list[Any]], part: Part, empty: Any) -> Tensor:
    """Values of tokens in the columns of a part; padding holds something else in every place."""
    laid = []
    for row, mask in zip(values, part.mask, strict=True):
        given = iter(row)
        laid.append([next(given) if is_token else empty for is_token in mask])
    return torch.tensor(laid)
