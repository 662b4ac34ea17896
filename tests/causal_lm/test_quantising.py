"""`from_pretrained(..., quantize=...)` against transformers' models that the same libraries quantise.

Tiny random checkpoints; widths are multiples of 64, the block of 4-bit weights.
"""

import copy
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, TorchAoConfig

from hooklens import HookedCausalLM, verify
from hooklens.errors import InputError, MissingDependencyError, UnsupportedModelError
from hooklens.model.parts.quantised import quantised_maps
from hooklens.training import TrainConfig, train
from tests.checkpoints import D_VOCAB, _llama, _neox, _randomise

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
# What on disk is one map for queries, keys and values; three maps; one that lies the other way round.
MODELS = {
    "fused": lambda: _neox(0, **SIZES),
    "apart": lambda: _llama(0, **SIZES),
    "turned": lambda: _randomise(
        GPT2LMHeadModel._from_config(
            GPT2Config(
                vocab_size=D_VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
            ),
            attn_implementation="sdpa",
        ),
        0,
    ),
}
TOKENS = torch.randint(D_VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
# float32 logits of some ten, of two computations of the same function.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
WAYS = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "nf4, nested": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Plain checkpoints by name."""
    made = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in made.items():
        MODELS[name]().save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def quantised(folders, tmp_path_factory):
    """A function that gives transformers' quantised model of a checkpoint, and the folder that it saves."""
    known = {}

    def make(name, way):
        if (name, way) not in known:
            folder = tmp_path_factory.mktemp(f"{name}-{way}")
            hf_model = AutoModelForCausalLM.from_pretrained(
                folders[name], quantization_config=WAYS[way], device_map="cpu", dtype=torch.float32
            )
            hf_model.save_pretrained(folder)
            known[name, way] = (weight_only(hf_model), folder)
        return known[name, way]

    return make


def weight_only(hf_model):
    """Have bitsandbytes' maps leave their inputs as they are: in eval mode, on a CPU, it rounds those of some."""
    for module in hf_model.modules():
        if "8bit" in type(module).__name__:
            module.train()
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return hf_model


@torch.no_grad()
def logits_of(hf_model):
    return hf_model(TOKENS).logits


@pytest.mark.parametrize("name", ["fused", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_what_torchao_makes_of_transformers_model(folders, name, dtype) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = HookedCausalLM.from_pretrained(folders[name], quantize="int8", dtype=dtype)
    hf_model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype)
    head = hf_model.get_output_embeddings()
    quantize_(
        hf_model,
        Int8WeightOnlyConfig(set_inductor_config=False),
        filter_fn=lambda module, _: isinstance(module, torch.nn.Linear) and module is not head,
    )
    ours, theirs = model(TOKENS), logits_of(hf_model)
    assert ours.dtype == model.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, **CLOSE)
    else:
        # As far from the same numbers in float32 as theirs; by chance up to half more.
        exact = copy.deepcopy(model).float()(TOKENS)
        assert (ours - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()
    block = (hf_model.gpt_neox if name == "fused" else hf_model.model).layers[1]
    written = block.attention.dense if name == "fused" else block.self_attn.o_proj
    assert torch.equal(model.blocks[1].attn.o_proj.weight.dequantize(), written.weight.dequantize())
    if name == "fused":
        # Rows of each head: queries, keys, values.
        rows = block.attention.query_key_value.weight.dequantize().view(4, 3, 16, 64)
        assert torch.equal(model.W_K[1], rows[:, 1].mT)


def test_int4_is_what_bitsandbytes_makes_of_transformers_model(folders) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for name, folder in folders.items():
        model = HookedCausalLM.from_pretrained(folder, quantize="int4")
        hf_model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        with torch.no_grad():
            ours = model(TOKENS)
        torch.testing.assert_close(ours, logits_of(weight_only(hf_model)), **CLOSE, msg=name)
        # The same with gradients asked for, which bitsandbytes computes another way.
        torch.testing.assert_close(model(TOKENS), ours, **CLOSE, msg=name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_of_bitsandbytes_stay_quantised(quantised, name, way) -> None:
    """Also those whose queries, keys and values lie in one map: its rows are taken apart."""
    hf_model, folder = quantised(name, way)
    model = HookedCausalLM.from_pretrained(folder, quantize="keep")
    dense = HookedCausalLM.from_pretrained(folder)
    assert len(quantised_maps(model)) == 2 * (7 if name == "apart" else 6)
    torch.testing.assert_close(model(TOKENS), logits_of(hf_model), **CLOSE)
    torch.testing.assert_close(model(TOKENS), dense(TOKENS), **CLOSE)
    for weight, value in model.named_weights().items():
        assert torch.equal(value, dense.named_weights()[weight]), weight
    # No larger than they lie there: int8, or half a byte and a float32 for each 64 numbers.
    stored = [linear.weight for linear in quantised_maps(model).values()]
    if way != "8 bits":
        assert sum(weight.numel() * weight.element_size() for weight in stored) == sum(
            tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values()
            if tensor.dtype == torch.uint8 and tensor.ndim == 2
        )  # fmt: skip


@pytest.mark.parametrize("layers", [[1], [1, 0]])
def test_some_layers_of_a_quantised_checkpoint(quantised, layers) -> None:
    _, folder = quantised("fused", "8 bits")
    kept, dense = (HookedCausalLM.from_pretrained(folder, quantize=how, layers=layers) for how in ("keep", None))
    assert len(quantised_maps(kept)) == 6 * len(layers)
    assert torch.equal(kept.W_V, dense.W_V)


@pytest.mark.skipif(
    tuple(map(int, importlib.metadata.version("torchao").split(".")[:2])) < (0, 17),
    reason="torchao 0.16 saves weights as pickles of its classes",
)
@pytest.mark.parametrize("name", ["fused", "apart"])
def test_checkpoints_of_torchao(folders, tmp_path, name) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    hf_model = AutoModelForCausalLM.from_pretrained(folders[name], quantization_config=config, dtype=torch.float32)
    hf_model.save_pretrained(tmp_path)
    kept, dense = (HookedCausalLM.from_pretrained(tmp_path, quantize=how) for how in ("keep", None))
    made = HookedCausalLM.from_pretrained(folders[name], quantize="int8")
    assert quantised_maps(kept).keys() == quantised_maps(made).keys()
    assert not quantised_maps(dense)
    for model in (kept, dense, made):
        torch.testing.assert_close(model(TOKENS), logits_of(hf_model), **CLOSE)
        for weight, value in model.named_weights().items():
            assert torch.equal(value, made.named_weights()[weight]), weight


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_with_a_device_map(folders, quantize) -> None:
    model = HookedCausalLM.from_pretrained(folders["apart"], quantize=quantize, device_map={"": "cpu"})
    expected = HookedCausalLM.from_pretrained(folders["apart"], quantize=quantize)
    assert torch.equal(model(TOKENS), expected(TOKENS))


def test_a_quantised_checkpoint_is_quantised_anew(quantised) -> None:
    _, folder = quantised("apart", "8 bits")
    model = HookedCausalLM.from_pretrained(folder, quantize="int4")
    assert {type(linear).__name__ for linear in quantised_maps(model).values()} == {"Linear4bit"}


def test_rows_that_are_no_whole_blocks(tmp_path) -> None:
    """bitsandbytes' kernel for CPUs begins each row with a new block: it multiplied with other weights, and no word."""
    _llama(0).save_pretrained(tmp_path / "plain")
    hf_model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=WAYS["nf4, nested"], device_map="cpu", dtype=torch.float32
    )
    hf_model.save_pretrained(tmp_path / "packed")
    plain, dense, kept, made = (
        HookedCausalLM.from_pretrained(tmp_path / folder, quantize=quantize)
        for folder, quantize in (("plain", None), ("packed", None), ("packed", "keep"), ("plain", "int4"))
    )
    for name, weight in dense.named_weights().items():
        assert torch.equal(kept.named_weights()[name], weight), name
        # Without double quantisation, so other scales by up to 2^-8; a value of the table is at most 0.15 away.
        assert (made.named_weights()[name] - plain.named_weights()[name]).abs().max() <= 0.16 * weight.abs().max(), name
    assert {type(linear).__name__ for linear in quantised_maps(kept).values()} == {"UnevenLinear"}
    torch.testing.assert_close(kept(TOKENS), dense(TOKENS), **CLOSE)
    torch.testing.assert_close(made(TOKENS), made.dequantize()(TOKENS), **CLOSE)
    for model in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert torch.equal(model(TOKENS), kept(TOKENS))
        assert torch.equal(model.W_out, kept.W_out)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_saving_writes_the_weights_that_are_computed_with(folders, tmp_path, quantize) -> None:
    model = HookedCausalLM.from_pretrained(folders["fused"], quantize=quantize)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded, hf_model = HookedCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not quantised_maps(loaded)
    for one in (loaded(TOKENS), logits_of(hf_model), logits_of(model.to_hf())):
        torch.testing.assert_close(one, model(TOKENS), **CLOSE)


@pytest.mark.parametrize("layers", [[], pytest.param([0], marks=pytest.mark.slow)])
def test_verify_runs_on_a_quantised_network(folders, layers) -> None:
    model = HookedCausalLM.from_pretrained(folders["apart"], quantize="int8", layers=[0])
    dtypes = [torch.float32, torch.bfloat16] if layers else [torch.float32]
    report = verify(model, layers=layers, dtypes=dtypes, gradients=False, n_tokens=8, progress=False)
    assert report.passed, report
    assert not any("not recomputed" in note for note in report.notes)


def test_training_refuses_quantised_weights(folders) -> None:
    for quantize in ("int8", "int4"):
        model = HookedCausalLM.from_pretrained(folders["apart"], quantize=quantize)
        with pytest.raises(InputError, match=r"cannot be trained: .*q_proj\.weight.*are quantised"):
            train(model, [TOKENS], TrainConfig(steps=1))


class TestRefusals:
    def test_a_dtype_in_which_the_libraries_do_not_compute(self, folders) -> None:
        with pytest.raises(InputError, match=r"quantize='int8' with dtype torch\.float64: .*leave quantize out"):
            HookedCausalLM.from_pretrained(folders["apart"], quantize="int8", dtype="float64")

    def test_another_word(self, folders) -> None:
        with pytest.raises(InputError, match="quantize is 'int3', expected 'int8', 'int4', 'keep' or None"):
            HookedCausalLM.from_pretrained(folders["apart"], quantize="int3")

    def test_rows_that_share_blocks(self, tmp_path) -> None:
        """Queries, keys and values in one map, whose rows are half a block each."""
        _neox(0).save_pretrained(tmp_path / "plain")
        hf_model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=WAYS["fp4"], device_map="cpu"
        )
        hf_model.save_pretrained(tmp_path / "packed")
        with pytest.raises(UnsupportedModelError, match=r"3 quantised weights .*rows of 32 .* scales of 64"):
            HookedCausalLM.from_pretrained(tmp_path / "packed", quantize="keep")
        HookedCausalLM.from_pretrained(tmp_path / "packed")

    def test_nothing_to_keep(self, folders) -> None:
        with pytest.raises(
            UnsupportedModelError, match="quantize='keep', and the checkpoint's weights are not quantised"
        ):
            HookedCausalLM.from_pretrained(folders["apart"], quantize="keep")

    @pytest.mark.parametrize(("quantize", "package"), [("int8", "torchao"), ("int4", "bitsandbytes")])
    def test_without_the_library(self, folders, monkeypatch, quantize, package) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [_Missing(package), *sys.meta_path])
        with pytest.raises(MissingDependencyError, match=rf"'{package}' .* pip install 'hooklens\[quant\]'"):
            HookedCausalLM.from_pretrained(folders["apart"], quantize=quantize)

    def test_a_library_of_another_torch(self, folders, monkeypatch, tmp_path) -> None:
        """torchao imported into a torch that it does not go with raised AttributeError from its depths."""
        (tmp_path / "torchao").mkdir()
        (tmp_path / "torchao" / "__init__.py").write_text("raise AttributeError('no register_constant')")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(MissingDependencyError, match=r"AttributeError: no register_constant.*version of torch"):
            HookedCausalLM.from_pretrained(folders["apart"], quantize="int8")

    def test_live_models_of_transformers(self, folders, quantised) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        hf_model = AutoModelForCausalLM.from_pretrained(folders["apart"])
        quantize_(hf_model, Int8WeightOnlyConfig(set_inductor_config=False))
        for one in (hf_model, quantised("apart", "8 bits")[0]):
            with pytest.raises((UnsupportedModelError, ValueError), match="quantised"):
                HookedCausalLM.from_hf(one)


class _Missing:
    """A finder under which a package is not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


_GROWTH = """
import pathlib, sys
import bitsandbytes, torchao.quantization
from hooklens import HookedCausalLM
def peak():
    # What getrusage gives begins with the peak of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
large, small, quantize = sys.argv[1:]
HookedCausalLM.from_pretrained(small, quantize=quantize)
before = peak()
model = HookedCausalLM.from_pretrained(large, quantize=quantize)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read as Linux gives it")
def test_the_dense_model_is_never_in_memory_as_a_whole(tmp_path) -> None:
    """110 MB in float32; the pages of the mapped file, all of which had been read, stayed resident beside the rest."""
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 3, "num_attention_heads": 8}
    _llama(0, **SIZES).save_pretrained(tmp_path / "small")
    _llama(0, **config).save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    # So that what is freed is given back at once: the heap would keep it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    # What is stored, and some ten MB for one weight and what quantising it takes.
    for quantize, share in (("int8", 0.25 + 0.4), ("int4", 0.15 + 0.4)):
        arguments = [str(tmp_path / "large"), str(tmp_path / "small"), quantize]
        done = subprocess.run(
            [sys.executable, "-c", _GROWTH, *arguments], check=True, capture_output=True, text=True, env=environment
        )
        assert int(done.stdout.split()[-1]) < share * size, (quantize, done.stdout, size)
