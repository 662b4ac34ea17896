"""What a network that processes share does beside the plain calls: in each process, as a dictionary of findings."""

import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor

import hooklens as hl
from hooklens.parallel import ParallelConfig, load, local_parts

PROMPT = ["When Mary and John went to the store , John gave a drink to"]
OTHER = ["When Mary and John went to the store , Mary gave a drink to"]


def both(config: dict[str, int]) -> tuple[hl.HookedCausalLM, hl.HookedCausalLM]:
    """A bundled checkpoint whole, and shared."""
    alone = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama", dtype=torch.float64)
    return alone, load("bundled:tiny-llama", ParallelConfig(**config), dtype=torch.float64)


def experiment(config: dict[str, int]) -> dict[str, float]:
    """How far experiments are apart from those on the whole network."""
    found: dict[str, list[Any]] = {}
    for model in both(config):
        metric = hl.patching.LogitDiff(["Mary"], ["John"])
        for site in ("resid_pre", "z"):
            result = hl.patching.sweep(model, PROMPT, OTHER, site, metric, progress=False)
            found.setdefault(site, []).append(torch.as_tensor(result.values))
        estimate = hl.patching.attribution(model, PROMPT, OTHER, "resid_pre", metric, progress=False)
        found.setdefault("attribution", []).append(torch.as_tensor(estimate.values))
        with torch.no_grad():
            halved = model.run_with_hooks(PROMPT, edits=[hl.edits.Scale("blocks.1.attn.hook_z", head=1, factor=0.5)])
        found.setdefault("edit of one head", []).append(halved)
    return {name: float((one - other).abs().max()) for name, (one, other) in found.items()}


def break_off(config: dict[str, int]) -> dict[str, Any]:
    """A hook that raises, in all processes; then a call that works."""
    alone, shared = both(config)

    def fail(tensor: Tensor, hook: hl.HookPoint) -> None:
        raise RuntimeError(f"at {hook.name}")

    raised = []
    for name in ("blocks.0.attn.hook_z", "blocks.1.hook_resid_post", "blocks.3.hook_resid_pre"):
        try:
            shared.run_with_hooks(PROMPT, fwd_hooks=[(name, fail)])
        except RuntimeError as error:
            raised.append(str(error))
    with torch.no_grad():
        apart = float((alone(PROMPT) - shared(PROMPT)).abs().max())
    return {"raised": raised, "apart": apart}


def refuse(config: dict[str, int]) -> dict[str, str]:
    """What a shared network does not do."""
    _, shared = both(config)
    folder = tempfile.mkdtemp()
    cache = shared.prefill(PROMPT)
    tried = {
        "save_pretrained": lambda: shared.save_pretrained(folder),
        "to_hf": shared.to_hf,
        "process_weights": lambda: shared.process_weights(fold_ln=True),
        "load_state_dict": lambda: shared.load_state_dict({}),
        "initialize": shared.initialize,
        "W_Q": lambda: shared.W_Q,
        "dispatch": lambda: shared.dispatch("auto"),
        "train": lambda: shared.train()(PROMPT),
        "cache.save": lambda: cache.save(f"{folder}/cache"),
        "generate": lambda: shared.generate(PROMPT[0], max_new_tokens=1),
        "load": lambda: load("bundled:tiny-llama", ParallelConfig(tensor=3)),
    }
    told: dict[str, str] = {}
    for name, call in tried.items():
        try:
            call()
        except hl.HookLensError as error:
            told[name] = str(error)
        else:
            told[name] = "done"
    shutil.rmtree(folder)
    return told


def show_parts(config: dict[str, int]) -> dict[str, Any]:
    """What a hook is shown, whole and inside of `local_parts`; and gradients of a parameter that is shared."""
    alone, shared = both(config)
    shapes = {}
    with torch.no_grad():
        _, whole = shared.run_with_cache(PROMPT, names_filter="blocks.0.attn.hook_z")
        with local_parts():
            _, own = shared.run_with_cache(PROMPT, names_filter="blocks.0.attn.hook_z")
        for name, cache in (("whole", whole), ("own", own)):
            shapes[name] = list(cache["blocks.0.attn.hook_z"].shape)
        keys = shared.prefill(PROMPT).entries[0].past_keys
    weight: Any = shared.blocks[0].attn.q_proj.weight
    return {
        **shapes,
        "heads": alone.cfg.n_heads,
        "keys": list(keys.shape),
        "weight": type(weight).__name__,
        "of weight": list(weight.to_local().shape if hasattr(weight, "to_local") else weight.shape),
        "equal": torch.equal(weight.full_tensor(), alone.blocks[0].attn.q_proj.weight)
        if hasattr(weight, "full_tensor")
        else weight.is_meta,
    }


def keep_inside(config: dict[str, int]) -> str:
    """The error of a gradient through what a hook kept from inside a stage of a pipeline."""
    _, shared = both(config)
    kept: list[Tensor] = []
    shared.run_with_hooks(PROMPT, fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: kept.append(x))])
    try:
        kept[0].sum().backward()
    except hl.HookLensError as error:
        return str(error)
    return "no error"


def sweep_in_stages(config: dict[str, int]) -> str:
    """The error of a sweep, which runs single blocks, on a network whose layers lie in several processes."""
    _, shared = both(config)
    try:
        hl.patching.sweep(shared, PROMPT, OTHER, "resid_pre", hl.patching.LogitDiff(["Mary"], ["John"]), progress=False)
    except hl.HookLensError as error:
        return str(error)
    return "no error"


def find_all(configs: list[dict[str, int]]) -> dict[tuple[str, str], Any]:
    """All findings, by function and config."""
    found: dict[tuple[str, str], Any] = {}
    for config in configs:
        in_stages = "pipeline" in config
        for work in (break_off, refuse, *((keep_inside, sweep_in_stages) if in_stages else (experiment, show_parts))):
            found[work.__name__, str(config)] = work(config)
    return found
