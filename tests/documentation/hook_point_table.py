"""`python -m tests.documentation.hook_point_table`: write docs/hook_points.md from what the parts declare."""

from collections.abc import Iterator

from hooklens.axes import AXES, HOOK_SITES, HookSite
from hooklens.model import Decoder, Part
from hooklens.model.moe.mixture import _ELSEWHERE
from hooklens.model.parts.declared import Point, Slot, When
from tests.documentation.pages import DOCS

PAGE = DOCS / "hook_points.md"
_HEAD = """---
hide:
  - toc
---

# Hook points

Every kind of hook point there is, in the order of the computation; `{i}` is the layer. `model.hook_table()` and
`hooklens info MODEL` list those of one model with the sizes of their axes; a point exists if and only if it fires, once
in every call. [How the engine works](engine.md) says what an edit at each reaches.

- **In**: the parts that have it. `LatentAttention` stands where `attn` is an `MLAConfig`, the parts of a mixture where
  `mlp` is a `MoEConfig`, and projected ones where `d_embed` is given.
- **Not where**: a model lacks the point for one of these reasons; nothing: every part of this kind has it.
- **On request**: it is expensive, so "cache everything" (`names_filter=None`) leaves it out; naming it asks for it.

Axes are words of one glossary, below. With a key-value cache `pos` and `query` are the tokens of this call, and `key`
is those in the cache and these.

This page is written by `python -m tests.documentation.hook_point_table`.
"""
_GROUPS = (
    ("Below the blocks", ("hook_tokens", "embed.", "hook_embed", "hook_pos_embed")),
    ("The block and its stream", ("blocks.{i}.hook_", "blocks.{i}.ln")),
    ("Attention", ("blocks.{i}.attn.",)),
    ("MLP", ("blocks.{i}.mlp.hook_", "blocks.{i}.mlp.ln.")),
    ("Mixture of experts", ("blocks.{i}.mlp.router.", "blocks.{i}.mlp.experts.", "blocks.{i}.mlp.shared.")),
    ("Behind the blocks", ("ln_final.", "unembed.")),
)


def own_sites() -> dict[str, HookSite]:
    """The kinds of hook points that this package's parts declare; tests and other packages declare more."""
    declared = {template for part in own_parts() for template, _ in declared_points(part)}
    return {template: site for template, site in HOOK_SITES.items() if template in declared}


def own_parts(base: type[Part] = Part) -> Iterator[type[Part]]:
    """The classes of parts of the network that have a place; the facade is a `Decoder`."""
    for part in dict.fromkeys(base.__subclasses__()):
        if part.__module__.startswith("hooklens.model.") and part.place is not None:
            yield part
        yield from own_parts(part)


def declared_points(part: type[Part], path: str | None = None, *whens: When) -> Iterator[tuple[str, tuple[When, ...]]]:
    """The points of a part and of the norms inside it, by template, each with what has to hold for it."""
    path = part.place if path is None else path
    prefix = f"{path}." if path else ""
    for name, one in part.declared.items():
        if isinstance(one, Point):
            yield prefix + name, (*whens, one.when)
        elif isinstance(one, Slot) and one.axes and isinstance(one.part, type):
            yield from declared_points(one.part, prefix + name, *whens, one.when)


def reasons_of(when: When) -> Iterator[str]:
    """Why networks do not have something: all reasons that can be told."""
    for one in when._also:
        yield from reasons_of(one)
    if when._absent:
        yield when._absent


def why_absent(template: str) -> list[str]:
    """Why networks do not have a point, or the part that it stands in."""
    found: dict[str, None] = {}
    for whole in own_parts():
        prefix = f"{whole.place}." if whole.place else ""
        for name, one in whole.declared.items():
            if isinstance(one, Slot) and template.startswith(f"{prefix}{name}."):
                found.update(dict.fromkeys(reasons_of(one.when)))
    for part in own_parts():
        for other, whens in declared_points(part):
            if other == template:
                found.update(dict.fromkeys(reason for when in whens for reason in reasons_of(when)))
    return list(found)


def parts_with(template: str) -> list[str]:
    """The classes of parts that declare a point, those that another of them is made from first."""
    found = [
        part
        for part in own_parts()
        for other, whens in declared_points(part)
        # A mixture declares these only to say where its neurons are.
        if other == template and _ELSEWHERE not in whens
    ]
    return list(dict.fromkeys(part.__name__ for part in sorted(found, key=lambda part: len(part.__mro__))))


def make_page() -> str:
    """The page, with a row for each kind of hook point."""
    # What stands around the blocks, in the order in which the network declares it.
    order = {name: place for place, name in enumerate(Decoder.declared)}
    parts, seen = [_HEAD], set()
    for title, prefixes in _GROUPS:
        rows = [site for template, site in own_sites().items() if template.startswith(prefixes)]
        rows.sort(key=lambda site: order.get(site.template.split(".")[0], 0) if "{i}" not in site.template else 0)
        seen.update(site.template for site in rows)
        parts.append(f"## {title}\n")
        parts.append("| name | axes | carries | in | not where | on request |\n|---|---|---|---|---|---|")
        parts[-1] += "".join(f"\n| {' | '.join(describe(site))} |" for site in rows) + "\n"
    assert seen == own_sites().keys(), f"a group is missing for {own_sites().keys() - seen}"
    parts.append("## Axes\n\n| axis | runs over |\n|---|---|")
    used = {axis for site in own_sites().values() for axis in site.axes}
    parts[-1] += "".join(f"\n| `{axis}` | {text} |" for axis, text in AXES.items() if axis in used) + "\n"
    return "\n".join(parts)


def describe(site: HookSite) -> tuple[str, ...]:
    """The cells of a point's row."""
    parts = ", ".join(f"`{name}`" for name in parts_with(site.template))
    carries = site.description + (" (whole numbers, without gradients)" if site.discrete else "")
    absent = "; ".join(why_absent(site.template))
    return f"`{site.template}`", f"`[{' '.join(site.axes)}]`", carries, parts, absent, "yes" if site.on_request else ""


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
