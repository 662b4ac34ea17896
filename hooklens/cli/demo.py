"""`hooklens demo`: a tour in four steps on a small model, without a network.

The prompt is the indirect-object task of Wang et al. 2022 ("Interpretability in the wild"), and the third
step is activation patching as Meng et al. 2022 ("Locating and editing factual associations in GPT") do it.
Each step is a few calls that a reader can copy.
"""

import time
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.axes import find_site, get_act_name
from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.screen import make_console, make_table, print_heat_map, say, say_heading
from hooklens.display.numbers import format_bytes
from hooklens.errors import InputError
from hooklens.hooks.edits import Replace

DEFAULT_MODEL = "bundled:tiny-gpt-neox"
PREFIX = "When Mary and John went to the store ,"
CLEAN_PROMPT = f"{PREFIX} John gave a drink to"
CORRUPTED_PROMPT = f"{PREFIX} Mary gave a drink to"
CONTINUATIONS = (
    " John gave a drink to",
    " Mary gave a drink to",
    " John said goodbye to",
    " Mary wanted to give the book to",
)
_LEAST_DIFFERENCE = 0.1
"""Logits; patching divides by the difference between the two runs, which must be more than noise."""


@dataclass(frozen=True, kw_only=True)
class PromptPair:
    """Two prompts that differ in one name, and with it in which name should come next.

    Attributes:
        clean: `[1 pos]`.
        corrupted: `[1 pos]`.
        answer: the token that should follow `clean`.
        wrong: the token that should follow `corrupted`.
    """

    clean: Int[Tensor, "1 pos"]
    corrupted: Int[Tensor, "1 pos"]
    answer: int
    wrong: int

    def logit_difference(self, logits: Float[Tensor, "1 pos d_vocab"]) -> float:
        """How much the answer is ahead of the wrong name at the last position, in logits."""
        return float(logits[0, -1, self.answer] - logits[0, -1, self.wrong])


def make_prompt_pair(model: HookedCausalLM) -> PromptPair:
    """Encode the two prompts; the names are read off the one position where they differ.

    Raises:
        InputError: for this tokenizer the prompts differ in more than one token.
    """
    clean, corrupted = model.to_tokens(CLEAN_PROMPT), model.to_tokens(CORRUPTED_PROMPT)
    differs = (clean != corrupted)[0].nonzero().flatten() if clean.shape == corrupted.shape else None
    if differs is None or len(differs) != 1:
        raise InputError(
            f"the demo's prompts {CLEAN_PROMPT!r} and {CORRUPTED_PROMPT!r} must differ in exactly one token; this "
            f"model's tokenizer makes {model.to_str_tokens(CLEAN_PROMPT)} and {model.to_str_tokens(CORRUPTED_PROMPT)}. "
            "Run the demo on a model whose tokenizer knows both names"
        )
    at = int(differs[0])
    # The sentence is about two people: whoever does not act is the one who receives.
    return PromptPair(clean=clean, corrupted=corrupted, answer=int(corrupted[0, at]), wrong=int(clean[0, at]))


def patch_residual_stream(
    model: HookedCausalLM, pair: PromptPair, clean_cache: ActivationCache
) -> tuple[Float[Tensor, "pos layer"], float, float]:
    """Run the corrupted prompt once per position and layer with `resid_pre` there taken from the clean run.

    Returns:
        Logit differences, normalised so that 0 is the corrupted run and 1 the clean one; then those two runs'
        own differences, clean and corrupted, in logits.
    """
    n_pos = pair.clean.shape[1]
    clean = pair.logit_difference(model(pair.clean, logits_at=-1))
    corrupted = pair.logit_difference(model(pair.corrupted, logits_at=-1))
    patched = torch.empty(n_pos, model.cfg.n_layers)
    for layer in range(model.cfg.n_layers):
        for pos in range(n_pos):
            edit = Replace(get_act_name("resid_pre", layer), clean_cache["resid_pre", layer][:, pos], pos=pos)
            logits = model.run_with_hooks(pair.corrupted, edits=[edit], logits_at=-1)
            patched[pos, layer] = pair.logit_difference(logits)
    return (patched - corrupted) / (clean - corrupted), clean, corrupted


def demo(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="The model to look at: bundled, a folder, or a hub name.")
    ] = DEFAULT_MODEL,
) -> None:
    """Show what HookLens does, in four steps on a small bundled model: predict, watch, patch, share a prefix."""
    start = time.perf_counter()
    console = make_console()
    hooked = HookedCausalLM.from_pretrained(model)
    say(console, f'model = HookedCausalLM.from_pretrained("{model}")')
    say(console, f"It has {hooked.cfg.n_layers} layers and {hooked.n_params_total:,} parameters.")
    with torch.no_grad():
        pair = make_prompt_pair(hooked)
        logits, cache = hooked.run_with_cache(pair.clean)
        _show_prediction(console, hooked, logits)
        _show_cache(console, cache)
        _show_patching(console, hooked, pair, cache)
        _show_shared_prefix(console, hooked)
    console.print()
    say(console, f"That was everything: {time.perf_counter() - start:.1f} s on {hooked.device}, no network.")
    say(console, "Next: tutorials/01_first_look.ipynb, `hooklens info MODEL`, `hooklens verify MODEL`.")


def _show_prediction(console: Console, model: HookedCausalLM, logits: Float[Tensor, "1 pos d_vocab"]) -> None:
    say_heading(console, "1  Predict")
    say(
        console,
        f'The prompt is "{CLEAN_PROMPT}". Two people are named, John acts, so Mary should receive. '
        "The model's five most likely next tokens:",
    )
    console.print()
    probabilities, tokens = logits[0, -1].softmax(-1).topk(5)
    table = make_table(console, ["next token", "probability"], numeric=["probability"])
    for probability, token in zip(probabilities.tolist(), tokens.tolist(), strict=True):
        table.add_row(repr(model.to_single_str_token(token)), f"{probability:.3f}")
    console.print(table)


def _show_cache(console: Console, cache: ActivationCache) -> None:
    say_heading(console, "2  Watch")
    say(
        console,
        "logits, cache = model.run_with_cache(prompt) ran the same computation and kept every activation under its "
        'name: cache["pattern", 0] is the attention pattern of layer 0. Below, {i} is any layer, and the bytes are '
        "those of all layers.",
    )
    console.print()
    table = make_table(console, ["name", "axes", "shape", "bytes"], numeric=["shape", "bytes"])
    for template, names in _group_by_site(cache).items():
        axes = cache.axes_of(names[0]) or ()
        shape = " x ".join(str(size) for size in cache[names[0]].shape)
        n_bytes = sum(cache[name].nbytes for name in names)
        table.add_row(template, " ".join(axes), shape, format_bytes(n_bytes))
    console.print(table)
    console.print()
    say(
        console,
        f"In all {len(cache)} activations in {format_bytes(cache.nbytes)} of memory: the stream leaving a block is the "
        "stream entering the next, one tensor under two names.",
    )


def _group_by_site(cache: ActivationCache) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in cache:
        site = find_site(name)
        groups.setdefault(site.template if site else name, []).append(name)
    return groups


def _show_patching(console: Console, model: HookedCausalLM, pair: PromptPair, cache: ActivationCache) -> None:
    answer, wrong = (model.to_single_str_token(token).strip() for token in (pair.answer, pair.wrong))
    say_heading(console, "3  Patch")
    say(
        console,
        f"Where does the model know who acts? We run the corrupted prompt, in which {answer} acts instead of {wrong}, "
        "and put back the clean run's residual stream at one position of one layer. The score is the logit of "
        f"{answer} minus the logit of {wrong}, scaled: 0 means the patch changed nothing, 1 means it restored the "
        "clean answer.",
    )
    console.print()
    values, clean, corrupted = patch_residual_stream(model, pair, cache)
    if abs(clean - corrupted) < _LEAST_DIFFERENCE:
        say(
            console,
            f"This model answers both prompts alike (logit differences {clean:.2f} and {corrupted:.2f}): it does not "
            "do the task, so there is nothing to restore.",
        )
        return
    tokens = model.to_str_tokens(pair.corrupted[0])
    print_heat_map(
        console,
        values.tolist(),
        row_labels=[f"{pos:2d} {str(token).strip()}" for pos, token in enumerate(tokens)],
        column_labels=[f"layer {layer}" for layer in range(model.cfg.n_layers)],
        row_title="position",
    )
    console.print()
    say(console, f"Unscaled, the clean run scores {clean:+.2f} logits and the corrupted run {corrupted:+.2f}.")
    say(console, _describe_path(values, [str(token).strip() for token in tokens]))


def _describe_path(values: Float[Tensor, "pos layer"], tokens: list[str]) -> str:
    """Where what makes the difference sits, entering the first layer and entering the last."""
    first, last = int(values[:, 0].argmax()), int(values[:, -1].argmax())
    start = (
        f"Entering layer 0 the difference sits at {tokens[first]!r} (position {first}, {float(values[first, 0]):.2f})"
    )
    end = f"entering the last layer at {tokens[last]!r} (position {last}, {float(values[last, -1]):.2f})"
    moved = "attention in between has moved it" if first != last else "it has not moved"
    return f"{start}, {end}: {moved}."


def _show_shared_prefix(console: Console, model: HookedCausalLM) -> None:
    say_heading(console, "4  Share a prefix")
    cache = model.prefill(PREFIX)
    logits = model(list(CONTINUATIONS), past_kv_cache=cache, logits_at=-1)
    say(
        console,
        f'kv = model.prefill("{PREFIX}") ran these {len(cache)} tokens once ({format_bytes(cache.nbytes)} of keys and '
        f"values). model(continuations, past_kv_cache=kv) runs {len(CONTINUATIONS)} continuations of different length "
        "on it, in one batch and without a copy of the prefix:",
    )
    console.print()
    table = make_table(console, ["continuation", "next token", "probability"], numeric=["probability"])
    probabilities, tokens = logits[:, -1].softmax(-1).max(-1)
    for text, token, probability in zip(CONTINUATIONS, tokens.tolist(), probabilities.tolist(), strict=True):
        table.add_row(f"...{text}", repr(model.to_single_str_token(token)), f"{probability:.3f}")
    console.print(table)
    console.print()
    in_full = model([PREFIX + text for text in CONTINUATIONS], logits_at=-1)
    difference = float((logits - in_full).abs().max())
    say(console, f"The same prompts run in full give the same logits; the largest difference is {difference:.1e}.")
