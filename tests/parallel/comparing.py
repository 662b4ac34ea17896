"""One network in this process and shared by all: the same calls, and how far apart their results are."""

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

import hooklens as hl
from hooklens.parallel import ParallelConfig, load
from hooklens.parallel.config import own_device

# float64, where sums in another order differ by some units of 2e-16 times the size of the terms.
CLOSE = 1e-9


class Compared:
    """A checkpoint loaded whole, and into the processes.

    Args:
        source: the checkpoint.
        config: how the processes share it.
        seed: of the input.
        batch: rows.

    Attributes:
        problems: what differs by more than `CLOSE`.
        worst: the largest differences, by what was compared.
    """

    def __init__(self, source: str | Path, config: Mapping[str, int], *, seed: int = 0, batch: int = 3) -> None:
        self.source, self.config = str(source), ParallelConfig(**config)
        self.shared = load(source, self.config, dtype=torch.float64)
        device = own_device()
        self.alone = hl.HookedCausalLM.from_pretrained(source, dtype=torch.float64).to(device)
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(2, self.alone.cfg.d_vocab, (batch, 7), generator=generator).to(device)
        self.mask = torch.ones_like(self.ids, dtype=torch.bool)
        self.mask[0, :2] = False
        self.rng = random.Random(seed)
        self.problems: list[str] = []
        self.worst: dict[str, float] = {}

    @property
    def models(self) -> tuple[hl.HookedCausalLM, hl.HookedCausalLM]:
        """Whole and shared."""
        return self.alone, self.shared

    def note(self, what: str, first: Any, second: Any, *, detail: str = "") -> None:
        """Note how far two results are apart."""
        if isinstance(first, Mapping):
            if list(first) != list(second):
                self.problems.append(f"{what}: {sorted(set(first) ^ set(second))} on one side only")
            for name in set(first) & set(second):
                self.note(what, first[name], second[name], detail=str(name))
            return
        if first is None or second is None or first.shape != second.shape:
            self.problems.append(f"{what} {detail}: {_describe(first)} and {_describe(second)}")
            return
        apart = _apart(first, second)
        self.worst[what] = max(self.worst.get(what, 0.0), apart)
        if not apart < CLOSE:
            self.problems.append(f"{what} {detail}: {apart}")

    def every_point(self) -> list[str]:
        """All hook points but that of the token ids."""
        return [name for name in self.alone.hook_points() if name != "hook_tokens"]

    @torch.no_grad()
    def compare_forward(self) -> None:
        """Logits and every hook point, on-request ones included, each by itself and all at once."""
        self.note("logits", *(model(self.ids, attention_mask=self.mask) for model in self.models))
        caches = []
        for model in self.models:
            _, cache = model.run_with_cache(self.ids, attention_mask=self.mask, names_filter=self.every_point())
            caches.append(dict(cache))
        self.note("hook points", *caches)
        self.fired = {name: value for name, value in caches[0].items() if value.is_floating_point()}

    @torch.no_grad()
    def compare_edits(self, names: Iterable[str] | None = None) -> None:
        """An edit at each hook point: by what another row, position and head has, and in place."""
        for name in self.fired if names is None else names:
            logits = [
                model.run_with_hooks(self.ids, attention_mask=self.mask, fwd_hooks=[(name, edit)])
                for model in self.models
            ]
            self.note("edits", *logits, detail=name)

    def compare_gradients(self) -> None:
        """Of every activation, and of every parameter."""
        found, parameters = [], []
        for model in self.models:
            model.zero_grad()
            _, cache = model.run_with_cache(
                self.ids,
                attention_mask=self.mask,
                names_filter=list(self.fired),
                incl_bwd=True,
                return_type="loss",
                fwd_hooks=[("blocks.0.hook_resid_pre", edit)],
            )
            found.append({name: value for name, value in cache.items() if name.endswith("_grad")})
            parameters.append({name: _whole(one.grad) for name, one in model.named_parameters() if not one.is_meta})
        self.note("gradients of activations", *found)
        here = {name: parameters[0][name] for name in parameters[1]}
        # Experts that no token chose have none, in either.
        for name, one in here.items():
            if one is not None or parameters[1][name] is not None:
                other = parameters[1][name]
                self.note("gradients of parameters", _or_zero(one, other), _or_zero(other, one), detail=name)

    @torch.no_grad()
    def compare_caches(self) -> None:
        """Generation, a cache that grows, and a frozen prefix of one row."""
        if not self.alone.cfg.causal:
            return
        texts = [model.generate(self.ids[1:], max_new_tokens=3, do_sample=False) for model in self.models]
        self.note("generation", *(torch.as_tensor(text) for text in texts))
        drawn = [model.generate(self.ids[1:], max_new_tokens=3, seed=5) for model in self.models]
        self.note("generation", *(torch.as_tensor(text) for text in drawn), detail="drawn")
        prefixes = [model.prefill(self.ids[:1, :3]) for model in self.models]
        pairs = zip(self.models, prefixes, strict=True)
        self.note("frozen prefix", *(model(self.ids[:, 3:], past_kv_cache=prefix) for model, prefix in pairs))
        grown, held = [], []
        for model in self.models:
            cache = hl.HookedKeyValueCache.init_cache(model.cfg, model.device, len(self.ids), dtype=model.dtype)
            model(self.ids[:, :4], attention_mask=self.mask[:, :4], past_kv_cache=cache)
            edits = [(name, edit) for name in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")]
            grown.append(model.run_with_hooks(self.ids[:, 4:], past_kv_cache=cache, fwd_hooks=edits))
            held.append(cache)
        self.note("growing cache", *grown)
        held[1] = hl.parallel.gather_cache(self.shared, held[1])
        for layer, (first, second) in enumerate(zip(held[0].entries, held[1].entries, strict=True)):
            self.note("cached keys", first.past_keys, second.past_keys, detail=str(layer))
            self.note("cached values", first.past_values, second.past_values, detail=str(layer))
        # Put together it is a cache of the whole network's.
        self.note("gathered cache", *(self.alone(self.ids[:, 4:], past_kv_cache=one) for one in held))

    def compare_documents(self) -> None:
        """Rows of several documents, positions of one's own, logits of some positions, a stream in and a stream out."""
        ids, calls = self.ids, []
        borders = torch.tensor([[0, 0, 0, 1, 1, 1, 1]], device=ids.device).expand(len(ids), -1)
        calls.append({"document_ids": borders.contiguous()})
        calls.append({"attention_mask": self.mask, "logits_at": [-1, 0]})
        calls.append({"stop_at_layer": 1})
        calls.append({"return_type": "loss"})
        for keywords in calls:
            with torch.no_grad():
                self.note("other calls", *(model(ids, **keywords) for model in self.models), detail=str(list(keywords)))
        with torch.inference_mode():
            streams = [model(ids, stop_at_layer=1) for model in self.models]
            pairs = zip(self.models, streams, strict=True)
            self.note("late start", *(model(stream, start_at_layer=1) for model, stream in pairs))
            self.note("one row", *(model(ids[:1]) for model in self.models))

    def some_points(self, n: int) -> list[str]:
        """Some of the points that fired."""
        return self.rng.sample(sorted(self.fired), min(n, len(self.fired)))

    def compare_all(self, *, n_edits: int | None = None) -> None:
        """Everything; edits at some points or at all of them."""
        self.compare_forward()
        self.compare_edits(None if n_edits is None else self.some_points(n_edits))
        self.compare_gradients()
        self.compare_caches()
        self.compare_documents()


def edit(tensor: Tensor, hook: hl.HookPoint) -> Tensor:
    """An edit that counts rows, heads and positions: one that was shown a part would do something else."""
    turned = 0.5 * tensor + 0.5 * tensor.roll(1, 0)
    if "query" in (hook.site.axes if hook.site else ()):
        # Between scores that are -inf somewhere nothing is added up.
        return tensor * torch.linspace(0.5, 1.5, tensor.shape[1], device=tensor.device)[:, None, None]
    if tensor.ndim == 4:
        turned[:, :, -1] = 1.5 * turned[:, :, 0]
    return turned + 0.1 * tensor.flip(-1)


def _whole(gradient: Any) -> Any:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _or_zero(one: Tensor | None, like: Tensor | None) -> Tensor | None:
    return torch.zeros_like(like) if one is None and like is not None else one


def _apart(first: Tensor, second: Tensor) -> float:
    first, second = (one.double().nan_to_num(neginf=-1e3) for one in (first, second))
    return float((first - second).abs().max()) if first.numel() else 0.0


def _describe(one: Any) -> str:
    return "none" if one is None else str(list(one.shape))


def compare_checkpoints(
    sources: list[str], configs: list[dict[str, int]], n_edits: int | None = None
) -> list[tuple[str, str, list[str], dict[str, float]]]:
    """In each process: all checkpoints, shared in all ways."""
    results = []
    for number, source in enumerate(sources):
        for config in configs:
            try:
                compared = Compared(source, config, seed=number)
            except hl.errors.ConfigError as error:
                results.append((source, str(config), [f"refused: {error}"], {}))
                continue
            compared.compare_all(n_edits=n_edits)
            results.append((source, str(config), compared.problems, compared.worst))
    return results


def compare_by_nccl(source: str, config: dict[str, int]) -> tuple[str, str, list[str], dict[str, float]]:
    """In each process, which has a GPU of its own: a checkpoint shared in one way, and by what they talk."""
    [(_, _, problems, worst)] = compare_checkpoints([source], [config], 6)
    return distributed.get_backend(), own_device().type, problems, worst
