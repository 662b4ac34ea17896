import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.patching.runs.sites import Place
from hooklens.patching.sweeps.packing import Packing, Segment

LENGTH = 7
WHOLE = Place(None, None, None)


@st.composite
def some_segments(draw):
    segments = []
    for cell in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, LENGTH - 1))
        stop = draw(st.integers(start + 1, LENGTH))
        segments.append(Segment(cell, draw(st.integers(0, 1)), start, stop, draw(st.integers(0, 2)), WHOLE))
    return segments


@settings(max_examples=60)
@given(some_segments())
def test_every_token_has_a_place_of_its_own(segments):
    packing = Packing(segments, device=torch.device("cpu"))
    assert packing.layers == sorted(packing.layers)
    taken = set()
    for segment, row, offset in zip(segments, packing.row, packing.offset, strict=True):
        assert (packing.layers[row], packing.pairs[row]) == (segment.layer, segment.pair)
        for column in range(segment.start, segment.stop):
            place = (row, offset + column - segment.start)
            assert place not in taken
            assert place[1] < packing.width
            taken.add(place)
            assert int(packing.column[place]) == column
    assert packing.n_holes == len(packing.layers) * packing.width - len(taken)


@settings(max_examples=40)
@given(some_segments(), st.sampled_from([None, 1, 3, 50]))
def test_a_token_sees_what_it_would_see_in_its_own_prompt(segments, window):
    """Each token sees every earlier column of its prompt once: in the past, or in its own segment."""
    packing = Packing(segments, device=torch.device("cpu"))
    plan = packing.make_plan()
    mask = plan.visibility(window).sight(plan.keys, torch.float32).mask
    keys = plan.key_positions
    for segment, row, offset in zip(segments, packing.row, packing.offset, strict=True):
        for column in range(segment.start, segment.stop):
            seen = keys[row][mask[row, 0, offset + column - segment.start] == 0].tolist()
            first = 0 if window is None else max(0, column - window + 1)
            assert sorted(seen) == list(range(first, column + 1))
    n_rows = max(1, len(packing.layers) // 2)
    part = plan.first_rows(n_rows)
    seen = part.visibility(window)
    assert torch.equal(seen.sight(part.keys, torch.float32).mask, mask[:n_rows])
    past, new = (seen.sight(keys, torch.float32).mask for keys in (part.past, part.new))
    assert torch.equal(torch.cat([past, new], -1), mask[:n_rows])
    folded = seen.sight(part.past, torch.float32, fold_rows=n_rows).mask
    assert torch.equal(folded, past.flatten(0, 2)[None, None])


def test_segments_of_complementary_length_share_rows():
    segments = [Segment(pos, 0, pos, 16, 0, WHOLE) for pos in range(16)]
    packing = Packing(segments, device=torch.device("cpu"))
    # 16 + 15 + ... + 1 = 136 tokens in nine rows of sixteen.
    assert len(packing.layers) == 9
    assert packing.n_holes == 8
    assert not packing.is_plain
    assert Packing([Segment(0, 0, 2, 5, 1, WHOLE), Segment(1, 1, 2, 5, 0, WHOLE)], device=torch.device("cpu")).is_plain
