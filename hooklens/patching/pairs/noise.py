"""Noise on the embeddings of chosen tokens, in the place of corrupted prompts.

Causal tracing (Meng et al. 2022, "Locating and Editing Factual Associations in GPT") corrupts a prompt without other
words: to the embeddings of some tokens, those of a subject, it adds Gaussian noise,

    embedding(token) := embedding(token) + std * eps,   eps ~ N(0, I),

and restores single activations of the clean run. Zhang and Nanda (2023, "Towards Best Practices of Activation
Patching") compare it with prompts that differ in words: noise may take a model out of what it was trained on, and finds
other sites. One draw says little, so a prompt is paired with several, and results are means over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.arguments import read_int, read_number, read_seed, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.choice import Index, read_choice, resolve_choice

_WHAT = "Noise"


@dataclass(frozen=True)
class Noise:
    """Corrupt the clean prompts by noise on the embeddings of some tokens; stands where corrupted prompts do.

    Every draw makes a pair of its own, the draws of a prompt one after another, so that `result.per_pair` has
    `draws` values for each prompt and a result's mean is over prompts and draws. Where prompts have other answers than
    each other, give pairs that bring them along (`Pair(clean, corrupted, answer=...)`) as the clean prompts: they hold
    for all draws, and the pairs' own corrupted prompts are not used.

    Attributes:
        pos: the tokens, counted in each prompt, negative from its end: a number, a slice, a list; or a list of lists,
            one for each prompt.
        scale: the noise's standard deviation, in that of the entries of the chosen tokens' embeddings (at
            `hook_embed`, over all prompts). Meng et al. take 3.
        std: the standard deviation itself, in place of `scale`.
        draws: how many times noise is drawn for each prompt.
        seed: of the noise. What is drawn depends on the seed, the prompt's number and the draw's, and on nothing else.

    Raises:
        InputError: numbers that are none, or no draws.

    Example:
        >>> patching.sweep(model, prompt, patching.Noise(pos=[2, 3]), "resid_pre", patching.LogProb(" Seattle"))
    """

    pos: int | slice | Sequence[int] | Sequence[Sequence[int]]
    scale: float = 3.0
    std: float | None = field(default=None, kw_only=True)
    draws: int = field(default=10, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("scale", "std"):
            given = getattr(self, name)
            if given is not None:
                read_number(
                    given, what=f"{_WHAT}: {name}", expected="a number above 0", allows=lambda number: number > 0
                )
        read_int(self.draws, what=f"{_WHAT}: draws", least=1)
        read_seed(self.seed, what=f"{_WHAT}: seed")
        for pos in self._by_prompt() or [self.pos]:
            self._read(pos)

    def _by_prompt(self) -> list[object] | None:
        """The tokens of each prompt, where they are given so."""
        if isinstance(self.pos, list | tuple) and self.pos and all(isinstance(one, list | tuple) for one in self.pos):
            return list(self.pos)
        return None

    def _read(self, pos: object) -> Index:
        found = read_choice(pos, what=f"{_WHAT}: pos", error=InputError)
        if found is None:
            raise InputError(f"{_WHAT}: pos is {show(pos)}; expected positions, a slice or lists of them")
        return found

    def choose(self, lengths: Sequence[int], width: int) -> Bool[Tensor, "prompt pos"]:
        """The tokens that are noised.

        Raises:
            InputError: positions that a prompt does not have, or lists for another number of prompts.
        """
        given = self._by_prompt()
        if given is not None and len(given) != len(lengths):
            raise InputError(f"{_WHAT}: pos has lists for {len(given)} prompts, and there are {len(lengths)}")
        chosen = torch.zeros(len(lengths), width, dtype=torch.bool)
        for prompt, length in enumerate(lengths):
            index = self._read(self.pos if given is None else given[prompt])
            places = resolve_choice(
                index, length, what=f"{_WHAT}: pos", noun=f"tokens in prompt {prompt}", error=InputError
            )
            if not places:
                raise InputError(f"{_WHAT}: pos chooses none of the {length} tokens of prompt {prompt}")
            chosen[prompt, places] = True
        return chosen


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenNoise:
    """The noise of some pairs, drawn anew whenever it is asked for.

    Attributes:
        chosen: the tokens that are noised.
        std: the standard deviation.
        seeds: of each pair.
        d_model: entries of an embedding.
        prompts: of each pair, the number of its prompt, which its other draws share.
    """

    chosen: Bool[Tensor, "pairs pos"]
    std: float
    seeds: tuple[int, ...]
    d_model: int
    prompts: tuple[int, ...]

    def take(self, pairs: Sequence[int]) -> "TokenNoise":
        """The noise of some of the pairs."""
        rows = list(pairs)
        return replace(
            self,
            chosen=self.chosen[rows],
            seeds=tuple(self.seeds[row] for row in rows),
            prompts=tuple(self.prompts[row] for row in rows),
        )

    def draw(self, pairs: Sequence[int], width: int, dtype: torch.dtype) -> Float[Tensor, "pairs pos d_model"]:
        """What is added to the embeddings of some pairs' first columns; 0 where nothing is."""
        added = torch.zeros(len(pairs), self.chosen.shape[1], self.d_model)
        for row, pair in enumerate(pairs):
            generator = torch.Generator().manual_seed(self.seeds[pair])
            own = self.chosen[pair].cpu()
            added[row, own] = self.std * torch.randn(int(own.sum()), self.d_model, generator=generator)
        return added[:, :width].to(self.chosen.device, dtype)


@torch.no_grad()
def draw_noise(
    model: HookedCausalLM, noise: Noise, tokens: Int[Tensor, "prompt pos"], lengths: Sequence[int]
) -> TokenNoise:
    """The noise of all draws of some prompts, the draws of a prompt one after another.

    Raises:
        InputError: as `Noise.choose`.
    """
    chosen = noise.choose(lengths, tokens.shape[1]).to(tokens.device)
    std = noise.std
    if std is None:
        std = noise.scale * _spread(model, tokens, chosen, lengths)
    # Seeds of 64 bits: draws of one prompt and of others never share one.
    seeds = [
        (noise.seed * 0x9E3779B97F4A7C15 + prompt * 0x100000 + draw) % 2**63
        for prompt in range(len(lengths))
        for draw in range(noise.draws)
    ]
    return TokenNoise(
        chosen=chosen.repeat_interleave(noise.draws, 0),
        std=float(std),
        seeds=tuple(seeds),
        d_model=model.cfg.d_model,
        prompts=tuple(prompt for prompt in range(len(lengths)) for _ in range(noise.draws)),
    )


def _spread(
    model: HookedCausalLM, tokens: Int[Tensor, "prompt pos"], chosen: Bool[Tensor, "prompt pos"], lengths: Sequence[int]
) -> float:
    """The standard deviation of the entries of the chosen tokens' embeddings."""
    real = torch.arange(tokens.shape[1], device=tokens.device) < torch.tensor(lengths, device=tokens.device)[:, None]
    with model.capture(["hook_embed"]) as captured:
        model.run(tokens, model.make_plan(tokens, None if bool(real.all()) else real), stop_at_layer=0)
    entries = captured["hook_embed"][chosen].float()
    return float(entries.std()) if entries.numel() > 1 else 0.0
