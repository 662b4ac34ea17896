"""Steps as they are made: streams, streamers, interruption, and a model that is free in between."""

import pytest
import torch

from tests.generation.networks import greedy_loop, pair, reader


def test_streamer_gets_prompts_and_every_step():
    class Collector:
        def __init__(self):
            self.values, self.ended = [], 0

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended += 1

    model, _ = pair()
    collector = Collector()
    tokens = model.generate(torch.tensor([[5, 17]]), streamer=collector, max_new_tokens=4, seed=0, verbose=False)
    assert collector.values[0].tolist() == [[5, 17]]
    assert [int(value) for value in collector.values[1:]] == tokens[0, 2:].tolist()
    assert collector.ended == 1


def test_stream_gives_the_tokens_and_the_text_of_generate():
    model = reader()
    prompts = ["Mary went to the", "Mary"]
    end = None
    whole = model.generate(prompts, seed=5, max_new_tokens=12, return_type="output", verbose=False)
    steps = list(model.generate_stream(prompts, seed=5, max_new_tokens=12, eos_token_id=end))
    assert len(steps) == max(whole.n_new_tokens)
    for row, new in enumerate(whole.new_tokens):
        taken = [step for step in steps if bool(step.is_new[row])]
        assert [int(step.tokens[row]) for step in taken] == new.tolist()
        assert prompts[row] + "".join(step.text[row] for step in steps) == whole.text[row]
        streamed = torch.stack([step.logprobs[row] for step in taken])
        assert torch.equal(streamed, whole.logprobs[row, : len(taken)])
        assert steps[-1].finish_reasons[row] == whole.finish_reasons[row]


def test_model_is_free_between_the_steps_of_a_stream():
    from hooklens import edits

    model, _ = pair()
    ids = torch.tensor([[5, 17, 80]])
    with torch.no_grad():
        plain = model(ids)
    edit = edits.Zero("blocks.0.hook_attn_out")
    stream = model.generate_stream(ids, max_new_tokens=3, do_sample=False, edits=[edit])
    tokens = []
    for step in stream:
        tokens.append(int(step.tokens[0]))
        with torch.no_grad():
            assert torch.equal(model(ids), plain)
    assert tokens == model.generate(ids, max_new_tokens=3, do_sample=False, edits=[edit], verbose=False)[0, 3:].tolist()


def test_interrupting_gives_what_there_is():
    model, _ = pair()

    def interrupt(ids, scores):
        if ids.shape[1] == 5:
            raise KeyboardInterrupt
        return scores

    with pytest.warns(UserWarning, match="interrupted after 3 tokens"):
        out = model.generate(
            torch.tensor([[5, 17]]),
            logits_processor=[interrupt],
            do_sample=False,
            names_filter="resid_post",
            return_type="output",
            verbose=False,
        )
    assert out.interrupted
    assert out.finish_reasons == ["interrupted"]
    assert out.tokens[0].tolist() == greedy_loop(model, [5, 17], 3)
    assert out.logprobs.shape == (1, 3)
    assert out.cache["resid_post", 0].shape == (1, 4, 32)


def test_generation_leaves_no_listener_behind():
    from hooklens import edits

    model, _ = pair()

    def fail(ids, scores):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.generate(
            torch.tensor([[5]]),
            edits=[edits.Zero("hook_embed")],
            names_filter="*",
            logits_processor=[fail],
            verbose=False,
        )
    assert not any(point.listening for point in model.hook_points().values())
