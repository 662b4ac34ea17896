"""What `HookedTransformer` does as 2.x does, row by row of docs/transformer_lens.md."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.compat.transformer_lens import (
    ActivationCache,
    BertNextSentencePrediction,
    HookedEncoder,
    HookedEncoderDecoder,
    HookedTransformer,
    HookedTransformerConfig,
    HookedTransformerKeyValueCache,
)
from hooklens.compat.transformer_lens.hook_points import HookPoint
from tests.compat.transformer_lens.models import BASE, NETWORKS, build, tokens


@functools.cache
def bundled() -> HookedTransformer:
    return HookedTransformer.from_pretrained("bundled:tiny-gpt-neox")


def zero(activation: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(activation)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_hooklens_model(name: str) -> None:
    model = build(name)
    logits = model(tokens())
    assert torch.equal(logits, model.hooked(tokens()))
    assert logits.shape[-1] == model.cfg.d_vocab_out
    if name != "bracket":
        per_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten(), reduction="none")
        torch.testing.assert_close(model(tokens(), "loss"), per_token.mean())
        torch.testing.assert_close(model(tokens(), "loss", True).flatten(), per_token)
        both = model(tokens(), return_type="both")
        assert torch.equal(both.logits, logits)
    assert model(tokens(), return_type=None) is None
    assert torch.equal(model(tokens()[0]), model(tokens()[:1]))


def test_layers_to_start_and_stop_at() -> None:
    model = build()
    stream = model(tokens(), stop_at_layer=1)
    assert torch.equal(model(stream, start_at_layer=1), model(tokens()))
    torch.testing.assert_close(
        model(stream, start_at_layer=1, return_type="loss", tokens=tokens()), model(tokens(), return_type="loss")
    )
    with pytest.raises(AssertionError, match="tokens must be passed"):
        model(stream, start_at_layer=1, return_type="loss")
    with pytest.raises(ValueError, match="return_type is 'logit'"):
        model(tokens(), return_type="logit")


def test_bos_goes_before_every_text() -> None:
    model, text = bundled(), "When Mary and John went"
    bos = model.tokenizer.bos_token_id
    assert model.to_tokens(text)[0, 0] == bos
    assert model.to_tokens(text, False)[0, 0] != bos
    assert torch.equal(model(text), model(model.to_tokens(text)))
    assert torch.equal(model(text, prepend_bos=False), model(model.to_tokens(text, False)))
    assert model.to_str_tokens(text)[1:] == model.to_str_tokens(text, False)
    assert model.get_token_position("Mary", text) == 1 + model.get_token_position("Mary", text, prepend_bos=False)
    try:
        model.cfg.default_prepend_bos = False
        assert model.to_tokens(text)[0, 0] != bos
        assert model.to_tokens(text, True)[0, 0] == bos
    finally:
        model.cfg.default_prepend_bos = True


def test_text_and_tokens() -> None:
    model = bundled()
    ids = model.to_tokens("When Mary went")
    flat = model.to_str_tokens(ids)
    assert flat == model.to_str_tokens(ids[0]) == model.to_str_tokens("When Mary went")
    assert all(isinstance(one, str) for one in flat)
    assert model.to_str_tokens(["When", "When Mary"], False) == [["When"], ["When", "Mary"]]
    assert isinstance(model.to_string(ids[0]), str)
    assert model.to_string(ids) == [model.to_string(ids[0])]
    assert model.to_single_str_token(model.to_single_token("Mary")) == "Mary"
    with pytest.raises(AssertionError, match="not a single token"):
        model.to_single_token("Mary and John")
    with pytest.raises(AssertionError, match="does not occur"):
        model.get_token_position("garden", "When Mary went")
    padded = model.to_tokens(["When", "When Mary went"], padding_side="left")
    assert padded.shape == (2, 4)
    assert padded[0, 1] == model.tokenizer.bos_token_id or padded[0, 2] == model.tokenizer.bos_token_id
    direction = model.tokens_to_residual_directions("Mary")
    assert torch.equal(direction, model.W_U[:, model.to_single_token("Mary")])
    assert model.tokens_to_residual_directions(ids).shape == (*ids.shape, model.cfg.d_model)


def test_left_padding_changes_no_row() -> None:
    """What stands before a text's tokens is masked where texts are padded on the left."""
    model = bundled()
    alone = model("When Mary went")
    padded = model(["When Mary went", "When Mary and John went to the store"], padding_side="left")
    torch.testing.assert_close(padded[:1, -4:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["bundled:tiny-gpt-neox", "bundled:tiny-llama", "bundled:tiny-falcon"])
def test_from_pretrained_processes_weights(prefix: str) -> None:
    """Folded norms and a centred unembedding leave the log-probabilities as they are."""
    plain = HookedTransformer.from_pretrained_no_processing(prefix)
    processed = HookedTransformer.from_pretrained(prefix)
    original = HookedCausalLM.from_pretrained(prefix)
    ids = plain.to_tokens("When Mary and John went to the store")
    torch.testing.assert_close(plain(ids), original(ids))
    expected = original(ids).log_softmax(-1)
    torch.testing.assert_close(processed(ids).log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(processed.W_U.mean(-1), torch.zeros(processed.cfg.d_model), atol=1e-6, rtol=0)
    kind = processed.cfg.normalization_type
    assert (kind, plain.cfg.normalization_type) in {("LNPre", "LN"), ("RMSPre", "RMS")}
    assert not any(name.endswith(("ln1.w", "ln_final.w")) for name in processed.state_dict())
    if kind == "LNPre":
        torch.testing.assert_close(processed.W_O.mean(-1), torch.zeros_like(processed.W_O.mean(-1)), atol=1e-6, rtol=0)


def test_a_transformers_model_stays_as_it_is() -> None:
    hf = HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox").to_hf()
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    model = HookedTransformer.from_pretrained("pythia-70m", hf_model=hf, tokenizer=bundled().tokenizer)
    ids = tokens()
    torch.testing.assert_close(model(ids).log_softmax(-1), hf(ids).logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        model.hooked.embed.W_E.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())


def test_arguments_that_have_no_meaning_are_refused() -> None:
    with pytest.raises(TypeError, match="attn_implementation"):
        HookedTransformer.from_pretrained("bundled:tiny-llama", attn_implementation="eager")
    with pytest.raises(AssertionError, match="Quantization"):
        HookedTransformer.from_pretrained("bundled:tiny-llama", load_in_8bit=True)
    with pytest.raises(ValueError, match="not found"):
        HookedTransformer.from_pretrained("gpt-7-huge")
    with pytest.raises(ValueError, match="from_pretrained"):
        HookedTransformer("gpt2")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
def test_points_that_settings_turn_on(name: str) -> None:
    model = build(name)
    _, cache = model.run_with_cache(tokens())
    assert isinstance(cache, ActivationCache)
    gated = [one for one in model.hook_dict if one not in cache.keys()]  # noqa: SIM118
    for one in gated:
        with pytest.raises(AssertionError, match="is off"):
            model.add_hook(one, zero)
        assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=[(one, zero)]), model(tokens()))
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    if not model.cfg.attn_only:
        model.set_use_hook_mlp_in(True)
    if model.cfg.n_key_value_heads is None:
        model.set_use_attn_in(True)
    _, cache = model.run_with_cache(tokens())
    shown = {one for one in gated if not one.endswith("hook_attn_in") or model.cfg.n_key_value_heads is None}
    assert shown <= set(cache.keys())
    block = cache["blocks.0.hook_attn_out"]
    total = cache["blocks.0.attn.hook_result"].sum(2) + model.b_O[0]
    torch.testing.assert_close(total, block)
    for one in shown:
        assert not torch.equal(model.run_with_hooks(tokens(), fwd_hooks=[(one, zero)]), model(tokens())), one


def test_settings_are_checked() -> None:
    with pytest.raises(AssertionError, match="hook_mlp_in"):
        build("attn_only").set_use_hook_mlp_in(True)
    with pytest.raises(AssertionError, match="attn_in"):
        build("llama").set_use_attn_in(True)


def test_what_a_layer_norm_shows() -> None:
    """Its output, as 2.x has it, and an edit of it is what goes on."""
    model = build()
    _, cache = model.run_with_cache(tokens())
    norm, x = model.blocks[0].ln1, cache["blocks.0.hook_resid_pre"]
    expected = F.layer_norm(x, [model.cfg.d_model], norm.w, norm.b, model.cfg.eps)
    torch.testing.assert_close(cache["blocks.0.ln1.hook_normalized"], expected)
    q = torch.einsum("bpd,hde->bphe", expected * 2, model.W_Q[0]) + model.b_Q[0]
    with model.hooks([("blocks.0.ln1.hook_normalized", lambda x, hook: x * 2)]):
        torch.testing.assert_close(model.run_with_cache(tokens())[1]["q", 0], q)


def test_weights_of_shared_heads_are_repeated() -> None:
    model = build("llama")
    assert model.W_K.shape == (2, 4, 16, 4)
    assert torch.equal(model.W_K[:, 0], model.W_K[:, 1])
    assert model.state_dict()["blocks.0.attn._W_K"].shape == (2, 16, 4)
    assert model.b_K.shape == (2, 4, 4)
    assert model.QK.AB.shape == (2, 4, 16, 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dicts_go_round(name: str) -> None:
    model = build(name)
    state = {one: tensor.clone() for one, tensor in model.state_dict().items()}
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other(tokens()), model(tokens()))
    loaded = other.load_state_dict(state)
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert torch.equal(other(tokens()), model(tokens()))
    assert state["blocks.0.attn.IGNORE"] == -torch.inf
    assert state["blocks.0.attn.mask"].shape == (16, 16)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "attn_only", "solu"])
def test_processing_in_place_changes_no_log_probability(name: str) -> None:
    model = build(name)
    expected = model(tokens()).log_softmax(-1)
    seen: list[Any] = []
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: seen.append(hook.name))
    model.process_weights_()
    torch.testing.assert_close(model(tokens()).log_softmax(-1), expected)
    assert seen == ["blocks.0.hook_resid_post"]
    assert model.cfg.normalization_type in ("LNPre", "RMSPre")
    again = HookedTransformer(copy.deepcopy(model.cfg))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(tokens()).log_softmax(-1), expected)


def test_a_state_dict_is_processed_while_it_is_loaded() -> None:
    source = build()
    target = build(normalization_type="LNPre")
    target.load_and_process_state_dict(source.state_dict())
    torch.testing.assert_close(target(tokens()).log_softmax(-1), source(tokens()).log_softmax(-1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("frozen", [False, True])
def test_key_value_caches(name: str, *, frozen: bool) -> None:
    model = build(name)
    cache = HookedTransformerKeyValueCache.init_cache(model.cfg, model.cfg.device, 2)
    model(tokens()[:, :4], past_kv_cache=cache)
    if frozen:
        cache.freeze()
    torch.testing.assert_close(model(tokens()[:, 4:], past_kv_cache=cache), model(tokens())[:, 4:])
    assert cache[0].past_keys.shape == (2, 4 if frozen else 7, model.cfg.n_key_value_heads or 4, 4)
    assert cache.previous_attention_mask.shape == (2, 4 if frozen else 7)


def test_generation() -> None:
    model = bundled()
    greedy = model.generate("When Mary and John went", 5, do_sample=False, verbose=False)
    assert greedy == model.generate(
        "When Mary and John went", 5, do_sample=False, verbose=False, use_past_kv_cache=False
    )
    assert greedy == model.generate("When Mary and John went", 5, temperature=0.0, verbose=False)
    rows = model.generate(["When Mary and John went", "Then"], 5, do_sample=False, verbose=False)
    assert rows[0] == greedy
    assert rows[1] == model.generate("Then", 5, do_sample=False, verbose=False)
    ids = model.to_tokens("When Mary and John went")
    out = model.generate(ids, 3, do_sample=False, verbose=False, stop_at_eos=False)
    assert out.shape == (1, ids.shape[1] + 3)
    assert torch.equal(out[:, :-3], ids)
    texts = []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(model.generate("When Mary", 8, verbose=False))
    assert texts[0] == texts[1]


def test_the_first_residual_stream() -> None:
    model = build()
    stream, ids, shortformer, mask = model.input_to_embed(tokens())
    assert torch.equal(stream, model(tokens(), stop_at_layer=0))
    assert torch.equal(ids, tokens())
    assert (shortformer, mask) == (None, None)
    assert torch.equal(model(stream, start_at_layer=0), model(tokens()))


def test_devices_and_dtypes_stand_in_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    assert model.to(torch.float32).cfg.dtype is torch.float32
    assert model.hooked.dtype is torch.float32
    assert str(model.cpu().cfg.device) == "cpu"
    assert "dtype" in capsys.readouterr().out


def test_copies_have_their_own_weights_and_hooks() -> None:
    model = build()
    other = copy.deepcopy(model)
    other.add_hook("hook_embed", zero)
    with torch.no_grad():
        other.hooked.embed.W_E.zero_()
    assert model.W_E.any()
    assert not other.W_E.any()
    assert not model.hook_dict["hook_embed"].has_hooks()
    assert other.blocks[0] is other.hooked.blocks[0]


def test_training_mode_reaches_the_network() -> None:
    model = build()
    assert not model.eval().hooked.training
    assert model.train().hooked.training
    assert model.training


def test_a_hook_of_another_shape_is_refused() -> None:
    model = build()
    with pytest.raises(Exception, match="returned shape"):
        model.run_with_hooks(tokens(), fwd_hooks=[("hook_embed", lambda x, hook: x[:1])])


def test_a_new_model_needs_a_vocabulary() -> None:
    with pytest.raises(AssertionError, match="tokenizer"):
        HookedTransformer(HookedTransformerConfig(**{**BASE, "d_vocab": -1}))
    model = HookedTransformer(HookedTransformerConfig(**{**BASE, "d_vocab": -1}), bundled().tokenizer)
    assert model.cfg.d_vocab == len(bundled().tokenizer)


def test_a_soft_cap_is_the_configs_of_now() -> None:
    """circuit-tracer sets it to 0 for a while."""
    model = build("llama", output_logits_soft_cap=2.0)
    capped = model(tokens())
    model.cfg.output_logits_soft_cap = 0.0
    torch.testing.assert_close(2 * torch.tanh(model(tokens()) / 2), capped)
    model.cfg.output_logits_soft_cap = 2.0
    assert torch.equal(model(tokens()), capped)


def test_backward_hooks_act_in_the_graph_they_were_handed_to() -> None:
    """Leaving the block that added them changes nothing there, as PyTorch has it; circuit-tracer relies on it."""
    model, seen = build(), []
    with model.hooks(bwd_hooks=[("hook_embed", lambda gradient, hook: seen.append(hook.name))]):
        loss = model(tokens(), return_type="loss")
    loss.backward()
    model(tokens(), return_type="loss").backward()
    assert seen == ["hook_embed"]


def test_data_points_are_drawn_from_the_data_set() -> None:
    model = build("gpt2")
    model.dataset = [{"text": "a b"}, {"text": "b"}]
    drawn = {model.sample_datapoint() for _ in range(30)}
    assert drawn == {"a b", "b"}
    model.dataset, model.cfg.original_architecture = None, "Nobody"
    with pytest.raises(ValueError, match="Nobody"):
        model.sample_datapoint()


def test_models_that_are_no_decoders_can_be_named_and_not_used() -> None:
    """Code that imported them beside what it used did not run."""
    for kind in (HookedEncoder, HookedEncoderDecoder, BertNextSentencePrediction):
        for use in (kind, kind.from_pretrained):
            with pytest.raises(NotImplementedError, match="decoders only"):
                use("bert-base-cased")


def test_functions_of_hooklens_read_texts_as_the_layer_does() -> None:
    """They left out the BOS that the layer puts first."""
    model = bundled()
    text = "the cat"
    assert torch.equal(model.hooked.to_tokens(text), model.to_tokens(text))
    assert torch.equal(model.hooked(text), model(text))
