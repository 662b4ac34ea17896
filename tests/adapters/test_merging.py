"""Merges of checkpoint folders: against formulas over transformers' state dicts, and whatever may go wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hooklens import HookedCausalLM
from hooklens.adapters import export
from hooklens.adapters import merging as folders
from hooklens.adapters.files import pieces
from hooklens.errors import CheckpointError, InputError, UnsupportedModelError
from hooklens.weights import merging
from hooklens.weights.merging import operands
from tests.merged_models import FAMILIES, build_models, flatten, save_models

# Sums of a few numbers below 1, in float64.
CLOSE = {"rtol": 0.0, "atol": 1e-12}


class Family:
    """A base and three models, in memory and in folders."""

    def __init__(self, name: str, place: Path) -> None:
        self.models = build_models(name)
        self.folders = save_models(self.models, place)
        # Each weight once, as transformers counts them.
        self.names = [name for name, _ in self.models[0].named_parameters()]
        self.whole = torch.stack([flatten(model.state_dict(), self.names) for model in self.models])

    def check(self, out: Path, expected: torch.Tensor) -> None:
        """What transformers loads from a folder is a merged model."""
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert type(loaded) is type(self.models[0])
        assert loaded.dtype == torch.float64
        torch.testing.assert_close(flatten(loaded.state_dict(), self.names), expected, **CLOSE)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Family:
    return Family("llama", tmp_path_factory.mktemp("plain"))


def test_folders_merge_by_the_formulas(family, tmp_path):
    base, *models = family.folders
    start, rest = family.whole[0], family.whole[1:]
    tasks = rest - start
    assert merging.simple_average(models, out=tmp_path / "average") == tmp_path / "average"
    family.check(tmp_path / "average", rest.mean(0))
    merging.weighted_average(models, [0.5, -1.0, 2.0], normalize=False, out=tmp_path / "weighted")
    family.check(tmp_path / "weighted", 0.5 * rest[0] - rest[1] + 2 * rest[2])
    merging.task_arithmetic(base, models, scaling_factor=0.4, out=tmp_path / "task")
    family.check(tmp_path / "task", start + 0.4 * tasks.sum(0))
    merging.ties_merging(base, models, density=0.3, out=tmp_path / "ties")
    trimmed = torch.zeros_like(tasks)
    for row, task in enumerate(tasks):
        kept = task.abs().topk(int(0.3 * len(task))).indices
        trimmed[row, kept] = task[kept]
    agreeing = torch.where(trimmed.sign() == trimmed.sum(0).sign(), trimmed, 0.0)
    family.check(tmp_path / "ties", start + agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1))


def test_dare_leaves_entries_of_some_of_the_models(llama, tmp_path):
    base, *models = llama.folders
    merging.dare(base, models, sparsity=0.5, scaling_factor=1.0, out=tmp_path, seed=3)
    state = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    tasks = llama.whole[1:] - llama.whole[0]
    change = (flatten(state, llama.names) - llama.whole[0]) / 2
    subsets = torch.stack([sum(tasks[i] * (bits >> i & 1) for i in range(3)) for bits in range(8)])
    assert bool(((change - subsets).abs().min(0).values < 1e-12).all())


def test_one_model_with_its_task_vector_is_that_model(family, tmp_path):
    """To the last bit of float32. In float64 `base + (model - base)` is rounded, as the sums themselves are."""
    base, model, *_ = family.folders
    merging.task_arithmetic(base, [model], scaling_factor=1.0, out=tmp_path / "wide")
    family.check(tmp_path / "wide", family.whole[1])
    narrow = [merging.simple_average([folder], dtype="float32", out=tmp_path / folder.name) for folder in (base, model)]
    merging.task_arithmetic(narrow[0], [narrow[1]], scaling_factor=1.0, out=tmp_path / "narrow")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "narrow", narrow[1]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layouts_do_not_matter(family, tmp_path):
    """Each entry is computed by itself, so merging folders and merging hooked models agree to the last bit."""
    base, *models = family.folders
    hooked_base, *hooked = map(HookedCausalLM.from_pretrained, family.folders)
    for number, merge in enumerate(
        (
            lambda start, others, **out: merging.simple_average(others, **out),
            merging.task_arithmetic,
            lambda start, others, **out: merging.ties_merging(start, others, density=0.3, **out),
        )
    ):
        from_folders = HookedCausalLM.from_pretrained(merge(base, models, out=tmp_path / str(number)))
        from_models = merge(hooked_base, hooked)
        for name, weight in from_models.named_weights().items():
            assert torch.equal(from_folders.named_weights()[name], weight), name


def test_results_do_not_depend_on_the_size_of_the_pieces(llama, tmp_path, monkeypatch):
    base, *models = llama.folders
    merges = {
        "average": lambda out: merging.simple_average(models, out=out),
        "task": lambda out: merging.task_arithmetic(base, models, out=out),
        "ties": lambda out: merging.ties_merging(base, models, density=0.1, out=out),
        "dare": lambda out: merging.dare(base, models, then="ties_merging", out=out),
        "slerp": lambda out: merging.slerp(*models[:2], 0.3, out=out),
    }
    for name, merge in merges.items():
        merge(tmp_path / name)
    monkeypatch.setattr(operands, "N_PIECE", 100)
    for name, merge in merges.items():
        merge(tmp_path / "small" / name)
        whole, in_pieces = (load_file(place / name / "model.safetensors") for place in (tmp_path, tmp_path / "small"))
        for key in whole:
            # Only the angle of slerp is summed over pieces.
            tolerance = 1e-14 if name == "slerp" else 0.0
            torch.testing.assert_close(in_pieces[key], whole[key], rtol=0.0, atol=tolerance)


def test_what_stands_beside_the_weights_is_the_base_s(llama, tmp_path):
    base, *models = llama.folders
    merging.task_arithmetic(base, models, out=tmp_path / "out", dtype=torch.bfloat16)
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", base))
    assert config == {**expected, "dtype": "bfloat16"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7
    text = "a b c"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(base)(text)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    hooked = HookedCausalLM.from_pretrained(tmp_path / "out")
    assert hooked.tokenizer is not None
    assert hooked.generation_config["max_new_tokens"] == 7
    # An older checkpoint in the folder goes, in other files and with another tokenizer, too.
    (tmp_path / "out" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "out" / "vocab.txt").touch()
    (tmp_path / "out" / "README.md").touch()
    merging.simple_average([base, *models], out=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({"model-00001-of-00002.safetensors", "vocab.txt"})
    assert {"model.safetensors", "README.md"} <= names


def test_large_models_are_written_in_several_files(llama, tmp_path, monkeypatch):
    """As save_pretrained splits them; files in the middle of which another one is begun, too."""
    _, *models = llama.folders
    monkeypatch.setattr(folders, "plan_shards", lambda outlines, _: export.plan_shards(outlines, "30KB"))
    merging.simple_average(models, out=tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    llama.check(tmp_path, llama.whole[1:].mean(0))


def test_writing_into_the_folder_of_a_model_is_safe(llama, tmp_path):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in llama.folders]
    merging.task_arithmetic(folders[0], folders[1:], out=folders[0], scaling_factor=1.0)
    llama.check(folders[0], llama.whole[0] + (llama.whole[1:] - llama.whole[0]).sum(0))


def test_other_files_of_the_same_weights(llama, tmp_path):
    """Pickles, whole files and shards, other names of today and of old times."""
    base, *models = llama.folders
    pickled = shutil.copytree(models[0], tmp_path / "pickled")
    state = {}
    for path in pickled.glob("*.safetensors"):
        state |= load_file(path)
        path.unlink()
    (pickled / "model.safetensors.index.json").unlink()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, pickled / "pytorch_model.bin")
    merging.task_arithmetic(base, [pickled, *models[1:]], scaling_factor=1.0, out=tmp_path / "out")
    llama.check(tmp_path / "out", llama.whole[0] + (llama.whole[1:] - llama.whole[0]).sum(0))


def test_a_tied_unembedding_counts_once_whatever_files_hold(tmp_path):
    """Counted twice, its entries would take the places of others when task vectors are trimmed."""
    models = build_models("gpt2", dtype=torch.float32)
    folders = save_models(models, tmp_path / "once")
    twice = [shutil.copytree(folder, tmp_path / "twice" / folder.name) for folder in folders]
    for folder in twice:
        state = {}
        for path in folder.glob("*.safetensors"):
            state |= load_file(path)
            path.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    merging.ties_merging(folders[0], folders[1:], out=tmp_path / "a")
    merging.ties_merging(folders[0], [*twice[1:3], folders[3]], out=tmp_path / "b")
    merging.ties_merging(twice[0], folders[1:], out=tmp_path / "c")
    first = load_file(tmp_path / "a" / "model.safetensors")
    assert "lm_head.weight" not in first
    for other in "bc":
        found = load_file(tmp_path / other / "model.safetensors")
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], first[name]) for name in first)


@pytest.fixture(scope="module")
def processed(llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processed")
    model = HookedCausalLM.from_pretrained(llama.folders[1]).process_weights(fold_ln=True)
    model.save_pretrained(folder)
    return folder


def test_what_cannot_be_merged_is_refused_before_any_work(llama, processed, tmp_path):
    base, model, *_ = map(str, llama.folders)
    other = save_models(build_models("neox", 0), tmp_path / "neox")[0]
    wider = shutil.copytree(model, tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    file = tmp_path / "file"
    file.touch()
    out = tmp_path / "out"
    for merge, error, text in (
        (lambda: merging.simple_average([base, model]), InputError, "out is None, expected the folder to write"),
        (lambda: merging.simple_average([base, model], out=file), CheckpointError, "is a file"),
        (lambda: merging.simple_average([base, model], out=adapter), CheckpointError, "holds a PEFT adapter"),
        (lambda: merging.simple_average([base, str(other)], out=out), InputError, r"models\[1\] lacks 'model.embed_to"),
        (
            lambda: merging.simple_average([base, wider], out=out),
            InputError,
            r"norm is .*1e-06.* and .*0.5.* between models\[0\] and models\[1\]",
        ),
        (
            lambda: merging.task_arithmetic(base, [processed], out=out),
            InputError,
            r"models\[0\]: the weights in .* have been processed \(fold_ln\)",
        ),
        (
            lambda: merging.simple_average([base, adapter], out=out),
            InputError,
            r"models\[1\]: .* holds a PEFT adapter .*; merge the adapter into its base first",
        ),
        (lambda: merging.simple_average([base, {"a": torch.ones(1)}], out=out), InputError, "folders and .*state dict"),
        (lambda: merging.simple_average([base, tmp_path / "nowhere"], out=out), CheckpointError, "no such folder"),
        (lambda: merging.simple_average([{"a": torch.ones(1)}], out=out), InputError, "goes with folders"),
    ):
        with pytest.raises(error, match=text):
            merge()
    assert not out.exists()


def test_weights_of_another_shape_are_listed(llama, tmp_path):
    """As after tokens were added to a vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(llama.folders[1], dtype="auto")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "more")
    with pytest.raises(InputError) as refusal:
        merging.simple_average([llama.folders[0], tmp_path / "more"], out=tmp_path / "out")
    for text in (
        "d_vocab is 97 and 100",
        "'model.embed_tokens.weight' is [97, 32] in models[0] and [100, 32] in models[1]",
        "'lm_head.weight' is [97, 32] in models[0] and [100, 32] in models[1]",
    ):
        assert text in str(refusal.value)


def test_quantised_checkpoints_are_refused(llama, tmp_path):
    folder = shutil.copytree(llama.folders[1], tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    state = {}
    for path in folder.glob("model*"):
        state |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    for name in [name for name in state if "_proj" in name]:
        blocks = [length // 16 for length in state[name].shape]
        state |= {name: state[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(blocks)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="its weights are quantised: load it with"):
        merging.simple_average([folder], out=tmp_path / "out")


def test_an_interrupt_leaves_nothing(llama, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a weight: what stood in the folder stays, and a folder that was not there is none."""
    base, *models = llama.folders
    merging.simple_average(models, out=tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    write, left = pieces.PiecesFile.write, iter(range(5))

    def interrupted(self, name, given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, name, given)

    monkeypatch.setattr(pieces.PiecesFile, "write", interrupted)
    for place in ("new", "old"):
        left = iter(range(5))
        with pytest.raises(KeyboardInterrupt):
            merging.task_arithmetic(base, models, out=tmp_path / place)
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


KILLED = """
import os, signal
from hooklens.adapters import export
from hooklens.adapters import merging as folders
from hooklens.adapters.files import pieces
from hooklens.weights import merging
write, left = pieces.PiecesFile.write, iter(range(7))
def killed(self, name, given):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, given)
pieces.PiecesFile.write = killed
merging.simple_average({models!r}, out={out!r}, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that no process can catch")
def test_a_killed_merge_leaves_nothing_that_loads(llama, tmp_path):
    models, out = [str(folder) for folder in llama.folders], tmp_path / "out"
    code = KILLED.format(models=models, out=str(out))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    # It was in the middle of it.
    (draft,) = out.iterdir()
    assert list(draft.rglob("*.safetensors"))
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        HookedCausalLM.from_pretrained(out)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(out)
    # The next one takes away what is left.
    merging.simple_average(models, out=out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    llama.check(out, llama.whole.mean(0))
