"""Steering vectors as values: a direction, where it belongs, and where it comes from."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import Reader, optional, read_dtype, read_number, read_one_of, read_seed, reads, refusal
from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Listing, Summary
from hooklens.errors import join_names
from hooklens.hooks.choice import Choice
from hooklens.hooks.edits import Add, Edit, Project, SetComponents
from hooklens.hooks.names import select_names
from hooklens.optional import import_package
from hooklens.patching.results.file import Expectation, Expected, ResultFile, is_list
from hooklens.steering.errors import SteeringError
from hooklens.steering.provenance import PROVENANCE, Provenance, check_fits

if TYPE_CHECKING:
    import pandas

How = Literal["add", "ablate", "clamp"]
When = Literal["all", "prefill", "decode"]

_READERS: dict[str, Reader] = {
    "strength": partial(read_number, expected="a finite number", error=SteeringError),
    "how": partial(read_one_of, options=("add", "ablate", "clamp"), error=SteeringError),
    "dtype": optional(partial(read_dtype, error=SteeringError)),
}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SteeringVector(Displayed):
    """A direction at one hook point; at a point with heads, one for each head.

    Attributes:
        name: the hook point.
        direction: at strength 1 this is added to every token: from the average negative prompt to the average positive
            one, or as long as that distance along the direction.
        levels: the component along the direction, with length 1, of the average negative and the average positive
            prompt.
        share: of directions by PCA, the part of the differences' sum of squares that lies along it, else None.
        provenance: what it was made from.
    """

    name: str
    direction: Float[Tensor, "*heads d"]
    levels: Float[Tensor, "2 ..."]
    share: Float[Tensor, "*heads"] | None = None
    provenance: Provenance

    @property
    def layer(self) -> int | None:
        """The layer of the hook point."""
        return layer_of(self.name)

    @property
    def norm(self) -> Float[Tensor, "*heads"]:
        """The length of the direction."""
        norm: Tensor = self.direction.norm(dim=-1)
        return norm

    @property
    def unit(self) -> Float[Tensor, "*heads d"]:
        """The direction with length 1; one of length 0 as it is."""
        return torch.nn.functional.normalize(self.direction, dim=-1, eps=torch.finfo(self.direction.dtype).tiny)

    @reads(SteeringError, **_READERS)
    def edits(
        self,
        *,
        strength: float = 1.0,
        how: How = "add",
        pos: Choice = None,
        when: When = "all",
        dtype: torch.dtype | str | None = None,
    ) -> list[Edit]:
        """The edits that steer; they act in calls, generation, evaluation and wherever else edits do.

        Args:
            strength: how much. `"add"` adds so many times the direction. `"clamp"` sets the component along it to
                `negative + strength (positive - negative)`, of `levels`. `"ablate"` knows nothing but 1.
            how: `"add"` the direction (activation addition), `"ablate"` what lies along it at this point (directional
                ablation; `ablate_everywhere` does so at every point of the stream), or `"clamp"` it to a level.
            pos: token positions; None: all, padding included.
            when: while generating, act on the prompt, on new tokens, or on both.
            dtype: of the model's activations; None: that of those that the direction was made from.

        Raises:
            SteeringError: arguments that are none, or a direction that is zero and cannot be clamped.
        """
        if how == "ablate" and strength != 1:
            raise SteeringError(
                f"how='ablate' removes all that lies along the direction, and strength is {strength}; leave strength "
                "out, or clamp to a level: how='clamp'"
            )
        at = {"pos": pos, "when": when}
        cast: torch.dtype = dtype or self.provenance.torch_dtype  # type: ignore[assignment]
        if self.direction.ndim == 1:
            return [self._edit(self.direction, self.levels, strength, how, cast, {**at})]
        return [
            self._edit(self.direction[head], self.levels[:, head], strength, how, cast, {**at, "head": head})
            for head in range(len(self.direction))
        ]

    def _edit(
        self, direction: Tensor, levels: Tensor, strength: float, how: How, dtype: torch.dtype, at: dict[str, object]
    ) -> Edit:
        where: dict[str, Choice] = at  # type: ignore[assignment]
        if how == "add":
            return Add(self.name, (strength * direction).to(dtype), **where)  # type: ignore[arg-type]
        if how == "ablate":
            return Project(self.name, direction, **where)  # type: ignore[arg-type]
        length = direction.norm()
        if not length:
            raise SteeringError(f"the direction at {self.name!r} is zero: there is no component to clamp")
        value = levels[0] + strength * (levels[1] - levels[0])
        return SetComponents(self.name, direction / length, value, **where)  # type: ignore[arg-type]

    @reads(SteeringError, seed=partial(read_seed, error=SteeringError))
    def random_like(self, *, seed: int) -> "SteeringVector":
        """A direction drawn at random with the same length, to compare with; its levels are NaN: nothing was measured.

        What a direction does beyond what random ones of its length do is due to where it points.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.direction.shape, generator=generator, dtype=torch.float64)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True)
        direction = drawn.to(self.direction) * self.norm[..., None]
        provenance = replace(self.provenance, method=f"random, as long as {self.provenance.method}", seed=seed)
        levels = torch.full_like(self.levels, torch.nan)
        return replace(self, direction=direction, levels=levels, share=None, provenance=provenance)

    def to(self, device: torch.device | str) -> "SteeringVector":
        """The same on another device."""
        share = None if self.share is None else self.share.to(device)
        return replace(self, direction=self.direction.to(device), levels=self.levels.to(device), share=share)

    def check(self, model: HookedCausalLM) -> None:
        """Refuse a model in which the direction would mean something else.

        Raises:
            TransformError: its weights were processed otherwise.
            SteeringError: it lacks the hook point, or has another width there.
        """
        check_fits(model, self.provenance, {self.name: tuple(self.direction.shape)})

    def save(self, path: str | Path) -> None:
        """Write the vector to a safetensors file, which `SteeringVectors.load` and `load` read.

        Raises:
            CheckpointError: the file cannot be written.
        """
        SteeringVectors(vectors=(self,)).save(path)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
            SteeringError: it holds several vectors.
        """
        vectors = SteeringVectors.load(path)
        if len(vectors) != 1:
            raise SteeringError(f"{path} holds {len(vectors)} vectors; read it with SteeringVectors.load")
        return vectors.vectors[0]

    def _summary(self) -> Summary:
        norms = self.norm.reshape(-1).tolist()
        heads = f", {len(self.direction)} heads" if self.direction.ndim > 1 else ""
        norm = ", ".join(f"{one:.3g}" for one in norms[:4]) + (", ..." if len(norms) > 4 else "")
        levels = [f"{one:.3g}" for one in self.levels.reshape(2, -1)[:, 0].tolist()]
        return Summary(
            title=f"SteeringVector({self.name!r}, {self.provenance.method}, norm {norm}{heads})",
            facts={
                "component along it": f"{levels[0]} of the average negative prompt, {levels[1]} of the positive one"
                if self.direction.ndim == 1
                else None,
                "share of the differences": None
                if self.share is None
                else ", ".join(f"{one:.1%}" for one in self.share.reshape(-1)[:8].tolist()),
                **self.provenance.facts(),
            },
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SteeringVectors(Displayed):
    """Directions at several hook points, made in one pass.

    `vectors["resid_post", 3]` or `vectors["blocks.3.hook_resid_post"]` is one of them.

    Attributes:
        vectors: in the order of the computation.
    """

    vectors: tuple[SteeringVector, ...]

    def __post_init__(self) -> None:
        names = [one.name for one in self.vectors]
        if not names or len(set(names)) < len(names):
            raise SteeringError(f"vectors at {names}; expected at least one, and one for each hook point")

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[SteeringVector]:
        return iter(self.vectors)

    @property
    def names(self) -> list[str]:
        """The hook points."""
        return [one.name for one in self.vectors]

    def __getitem__(self, key: str | tuple[str, int]) -> SteeringVector:
        by_name = {one.name: one for one in self.vectors}
        if not isinstance(key, str | tuple):
            raise refusal(key, "a vector's key", "a hook point, or a word and a layer", SteeringError)
        if isinstance(key, str) and key in by_name:
            return by_name[key]
        n_layers = 1 + max((one.layer or 0) for one in self.vectors)
        wanted = list(select_names(key, list(by_name), n_layers=n_layers))
        if len(wanted) != 1:
            raise SteeringError(f"{key!r} selects {join_names(wanted)}, expected one vector; use vectors.edits for all")
        return by_name[wanted[0]]

    @reads(SteeringError, **_READERS)
    def edits(
        self,
        *,
        strength: float = 1.0,
        how: How = "add",
        pos: Choice = None,
        when: When = "all",
        dtype: torch.dtype | str | None = None,
    ) -> list[Edit]:
        """The edits of all vectors at once; see `SteeringVector.edits`."""
        return [
            edit
            for one in self.vectors
            for edit in one.edits(strength=strength, how=how, pos=pos, when=when, dtype=dtype)
        ]

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for each direction: its place, `norm`, the levels `negative` and `positive`, `share`, `method`."""
        rows = []
        for one in self.vectors:
            norms, levels = one.norm.reshape(-1).tolist(), one.levels.reshape(2, -1).tolist()
            shares = [None] * len(norms) if one.share is None else one.share.reshape(-1).tolist()
            for head, (norm, negative, positive, share) in enumerate(zip(norms, *levels, shares, strict=True)):
                rows.append(
                    {
                        "name": one.name,
                        "layer": one.layer,
                        "head": head if one.direction.ndim > 1 else None,
                        "norm": norm,
                        "negative": negative,
                        "positive": positive,
                        "share": share,
                        "method": one.provenance.method,
                    }
                )
        frame: pandas.DataFrame = import_package("pandas").DataFrame(rows)
        return frame

    def check(self, model: HookedCausalLM) -> None:
        """Refuse a model in which the directions would mean something else; see `SteeringVector.check`."""
        for one in self.vectors:
            one.check(model)

    def save(self, path: str | Path) -> None:
        """Write the vectors to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for place, one in enumerate(self.vectors):
            tensors |= {f"{place}.direction": one.direction, f"{place}.levels": one.levels}
            if one.share is not None:
                tensors[f"{place}.share"] = one.share
        described = [
            {"name": one.name, "share": one.share is not None, "provenance": one.provenance.to_json()}
            for one in self.vectors
        ]
        _FILE.write(path, tensors, {"vectors": described})

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVectors":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no steering vectors.
        """
        tensors, described = _FILE.read(path, _expect)
        vectors = tuple(
            SteeringVector(
                name=one["name"],
                direction=tensors[f"{place}.direction"],
                levels=tensors[f"{place}.levels"],
                share=tensors.get(f"{place}.share"),
                provenance=Provenance.from_json(one["provenance"]),
            )
            for place, one in enumerate(described["vectors"])
        )
        return cls(vectors=vectors)

    def _summary(self) -> Summary:
        rows = []
        for one in self.vectors:
            norms = one.norm.reshape(-1).tolist()
            rows.append((one.name, one.provenance.method, min(norms), max(norms), len(norms)))
        has_heads = any(row[-1] > 1 for row in rows)
        return Summary(
            title=f"SteeringVectors: {len(self)}",
            facts=self.vectors[0].provenance.facts(),
            listing=Listing(
                columns=("hook point", "method", "least norm", "largest norm", "heads")
                if has_heads
                else ("hook point", "method", "norm"),
                rows=rows if has_heads else [row[:3] for row in rows],
                what="vectors",
            ),
        )


def _is_vector(found: object) -> bool:
    return (
        isinstance(found, dict)
        and found.keys() == {"name", "share", "provenance"}
        and isinstance(found["name"], str)
        and isinstance(found["share"], bool)
        and PROVENANCE.holds(found["provenance"])
    )


_FILE = ResultFile(
    format="hooklens steering vectors 1",
    contents="steering vectors",
    writer="SteeringVectors.save",
    keys={"vectors": Expected("a list of vectors", lambda found: bool(found) and is_list(found, _is_vector))},
)


def _expect(described: dict[str, list[dict[str, object]]], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    expected = {}
    for place, one in enumerate(described["vectors"]):
        found = tensors.get(f"{place}.direction")
        heads = () if found is None or found.ndim < 2 else (f"{place}.heads",)
        expected[f"{place}.direction"] = Expectation((*heads, f"{place}.d"))
        expected[f"{place}.levels"] = Expectation((2, *heads))
        if one["share"]:
            expected[f"{place}.share"] = Expectation(heads)
    return expected
