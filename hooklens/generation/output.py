"""What a generation gives back."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.generation.choosing.stopping import FinishReason


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationTiming:
    """Wall-clock times in seconds.

    Attributes:
        time_to_first_token: from the start until every row had its first token.
        total: from the start to the end.
        n_steps: tokens of the longest continuation.
    """

    time_to_first_token: float
    total: float
    n_steps: int

    @property
    def time_per_token(self) -> float | None:
        """Mean time of a step after the first, all rows together; None if there was but one."""
        if self.n_steps < 2:
            return None
        return (self.total - self.time_to_first_token) / (self.n_steps - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationOutput:
    """The result of a generation; row `i * num_return_sequences + j` is sample `j` of prompt `i`.

    Attributes:
        tokens: prompts and their continuations, end tokens included, rows filled up on the right with the
            tokenizer's padding token (0 without a tokenizer).
        prompt_lengths: tokens of each row that were given.
        n_new_tokens: tokens of each row that were generated.
        finish_reasons: why each row ended.
        logprobs: log-probabilities in nats of the new tokens under the model itself, before penalties, the
            caller's processors, temperature and truncation; 0 where a row has no token.
        text: tokens as text, without special tokens, as they read behind what came before them in a key-value cache;
            None without a tokenizer.
        cache: what `names_filter` captured, laid out as one run of `tokens[:, :-1]`, with an attention mask
            that leaves out each row's last token; None without a filter.
        timing: seconds.
        interrupted: the user broke off (Ctrl-C) and this is what there was.
    """

    tokens: Int[Tensor, "rows pos"]
    prompt_lengths: list[int]
    n_new_tokens: list[int]
    finish_reasons: list[FinishReason]
    logprobs: Float[Tensor, "rows new"]
    text: list[str] | None
    cache: ActivationCache | None
    timing: GenerationTiming
    interrupted: bool = field(default=False)

    @property
    def new_tokens(self) -> list[Int[Tensor, " new"]]:
        """The continuation of each row, unpadded."""
        lengths = zip(self.prompt_lengths, self.n_new_tokens, strict=True)
        return [row[start : start + n] for row, (start, n) in zip(self.tokens, lengths, strict=True)]

    @property
    def attention_mask(self) -> Bool[Tensor, "rows pos"]:
        """Which of `tokens` are tokens."""
        lengths = self.tokens.new_tensor(self.prompt_lengths) + self.tokens.new_tensor(self.n_new_tokens)
        columns = self.tokens.new_tensor(range(self.tokens.shape[1]))
        return columns < lengths[:, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationStep:
    """One step of a stream: a token for every row that had not ended.

    Attributes:
        tokens: padding where a row had ended before.
        is_new: which rows got a token in this step.
        text: the text that the step adds to each row, empty where a character is not complete yet; None
            without a tokenizer.
        logprobs: log-probabilities in nats under the model itself; 0 where a row had ended before.
        finish_reasons: why each row ended, in this step or before; None: it goes on.
    """

    tokens: Int[Tensor, " rows"]
    is_new: Bool[Tensor, " rows"]
    text: list[str] | None
    logprobs: Float[Tensor, " rows"]
    finish_reasons: list[FinishReason | None]
