"""`python -m tests.support_table`: write docs/families.md, from the families' docstrings and their tests' variants."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

from hooklens.adapters import Family
from hooklens.adapters.families import load_families
from tests.checkpoints import VARIANTS

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
# Families whose variants all other tests use, too, with the beginning of their names.
_IN_CATALOGUE = {"gpt_neox": "neox-", "llama": "llama-", "falcon": "falcon-"}
_HEAD = """# Supported families

`HookedCausalLM.from_pretrained` loads checkpoints of these families from a folder, the hub, or any URL that fsspec
opens, and `save_pretrained` writes them back bit for bit. Each variant is a tiny model of transformers with random
parameters, saved to disk; tests hold logits in float32, float64 and bfloat16 against transformers, rows alone and
padded on both sides, key-value caches, greedy generation, and the way back to disk. `hooklens verify FOLDER` does that,
and much more, for a checkpoint of yours.

Quantised checkpoints of all of them are dequantised when they are loaded: fp8 with scales of blocks
(`weight_scale_inv`), compressed-tensors (4 and 8 bits), mxfp4, GPTQ and AWQ (`GEMM`), bitsandbytes, int8 of
torchao. With `quantize="keep"` they stay as few bits as they have there, with the same weights to the bit;
`quantize="int8"` and `"int4"` quantise a plain checkpoint while it is loaded, mixtures of experts too.

Old formats of the field are read, from the same places, and not written: TransformerLens's own (attention-only and
SoLU models, the first ones and minGPT's as it reads them), nanoGPT's `ckpt.pt`, and Meta's `params.json` with
`consolidated.*.pth` (Llama 2 and 3). Of TransformerLens's files from several times in training,
`variant="100000"` is the one whose name ends with that number; any file among several is named by its path or URL, or
as `subfolder="checkpoints/model_100000.pth"`.

This page is written by `python -m tests.support_table`.

| `model_type` | family | checkpoints | variants that are tested |
|---|---|---|---|
"""


def make_page() -> str:
    """The page, with a row for each family of this package."""
    own = [family for family in load_families() if module_of(family) is not None]
    return _HEAD + "".join(f"| {' | '.join(describe(family))} |\n" for family in sorted(own, key=lambda one: one.name))


def module_of(family: Family) -> str | None:
    """The module of a family of this package."""
    name = f"hooklens.adapters.families.{family.name}"
    return name if importlib.util.find_spec(name) is not None else None


def describe(family: Family) -> tuple[str, str, str, str]:
    """The cells of a family's row."""
    title, _, rest = inspect.cleandoc(importlib.import_module(str(module_of(family))).__doc__ or "").partition("\n\n")
    checkpoints = re.search(r"^Checkpoints:(.*?)(?:\n\n|\Z)", rest, re.DOTALL | re.MULTILINE)
    assert checkpoints is not None, f"{family.name}: its docstring has no paragraph 'Checkpoints: ...'"
    names = ", ".join(f"`{name}`" for name in dict.fromkeys((*family.model_types, *family.dialects)))
    variants = ", ".join(variants_of(family))
    return names, _in_one_line(title).rstrip("."), _in_one_line(checkpoints[1]).rstrip("."), variants


def variants_of(family: Family) -> list[str]:
    """The names of the variants that a family's tests try."""
    prefix = _IN_CATALOGUE.get(family.name)
    if prefix is not None:
        return [name.removeprefix(prefix) for name in VARIANTS if name.startswith(prefix)]
    tests = importlib.import_module(f"tests.adapters.families.test_{family.name}")
    return [str(name) for name in tests.VARIANTS]


def _in_one_line(text: str) -> str:
    return re.sub(r"([|*])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(make_page(), encoding="utf-8")
