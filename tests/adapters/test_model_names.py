"""Names of published models; what they stand for is tested with the import layer, tests/compat/transformer_lens."""

import pytest

from hooklens.adapters.model_names import checkpoint_labels, find_model, official_name, source_name
from hooklens.errors import CheckpointError, InputError


def test_names_in_any_case() -> None:
    assert official_name("Attn-Only-1L") == official_name("attn-only-1l") == "NeelNanda/Attn_Only_1L512W_C4_Code"
    assert official_name("EleutherAI/PYTHIA-70m") == "EleutherAI/pythia-70m"


def test_what_is_a_source_already(tmp_path) -> None:
    for name in (str(tmp_path), "bundled:tiny-llama", "owner/name"):
        assert source_name(name) == name


def test_names_and_checkpoints_that_there_are_not() -> None:
    with pytest.raises(InputError, match=r"pythia-70 not found\. Did you mean 'pythia-70m'"):
        source_name("pythia-70")
    with pytest.raises(InputError, match=r"has 154 checkpoints, 0 to 143000; the checkpoint 3 is not there"):
        find_model("pythia-70m", label=3)
    with pytest.raises(InputError, match=r"number -155 is not there"):
        find_model("pythia-70m", index=-155)
    with pytest.raises(CheckpointError, match=r"owner/name is not checkpointed"):
        checkpoint_labels("owner/name")


def test_checkpoints_counted_from_the_end() -> None:
    found = find_model("pythia-70m", index=-1)
    assert (found.keywords, found.words["checkpoint_index"]) == ({"revision": "step143000"}, 153)
