"""The table of the bridge's names and our hook points of equal values, made anew with TransformerLens (extra `bench`).

`tests/compat/names/test_transformer_lens.py` reads the table, so that translations are tested without the library.
`python -m tests.benchmarks.test_bridge_names` writes it.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

from hooklens import HookedCausalLM
from hooklens.bundled import bundled_path
from tests.compat.names.transformers_runs import IDS, make_folder, variants_of

TABLE = Path(__file__).parents[1] / "compat" / "names" / "bridge_names.json"
FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "falcon", "mixtral", "olmo2")
_SWITCHES = ("set_use_attn_result", "set_use_hook_mlp_in")


def find_equals(folder: Path) -> dict[str, list[str] | None]:
    """For each name of the bridge, outside the blocks and in the first of them, our points of equal values.

    None: the bridge lists the name and caches nothing under it.
    """
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    ours = HookedCausalLM.from_pretrained(folder)
    eager = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_path("tiny-gpt-neox"))
    peer = bridge.TransformerBridge.boot_transformers(str(folder), hf_model=eager, tokenizer=tokenizer, device="cpu")
    cached: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        _, known = ours.run_with_cache(IDS, names_filter=["*", "hook_tokens"])
        # Heads' inputs, of which the bridge shows either the joint or the split ones.
        for switch in ("set_use_attn_in", "set_use_split_qkv_input"):
            for name in (*_SWITCHES, switch):
                try:
                    getattr(peer, name)(True)
                except (ValueError, NotImplementedError):
                    continue
            _, cache = peer.run_with_cache(IDS)
            cached |= {name: tensor for name, tensor in cache.items() if isinstance(tensor, torch.Tensor)}
            peer.set_use_attn_in(False)
    names = [name for name in dict.fromkeys([*peer.hook_dict, *cached]) if ".1." not in name and ".2." not in name]
    return {name: _equal_points(cached[name], known) if name in cached else None for name in sorted(names)}


def _equal_points(tensor: torch.Tensor, known: object) -> list[str]:
    equal = []
    for name, ours in known.items():  # type: ignore[attr-defined]
        same_size = ours.numel() == tensor.numel() and ours.is_floating_point() == tensor.is_floating_point()
        if same_size and torch.allclose(ours, tensor.reshape(ours.shape), atol=1e-4, rtol=1e-4):
            equal.append(name)
    return equal


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_the_bridge_shows(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens.model_bridge")
    stored = json.loads(TABLE.read_text(encoding="utf-8"))[family]
    assert find_equals(make_folder(tmp_path, family, variants_of(family)[0])) == stored


def write_table() -> None:
    """Make the table anew."""
    table = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            table[family] = find_equals(make_folder(Path(folder), family, variants_of(family)[0]))
    lines = (f" {json.dumps(family)}: {json.dumps(names)}" for family, names in table.items())
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write_table()
