import torch

from hooklens.config import DeclaredWeight
from hooklens.weights.draft import WeightDraft
from hooklens.weights.layout import parse_stored, stored_view

LAYOUTS = {
    "attn.W_Q": ("head d_model d_head", "(head d_head) d_model"),
    "attn.b_Q": ("head d_head", "(head d_head)"),
    "embed.W_E": ("d_vocab d_model", "d_vocab d_model"),
    "unembed.W_U": ("d_model d_vocab", "d_vocab d_model"),
}


def make_draft(state, *, tied=False, **extra):
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()} | extra
    declared = {}
    for name, shape in shapes.items():
        axes, stored = LAYOUTS.get(name, ("d_model", "d_model"))
        declared[name] = DeclaredWeight(
            name=name, axes=tuple(axes.split()), shape=shape, stored=parse_stored(stored), parameter=name
        )
    return WeightDraft(state, declared, dtype=torch.float32, tied=tied)


def test_reads_are_in_working_precision_and_writes_are_rounded_at_the_end():
    state = {"attn.W_Q": torch.randn(2, 3, 4, dtype=torch.bfloat16)}
    draft = make_draft(state)
    draft.write("attn.W_Q", draft.read("attn.W_Q") / 3)
    # 3 * (x / 3) is x again only while nothing is rounded to bfloat16 in between.
    draft.write("attn.W_Q", draft.read("attn.W_Q") * 3)
    finished = draft.finish()["attn.W_Q"]
    assert torch.equal(finished, state["attn.W_Q"])
    assert finished.dtype == torch.bfloat16
    assert stored_view(finished, parse_stored("(head d_head) d_model"), ("head", "d_model", "d_head")).is_contiguous()
    assert finished.stride() == (12, 1, 3)


def test_what_is_not_written_is_the_same_tensor():
    state = {"ln1.w": torch.randn(3, dtype=torch.float16)}
    draft = make_draft(state)
    draft.read("ln1.w")
    assert draft.finish()["ln1.w"] is state["ln1.w"]


def test_a_bias_that_comes_into_being_is_zero():
    draft = make_draft({"attn.W_Q": torch.randn(2, 3, 4, dtype=torch.float16)}, **{"attn.b_Q": (2, 4)})
    assert draft.read("attn.b_Q").dtype == torch.float32
    bias = draft.finish()["attn.b_Q"]
    assert torch.equal(bias, torch.zeros(2, 4, dtype=torch.float16))


def test_a_tied_unembedding_reads_the_embedding():
    embedding = torch.randn(5, 3)
    draft = make_draft({"embed.W_E": embedding}, tied=True, **{"unembed.W_U": (3, 5)})
    assert torch.equal(draft.read("unembed.W_U"), embedding.T)
    assert draft.finish()["unembed.W_U"].untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
