"""The forms of batches, and the loss on labels against plain torch."""

from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.documents import pack
from hooklens.errors import InputError
from hooklens.training.batches import (
    NextTokenObjective,
    TokenBatch,
    count_predicted,
    label_loss,
    move,
    read_token_batch,
)
from tests.training.networks import D_VOCAB, make_rotary_model, make_rows


def test_all_forms_say_the_same() -> None:
    ids = make_rows(2)
    for batch in (ids, [ids], (ids,), {"input_ids": ids}, {"input_ids": ids, "labels": None}):
        read = read_token_batch(batch)
        assert read.input_ids is ids
        assert read[1:] == (None, None, None)
    packed = pack([[1, 2], [3]], 4)
    assert read_token_batch(packed) == TokenBatch(packed.ids, document_ids=packed.document_ids)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((make_rows(2), make_rows(2)), "a batch is tuple of 2; expected token ids"),
        ("text", "a batch is str; expected token ids"),
        ({"input_id": make_rows(2)}, "unknown key 'input_id'. Did you mean 'input_ids'\\?; no 'input_ids'"),
        ({"input_ids": make_rows(2), "token_type_ids": make_rows(2)}, "unknown key 'token_type_ids'"),
        (make_rows(2)[0], r"'input_ids' is a tensor \[8\] of torch.int64, expected whole numbers \[batch, pos\]"),
        (torch.zeros(2, 3), "'input_ids' is a tensor"),
        ({"input_ids": make_rows(2), "labels": make_rows(3), "attention_mask": [1]},
         r"'attention_mask' is \[1\], expected a tensor \[batch, pos\]; 'labels' is \[3, 8\], 'input_ids' \[2, 8\]"),
    ],
)  # fmt: skip
def test_other_forms_are_refused(batch, words) -> None:
    with pytest.raises(InputError, match=words):
        read_token_batch(batch)


def test_moving_keeps_the_form() -> None:
    kind = namedtuple("kind", ["a", "b"])
    batch = kind([torch.ones(1), "text"], {"x": (torch.zeros(1), 3)})
    moved = move(batch, torch.device("cpu"))
    assert type(moved) is kind
    assert moved == batch
    with torch.inference_mode():
        made = torch.ones(1)
    assert not move(made, torch.device("cpu")).is_inference()


@settings(max_examples=25)
@given(st.data())
def test_labels_count_as_a_loop_over_tokens_counts_them(data) -> None:
    """Padding on either side, gaps in the labels, documents: every predicted token by itself, in float64."""
    model = make_rotary_model().double()
    n, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 8))
    ids = make_rows(n, length, seed=data.draw(st.integers(0, 99)))
    flags = st.lists(st.booleans(), min_size=n * length, max_size=n * length)
    labels = ids.masked_fill(torch.tensor(data.draw(flags)).view(n, length), -100) if data.draw(st.booleans()) else ids
    mask = documents = None
    kind = data.draw(st.sampled_from(["plain", "left", "right", "documents"]))
    column = torch.arange(length)[None]
    if kind in ("left", "right"):
        sizes = torch.tensor(data.draw(st.lists(st.integers(1, length), min_size=n, max_size=n)))[:, None]
        mask = (column < sizes).long() if kind == "right" else (column >= length - sizes).long()
    if kind == "documents":
        borders = torch.tensor(data.draw(flags)).view(n, length)
        documents = borders.long().cumsum(1)
        if length > 2 and data.draw(st.booleans()):
            documents[:, -1] = -1
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for row in range(n):
        keep = torch.ones(length, dtype=torch.bool) if mask is None else mask[row].bool()
        of = torch.zeros(length, dtype=torch.long) if documents is None else documents[row]
        for number in sorted({int(one) for one in of[keep] if one >= 0}):
            where = (keep & (of == number)).nonzero().flatten()
            logits = model(ids[row, where][None])[0]
            for place in range(1, len(where)):
                label = int(labels[row, where[place]])
                if label != -100:
                    total = total - logits[place - 1].log_softmax(-1)[label]
                    counted += 1
    batch = TokenBatch(ids, mask, labels, documents)
    assert count_predicted(model, batch) == counted
    if not counted:
        with pytest.raises(InputError, match="labels: none counts"):
            label_loss(model, batch)
        return
    found = label_loss(model, batch)
    assert int(found.n_counted) == counted
    torch.testing.assert_close(found.total, total, rtol=1e-9, atol=1e-10)
    if (labels == ids).all():
        own = NextTokenObjective().measure(model, batch._replace(labels=None))
        torch.testing.assert_close(own, total / counted, rtol=1e-9, atol=1e-10)


def test_labels_that_are_no_tokens_are_refused() -> None:
    ids = make_rows(2)
    for wrong in (-1, D_VOCAB):
        labels = ids.clone()
        labels[1, 2] = wrong
        with pytest.raises(
            InputError, match=f"labels: \\[{wrong}\\] are no tokens; expected 0 to {D_VOCAB - 1}, or -100"
        ):
            label_loss(make_rotary_model(), TokenBatch(ids, labels=labels))
