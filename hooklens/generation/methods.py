"""The methods `generate` and `generate_stream` of a model."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, overload

from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import reads
from hooklens.generation.generate import Generated, generate, generate_stream
from hooklens.generation.model import GeneratingModel
from hooklens.generation.options import (
    DELIVERY,
    GenerationOptions,
    LogitsFunction,
    ReturnKind,
    StopFunction,
    Streamer,
)
from hooklens.generation.output import GenerationOutput, GenerationStep
from hooklens.generation.prompts import Input
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.tokens import Ids, TextList

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hooklens.generation.options import GenerateKeywords


class TextGeneration:
    """Gives a model (see `GeneratingModel`) methods that generate."""

    if TYPE_CHECKING:

        @overload
        def generate(
            self: GeneratingModel,
            input: str = ...,
            *,
            return_type: Literal["input", "str"] = ...,
            num_return_sequences: Literal[1] = ...,
            **options: Unpack[GenerateKeywords],
        ) -> str: ...
        @overload
        def generate(
            self: GeneratingModel,
            input: str = ...,
            *,
            return_type: Literal["input", "str"] = ...,
            num_return_sequences: int,
            **options: Unpack[GenerateKeywords],
        ) -> str | list[str]: ...
        @overload
        def generate(
            self: GeneratingModel,
            input: TextList,
            *,
            return_type: Literal["input", "str"] = ...,
            num_return_sequences: int = ...,
            **options: Unpack[GenerateKeywords],
        ) -> list[str]: ...
        @overload
        def generate(
            self: GeneratingModel,
            input: Ids,
            *,
            return_type: Literal["input"] = ...,
            num_return_sequences: int = ...,
            **options: Unpack[GenerateKeywords],
        ) -> Int[Tensor, "rows pos"]: ...
        @overload
        def generate(
            self: GeneratingModel,
            input: Ids,
            *,
            return_type: Literal["str"],
            num_return_sequences: int = ...,
            **options: Unpack[GenerateKeywords],
        ) -> str | list[str]: ...
        @overload
        def generate(
            self: GeneratingModel,
            input: Input = ...,
            *,
            return_type: Literal["tokens"],
            num_return_sequences: int = ...,
            **options: Unpack[GenerateKeywords],
        ) -> Int[Tensor, "rows pos"]: ...
        @overload
        def generate(
            self: GeneratingModel,
            input: Input = ...,
            *,
            return_type: Literal["output"],
            num_return_sequences: int = ...,
            **options: Unpack[GenerateKeywords],
        ) -> GenerationOutput: ...
        @overload
        def generate(
            self: GeneratingModel,
            input: Input = ...,
            *,
            return_type: ReturnKind = ...,
            num_return_sequences: int = ...,
            **options: Unpack[GenerateKeywords],
        ) -> Generated: ...

    @reads(**DELIVERY)
    def generate(
        self: GeneratingModel,
        input: Input = "",
        *,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        freq_penalty: float = 0.0,
        repetition_penalty: float | None = None,
        stop_strings: str | Sequence[str] | None = None,
        num_return_sequences: int = 1,
        use_past_kv_cache: bool = True,
        past_kv_cache: HookedKeyValueCache | None = None,
        prepend_bos: bool | None = None,
        seed: int | None = None,
        logits_processor: Sequence[LogitsFunction] = (),
        stopping_criteria: Sequence[StopFunction] = (),
        streamer: Streamer | None = None,
        edits: Sequence[Edit] = (),
        names_filter: NamesFilter = None,
        return_type: ReturnKind = "input",
        verbose: bool = True,
    ) -> Generated:
        """Prompts with their continuations.

        Row `i * num_return_sequences + j` of the result is sample `j` of prompt `i`. Rows that have ended leave
        the batch, unless hooks are attached to the model from outside (they may count on rows) or a cache is
        appended to. Interrupting (Ctrl-C) gives a warning and what there is so far.

        Args:
            input: a text, a list of texts, or token ids `[batch pos]`; prompts may differ in length. An empty
                text is the BOS token alone. What a tokenizer puts behind a text (an EOS, in some) is left out.
            max_new_tokens: most tokens to add to a prompt.
            stop_at_eos: a row ends with the first end token, which stays in it.
            eos_token_id: the end token, or several; None: those of `model.generation_config` (the checkpoint's
                generation_config.json), or else the tokenizer's.
            do_sample: draw from the distribution; False: take the most likely token.
            temperature: divides the logits; 0 takes the most likely token, as `do_sample=False` does.
            top_k: draw from the k most likely tokens.
            top_p: draw from the smallest set of most likely tokens that has this probability, in (0, 1].
            min_p: draw from tokens at least this fraction as likely as the most likely one, in [0, 1].
            freq_penalty: taken off a token's logit for each time it occurs in the row.
            repetition_penalty: > 1 makes tokens of the row less likely (Keskar et al. 2019).
            stop_strings: a row ends when its new text holds one of them, which stays in it.
            num_return_sequences: samples of each prompt, which is run once.
            use_past_kv_cache: False runs the whole sequence at every step. The tokens are the same. Where rotary
                frequencies depend on a sequence's length (dynamic scaling, longrope), a step whose cached keys turned
                at others runs the whole sequence, too; with edits, captures or a `past_kv_cache` it is refused.
            past_kv_cache: what came before the prompts. A frozen cache is read (one row serves all prompts),
                another one is appended to: all tokens but each row's last. The new tokens are those of the whole
                sequence under every option, since the cache knows its tokens; the result and the streamer have the
                prompts and what follows, not what came before.
            prepend_bos: for text; None is the model's `default_prepend_bos`. On a cache that holds tokens text goes on
                from them: it is encoded together with them, and there is no BOS to prepend.
            seed: of the draws; None: from torch's global generator. A row's draws depend on the seed and on its
                place only, not on other rows.
            logits_processor: functions (ids `[batch pos]`, scores `[batch d_vocab]`) to scores, as in
                transformers; run before temperature. They see rows without padding and, in a batch of ragged
                prompts, rows of one length at a time.
            stopping_criteria: functions (ids, scores) to bools `[batch]` that end rows, called in the same way.
            streamer: an object with `put(tokens)` and `end()`, as in transformers.
            edits: values from `hooklens.edits`, which act at every step. Positions are absolute; negative ones
                count from the end of the prompt; `rows` are prompts.
            names_filter: activations to keep, for `return_type="output"`; `"*"` is everything, None nothing.
                Keeping them changes no bit of the logits, except that keeping the logits themselves makes those
                of the whole prompt at once, which rounds differently.
            return_type: `"input"` gives text for text and ids for ids; `"tokens"` ids `[rows pos]`, padded on the
                right; `"str"` text without special tokens; `"output"` a `GenerationOutput` with
                log-probabilities, captured activations and timing, too.
            verbose: show a progress bar.

        Raises:
            InputError: values out of range or that exclude each other, text that does not go on from what is in the
                cache, options that look at tokens that the cache does not know, or a sequence longer than `n_ctx`;
                before any work.
            CacheError: the cache is another model's, of another dtype or device, serves other rows, or does not know
                the tokens that text goes on from.
            EditError: an edit's positions or rows are outside the sequences.
            HookNameError: an edit or `names_filter` selects no hook point.
        """
        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            stop_strings=stop_strings,
            num_return_sequences=num_return_sequences,
            use_past_kv_cache=use_past_kv_cache,
            past_kv_cache=past_kv_cache,
            prepend_bos=prepend_bos,
            seed=seed,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            edits=edits,
            names_filter=names_filter,
        )
        return generate(self, input, options, streamer=streamer, return_type=return_type, verbose=verbose)

    @reads()
    def generate_stream(
        self: GeneratingModel,
        input: Input = "",
        *,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        freq_penalty: float = 0.0,
        repetition_penalty: float | None = None,
        stop_strings: str | Sequence[str] | None = None,
        num_return_sequences: int = 1,
        use_past_kv_cache: bool = True,
        past_kv_cache: HookedKeyValueCache | None = None,
        prepend_bos: bool | None = None,
        seed: int | None = None,
        logits_processor: Sequence[LogitsFunction] = (),
        stopping_criteria: Sequence[StopFunction] = (),
        edits: Sequence[Edit] = (),
    ) -> Iterator[GenerationStep]:
        """The steps of a generation as they are made; keywords are those of `generate`.

        Example:
            >>> for step in model.generate_stream("Mary went to", max_new_tokens=20):
            ...     print(step.text[0], end="")

        Raises:
            InputError, CacheError, EditError, HookNameError: as `generate`, when called.
        """
        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            stop_strings=stop_strings,
            num_return_sequences=num_return_sequences,
            use_past_kv_cache=use_past_kv_cache,
            past_kv_cache=past_kv_cache,
            prepend_bos=prepend_bos,
            seed=seed,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            edits=edits,
        )
        return generate_stream(self, input, options)
