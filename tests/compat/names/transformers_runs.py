"""What transformers' own modules see and give, and what becomes of the logits when that is changed there."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hooklens import HookedCausalLM
from hooklens.adapters.families import load_families
from tests.adapters.families.checks import load_reference, save
from tests.checkpoints import save_variant

IDS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
# Families whose variants stand in the catalogue of checkpoints.
_CATALOGUED = {
    "llama": ("llama-gqa", "llama-biases"),
    "gpt_neox": ("neox-parallel", "neox-sequential"),
    "falcon": ("falcon-7b", "falcon-rw", "falcon-40b"),
}


def all_variants() -> Iterator[tuple[str, str]]:
    """Every family with every variant that its own test has."""
    for family in load_families():
        for variant in variants_of(family.name):
            yield family.name, variant


def variants_of(family: str) -> list[str]:
    """The variants of a family, the plainest first."""
    return list(_CATALOGUED.get(family) or importlib.import_module(f"tests.adapters.families.test_{family}").VARIANTS)


def make_folder(folder: Path, family: str, variant: str) -> Path:
    """A tiny checkpoint with random parameters."""
    if family in _CATALOGUED:
        return save_variant(variant, folder)
    module = importlib.import_module(f"tests.adapters.families.test_{family}")
    model_type = next(one.model_types[0] for one in load_families() if one.name == family)
    return save(folder, model_type, **{**getattr(module, "TINY", {}), **module.VARIANTS[variant]})


def load_pair(folder: Path, family: str) -> tuple[PreTrainedModel, HookedCausalLM]:
    """transformers' model and ours; transformers' attends eagerly, so that it gives its patterns.

    Its eager Falcon adds ALiBi twice and leaves the causal mask out.
    """
    model = load_reference(folder, torch.float32)
    if family != "falcon":
        model.set_attn_implementation("eager")
    return model, HookedCausalLM.from_pretrained(folder)


@torch.no_grad()
def record(model: PreTrainedModel) -> dict[str, Tensor]:
    """The first call's input and output of every module, and transformers' outputs, by nnsight's names."""
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            given = (
                arguments[0] if arguments else next((one for one in keywords.values() if isinstance(one, Tensor)), None)
            )
            for name, tensor in (("input", given), *_tensors_of(output)):
                if isinstance(tensor, Tensor):
                    seen.setdefault(f"{path}.{name}", tensor.clone())

        return hook

    handles = [
        module.register_forward_hook(watch(path), with_kwargs=True) for path, module in model.named_modules() if path
    ]
    try:
        shows_patterns = model.config._attn_implementation == "eager"
        output = model(IDS, output_hidden_states=True, output_attentions=shows_patterns)
    finally:
        for handle in handles:
            handle.remove()
    for what in ("hidden_states", "attentions"):
        for place, tensor in enumerate(output.get(what) or ()):
            if tensor is not None:
                seen[f"{what}[{place}]"] = tensor
    return seen


def _tensors_of(output: Any) -> list[tuple[str, Any]]:
    if isinstance(output, dict):
        return [(f"output.{name}", tensor) for name, tensor in output.items()]
    if isinstance(output, tuple):
        return [(f"output[{place}]", tensor) for place, tensor in enumerate(output)]
    return [("output", output)]


@contextmanager
def changed(model: PreTrainedModel, path: str, side: str, place: int, noise: Tensor) -> Iterator[None]:
    """Noise added to what a module sees or gives."""

    def change_output(module: Any, arguments: Any, keywords: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (*output[:place], output[place] + noise, *output[place + 1 :])
        return output + noise

    def change_input(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (arguments[0] + noise, *arguments[1:]), keywords
        name = next(name for name, one in keywords.items() if isinstance(one, Tensor))
        return arguments, {**keywords, name: keywords[name] + noise}

    module = model.get_submodule(path)
    if side == "output":
        handle = module.register_forward_hook(change_output, with_kwargs=True)
    else:
        handle = module.register_forward_pre_hook(change_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
