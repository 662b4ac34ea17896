"""`python -m tests.memory_table`: plans beside what torch's allocator reports of the calls, into docs/memory.md."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import hooklens as hl

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
_HEAD = "| call | planned | measured | difference |\n|---|---|---|---|\n"
_END = "\nWhat the plan does not see"


class PlannedCall(NamedTuple):
    """A call to plan and to run.

    Attributes:
        title: of its row.
        model: makes the model.
        shape: of its token ids.
        keywords: of `plan`.
        prefix: how many tokens are in a frozen cache before them.
    """

    title: str
    model: Callable[[], hl.HookedCausalLM]
    shape: tuple[int, int]
    keywords: dict[str, Any]
    prefix: int = 0


def _bundled(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], hl.HookedCausalLM]:
    return lambda: hl.HookedCausalLM.from_pretrained(f"bundled:tiny-{name}", dtype=dtype)


def _own(**fields: Any) -> Callable[[], hl.HookedCausalLM]:
    sizes: dict[str, Any] = {"n_layers": 3, "d_model": 64, "n_heads": 4, "d_mlp": 256, "d_vocab": 500, "n_ctx": 512}
    given = {"gated_mlp": False, "positions": hl.RotaryPositions(dim=16), **sizes, **fields}
    return lambda: hl.HookedCausalLM(hl.HookedConfig(**given))


CALLS = (
    PlannedCall("all sites, 8 x 100", _bundled("llama"), (8, 100), {"grad": False}),
    PlannedCall(
        "one filter, shared norm", _bundled("gpt-neox"), (8, 100), {"names_filter": "resid_post", "grad": False}
    ),
    PlannedCall(
        "patterns, one key-value head, logits_at=-1",
        _bundled("falcon"),
        (16, 60),
        {"names_filter": "pattern", "logits_at": -1, "grad": False},
    ),
    PlannedCall("bfloat16, no capture", _bundled("llama", torch.bfloat16), (8, 100), {"capture": False, "grad": False}),
    PlannedCall("float64, '*'", _bundled("gpt-neox", torch.float64), (4, 64), {"names_filter": "*", "grad": False}),
    PlannedCall(
        "kept as bfloat16, one position",
        _bundled("llama"),
        (8, 100),
        {"dtype": torch.bfloat16, "pos_slice": -1, "names_filter": "mlp_out", "grad": False},
    ),
    PlannedCall("gradients recorded", _bundled("llama"), (8, 100), {"names_filter": "z", "grad": True}),
    PlannedCall(
        "loss and backward", _bundled("gpt-neox"), (8, 100), {"capture": False, "return_type": "loss", "backward": True}
    ),
    PlannedCall(
        "incl_bwd", _bundled("falcon"), (4, 64), {"names_filter": "resid_post", "return_type": "loss", "incl_bwd": True}
    ),
    PlannedCall("frozen prefix of 60", _bundled("llama"), (32, 8), {"names_filter": "z", "grad": False}, prefix=60),
    PlannedCall("soft caps", _own(attn_softcap=30.0), (4, 256), {"capture": False, "grad": False}),
    PlannedCall(
        "mixture of experts",
        _own(mlp=hl.MoEConfig(n_experts=4, experts_per_token=2, d_expert=128), gated_mlp=True),
        (4, 200),
        {"names_filter": "mlp_out", "grad": False},
    ),
    PlannedCall(
        "a head edited", _bundled("llama"), (8, 100), {"edits": [hl.edits.Zero("pattern", head=1)], "grad": False}
    ),
)


def measure(call: Callable[[], object], *, before: Callable[[], object] = gc.collect) -> int:
    """The most bytes that torch's CPU allocator held at once during a call, besides what it held before.

    Args:
        call: run twice, and measured the second time.
        before: run before it, unmeasured.
    """
    call()
    before()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    reports = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = peak = 0
    for report in sorted(reports, key=lambda one: one.start_ns()):
        live += report.nbytes()
        peak = max(peak, live)
    del kept
    return peak


def compare(planned: PlannedCall) -> tuple[int, int]:
    """The planned peak of a call, and the measured one."""
    model = planned.model()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 200, planned.shape, generator=generator)
    keywords = dict(planned.keywords)
    if planned.prefix:
        prefix = torch.randint(1, 200, (1, planned.prefix), generator=generator)
        keywords["past_kv_cache"] = model.prefill(prefix)
    peak = hl.plan(model, tokens, **keywords).peak
    backward, capture = keywords.pop("backward", False), keywords.pop("capture", True)
    grad = keywords.pop("grad", True)

    def run() -> object:
        with torch.set_grad_enabled(grad):
            if capture:
                return model.run_with_cache(tokens, **keywords)
            out = model(tokens, **keywords)
            if backward:
                out.backward()
            return out

    return peak, measure(run, before=model.zero_grad)


def make_table() -> str:
    """The table of all calls."""
    rows = []
    for call in CALLS:
        planned, measured = compare(call)
        rows.append(f"| {call.title} | {planned:,} | {measured:,} | {planned / measured - 1:+.1%} |\n")
    return _HEAD + "".join(rows)


def refresh() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_HEAD)
    PAGE.write_text(before + make_table() + _END + rest.partition(_END)[2], encoding="utf-8")


if __name__ == "__main__":
    refresh()
