"""Tests of hooklens.pool.causal_lm_pool."""

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hooklens
from hooklens import HookedCausalLM, HookLensError
from hooklens.errors import InputError
from hooklens.pool import CausalLMBackbonePool, CausalLMPool, LazyWeights, ModelNameError, ModelPool, PoolError
from tests.checkpoints import save_variant
from tests.pool.checkpoints import save_family

TOKENS = torch.arange(6)[None]
TOKENIZER = "bundled:tiny-llama"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


def models_of(family: Path) -> dict[str, Any]:
    return {"_pretrained_": str(family / "base"), "math": str(family / "math"), "code": str(family / "code")}


def write(folder: Path, text: str) -> Path:
    path = folder / "pool.yaml"
    path.write_text(text)
    return path


# The shapes of the files that come with FusionBench: names on the hub stand for folders here.
FILES = {
    "mergebench": """
_target_: fusion_bench.modelpool.CausalLMPool
models:
  _pretrained_: {base}
  math: {math}
  code: {code}
model_kwargs:
  torch_dtype: bfloat16
tokenizer: bundled:tiny-llama
""",
    "mixtral_moe_merging": """
_target_: fusion_bench.modelpool.CausalLMPool
models:
  _pretrained_: {base}
  math: {math}
  code: {code}
tokenizer: ${{.models._pretrained_}}
model_kwargs:
  torch_dtype: bfloat16
""",
    "llama_for_causallm": """
_target_: fusion_bench.modelpool.CausalLMPool
_recursive_: false
models:
  _pretrained_:
    _target_: transformers.LlamaForCausalLM.from_pretrained
    pretrained_model_name_or_path: {base}
  math:
    _target_: transformers.LlamaForCausalLM.from_pretrained
    pretrained_model_name_or_path: {math}
  code:
    _target_: transformers.AutoModelForCausalLM
    pretrained_model_name_or_path: {code}
model_kwargs:
  torch_dtype: bfloat16
tokenizer:
  _target_: transformers.AutoTokenizer.from_pretrained
  pretrained_model_name_or_path: bundled:tiny-llama
""",
    "single_llama_model": """
_target_: fusion_bench.modelpool.CausalLMPool
_recursive_: false
models:
  _pretrained_:
    _target_: transformers.LlamaForCausalLM.from_pretrained
    pretrained_model_name_or_path: ${{...base_model}}
  math: {math}
  code: {code}
model_kwargs:
  torch_dtype: bfloat16
tokenizer:
  _target_: transformers.AutoTokenizer.from_pretrained
  pretrained_model_name_or_path: ${{..base_model}}
base_model: {base}
""",
    "llama_alpaca_cleaned": """
_target_: fusion_bench.modelpool.CausalLMPool
_usage_: null
_version_: 0.2.33
pretrained_model_name_or_path: {base}
models:
  _pretrained_:
    _target_: transformers.AutoModelForCausalLM.from_pretrained
    pretrained_model_name_or_path: ${{...pretrained_model_name_or_path}}
    torch_dtype: bfloat16
  math: {{pretrained_model_name_or_path: {math}, torch_dtype: bfloat16}}
  code: {{pretrained_model_name_or_path: {code}, torch_dtype: bf16}}
tokenizer:
  _target_: transformers.AutoTokenizer.from_pretrained
  pretrained_model_name_or_path: bundled:tiny-llama
train_datasets:
  alpaca-cleaned:
    _target_: fusion_bench.dataset.llama.alpaca.load_tokenized_alpaca_dataset
    tokenizer: ${{...tokenizer}}
    path: "yahma/alpaca-cleaned"
    split: train
    cache_path: null
""",
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_fusion_bench_load_unchanged(tmp_path: Path, family: Path, file: str) -> None:
    paths = {name: str(family / name) for name in ("base", "math", "code")}
    pool = CausalLMPool.from_yaml(write(tmp_path, FILES[file].format(**paths)))
    assert type(pool) is CausalLMPool
    assert (pool.model_names, len(pool), list(pool)) == (["math", "code"], 2, ["math", "code"])
    assert pool.all_model_names == ["_pretrained_", "math", "code"]
    assert (pool.has_pretrained, pool.has_merged) == (True, False)
    assert "_pretrained_" in pool
    assert "math" in pool
    assert "english" not in pool
    assert 3 not in pool
    assert pool.get_model_path("_pretrained_") == paths["base"]
    base = pool.load_pretrained_model(tokenizer=CausalLMPool({}, tokenizer=TOKENIZER).load_tokenizer())
    assert type(base) is HookedCausalLM
    assert base.embed.W_E.dtype == torch.bfloat16
    for name, folder in (("_pretrained_", "base"), ("math", "math"), ("code", "code")):
        plain = pool.load_model(name, hooked=False)
        expected = AutoModelForCausalLM.from_pretrained(paths[folder], dtype=torch.bfloat16)
        assert torch.equal(plain(TOKENS).logits, expected(TOKENS).logits)
    # What it is written as is the same pool, without references.
    pool.to_yaml(tmp_path / "written.yaml")
    again = CausalLMPool.from_yaml(tmp_path / "written.yaml")
    assert again.config == pool.config
    assert again.config["_target_"] == "fusion_bench.modelpool.CausalLMPool"
    assert "${" not in (tmp_path / "written.yaml").read_text()
    assert CausalLMPool.from_config(pool.config).config == pool.config


def test_a_lazy_file(tmp_path: Path, family: Path) -> None:
    text = FILES["mergebench"].format(**{name: family / name for name in ("base", "math", "code")})
    pool = CausalLMPool.from_yaml(write(tmp_path, text + "enable_lazy_loading: true\n"))
    weights = pool.load_model("math")
    assert isinstance(weights, LazyWeights)
    assert weights["embed.W_E"].dtype == torch.bfloat16
    assert isinstance(pool.load_model("math", lazy=False, tokenizer=pool.load_tokenizer()), HookedCausalLM)
    assert pool.config["enable_lazy_loading"] is True


def test_keywords_dicts_and_lists(family: Path) -> None:
    models = models_of(family)
    pool = CausalLMPool(models=models, tokenizer=TOKENIZER, model_kwargs={"torch_dtype": "float64"})
    assert pool.config == CausalLMPool.from_config(pool.config).config
    assert pool.load_model("math").embed.W_E.dtype == torch.float64
    assert CausalLMPool([models["math"], family / "code"]).model_names == ["0", "1"]
    assert ModelPool is CausalLMPool
    assert hooklens.pool.CausalLMPool is CausalLMPool
    models["math"] = "changed"
    assert pool.get_model_path("math") == str(family / "math")
    pool.model_kwargs["torch_dtype"] = "float16"
    pool.config["models"]["code"] = "changed"
    assert pool.load_model("code").embed.W_E.dtype == torch.float64
    assert repr(pool) == "CausalLMPool(_pretrained_, math, code)"


def test_configurations_of_omegaconf(family: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    made = omegaconf.OmegaConf.create({"base": str(family / "base"), "models": {"a": "${..base}"}, "tokenizer": None})
    assert CausalLMPool.from_config(made).config["models"] == {"a": str(family / "base")}
    pool = CausalLMPool(made.models, model_kwargs=omegaconf.OmegaConf.create({"torch_dtype": "bf16"}))
    assert pool.load_model("a").embed.W_E.dtype == torch.bfloat16


def test_overrides_never_leak(family: Path) -> None:
    """In FusionBench an override changed the pool's own dict, so that every later load had it."""
    pool = CausalLMPool(models_of(family), model_kwargs={"torch_dtype": "float32"})
    config = pool.config
    assert pool.load_model("math", torch_dtype="bfloat16").embed.W_E.dtype == torch.bfloat16
    assert pool.load_model("math", dtype=torch.float16).embed.W_E.dtype == torch.float16
    assert pool.load_model("math").embed.W_E.dtype == torch.float32
    assert pool.load_model("math", hooked=False).dtype == torch.float32
    assert pool.config == config
    for _, model in pool.named_models(dtype="float64"):
        assert model.embed.W_E.dtype == torch.float64
    assert pool.config == config


@pytest.mark.parametrize("name", ["mahts", "./nowhere", "/nowhere/at/all", "", "gpt"])
def test_unknown_names_are_key_errors(family: Path, name: str) -> None:
    """In FusionBench an UnboundLocalError."""
    pool = CausalLMPool(models_of(family))
    with pytest.raises(KeyError) as caught:
        pool.load_model(name)
    assert isinstance(caught.value, ModelNameError)
    assert isinstance(caught.value, HookLensError)
    assert str(caught.value).startswith(f"the pool has no model {name!r}: it has '_pretrained_', 'math', 'code'.")
    assert ("Did you mean 'math'?" in str(caught.value)) == (name == "mahts")
    with pytest.raises(ModelNameError):
        pool.get_model_path(name)


def test_paths_and_mappings_that_are_no_names(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FusionBench's comments promise paths; they, too, raised an UnboundLocalError."""
    pool = CausalLMPool(models_of(family), model_kwargs={"torch_dtype": "float64"})
    expected = pool.load_model("math")(TOKENS)
    path = family / "math"
    monkeypatch.chdir(family)
    mapping = {"_target_": "transformers.AutoModelForCausalLM", "pretrained_model_name_or_path": str(path)}
    # `math` in the working directory is not looked at: the pool has that name.
    for given in (path, str(path), "./math", mapping):
        assert torch.equal(pool.load_model(given)(TOKENS), expected)
    assert pool.load_model("bundled:tiny-falcon").cfg.n_layers == 4
    for wrong in (3, None, ["math"], HookedCausalLM):
        with pytest.raises(InputError, match="expected a name of the pool, a path, or a mapping of arguments"):
            pool.load_model(wrong)
    with pytest.raises(PoolError, match=r"_target_ is 'os\.system', which a configuration cannot ask for"):
        pool.load_model({"_target_": "os.system", "command": "true"})
    # A hub name is looked for there, which the tests have not.
    with pytest.raises(HookLensError) as caught:
        pool.load_model("owner/name", local_files_only=True)
    assert not isinstance(caught.value, ModelNameError)


def test_a_file_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    lines = [
        f"models:\n  a:\n    _target_: os.system\n    command: touch {marker}\n",
        f"models:\n  a:\n    source: x\n    y:\n      - _target_: os.system\n        command: touch {marker}\n",
        f"models: {{}}\ntokenizer:\n  _target_: os.system\n  command: touch {marker}\n",
        f"models: {{}}\nmodel_kwargs:\n  x:\n    _target_: os.system\n    command: touch {marker}\n",
        "models: {}\n_target_: os.system\n",
        f"models: {{}}\ntokenizer: !!python/object/apply:os.system ['touch {marker}']\n",
        "models:\n  a: ${oc.env:PATH}\n",
        "x: os.system\nmodels:\n  a:\n    _target_: ${...x}\n",
    ]
    for text in lines:
        with pytest.raises(PoolError) as caught:
            CausalLMPool.from_yaml(write(tmp_path, text))
        assert os.environ["PATH"] not in str(caught.value)
    assert not marker.exists()
    # Of data sets, which nothing here loads, a file says what it likes.
    CausalLMPool.from_yaml(write(tmp_path, "models: {}\ntrain_datasets: {x: {_target_: os.system}}\n"))


def test_a_configuration_cannot_allow_remote_code(family: Path) -> None:
    entry = {"pretrained_model_name_or_path": str(family / "math"), "trust_remote_code": True}
    pool = CausalLMPool({"a": entry, "b": str(family / "math")})
    with pytest.raises(InputError, match=r"models\.a: trust_remote_code is True in the configuration"):
        pool.load_model("a")
    assert torch.equal(pool.load_model("a", trust_remote_code=False)(TOKENS), pool.load_model("b")(TOKENS))
    assert isinstance(pool.load_model("a", hooked=False, trust_remote_code=True), PreTrainedModel)


def test_the_pretrained_or_the_first_model(family: Path) -> None:
    models = models_of(family)
    pool = CausalLMPool(models)
    assert torch.equal(pool.load_pretrained_or_first_model()(TOKENS), pool.load_pretrained_model()(TOKENS))
    del models["_pretrained_"]
    pool = CausalLMPool(models)
    first = pool.load_pretrained_or_first_model(dtype="float64")
    assert torch.equal(first(TOKENS), pool.load_model("math", dtype="float64")(TOKENS))
    with pytest.raises(ModelNameError, match="has no model '_pretrained_': it has 'math', 'code'"):
        pool.load_pretrained_model()
    with pytest.raises(ModelNameError, match="it has no models"):
        CausalLMPool({}).load_pretrained_or_first_model()


def test_adding_models(family: Path) -> None:
    pool = CausalLMPool({"a": str(family / "math")})
    pool.add_model("_merged_", family / "code")
    pool.add_model("memory", pool.load_model("a"))
    assert pool.all_model_names == ["a", "_merged_", "memory"]
    assert pool.has_merged
    assert torch.equal(pool.load_model("memory")(TOKENS), pool.load_model("a")(TOKENS))
    for name, entry, found in (
        ("a", "x", "the pool has a model 'a' already"),
        ("", "x", "model_name is '', expected a text"),
        (3, "x", "model_name is 3, expected a text"),
        ("b", 3, r"models\.b is 3"),
        ("b", {"_target_": "os.system"}, "which a configuration cannot ask for"),
    ):
        with pytest.raises(PoolError, match=found):
            pool.add_model(name, entry)  # type: ignore[arg-type]
    assert pool.all_model_names == ["a", "_merged_", "memory"]


def test_objects_are_in_no_file(tmp_path: Path, family: Path) -> None:
    model = HookedCausalLM.from_pretrained(family / "math")
    pool = CausalLMPool({"a": model, "b": "x/y"}, model_kwargs={"storage_options": {"x": object()}})
    with pytest.raises(PoolError) as caught:
        pool.to_yaml(tmp_path / "pool.yaml")
    assert r"models.a (HookedCausalLM), model_kwargs.storage_options.x (object)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PoolError, match=r"models\.a is in memory, and has no path"):
        pool.get_model_path("a")
    assert pool.config["models"]["a"] is model


@pytest.mark.parametrize("method", ["models", "named_models"])
def test_iteration_holds_no_model(family: Path, method: str) -> None:
    """A model is gone when the caller lets go of it, before the next is loaded."""
    pool = CausalLMPool(models_of(family))
    seen: list[Any] = []
    load = pool.load_model

    def checked(*arguments: Any, **keywords: Any) -> Any:
        gc.collect()
        assert [one() for one in seen] == [None] * len(seen)
        return load(*arguments, **keywords)

    pool.load_model = checked  # type: ignore[method-assign]
    for given in getattr(pool, method)():
        model = given if method == "models" else given[1]
        seen.append(weakref.ref(model))
        del model, given
    assert len(seen) == 2


def test_kept_models_share_what_is_equal_and_stay_apart(family: Path) -> None:
    pool = CausalLMPool(models_of(family), max_loaded=2)
    fresh = CausalLMPool(models_of(family))
    base, math = pool.load_pretrained_model(), pool.load_model("math")
    address = torch._C._data_address
    for name, parameter in math.named_parameters():
        assert (address(parameter) == address(base.get_parameter(name))) == (".mlp." not in name), name
    with torch.no_grad():
        math.blocks[0].attn.W_Q.zero_()
        math.embed.W_E.add_(1.0)
    for name, other in (("_pretrained_", base), ("math", pool.load_model("math"))):
        assert torch.equal(other(TOKENS), fresh.load_model(name)(TOKENS))
    assert math.blocks[0].attn.W_Q.eq(0).all()
    assert len(pool._kept) == 2
    for hooked, options in ((False, {}), (True, {"dtype": "float64"}), (True, {"n_ctx": 8})):
        for _ in range(2):
            mine, other = (one.load_model("code", hooked=hooked, **options) for one in (pool, fresh))
            assert type(mine) is type(other)
            assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
            with torch.no_grad():
                for parameter in mine.parameters():
                    parameter.zero_()


def test_a_folder_that_was_written_anew_is_loaded_anew(tmp_path: Path) -> None:
    save_variant("llama-gqa", tmp_path)
    pool = CausalLMPool({"a": str(tmp_path)}, max_loaded=1)
    before = pool.load_model("a")(TOKENS)
    assert torch.equal(pool.load_model("a")(TOKENS), before)
    save_variant("llama-theta", tmp_path)
    assert torch.equal(pool.load_model("a")(TOKENS), HookedCausalLM.from_pretrained(tmp_path)(TOKENS))
    assert not torch.equal(pool.load_model("a")(TOKENS), before)


@pytest.mark.parametrize("variant", ["neox-parallel", "llama-gqa", "falcon-7b", "falcon-40b"])
def test_backbones_of_any_family(tmp_path: Path, variant: str) -> None:
    """FusionBench's pool found the blocks of no GPT-NeoX and no Falcon."""
    folder = str(save_variant(variant, tmp_path))
    pool = CausalLMBackbonePool({"a": folder}, tokenizer=None)
    blocks, model = pool.load_model("a", dtype="float64"), HookedCausalLM.from_pretrained(folder, dtype="float64")
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == model.cfg.n_layers
    for name, tensor in model.blocks.state_dict().items():
        assert torch.equal(blocks.state_dict()[name], tensor)
    plain = pool.load_model("a", hooked=False)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    names = [name for name, one in whole.named_modules() if isinstance(one, nn.ModuleList) and len(one) == len(blocks)]
    assert isinstance(plain, nn.ModuleList)
    assert plain.state_dict().keys() == whole.get_submodule(names[0]).state_dict().keys()


def test_which_class_a_file_gives(tmp_path: Path, family: Path) -> None:
    path = write(tmp_path, f"_target_: fusion_bench.modelpool.CausalLMBackbonePool\nmodels: {{a: {family / 'math'}}}\n")
    pool = CausalLMPool.from_yaml(path)
    assert type(pool) is CausalLMBackbonePool
    assert pool.config["_target_"] == "fusion_bench.modelpool.CausalLMBackbonePool"
    path.write_text(f"_target_: fusion_bench.modelpool.CausalLMPool\nmodels: {{a: {family / 'math'}}}\n")
    backbones = CausalLMBackbonePool.from_yaml(path)
    assert type(backbones) is CausalLMBackbonePool
    assert isinstance(backbones.load_model("a"), nn.ModuleList)
    assert backbones.config["_target_"] == "hooklens.pool.CausalLMBackbonePool"
    lazy = CausalLMBackbonePool({"a": str(family / "math")}, enable_lazy_loading=True)
    with pytest.warns(UserWarning, match="blocks are modules"):
        assert isinstance(lazy.load_model("a"), nn.ModuleList)
    with pytest.raises(InputError, match="lazy=True: blocks are modules"):
        lazy.load_model("a", lazy=True)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"max_loaded": -1}, "max_loaded is -1"),
        ({"model_kwargs": 3}, "model_kwargs is 3"),
        ({"enable_lazy_loading": "yes"}, "enable_lazy_loading is 'yes'"),
        ({"tokenizer": 3}, "tokenizer is 3"),
        ({"models": None}, "models is None, expected a mapping from names, or a list"),
        ({"models": "folder"}, "models is 'folder', expected a mapping from names, or a list"),
    ],
)
def test_what_a_pool_refuses(arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(PoolError, match=found):
        CausalLMPool(**{"models": {}, **arguments})


def test_misspelt_keywords() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'tokeniser'.*Did you mean 'tokenizer'"):
        CausalLMPool({}, tokeniser="x")  # type: ignore[call-arg]
    with pytest.raises(PoolError, match="a file goes to from_yaml"):
        CausalLMPool.from_config("pool.yaml")  # type: ignore[arg-type]
    pool = CausalLMPool({"a": TOKENIZER})
    with pytest.raises(InputError, match=r"models\.a: dtyp='float16' is no argument of loading\. Did you mean 'dtype'"):
        pool.load_model("a", dtyp="float16")
    with pytest.raises(InputError, match="hooked is 'no', expected True or False"):
        pool.load_model("a", hooked="no")
