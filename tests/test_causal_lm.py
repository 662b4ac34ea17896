"""Tests of hooklens.causal_lm: the façade, on small random networks."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hooklens import HookedCausalLM, HookedKeyValueCache
from hooklens.axes import find_site
from hooklens.errors import HookLensError, HookNameError, HookOutputError, InputError
from tests.annotations import unchecked
from tests.checkpoints import build_variant, save_variant
from tests.model.networks import ALL_CONFIGS, activations_of, make_model, pad_rows, random_tokens
from tests.tokens.tokenizers import ALL_SPECIAL, word_tokenizer


def with_tokenizer(network="rotary") -> HookedCausalLM:
    model = make_model(network)
    tokenizer: PreTrainedTokenizerFast = word_tokenizer(template="<s> $A", **ALL_SPECIAL)
    model.tokenizer = tokenizer
    return model


class TestInput:
    def test_text_and_ids_are_the_same(self):
        model = with_tokenizer()
        ids = model.to_tokens("the cat sat")
        assert torch.equal(model("the cat sat"), model(ids))
        assert torch.equal(model(ids[0]), model(ids))
        assert model.to_string(ids[0, 1:]) == "the cat sat"

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_texts_of_different_length(self, side):
        model, texts = with_tokenizer(), ["the cat sat on", "mat"]
        batched = model(texts, padding_side=side, logits_at=-1)
        for row, text in enumerate(texts):
            torch.testing.assert_close(batched[row], model(text)[0, -1:], rtol=1e-10, atol=1e-10)
        ids = model.to_tokens(texts, padding_side=side)
        assert torch.equal(model(ids, padding_side=side, logits_at=-1), batched)

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            (
                torch.tensor([[1, 23, -2]]),
                r"outside the vocabulary: 23 \(row 0, position 1\), -2 .*d_vocab=23, ids 0 to",
            ),
            (torch.zeros(1, 0).long(), r"token ids are empty .* give at least one token"),
            (torch.zeros(1, 2, 3).long(), r"token ids have shape \[1, 2, 3\]; expected \[pos\] or \[batch pos\]"),
            (torch.zeros(1, 3, 12), r"dtype torch.float32; expected an integer dtype .*start_at_layer="),
            ("the cat", r"text was given, but the model has no tokenizer; pass token ids, or load with tokenizer="),
        ],
    )
    def test_refusals(self, given, text):
        with unchecked(), pytest.raises(InputError, match=text):
            make_model("bare")(given)

    def test_an_empty_prompt(self):
        model = make_model("bare")
        model.tokenizer = word_tokenizer(eos_token="</s>")
        with pytest.raises(InputError, match="empty"):
            model("")

    @pytest.mark.parametrize("call", ["forward", "run_with_hooks", "run_with_cache", "prefill"])
    def test_an_unknown_keyword_is_a_type_error(self, call):
        model = make_model("bare")
        with pytest.raises(TypeError, match=r"retrun_type|return_typ"):
            getattr(model, call)(random_tokens(1, 3), retrun_type="loss")
        if call in ("run_with_hooks", "run_with_cache"):
            with pytest.raises(TypeError, match=r"Did you mean 'return_type'.*A call takes attention_mask"):
                getattr(model, call)(random_tokens(1, 3), retrun_type="loss")

    def test_a_residual_stream_must_fit(self):
        model = make_model("bare")
        for stream, text in (
            (torch.zeros(1, 3, 11, dtype=torch.float64), r"the residual stream \[batch, pos, 12\]; got \[1, 3, 11\]"),
            (torch.zeros(1, 3, 12), r"the residual stream is torch.float32 on cpu, the model torch.float64 on cpu"),
            ("the", r"got str"),
        ):
            with unchecked(), pytest.raises(InputError, match=text):
                model(stream, start_at_layer=1)


class TestReturnTypes:
    def test_the_four(self):
        model, tokens = make_model("rotary"), random_tokens(2, 5)
        logits = model(tokens)
        both = model(tokens, return_type="both")
        assert torch.equal(both.logits, logits)
        assert torch.equal(both.loss, model(tokens, return_type="loss"))
        assert model(tokens, return_type=None) is None
        assert model(tokens, return_type="loss", loss_per_token=True).shape == (2, 4)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_the_loss_of_a_padded_batch_is_that_of_its_rows(self, side):
        model = make_model("rotary")
        rows = [random_tokens(1, n, seed=n)[0] for n in (6, 3)]
        ids, mask = pad_rows(rows, side)
        per_token = [model(row, return_type="loss", loss_per_token=True)[0] for row in rows]
        loss = model(ids, attention_mask=mask, return_type="loss")
        torch.testing.assert_close(loss, torch.cat(per_token).mean(), rtol=1e-10, atol=1e-10)
        by_token = model(ids, attention_mask=mask, return_type="loss", loss_per_token=True)
        torch.testing.assert_close(by_token.sum(1), torch.stack([t.sum() for t in per_token]))

    @pytest.mark.parametrize(
        ("keywords", "text"),
        [
            ({"return_type": "logit"}, r"return_type is 'logit', expected 'logits', 'loss', 'both' or None"),
            (
                {"return_type": "loss", "logits_at": -1},
                r"'loss' needs token ids and logits .* leave out \['logits_at'\]",
            ),
            ({"return_type": "both", "stop_at_layer": 1}, r"leave out \['stop_at_layer'\]"),
            ({"loss_per_token": True}, r"loss_per_token needs return_type 'loss' or 'both', got 'logits'"),
            ({"stop_at_layer": 1, "logits_at": 0}, r"stop_at_layer returns the residual stream: logits_at has nothing"),
        ],
    )
    def test_combinations_that_do_not_fit(self, keywords, text):
        with unchecked(), pytest.raises(InputError, match=text):
            make_model("bare")(random_tokens(1, 3), **keywords)

    @pytest.mark.parametrize("logits_at", [-1, 0, [2, 0], slice(1, 3), slice(None)])
    @pytest.mark.parametrize("network", ["rotary", "capped"])
    def test_logits_at(self, network, logits_at):
        model, tokens = make_model(network), random_tokens(2, 4)
        index = [logits_at] if isinstance(logits_at, int) else logits_at
        found = model(tokens, logits_at=logits_at)
        torch.testing.assert_close(found, model(tokens)[:, index], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_logits_at_counts_over_real_tokens(self, side):
        model = make_model("rotary")
        rows = [random_tokens(1, n, seed=n)[0] for n in (6, 3)]
        ids, mask = pad_rows(rows, side)
        found = model(ids, attention_mask=mask, logits_at=[0, -1])
        for row, tokens in enumerate(rows):
            torch.testing.assert_close(found[row], model(tokens)[0, [0, -1]], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_layers_compose_bit_for_bit(network):
    """`start_at_layer` ran all blocks, and `stop_at_layer=n_layers` gave logits in place of the last stream."""
    model, tokens = make_model(network), random_tokens(2, 5)
    logits, cache = model.run_with_cache(tokens)
    streams = [*cache.stack_activation("resid_pre"), cache["resid_post", -1]]
    for stop, stream in enumerate(streams):
        assert torch.equal(model(tokens, stop_at_layer=stop), stream)
        assert torch.equal(model(stream, start_at_layer=stop), logits)
        for start in range(stop + 1):
            assert torch.equal(model(streams[start], start_at_layer=start, stop_at_layer=stop), stream)
    assert torch.equal(model(tokens, stop_at_layer=-1), streams[-2])
    fired = []
    hooks = [("*", lambda t, hook: fired.append(hook.name))]
    model.run_with_hooks(streams[1], start_at_layer=1, stop_at_layer=2, fwd_hooks=hooks)
    assert all(name.startswith("blocks.1.") for name in fired)
    assert len(fired) == len(set(fired)) == sum(name.startswith("blocks.1.") for name in model.hook_points())


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_gradients_are_autograds(network):
    model, tokens = make_model(network), random_tokens(2, 5)
    leaves = {}

    def make_leaf(tensor, hook):
        leaves[hook.name] = tensor.clone().requires_grad_() if not tensor.requires_grad else tensor.clone()
        leaves[hook.name].retain_grad()
        return leaves[hook.name]

    loss, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss", names_filter="*")
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.run_with_hooks(tokens, fwd_hooks=[("*", make_leaf)], return_type="loss").backward()
    for name in activations_of(model):
        # 1e-9: the graph goes through other side tensors, with other roundings in float64.
        torch.testing.assert_close(cache[name + "_grad"], leaves[name].grad, rtol=1e-9, atol=1e-11)
        assert cache[name + "_grad"].shape == cache[name].shape
    model.zero_grad()
    plain = model(tokens, return_type="loss")
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-11)


def test_incl_bwd_needs_a_scalar():
    model = make_model("bare")
    for keywords in ({}, {"return_type": "both"}, {"return_type": "loss", "loss_per_token": True}):
        with pytest.raises(InputError, match=r"incl_bwd needs a scalar .* return_type='loss'"):
            model.run_with_cache(random_tokens(1, 3), incl_bwd=True, **keywords)


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (
            lambda t, hook: t[:1],
            r"hook at 'blocks.0.hook_resid_pre' \[batch=2, pos=3, d_model=12\] returned shape \[1, 3, 12",
        ),
        (
            lambda t, hook: t.float(),
            r"returned shape \[2, 3, 12\], torch.float32 on cpu; expected .*torch.float64 on cpu",
        ),
        (lambda t, hook: t.to("meta"), r"torch.float64 on meta"),
        (lambda t, hook: 0.0, r"returned a float; expected None \(keep\) or a tensor"),
    ],
)
def test_what_a_hook_may_not_return(hook, text):
    with unchecked(), pytest.raises(HookOutputError, match=text):
        make_model("rotary").run_with_hooks(random_tokens(2, 3), fwd_hooks=[("resid_pre0", hook)])


def test_names_that_select_nothing_are_found_before_the_forward():
    model, ran = make_model("rotary"), []
    model.add_hook("hook_embed", lambda t, hook: ran.append(1))
    for names in ("resid_mid", ["resid_pre", "patern"], "blocks.*.nope", lambda name: False, ("pattern", 9)):
        with pytest.raises(HookNameError):
            model.run_with_cache(random_tokens(1, 3), names_filter=names)
    assert ran == []


def test_training_mode_changes_nothing():
    model, tokens = make_model("grouped"), random_tokens(2, 5)
    assert not model.training
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_hook_table_tells_what_really_passes():
    model = make_model("grouped")
    table = model.hook_table()
    assert list(table.columns) == ["name", "axes", "shape", "on_request", "description"]
    _, cache = model.run_with_cache(random_tokens(2, 5), names_filter=["*", "hook_tokens"])
    assert list(table["name"]) == list(model.hook_points())
    by_input = {"batch": 2, "pos": 5, "query": 5, "key": 5}
    for row in table.itertuples():
        assert tuple(by_input.get(size, size) for size in row.shape) == tuple(cache[row.name].shape)
        assert row.axes == find_site(row.name).axes
    assert set(table["name"][~table["on_request"]]) == set(model.run_with_cache(random_tokens(1, 2))[1])


def test_remove_batch_dim():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4), remove_batch_dim=True)
    assert cache["resid_pre", 0].shape == (4, 12)
    with pytest.raises(HookLensError):
        model.run_with_cache(random_tokens(2, 4), remove_batch_dim=True)


def test_prefill():
    model, tokens = make_model("grouped"), random_tokens(1, 6)
    cache = model.prefill(tokens[:, :4])
    assert isinstance(cache, HookedKeyValueCache)
    assert cache.frozen
    torch.testing.assert_close(cache.last_logits, model(tokens)[:, 3], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(tokens[:, 4:], past_kv_cache=cache), model(tokens)[:, 4:], rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match=r"prefill sets \['logits_at', 'past_kv_cache'\] itself: leave them out"):
        model.prefill(tokens, logits_at=0, past_kv_cache=cache)


def test_from_hf_shares_memory():
    hf = build_variant("llama-gqa")
    model = HookedCausalLM.from_hf(hf)
    theirs = {parameter.data_ptr() for parameter in hf.parameters()}
    assert all(parameter.data_ptr() in theirs for parameter in model.parameters())


def test_from_pretrained_keeps_some_layers(tmp_path):
    folder = save_variant("llama-gqa", tmp_path)
    full, part = HookedCausalLM.from_pretrained(folder), HookedCausalLM.from_pretrained(folder, layers=[0, 2])
    assert part.cfg.n_layers == 2
    stream = full(random_tokens(1, 4), stop_at_layer=1)
    assert torch.equal(part(random_tokens(1, 4), stop_at_layer=1), stream)
    assert torch.equal(part(stream, start_at_layer=1), full(stream, start_at_layer=2))
    assert part.tokenizer is None
    assert HookedCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_tokens_to_residual_directions():
    model = with_tokenizer("learned, tied")
    ids = torch.tensor([[4, 5], [6, 7]])
    directions = model.tokens_to_residual_directions(ids)
    assert directions.shape == (2, 2, 12)
    assert torch.equal(directions[1, 0], model.W_U[:, 6])
    assert torch.equal(model.tokens_to_residual_directions(5), model.W_U[:, 5])
    assert torch.equal(model.tokens_to_residual_directions("cat"), model.W_U[:, model.to_single_token("cat")])


def test_process_weights_leaves_the_model_as_it_is():
    model, tokens = make_model("alibi"), random_tokens(2, 5)
    before, logits = {name: p.clone() for name, p in model.named_parameters()}, model(tokens)
    processed = model.process_weights(fold_ln=True, center_writing_weights=True, center_unembed=True)
    torch.testing.assert_close(processed(tokens).log_softmax(-1), logits.log_softmax(-1), rtol=1e-9, atol=1e-9)
    assert processed.transforms
    assert model.transforms == ()
    with torch.no_grad():
        for parameter in processed.parameters():
            parameter.zero_()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(tokens), logits)
