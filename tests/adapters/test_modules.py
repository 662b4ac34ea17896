"""The modules of transformers that weight maps tell of are there, and hold what the maps say."""

from pathlib import Path

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.adapters.modules import read_modules
from tests.adapters.families.checks import load_reference
from tests.compat.names.transformers_runs import make_folder, variants_of


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "falcon", "olmo2", "mixtral", "gpt_neo"])
def test_modules_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, family, variants_of(family)[0])
    found = read_modules(HookedCausalLM.from_config_of(folder).cfg).modules
    theirs = load_reference(folder, torch.float32)
    weighted = {name.rpartition(".")[0] for name, _ in theirs.named_parameters(remove_duplicate=False)}
    modules = {name for name, _ in theirs.named_modules()}
    # Experts lie in one tensor, of no module of its own; files of old versions name modules that are gone.
    assert {name for name in weighted if not name.endswith("experts")} <= set(found)
    gone = {name for name in set(found) - modules if "block_sparse_moe" not in name}
    assert gone <= {"embed_out"}


def test_modules_around_parts_are_the_parts(tmp_path: Path) -> None:
    cfg = HookedCausalLM.from_config_of(make_folder(tmp_path, "gpt_neo", variants_of("gpt_neo")[0])).cfg
    modules = read_modules(cfg).modules
    assert modules["transformer.h.1"].places == ("blocks.1",)
    assert (
        modules["transformer.h.1.attn"].places == modules["transformer.h.1.attn.attention"].places == ("blocks.1.attn",)
    )
    assert modules["transformer.h.1.mlp"].places == ("blocks.1.mlp",)
    assert modules["transformer"].places == ("",)
    assert modules["lm_head"].places == ("unembed.W_U",)
