"""What sentences say of tables that no small model gives."""

import pandas as pd
import pytest
import torch

from hooklens.analysis.first_report import findings
from hooklens.analysis.first_report.question import Question
from tests.model.networks import make_model, random_tokens


@pytest.fixture
def question():
    model = make_model("rotary")
    logits, cache = model.run_with_cache(random_tokens(1, 4))
    return Question(model=model, cache=cache, logits=logits[0, -1].detach(), answer=3, wrong=5, pos=-1, transport=None)


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        (
            [4, 0, 2, 0],
            "token 3 is the likeliest token only at the end; in 2_pre it is token 12 (0.500), and token 3 has",
        ),
        (
            [4, 2, 0, 0],
            "token 3 is the likeliest token from 2_pre on; in 1_pre it is token 11 (0.500), and token 3 has",
        ),
        ([0, 0, 0, 0], "token 3 is the likeliest token in all streams."),
        ([0, 0, 0, 2], "token 3 is not the likeliest token at the end either (rank 2, 0 is the likeliest)."),
    ],
)
def test_from_which_stream_on_the_answer_leads(question, monkeypatch, ranks, sentence):
    table = pd.DataFrame(
        {
            "stream": ["0_pre", "1_pre", "2_pre", "final_post"],
            "kl": [3.0, 2.5, 0.5, 0.0],
            "target_rank": ranks,
            "target_logprob": [-1.0] * 4,
            "top_tokens": [(10 + place,) for place in range(4)],
            "top_probs": [(0.5,)] * 4,
        }
    )
    monkeypatch.setattr(findings, "logit_lens", lambda *given, **more: table)
    found = findings.find_layers(question, 1)
    assert found.sentences[0].startswith(sentence)
    assert found.sentences[1] == "The largest step towards the end is from 1_pre to 2_pre: KL 2.50 to 0.50 nats."


def test_heads_of_no_known_kind_and_heads_that_add_nothing(question, monkeypatch):
    scores = pd.DataFrame(
        {
            "layer": [0, 0],
            "head": [0, 1],
            "previous_token": [0.2, 0.1],
            "duplicate_token": [0.1, 0.3],
            "induction": [0.0, 0.0],
        },
        index=["L0H0", "L0H1"],
    )
    monkeypatch.setattr(findings, "head_scores", lambda model: scores)
    heads = findings.find_heads(question)
    [sentence] = findings.find_kinds(question, heads).sentences
    assert sentence == "On repeated random tokens no head scores 0.5 for a known kind; the highest is L0H1 with 0.30."
    values = pd.DataFrame({"component": ["L0H0", "L0H1", "remainder"], "row": 0, "value": [0.01, 2.0, 9.0]})
    monkeypatch.setattr(findings, "attribute_to_heads", lambda *given, **more: values)
    heads = findings.find_heads(question)
    scores.loc["L0H0", "previous_token"] = 0.9
    assert findings.find_kinds(question, heads).sentences[1] == "None of them adds much to the difference directly."
    scores.loc["L0H1", "induction"] = 0.8
    assert findings.find_kinds(question, heads).sentences == (
        "On repeated random tokens: previous-token L0H0 (0.90); induction L0H1 (0.80).",
        "Of these count here, directly: L0H1 (induction, +2.00).",
    )
    assert findings.find_kinds(question, None).sentences == (
        "On repeated random tokens: previous-token L0H0 (0.90); induction L0H1 (0.80).",
    )


def test_an_unlikely_answer_of_ones_own(question):
    """The difference is that of the logits, also where the other token is likelier."""
    assert question.difference == pytest.approx(float(question.logits[3] - question.logits[5]))
    assert question.name(3) == "token 3"
    assert torch.equal(question.logits, question.model(question.cache.tokens)[0, -1])
