"""Keywords are stated for type checkers, in signatures and in functions themselves; all three say the same."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import hooklens as hl
from hooklens import patching
from hooklens.causal_lm.calls import InputKeywords
from tests.annotations import unchecked
from tests.typing.test_scripts import need

ROOT = Path(__file__).parents[2]
# By an expression of the type that has the method: what is called, for which checkers see overloads.
CALLED: dict[str, Callable[..., Any]] = {
    "model": hl.HookedCausalLM.forward,
    "model.run_with_cache": hl.HookedCausalLM.run_with_cache,
    "model.run_with_hooks": hl.HookedCausalLM.run_with_hooks,
    "model.prefill": hl.HookedCausalLM.prefill,
    "model.generate": hl.HookedCausalLM.generate,
    "model.to_tokens": hl.HookedCausalLM.to_tokens,
    "model.to_str_tokens": hl.HookedCausalLM.to_str_tokens,
    "cache.accumulated_resid": hl.ActivationCache.accumulated_resid,
    "cache.decompose_resid": hl.ActivationCache.decompose_resid,
    "cache.stack_head_results": hl.ActivationCache.stack_head_results,
    "cache.stack_neuron_results": hl.ActivationCache.stack_neuron_results,
    "cache.get_full_resid_decomposition": hl.ActivationCache.get_full_resid_decomposition,
    "patching.sweep": patching.sweep,
    "patching.path_patch": patching.path_patch,
    "patching.faithfulness_curve": patching.faithfulness_curve,
    "patching.evaluate_circuits": patching.evaluate_circuits,
}


def keywords_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]


@pytest.mark.parametrize("method", [hl.HookedCausalLM.run_with_cache, hl.HookedCausalLM.run_with_hooks])
def test_signatures_name_the_keywords_of_a_call(method: Callable[..., Any]) -> None:
    """`help` and notebooks showed `**forward_keywords` and no more."""
    shown = inspect.signature(method).parameters.values()
    assert not [one for one in shown if one.kind is one.VAR_KEYWORD]
    assert keywords_of(method)[-len(keywords_of(hl.HookedCausalLM.forward)) :] == keywords_of(hl.HookedCausalLM.forward)
    assert "**" not in str(inspect.signature(hl.HookedCausalLM(tiny()).run_with_cache))


def test_prefill_names_what_says_how_its_input_is_read() -> None:
    by_name = inspect.signature(hl.HookedCausalLM.forward).parameters
    assert keywords_of(hl.HookedCausalLM.prefill) == [by_name[name] for name in get_type_hints(InputKeywords)]


@pytest.mark.parametrize("method", ["run_with_cache", "run_with_hooks", "prefill"])
def test_unknown_keywords_are_refused_as_before(method: str) -> None:
    model = hl.HookedCausalLM(tiny())
    with unchecked(), pytest.raises(TypeError, match=r"'padding_sid'. Did you mean 'padding_side'.*A call takes"):
        getattr(model, method)([[1, 2]], padding_sid="left")


def tiny() -> hl.HookedConfig:
    return hl.HookedConfig(
        n_layers=1, d_model=8, n_heads=2, d_vocab=5, n_ctx=4, act_fn="gelu", positions=hl.NoPositions()
    )


@pytest.mark.long
def test_checkers_know_every_keyword(tmp_path: Path) -> None:
    """Overloads state keywords once more, and one that a function got later could be missing there."""
    need("mypy")
    lines = ["from typing import Any", "import hooklens as hl", "from hooklens import patching"]
    lines += ["def call(model: hl.HookedCausalLM, cache: hl.ActivationCache, anything: Any) -> None:"]
    for called, function in CALLED.items():
        first = {"cache": "", "patching": "anything, anything, "}.get(called.partition(".")[0], "anything, ")
        lines += [f"    {called}({first}{one.name}=anything)" for one in keywords_of(function)]
        # A keyword that nothing has, which shows that the others are looked at.
        lines += [f"    {called}({first}of_no_function=anything)"]
    script = tmp_path / "every_keyword.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", str(script)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    errors = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    wrong = {number for number, line in enumerate(lines, start=1) if "of_no_function" in line}
    assert errors == wrong, done.stdout
