"""`hooklens merge`: from a pool's YAML file or from folders, to what the functions give."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hooklens.weights import merging
from tests.cli.conftest import Run
from tests.merged_models import build_models, save_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    models = build_models("llama", 2, dtype=torch.float32)
    return [str(folder) for folder in save_models(models, tmp_path_factory.mktemp("merge"))]


def write_pool(path: Path, folders: list[str], **more: object) -> Path:
    base, *models = folders
    content = {
        "_target_": "fusion_bench.modelpool.CausalLMPool",
        "models": {
            "_pretrained_": base,
            "math": {"_target_": "transformers.AutoModelForCausalLM.from_pretrained",
                     "pretrained_model_name_or_path": models[0]},
            "code": models[1],
        },
        "tokenizer": base,
        **more,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def same(one: Path, other: Path) -> bool:
    found, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


CASES = {
    "simple_average": ([], lambda base, models, out: merging.simple_average(models, out=out)),
    "weighted_average": (
        ["--weights", "0.25,0.75"],
        lambda base, models, out: merging.weighted_average(models, [0.25, 0.75], out=out),
    ),
    "slerp": (["--t", "0.3"], lambda base, models, out: merging.slerp(*models, 0.3, out=out)),
    "task_arithmetic": (
        ["--scaling-factor", "-0.5"],
        lambda base, models, out: merging.task_arithmetic(base, models, scaling_factor=-0.5, out=out),
    ),
    "ties_merging": (
        ["--density", "0.4", "--agreement", "max", "--compat", "fusionbench"],
        lambda base, models, out: merging.ties_merging(
            base, models, density=0.4, agreement="max", compat="fusionbench", out=out
        ),
    ),
    "dare": (
        ["--sparsity", "0.7", "--then", "ties_merging", "--no-rescale", "--seed", "4"],
        lambda base, models, out: merging.dare(
            base, models, sparsity=0.7, then="ties_merging", rescale=False, seed=4, out=out
        ),
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_every_method(run: Run, folders, tmp_path, method):
    options, merge = CASES[method]
    merge(folders[0], folders[1:], tmp_path / "expected")
    pool = write_pool(tmp_path / "pool.yaml", folders)
    result = run("merge", pool, "--method", method, "--out", tmp_path / "pooled", *options)
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'pooled'}: 2 models merged" in " ".join(result.stdout.split())
    assert same(tmp_path / "pooled", tmp_path / "expected")
    # A bar is for what takes long.
    assert "merging:" not in result.stderr
    given = ["--base", folders[0], "--model", folders[1], "--model", folders[2]]
    assert run("merge", *given, "--method", method, "--out", tmp_path / "given", *options).exit_code == 0
    assert same(tmp_path / "given", tmp_path / "expected")


def test_the_dtype_is_the_pool_s_or_the_option_s(run: Run, folders, tmp_path):
    pool = write_pool(tmp_path / "pool.yaml", folders, model_kwargs={"torch_dtype": "bfloat16"})
    for name, options, dtype in (("pool", [], torch.bfloat16), ("option", ["--dtype", "float32"], torch.float32)):
        result = run("merge", pool, "--method", "simple_average", "--out", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").dtype == dtype


def test_models_that_are_more_than_a_folder_are_loaded(run: Run, folders, tmp_path):
    """Of a model with layers left out, or an adapter, the folder alone was another model."""
    path = write_pool(tmp_path / "pool.yaml", folders)
    content = yaml.safe_load(path.read_text())
    for name, source in content["models"].items():
        plain = source if isinstance(source, str) else source["pretrained_model_name_or_path"]
        content["models"][name] = {
            "pretrained_model_name_or_path": str(Path(plain).parent),
            "subfolder": Path(plain).name,
        }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    result = run("merge", path, "--method", "task_arithmetic", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    merging.task_arithmetic(folders[0], folders[1:], out=tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")


def test_a_checkpoint_in_the_way_is_kept(run: Run, folders, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    given = ["merge", "--model", folders[0], "--model", folders[1], "--method", "simple_average", "--out", tmp_path]
    result = run(*given)
    assert result.exit_code == 2
    assert "already holds a checkpoint; choose another folder, or pass --overwrite" in result.stderr
    assert (tmp_path / "config.json").read_text() == "{}"
    assert run(*given, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "simple_average"], "give CONFIG, a pool's YAML file, or --model for each model"),
        (["pool.yaml", "--model", "x", "--method", "simple_average"], "give CONFIG, a pool's YAML file, or --model"),
        (["--model", "x", "--method", "task_arithmetic"], "needs the model that the others were trained from: --base"),
        (["--model", "x", "--method", "slerp"], "slerp merges two models, and 1 are given"),
        (["--model", "x", "--method", "simple_average", "--density", "0.2"], "--density is no option of --method sim"),
        (["--model", "x", "--method", "weighted_average", "--weights", "1;2"], "--weights is '1;2'; expected a number"),
    ],
)
def test_what_cannot_be_run_is_refused(run: Run, tmp_path, options, text):
    result = run("merge", *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "out").exists()
