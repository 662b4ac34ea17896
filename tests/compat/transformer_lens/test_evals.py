"""2.x's evaluations, against definitions and numbers that TransformerLens 2.18 gives."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooklens.compat.transformer_lens import HookedTransformer, evals


@functools.cache
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained("bundled:tiny-gpt-neox")


def test_numbers_are_those_of_2x() -> None:
    # 1e-3: float32.
    assert evals.sanity_check(model()).item() == pytest.approx(7.990780, abs=1e-3)
    found = evals.ioi_eval(model(), num_samples=6, symmetric=True)
    assert found == pytest.approx({"Logit Difference": 2.962986, "Accuracy": 0.5}, abs=1e-3)


def test_prompts_are_those_of_2x() -> None:
    data = evals.IOIDataset(model().tokenizer, num_samples=2, symmetric=True)
    text = "{} and {} went to the store to buy bread. {} handed the bread to {}"
    assert data.samples == [
        {"text": text.format("Mary", "John", "John", "Mary"), "IO": " Mary", "S": " John"},
        {"text": text.format("John", "Mary", "Mary", "John"), "IO": " John", "S": " Mary"},
    ]
    assert len(evals.IOIDataset(model().tokenizer, num_samples=5)) == 5
    own = evals.IOIDataset(model().tokenizer, ["[A], [B] at [P]"], ["Al", "Bo"], {"P": ["sea"]}, 1, prepend_bos=False)
    assert own.samples[0]["text"] in ("Al, Bo at sea", "Bo, Al at sea")
    assert own[0]["prompt"].tolist() == model().tokenizer.encode(own.samples[0]["text"])


def test_the_difference_is_at_the_first_token_that_differs() -> None:
    """Prompts of other lengths in one batch, and names of several tokens that start alike."""
    rows = [
        {"prompt": torch.tensor([0, 7, 8, 9, 20, 21]), "IO": torch.tensor([20, 21]), "S": torch.tensor([20, 22])},
        {"prompt": torch.tensor([0, 5, 30]), "IO": torch.tensor([30]), "S": torch.tensor([31, 4])},
    ]
    with torch.no_grad():
        first, second = model()(rows[0]["prompt"][None])[0, 4], model()(rows[1]["prompt"][None])[0, 1]
    differences = [float(first[21] - first[22]), float(second[30] - second[31])]
    found = evals.ioi_eval(model(), dataset=rows)
    assert found["Logit Difference"] == pytest.approx(sum(differences) / 2, abs=1e-4)
    assert found["Accuracy"] == sum(one > 0 for one in differences) / 2


@pytest.mark.parametrize("bos", [None, True, False])
def test_induction_loss_is_that_of_the_repetition(bos: bool | None) -> None:
    seen = []

    class Bigrams:
        cfg, tokenizer = model().cfg, model().tokenizer

        def __call__(self, tokens: Tensor, return_type: str) -> Tensor:
            seen.append(tokens)
            return F.one_hot(tokens.roll(-1, 1) % 50, 20000).double()

    torch.manual_seed(0)
    loss = evals.induction_loss(Bigrams(), batch_size=2, subseq_len=6, prepend_bos=bos, device="cpu")
    [tokens] = seen
    assert tokens.shape == (2, 12)
    assert torch.equal(tokens[:, 1:6], tokens[:, 7:])
    assert (tokens[:, 0] == model().tokenizer.bos_token_id).all() == (bos is not False)
    logits = Bigrams()(tokens, "logits")
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, 11)
    # The first repeated token follows nothing that was seen.
    torch.testing.assert_close(loss, each[:, 7:].mean())


def test_the_loss_of_batches() -> None:
    batches: list[dict[str, Any]] = [{"tokens": torch.randint(1, 200, (2, 9))} for _ in range(5)]
    losses = [model()(batch["tokens"], return_type="loss").item() for batch in batches]
    found = evals.evaluate_on_dataset(model(), batches, device="cpu")
    assert found == pytest.approx(sum(losses) / 5, abs=1e-5)
    # As there, one more than asked for.
    assert evals.evaluate_on_dataset(model(), batches, truncate=1, device="cpu") == pytest.approx(
        sum(losses[:2]) / 2, abs=1e-5
    )


QUESTIONS = [
    {
        "question": "Who went to the store?",
        "choices": ["Mary", "John", "a bag", "no"],
        "answer": answer,
        "subject": kind,
    }
    for kind, answer in (("virology", 0), ("virology", 1), ("sociology", 1), ("virology", 0))
]


class Words:
    """Ids of a row of words; a letter with a space before it is one token of its own, but for D."""

    def encode(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        ids = {" A": [11], " B": [12], " C": [13], " D": [3, 14], "D": [14]}.get(text, [1, 2, 3])
        return torch.tensor([ids]) if return_tensors else ids


class Letters:
    """Finds one letter likeliest behind each prompt, in turn."""

    def __init__(self, turns: str) -> None:
        self.tokenizer, self.cfg, self.turns = Words(), model().cfg, iter(turns)

    def __call__(self, tokens: Tensor, return_type: str) -> Tensor:
        assert return_type == "logits"
        assert tokens.tolist() == [[1, 2, 3]]
        # Tokens that are no letters, and other positions, are likelier and do not count.
        logits = torch.full((1, 3, 20), 50.0)
        best = next(self.turns)
        logits[0, -1, 11:15] = torch.tensor([float(letter == best) for letter in "ABCD"])
        return logits


def test_mmlu_counts_the_likeliest_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = evals.mmlu_eval(Letters("ABDA"), mmlu_data=QUESTIONS)
    assert found == {
        "accuracy": 0.75, "num_correct": 3, "num_total": 4, "subject_scores": {"virology": 1.0, "sociology": 0.0},
    }  # fmt: skip
    prompts: list[str] = []
    encode = Words.encode
    monkeypatch.setattr(
        Words, "encode", lambda self, text, **words: prompts.append(text) or encode(self, text, **words)
    )
    evals.mmlu_eval(Letters("A"), mmlu_data=QUESTIONS[:1])
    choices = "A. Mary\nB. John\nC. a bag\nD. no\n"
    assert prompts[-1] == f"Question: Who went to the store?\nChoices:\n{choices}Answer:"
    with pytest.raises(ValueError, match="No MMLU data"):
        evals.mmlu_eval(Letters(""), mmlu_data=[])


def test_mmlu_is_loaded_by_subject(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No data set is downloaded here: what asks for it is looked at."""
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(*where: str, split: str) -> list[dict[str, Any]]:
            asked.append((*where, split))
            return QUESTIONS[:3]

    monkeypatch.setattr(evals, "import_package", lambda name: Datasets)
    rows = evals.make_mmlu_data_loader(["anatomy", "virology"], "dev", 2)
    assert asked == [("cais/mmlu", "anatomy", "dev"), ("cais/mmlu", "virology", "dev")]
    assert [row["subject"] for row in rows] == ["anatomy", "anatomy", "virology", "virology"]
    assert capsys.readouterr().out == "Loaded 4 MMLU examples from 2 subject(s)\n"
    assert len(evals.make_mmlu_data_loader("anatomy")) == 3
    with pytest.raises(ValueError, match="Invalid subject"):
        evals.make_mmlu_data_loader("anatomie")
    assert len(evals.MMLU_SUBJECTS) == len(set(evals.MMLU_SUBJECTS)) == 57
