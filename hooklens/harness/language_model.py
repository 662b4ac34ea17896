"""The class that the harness evaluates."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hooklens.arguments import (
    MOST_ENTRIES,
    optional,
    read_flag,
    read_int,
    read_number,
    read_one_of,
    read_path,
    read_text,
    reads,
    require,
)
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, MissingDependencyError, warn_caller
from hooklens.evaluation.batching import BatchSize
from hooklens.evaluation.interventions import find_interventions
from hooklens.evaluation.prefix import check_edits
from hooklens.evaluation.windows import Window, cut_window, score_windows
from hooklens.harness.arguments import load_model, make_steering, read_batch_size
from hooklens.harness.requests import PromptBatch, plan_prompts, read_asked
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.edits import Edit
from hooklens.optional import import_package
from hooklens.progress import progress_bar
from hooklens.steering import SteeringVectors
from hooklens.tokens.continuation import closing_ids
from hooklens.tokens.encoding import encode_batch
from hooklens.tokens.tokenizer import encode, special_id

if TYPE_CHECKING:
    from hooklens.generation.output import GenerationOutput

NAME = "hooklens"
"""What the harness knows the class by."""

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness names a request by, and the tokens of its context and its continuation."""

_MOST_NEW = 256


def _find_base() -> Any:
    """The harness' class of models that have a tokenizer; without the harness, a class that cannot be made."""
    try:
        return import_package("lm_eval.api.model").TemplateLM
    except MissingDependencyError:
        return object


_Base: Any = _find_base()


class HookLensLM(_Base):  # type: ignore[misc]  # of a package that may be absent
    """A HookLens model as lm-evaluation-harness asks it, with the numbers of the harness' own `hf` backend.

    Log-likelihoods run what contexts share once: a context with several continuations, and what contexts have in
    common at their start. Tokens of a context that does not fit are cut from its start. A text has the tokens that the
    model's BOS rule gives it; what a tokenizer puts behind a text (an EOS, in some) is left out.

    Edits and steering act on every token that runs: in log-likelihoods on a context with its continuation but for its
    last token, in generation at every step. Positions count from the first token that runs. While log-likelihoods are
    computed, positions from the end are refused, and edits with `when="decode"` have nothing to act on.

    Example:
        >>> edited = HookLensLM(model, edits=[hl.edits.Zero("blocks.3.hook_mlp_out")])
        >>> lm_eval.simple_evaluate(model=edited, tasks=["lambada_openai"])

    Args:
        pretrained: a model, or what `HookedCausalLM.from_pretrained` loads (`"bundled:tiny-llama"`).
        edits: values from `hooklens.edits`; they name no rows.
        steering: a file of steering vectors, as `SteeringVectors.save` writes it.
        steer_at: the hook point of the one vector of the file to steer with; None: all of them.
        strength: of steering, see `SteeringVectors.edits`; None: 1.
        how: what steering does, `"add"`, `"ablate"` or `"clamp"`; None: `"add"`.
        batch_size: rows at once, or `"auto"`, by memory.
        max_length: tokens that run at once; None: the model's `n_ctx`.
        max_gen_toks: most tokens of an answer where a task does not say.
        add_bos_token: whether a text begins with the BOS token; None: the model's `default_prepend_bos`.
        prefix_token_id: stands before a text without a context; None: the BOS token, or else the EOS token.
        chat_template_args: further keywords for the tokenizer's chat template.
        device: where a model that is loaded runs; None: on the GPU where torch sees one. `"cuda:0"` counts as None
            where torch sees none, or with `device_map`: the harness' command line says so where nobody does.
        max_batch_size: the harness' bound for its own search of a batch size; only None.
        progress: show progress bars.
        **loading: further keywords of `HookedCausalLM.from_pretrained` (`dtype`, `revision`, `tokenizer`, `adapter`).

    Raises:
        InputError: arguments that are none or exclude each other, or a model without a tokenizer.
        SteeringError: vectors that do not fit the model, or their arguments.
        CheckpointError: a file that cannot be read.
        MissingDependencyError: the harness is not installed.
    """

    @reads(
        edits=read_edits,
        steering=optional(read_path),
        steer_at=optional(read_text),
        strength=optional(partial(read_number, expected="a finite number")),
        how=optional(partial(read_one_of, options=("add", "ablate", "clamp"))),
        max_length=optional(partial(read_int, least=1, most=MOST_ENTRIES)),
        max_gen_toks=partial(read_int, least=1, most=MOST_ENTRIES),
        add_bos_token=optional(read_flag),
        prefix_token_id=optional(partial(read_int, least=0)),
        chat_template_args=optional(partial(require, kind=Mapping, expected="keywords by name")),
        progress=read_flag,
    )
    def __init__(
        self,
        pretrained: HookedCausalLM | str | Path,
        *,
        edits: Sequence[Edit] = (),
        steering: str | Path | None = None,
        steer_at: str | None = None,
        strength: float | None = None,
        how: Literal["add", "ablate", "clamp"] | None = None,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = _MOST_NEW,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        max_batch_size: int | None = None,
        progress: bool = True,
        **loading: Any,
    ) -> None:
        import_package("lm_eval.api.model")
        super().__init__()
        self._batch_size: BatchSize = read_batch_size(batch_size, max_batch_size)
        check_edits(edits)
        if steering is None and (strength, how, steer_at) != (None, None, None):
            raise InputError(
                "strength, how and steer_at say how to steer, and there are no vectors; give steering=FILE"
            )
        vectors = None if steering is None else SteeringVectors.load(steering)
        self.hooked = load_model(pretrained, device, loading)
        if self.hooked.tokenizer is None:
            raise InputError("the model has no tokenizer, and tasks are text; load it with tokenizer=...")
        self.tokenizer: Any = self.hooked.tokenizer
        steered = [] if vectors is None else make_steering(self.hooked, vectors, steer_at, strength, how)
        for edit in (*edits, *steered):
            self.hooked.find_edit_points(edit)
        self.edits: tuple[Edit, ...] = (*edits, *steered)
        self._steering = None if steering is None else str(steering)
        self._max_length = self._check_below(max_length, "max_length", self.hooked.cfg.n_ctx, "n_ctx")
        self._prefix = self._check_below(
            prefix_token_id, "prefix_token_id", self.hooked.cfg.d_vocab - 1, "the last id of the vocabulary"
        )
        self._max_gen_toks, self._progress = max_gen_toks, progress
        self.add_bos_token = add_bos_token
        self.chat_template_args = dict(chat_template_args or {})
        self._revision = loading.get("revision")
        self._device = self.hooked.device

    @classmethod
    def register(cls) -> None:
        """Make the class known to the harness; importing `hooklens.harness` has done so where the harness is there."""
        import_package("lm_eval.api.registry").register_model(NAME)(cls)

    @staticmethod
    def _check_below(given: int | None, what: str, most: int, of: str) -> int | None:
        if given is not None and given > most:
            raise InputError(f"{what} is {given}, expected at most {most}, {of}")
        return given

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            InputError: the tokenizer has none.
        """
        found = special_id(self.tokenizer, "eos_token_id")
        if found is None:
            raise InputError("the tokenizer has no EOS token; set tokenizer.eos_token, or give prefix_token_id")
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        if self._prefix is not None:
            return self._prefix
        found = special_id(self.tokenizer, "bos_token_id")
        return self.eot_token_id if found is None else found

    @property
    def max_length(self) -> int:
        """How many tokens run at once."""
        return self._max_length or self.hooked.cfg.n_ctx

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of an answer where a task does not say."""
        return self._max_gen_toks

    @property
    def batch_size(self) -> BatchSize:
        """Rows at once, or `"auto"`."""
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer, as the harness names what it keeps of requests."""
        return str(getattr(self.tokenizer, "name_or_path", type(self.tokenizer).__name__)).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What stands in the results beside the scores: the model, and what acts on it."""
        acting = find_interventions(self.hooked, self.edits)
        return {
            "model_num_parameters": sum(weight.numel() for weight in self.hooked.parameters()),
            "model_dtype": str(self.hooked.dtype),
            "model_revision": self._revision or "",
            "model_transforms": list(self.hooked.transforms),
            "edits": [f"{type(edit).__name__}({edit.name!r})" for edit in self.edits],
            "edits_fingerprint": acting.fingerprint,
            "functions": list(acting.functions),
            "steering": self._steering or "",
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:  # noqa: FBT001
        """The tokens of a text, by the BOS rule; an empty one has at most the BOS token."""
        asked = self.add_bos_token if add_special_tokens is None else add_special_tokens
        rule = self.hooked.bos_rule(prepend_bos=asked)
        if not string and not rule:
            [row] = encode(self.tokenizer, [string], add_special_tokens=rule is None)
            return row[: len(row) - len(closing_ids(self.tokenizer, []))] if rule is None else row
        batch = encode_batch(
            self.tokenizer,
            [string],
            prepend_bos=rule,
            padding_side=None,
            truncate=False,
            n_ctx=None,
            d_vocab=self.hooked.cfg.d_vocab,
            past=None,
            closed=False,
        )
        ids: list[int] = batch.tokens[0].tolist()
        return ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:  # noqa: FBT001, FBT002
        """The text of tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002
        """A conversation as text; for a template that knows no system's turns, without them, as the `hf` backend."""
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )
        try:
            text: str = render(chat_history)
        except import_package("jinja2").exceptions.TemplateError as error:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            if len(turns) == len(chat_history):
                raise
            warn_caller(f"the chat template refuses the conversation ({error}); it is tried without its system turns")
            text = render(turns)
        return text

    def loglikelihood(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each `(context, continuation)`, the log-probability in nats, and whether greedy decoding gives it."""
        pairs: list[Pair] = [((context, text), *self._encode(context, text)) for context, text in _arguments(requests)]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            encoded: tuple[list[int], list[int]] = self._encode_pair(context, continuation)
            return encoded
        ids = self.tok_encode(continuation, add_special_tokens=False)
        # A text that brings the token with it needs no second one before it.
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], *, disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        windows = self._cut(requests)
        answers: dict[int, tuple[float, bool]] = {}
        batches = score_windows(self.hooked, windows, batch_size=self._batch_size, edits=self.edits)
        with self._show("scoring", len(windows), disable_tqdm=disable_tqdm) as bar:
            for batch in batches:
                for index, score in batch.items():
                    answers[index] = (score.total, score.is_greedy)
                    name = requests[index][0]
                    if name is not None:
                        self.cache_hook.add_partial("loglikelihood", name, answers[index])
                bar.update(len(batch))
        return [answers[index] for index in range(len(windows))]

    def _cut(self, pairs: Sequence[Pair]) -> list[Window]:
        """Pairs as windows; what is wrong with any of them is said before the first runs."""
        windows, wrong = [], []
        for index, (name, context, continuation) in enumerate(pairs):
            try:
                windows.append(cut_window(context, continuation, self.max_length))
            except InputError as error:
                shown = "" if name is None else f" {name[1][:40]!r}"
                wrong.append(f"request {index}{shown}: {error}")
        if wrong:
            more = f"\nand {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise InputError("\n".join(wrong[:10]) + more)
        return windows

    def loglikelihood_rolling(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[float]:
        """For each `(text,)`, the log-probability of all of it in nats, each token given as many before it as fit.

        The windows are the harness' own. A text without a token has 0.
        """
        windows = import_package("lm_eval.utils")
        pairs: list[Pair] = []
        ends = []
        for (text,) in _arguments(requests):
            rolled = windows.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs += [(None, *windows.make_disjoint_window(pair)) for pair in rolled]
            ends.append(len(pairs))
        scores = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        totals = []
        for start, end, (text,) in zip([0, *ends], ends, _arguments(requests), strict=False):
            totals.append(sum(total for total, _ in scores[start:end]))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[str]:
        """For each `(context, keywords)`, the text that the model goes on with, up to what ends it.

        The keywords are `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p` and
        `repetition_penalty`; others are refused.
        """
        given = _arguments(requests)
        batches = plan_prompts(
            self.hooked,
            [self.tok_encode(context) for context, _ in given],
            [read_asked(keywords, self._max_gen_toks) for _, keywords in given],
            max_length=self.max_length,
            prefix=self.prefix_token_id,
            batch_size=self._batch_size,
        )
        answers: dict[int, str] = {}
        with self._show("generating", len(given), disable_tqdm=disable_tqdm) as bar:
            for batch in batches:
                output = self._generate(batch, [given[index][0] for index in batch.members])
                for index, new in zip(batch.members, output.new_tokens, strict=True):
                    answers[index] = batch.asked.cut(self.tok_decode(new.tolist()))
                    self.cache_hook.add_partial("generate_until", given[index], answers[index])
                bar.update(len(batch.members))
        return [answers[index] for index in range(len(given))]

    def _generate(self, batch: PromptBatch, contexts: list[str]) -> "GenerationOutput":
        output: GenerationOutput = self.hooked.generate(
            contexts if batch.ids is None else torch.tensor(batch.ids),
            max_new_tokens=batch.asked.max_new_tokens,
            eos_token_id=self._end_token_ids() or None,
            stop_strings=list(batch.asked.until) or None,
            prepend_bos=self.add_bos_token if batch.ids is None else None,
            edits=self.edits,
            return_type="output",
            verbose=False,
            **batch.asked.sampling,
        )
        if output.interrupted:
            # Half an answer would be counted as one.
            raise KeyboardInterrupt
        return output

    def _end_token_ids(self) -> list[int]:
        """The tokens that end an answer: the checkpoint's, and the tokenizer's."""
        found = self.hooked.generation_config.get("eos_token_id")
        listed = found if isinstance(found, list) else [found]
        own = special_id(self.tokenizer, "eos_token_id")
        return [token for token in dict.fromkeys([*listed, own]) if token is not None]

    def _show(self, what: str, total: int, *, disable_tqdm: bool) -> Any:
        return progress_bar(what, total=total, unit="request", progress=self._progress and not disable_tqdm)


def _arguments(requests: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What each of the harness' requests asks."""
    return [request.args for request in requests]


if _Base is not object:
    HookLensLM.register()
