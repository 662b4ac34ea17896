"""`transformer_lens.evals` of 2.x. `hooklens.evaluation` is more than this."""

import random
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hooklens.compat.transformer_lens import utils
from hooklens.optional import import_package
from hooklens.progress import progress_bar

_TEXT = (
    "Many important transition points in the history of science have been moments when science 'zoomed in.' At these "
    "points, we develop a visualization or tool that allows us to see the world in a new level of detail, and a new "
    "field of science develops to study the world through this lens."
)
_CORPORA = {
    "wiki": (("wikitext", "wikitext-2-v1"), "text"), "owt": (("stas/openwebtext-10k",), "text"),
    "pile": (("NeelNanda/pile-10k",), "text"), "code": (("codeparrot/codeparrot-valid-v2-near-dedup",), "content"),
}  # fmt: skip
DATASET_NAMES = list(_CORPORA)
_TEMPLATES = [
    "[A] and [B] went to the [LOCATION] to buy [OBJECT]. [B] handed the [OBJECT] to [A]",
    "Then, [B] and [A] went to the [LOCATION]. [B] gave the [OBJECT] to [A]",
]
_NOUNS = {"LOCATION": ["store", "market"], "OBJECT": ["milk", "eggs", "bread"]}

# The subjects of Hendrycks et al. 2020.
MMLU_SUBJECTS = [
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
]  # fmt: skip
MMLU_ANSWER_LETTERS = list("ABCD")


def sanity_check(model: Any) -> Tensor:
    """The loss on a paragraph of Olah et al. 2020: below 5 for a sound model, above 7 for a broken one."""
    loss: Tensor = model(_TEXT, return_type="loss")
    return loss


@runtime_checkable
class _MakesLoader(Protocol):
    def __call__(self, tokenizer: Any, batch_size: int = 8) -> DataLoader[Any]: ...


def _loader_of(name: str, title: str) -> _MakesLoader:
    where, column = _CORPORA[name]

    def make(tokenizer: Any, batch_size: int = 8) -> DataLoader[Any]:
        texts = import_package("datasets").load_dataset(*where, split="train")
        print(len(texts))
        rows = utils.tokenize_and_concatenate(texts, tokenizer, column_name=column)
        return DataLoader(rows, batch_size=batch_size, shuffle=True, drop_last=True)

    make.__doc__ = f"Batches of {title}."
    return make


make_wiki_data_loader, make_owt_data_loader = _loader_of("wiki", "Wikitext 2"), _loader_of("owt", "OpenWebText")
make_pile_data_loader, make_code_data_loader = _loader_of("pile", "the Pile"), _loader_of("code", "CodeParrot")
DATASET_LOADERS = [make_wiki_data_loader, make_owt_data_loader, make_pile_data_loader, make_code_data_loader]


@torch.inference_mode()
def evaluate_on_dataset(model: Any, data_loader: Any, truncate: int = 100, device: Any = "cuda") -> float:
    """The mean loss of batches."""
    losses: list[float] = []
    with progress_bar("evaluating", data_loader, unit="batch", progress=True) as bar:
        for batch in bar:
            losses.append(model(batch["tokens"].to(device), return_type="loss").mean().item())
            if len(losses) > truncate:
                break
    return float(sum(losses) / len(losses))


@torch.inference_mode()
def induction_loss(
    model: Any, tokenizer: Any = None, batch_size: int = 4, subseq_len: int = 384, prepend_bos: bool | None = None,
    device: Any = "cuda",
) -> Tensor:  # fmt: skip
    """The loss on the second half of random tokens that are repeated, which induction heads make small."""
    tokens = torch.randint(100, 20000, (batch_size, subseq_len)).to(device).repeat(1, 2)
    if utils.override_or_use_default_value(model.cfg.default_prepend_bos, override=prepend_bos):
        tokens[:, 0] = (model.tokenizer if tokenizer is None else tokenizer).bos_token_id
    losses = utils.lm_cross_entropy_loss(model(tokens, return_type="logits"), tokens, per_token=True)
    return losses[:, subseq_len + 1 :].mean()


@torch.inference_mode()
def evaluate(model: Any, truncate: int = 100, batch_size: int = 8, tokenizer: Any = None) -> dict[str, float]:
    """The mean loss on each of four corpora."""
    losses = {}
    for name, make in zip(DATASET_NAMES, DATASET_LOADERS, strict=True):
        loader = make(model.tokenizer if tokenizer is None else tokenizer, batch_size)
        losses[f"{name}_loss"] = evaluate_on_dataset(model, loader, truncate=truncate, device=model.cfg.device)
        print(f"{name}: {losses[f'{name}_loss']}")
    return losses


class IOIDataset(Dataset[dict[str, Tensor]]):
    """Prompts of indirect object identification (Wang et al. 2022)."""

    def __init__(
        self, tokenizer: Any, templates: list[str] | None = None, names: list[str] | None = None,
        nouns: dict[str, list[str]] | None = None, num_samples: int = 1000, symmetric: bool = False,
        prepend_bos: bool = True,
    ) -> None:  # fmt: skip
        self.tokenizer, self.prepend_bos = tokenizer, prepend_bos
        self.templates = self.get_default_templates() if templates is None else templates
        self.names = self.get_default_names() if names is None else names
        self.nouns = self.get_default_nouns() if nouns is None else nouns
        rounds = num_samples // 2 if symmetric else num_samples
        self.samples = [sample for _ in range(rounds) for sample in self.get_sample(symmetric=symmetric)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        sample = self.samples[idx]
        first = [self.tokenizer.bos_token_id] if self.prepend_bos else []
        ids = {"prompt": first + self.tokenizer.encode(sample["text"])}
        ids |= {who: self.tokenizer.encode(sample[who]) for who in ("IO", "S")}
        return {name: torch.tensor(value) for name, value in ids.items()}

    def get_sample(self, symmetric: bool = False) -> list[dict[str, str]]:
        """One prompt, or two with the names exchanged; always the same, as in 2.x, which seeds before each."""
        draw = random.Random(42)
        template = draw.choice(self.templates)
        for noun, several in self.nouns.items():
            template = template.replace(f"[{noun}]", draw.choice(several))
        first, second = draw.sample(self.names, 2)
        pairs = [(first, second), (second, first)][: 2 if symmetric else 1]
        return [
            {"text": template.replace("[A]", one).replace("[B]", other), "IO": f" {one}", "S": f" {other}"}
            for one, other in pairs
        ]

    @staticmethod
    def get_default_names() -> list[str]:
        """Names of persons."""
        return ["John", "Mary"]

    @staticmethod
    def get_default_templates() -> list[str]:
        """Templates of prompts."""
        return list(_TEMPLATES)

    @staticmethod
    def get_default_nouns() -> dict[str, list[str]]:
        """What stands in the templates."""
        return {name: list(several) for name, several in _NOUNS.items()}


@torch.inference_mode()
def ioi_eval(
    model: Any, dataset: Any = None, batch_size: int = 8, num_samples: int = 1000, tokenizer: Any = None,
    symmetric: bool = False,
) -> dict[str, float]:  # fmt: skip
    """How often, and by how much, the indirect object is likelier than the subject."""
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if dataset is None:
        dataset = IOIDataset(tokenizer, num_samples=num_samples, symmetric=symmetric)
    differences = []
    with progress_bar("evaluating IOI", range(0, len(dataset), batch_size), unit="batch", progress=True) as bar:
        for start in bar:
            rows = [dataset[place] for place in range(start, min(start + batch_size, len(dataset)))]
            prompts = torch.nn.utils.rnn.pad_sequence([row["prompt"] for row in rows], batch_first=True)
            for row, logits in zip(rows, model(prompts, return_type="logits"), strict=True):
                # The names end the prompt; what counts is the first token in which they differ.
                pairs = zip(row["IO"].tolist(), row["S"].tolist(), strict=False)
                place, (io, s) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
                scores = logits[len(row["prompt"]) - len(row["IO"]) + place - 1]
                differences.append(float(scores[io] - scores[s]))
    hits = sum(difference > 0 for difference in differences)
    return {"Logit Difference": sum(differences) / len(differences), "Accuracy": hits / len(differences)}


def make_mmlu_data_loader(
    subjects: str | list[str] | None = None, split: str = "test", num_samples: int | None = None
) -> list[dict[str, Any]]:
    """Questions of MMLU with their choices, the number of the right one, and their subject; of each so many."""
    chosen = MMLU_SUBJECTS if subjects is None else [subjects] if isinstance(subjects, str) else list(subjects)
    if unknown := sorted(set(chosen) - set(MMLU_SUBJECTS)):
        raise ValueError(f"Invalid subject(s): {unknown}. Valid subjects: {', '.join(MMLU_SUBJECTS)}")
    load, found = import_package("datasets").load_dataset, []
    for subject in chosen:
        rows = load("cais/mmlu", subject, split=split)
        for place in range(len(rows) if num_samples is None else min(num_samples, len(rows))):
            found.append({name: rows[place][name] for name in ("question", "choices", "answer")} | {"subject": subject})
    print(f"Loaded {len(found)} MMLU examples from {len(chosen)} subject(s)")
    return found


@torch.inference_mode()
def mmlu_eval(
    model: Any, tokenizer: Any = None, subjects: str | list[str] | None = None, split: str = "test",
    num_samples: int | None = None, *, mmlu_data: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How often the letter of the right answer is the likeliest; of `mmlu_data` where it is given, else downloaded."""
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    data = make_mmlu_data_loader(subjects, split, num_samples) if mmlu_data is None else mmlu_data
    if not data:
        raise ValueError("No MMLU data loaded. Check your subjects parameter.")
    encode = partial(tokenizer.encode, add_special_tokens=False)
    # With a space before it, as it comes behind "Answer:", where this is one token.
    spelt = [(encode(f" {letter}"), encode(letter)) for letter in MMLU_ANSWER_LETTERS]
    letters = [(behind if len(behind) == 1 else alone)[0] for behind, alone in spelt]
    hits: dict[str, list[bool]] = {}
    with progress_bar("evaluating MMLU", data, unit="question", progress=True) as bar:
        for row in bar:
            choices = "".join(f"{chr(65 + place)}. {text}\n" for place, text in enumerate(row["choices"]))
            prompt = f"Question: {row['question']}\nChoices:\n{choices}Answer:"
            tokens = tokenizer.encode(prompt, return_tensors="pt").to(model.cfg.device)
            logits = model(tokens, return_type="logits")[0, -1]
            best = int(logits[letters[: len(row["choices"])]].argmax())
            hits.setdefault(row["subject"], []).append(best == row["answer"])
    n_correct, n_total = sum(map(sum, hits.values())), len(data)
    scores = {subject: sum(one) / len(one) for subject, one in hits.items()}
    return {"accuracy": n_correct / n_total, "num_correct": n_correct, "num_total": n_total, "subject_scores": scores}
