"""Peak memory and time of merging checkpoints of 160 M parameters from folder to folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.benchmarks.peak import run_fresh

N_MODELS = 5
# 162 M parameters: embedding and unembedding of 50,304 tokens are half of them, as in a Pythia of that size.
SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "vocab_size": 50304, "tie_word_embeddings": False}  # fmt: skip

MERGE = """
    import json, re, time
    from pathlib import Path
    import huggingface_hub, tqdm.auto
    import hooklens.causal_lm.merging
    from hooklens.weights import merging
    from hooklens.weights.merging.kinds import open_operand

    def resident(which):
        # Not ru_maxrss: a process starts with that of the one it was forked from.
        return int(re.search(which + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    # A small model is opened first: what the interpreter and its packages take is not the merge's.
    open_operand({small!r}, "small")
    before, start = resident("VmRSS"), time.monotonic()
    # Pages of mapped files count, too, while they are mapped. The peak so far is forgotten (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    merging.{method}({base!r}, {models!r}, out={out!r}, progress=False)
    print(json.dumps([resident("VmHWM") - before, time.monotonic() - start]))
"""


def write_models(folder: Path, n_models: int, **shape: Any) -> list[Path]:
    """Checkpoints with random weights near one another."""
    config = AutoConfig.for_model("gpt_neox", **shape)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"model-{index}" for index in range(n_models)]
    state: dict[str, torch.Tensor] = {}
    for path in paths:
        path.mkdir(parents=True)
        for name, parameter in network.named_parameters():
            drawn = torch.empty(parameter.shape).normal_(std=0.02, generator=generator)
            state[name] = state[name] + 0.1 * drawn if name in state else drawn
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        config.architectures = ["GPTNeoXForCausalLM"]
        config.save_pretrained(path)
    return paths


@pytest.mark.parametrize("method", ["task_arithmetic", "ties_merging"])
def test_peak_memory_of_merging_five_models(method: str, record: Any, tmp_path: Path) -> None:
    """Growth of a fresh process, mapped pages counted, against the bytes of one model."""
    base, *models = write_models(tmp_path / "large", N_MODELS + 1, **SHAPE)
    (small,) = write_models(tmp_path / "small", 1, **{**SHAPE, "hidden_size": 192, "num_hidden_layers": 1})
    code = MERGE.format(
        method=method,
        base=str(base),
        models=[str(path) for path in models],
        small=str(small),
        out=str(tmp_path / "out"),
    )
    grown, seconds = json.loads(run_fresh(code).splitlines()[-1])
    size = (base / "model.safetensors").stat().st_size
    record(f"peak memory of {method} of 5 models of 160 M: / bytes of one", grown / size, at_most=1.6)
    record(f"seconds of {method} of 5 models of 160 M", seconds)
