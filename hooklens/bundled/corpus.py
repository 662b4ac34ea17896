"""The generated text that the bundled checkpoints read, and the prompts that test them.

Three tasks, each a pure function of a seeded `random.Random`:

- *indirect objects* (Wang et al. 2022, "Interpretability in the wild"): two people are named, one of them
  is named again and gives something to ... the other. Either may be named first: the subject second is
  the paper's ABBA order, the subject first its BABA order.
- *repeated sequences* (Olsson et al. 2022, "In-context learning and induction heads"): random words, then
  the same words again. The period varies, so that position alone does not tell what comes next.
- *capitals*: facts to be known by heart, asked in both directions.

`TRAINING_PAIRS` and `HELD_OUT_PAIRS` split the pairs of names, `TRAINING_TEMPLATES` and
`HELD_OUT_TEMPLATES` the sentences (a held-out sentence is an opening and a closing that never occur together in
training); training text holds nothing of what is held out.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from hooklens.bundled.words import CAPITALS, END_OF_TEXT, NAMES, OBJECTS, PLACES, WORDS

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class PromptItem:
    """A prompt with its answer, and the twin of equal length that activation patching compares it with.

    Attributes:
        prompt: text that ends where the answer is due.
        answer: the word that should come next.
        wrong: the word that should come next after `corrupted_prompt`.
        corrupted_prompt: `prompt` with one word exchanged; as many tokens.
    """

    prompt: str
    answer: str
    wrong: str
    corrupted_prompt: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """A sentence about two people that ends where the indirect object is due.

    Attributes:
        opening: names `{first}` and `{second}`.
        closing: names `{subject}`, who is one of them, again.
    """

    opening: str
    closing: str

    def fill(self, *, first: str, second: str, subject: str, place: str, thing: str) -> str:
        """The prompt with all slots filled; every choice of words gives the same number of tokens."""
        text = f"{self.opening} {self.closing}"
        return text.format(first=first, second=second, subject=subject, place=place, thing=thing)


OPENINGS: tuple[str, ...] = (
    "When {first} and {second} went to the {place} ,",
    "After {first} and {second} left the {place} ,",
    "While {first} and {second} were working at the {place} ,",
    "Before {first} and {second} came to the {place} ,",
    "Since {first} and {second} lived near the {place} ,",
    "Then , {first} and {second} went to the {place} , and",
    "Then {first} and {second} had a long talk at the {place} , and afterwards",
    "{first} and {second} met at the {place} , and",
    "{first} and {second} played in the {place} . Then",
    "Yesterday {first} and {second} visited the {place} , and",
    "Last night {first} and {second} were at the {place} . Later",
    "Friends {first} and {second} found a {thing} at the {place} . Soon",
    "At the {place} {first} talked with {second} , and",
    "{first} walked to the {place} with {second} , and",
    "{first} saw {second} near the {place} . Then",
    "The {place} was quiet when {first} and {second} arrived , so",
    "In the morning {first} and {second} opened the {place} , and",
    "As {first} and {second} walked around the {place} ,",
    "Once {first} and {second} reached the {place} ,",
    "One day {first} and {second} returned to the {place} , and",
    "{first} waited for {second} at the {place} . Finally",
    "{first} and {second} talked .",
    "{first} met {second} , and",
)
CLOSINGS: tuple[str, ...] = (
    "{subject} gave a {thing} to",
    "{subject} gave the {thing} to",
    "{subject} handed the {thing} to",
    "{subject} passed a {thing} to",
    "{subject} offered the {thing} to",
    "{subject} sold a {thing} to",
    "{subject} wanted to give the {thing} to",
    "{subject} decided to show a {thing} to",
    "{subject} bought a {thing} for",
    "{subject} made a {thing} for",
    "{subject} threw the {thing} to",
    "{subject} read a story to",
    "{subject} said goodbye to",
    "{subject} sent a {thing} to",
    "{subject} lent the {thing} to",
    "{subject} brought the {thing} back to",
    "{subject} told a joke to",
)

_HELD_OUT_TEMPLATE_EVERY = 6


def _split_templates() -> tuple[tuple[Template, ...], tuple[Template, ...]]:
    """Split the sentences so that every opening and every closing occurs on both sides, never the same two together."""
    training: list[Template] = []
    held_out: list[Template] = []
    for (i, opening), (j, closing) in product(enumerate(OPENINGS), enumerate(CLOSINGS)):
        side = held_out if (i + j) % _HELD_OUT_TEMPLATE_EVERY == 0 else training
        side.append(Template(opening=opening, closing=closing))
    return tuple(training), tuple(held_out)


TRAINING_TEMPLATES, HELD_OUT_TEMPLATES = _split_templates()

_HELD_OUT_EVERY = 8


def _split_pairs() -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Split the unordered pairs of names so that every name has partners on both sides."""
    training: list[Pair] = []
    held_out: list[Pair] = []
    for (i, first), (j, second) in combinations(enumerate(NAMES), 2):
        side = held_out if (i + j) % _HELD_OUT_EVERY == 0 else training
        side.append((first, second))
    return tuple(training), tuple(held_out)


TRAINING_PAIRS, HELD_OUT_PAIRS = _split_pairs()

# Question, what it asks for. Both directions, so that a capital is known from its country and back.
FACT_PHRASINGS: tuple[tuple[str, str], ...] = (
    ("The capital of {country} is", "capital"),
    ("The capital city of {country} is", "capital"),
    ("In {country} the capital is called", "capital"),
    ("{capital} is the capital of", "country"),
    ("The city of {capital} lies in", "country"),
)


def sample_indirect_object(rng: random.Random, *, templates: Sequence[Template], pairs: Sequence[Pair]) -> PromptItem:
    """Draw an indirect-object prompt: template, pair, who is named first and who is the subject.

    The corrupted prompt exchanges the subject for the other person, which exchanges answer and wrong.
    """
    template = rng.choice(templates)
    first, second = rng.sample(rng.choice(pairs), 2)
    subject, answer = (first, second) if rng.random() < 0.5 else (second, first)
    place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
    return PromptItem(
        prompt=template.fill(first=first, second=second, subject=subject, place=place, thing=thing),
        answer=answer,
        wrong=subject,
        corrupted_prompt=template.fill(first=first, second=second, subject=answer, place=place, thing=thing),
    )


def held_out_indirect_objects(n: int, *, seed: int) -> list[PromptItem]:
    """`n` prompts of which neither the pair of names nor the template occurs in training."""
    rng = random.Random(seed)
    return [sample_indirect_object(rng, templates=HELD_OUT_TEMPLATES, pairs=HELD_OUT_PAIRS) for _ in range(n)]


def sample_fact(rng: random.Random) -> PromptItem:
    """Draw a question about a capital; the corrupted prompt asks the same about another country."""
    country, other = rng.sample(tuple(CAPITALS), 2)
    return _ask_fact(*rng.choice(FACT_PHRASINGS), country=country, other=other)


def all_facts() -> list[PromptItem]:
    """Every fact in every phrasing; the country next in the list serves for the corrupted prompt."""
    countries = tuple(CAPITALS)
    others = (*countries[1:], countries[0])
    return [
        _ask_fact(question, asked, country=country, other=other)
        for question, asked in FACT_PHRASINGS
        for country, other in zip(countries, others, strict=True)
    ]


def _ask_fact(question: str, asked: str, *, country: str, other: str) -> PromptItem:
    clean = {"country": country, "capital": CAPITALS[country]}
    corrupted = {"country": other, "capital": CAPITALS[other]}
    return PromptItem(
        prompt=question.format(**clean),
        answer=clean[asked],
        wrong=corrupted[asked],
        corrupted_prompt=question.format(**corrupted),
    )


def sample_repeats(rng: random.Random, *, period: int, length: int) -> list[str]:
    """`length` words: `period` random ones (drawn with replacement), again and again."""
    block = rng.choices(WORDS, k=period)
    return [block[position % period] for position in range(length)]


# Shares of documents. Repeated sequences are the longest documents.
TASK_SHARES: Mapping[str, float] = {"indirect_object": 0.65, "repeats": 0.25, "facts": 0.1}
_SHORTEST_PERIOD = 2
_MOST_REPEATS = 8


# Weights in the training loss. An answer is one word in twenty, and nothing can be learnt from a random word
# but how frequent it is: at equal weights its noise hides the answers.
ANSWER_WEIGHT = 5.0
REPEATED_WORD_WEIGHT = 1.0
RANDOM_WORD_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """Words to train on, and what each of them weighs in the loss.

    Attributes:
        words: the tokens.
        weights: for each word `ANSWER_WEIGHT` (indirect objects, capitals), `REPEATED_WORD_WEIGHT`, or
            `RANDOM_WORD_WEIGHT` where the words before do not determine it.
    """

    words: list[str]
    weights: list[float]


def sample_document(rng: random.Random, *, room: int, shares: Mapping[str, float] = TASK_SHARES) -> TrainingText:
    """Draw a training document, without the end-of-text token in front.

    Args:
        rng: source of all choices.
        room: tokens left in the row; repeated sequences choose their period by it.
        shares: how often each task is drawn.
    """
    (task,) = rng.choices(tuple(shares), weights=tuple(shares.values()))
    if task == "repeats" and room >= 2 * _SHORTEST_PERIOD:
        # Log-uniform: short periods, repeated many times, are what induction is learnt from first.
        period = round(math.exp(rng.uniform(math.log(_SHORTEST_PERIOD), math.log(room // 2))))
        words = sample_repeats(rng, period=period, length=min(room, period * rng.randint(2, _MOST_REPEATS)))
        # The word at `period` is the first to come again, which nothing foretells.
        weights = [REPEATED_WORD_WEIGHT if place > period else RANDOM_WORD_WEIGHT for place in range(len(words))]
        return TrainingText(words=words, weights=weights)
    if task == "facts":
        return _write_out([sample_fact(rng) for _ in range(rng.randint(1, 3))])
    return _write_out([sample_indirect_object(rng, templates=TRAINING_TEMPLATES, pairs=TRAINING_PAIRS)])


def _write_out(items: Sequence[PromptItem]) -> TrainingText:
    words: list[str] = []
    weights: list[float] = []
    for item in items:
        prompt = item.prompt.split()
        words.extend([*prompt, item.answer, "."])
        weights.extend([*[RANDOM_WORD_WEIGHT] * len(prompt), ANSWER_WEIGHT, RANDOM_WORD_WEIGHT])
    return TrainingText(words=words, weights=weights)


def sample_row(rng: random.Random, *, length: int, shares: Mapping[str, float] = TASK_SHARES) -> TrainingText:
    """Draw a training row of `length` tokens: documents, each behind an end-of-text token, the last cut."""
    words: list[str] = []
    weights: list[float] = []
    while len(words) < length:
        document = sample_document(rng, room=length - len(words), shares=shares)
        words.extend([END_OF_TEXT, *document.words])
        weights.extend([RANDOM_WORD_WEIGHT, *document.weights])
    return TrainingText(words=words[:length], weights=weights[:length])
