"""Keywords and attributes of TransformerLens, nnsight and transformers, and what says the same here.

An unknown keyword is a `TypeError`, an unknown attribute an `AttributeError`; where another library has it, the text
names what means the same here. There is one table of keywords for all functions, by meaning, and one of attributes for
all modules.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from hooklens.errors import suggest_names

_HERE = "the model runs here and at once"
_READ = "weights are read tensor by tensor in any case"


@dataclass(frozen=True)
class Meaning:
    """Keywords that mean one thing.

    Attributes:
        words: as other libraries have them.
        keywords: ours, of which the first that a function takes is named.
        advice: what to do where a function takes none of them; `{word}` is the word that was given.
    """

    words: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    advice: str = ""


MEANINGS: tuple[Meaning, ...] = (
    # Loading.
    Meaning(("torch_dtype",), ("dtype",), "model.to(dtype) changes a model's dtype"),
    Meaning(("pretrained_model_name_or_path", "model_name", "model_path", "repo_id", "hf_model_name"), ("source",)),
    Meaning(("hf_model", "hf_config"), (), "HookedCausalLM.from_hf(model) takes a model that is in memory"),
    Meaning(("use_auth_token", "hf_token"), ("token",)),
    Meaning(("checkpoint_index", "checkpoint_value", "step"), ("revision",)),
    Meaning(("first_n_layers",), ("layers",)),
    Meaning(("n_devices", "device_mesh"), ("device_map",)),
    Meaning(("device_map", "move_to_device"), ("device",), "model.to(device) moves a model"),
    Meaning(("offload_dir",), ("offload_folder",)),
    Meaning(("main_device",), ("execution_device",)),
    Meaning(("load_in_8bit", "load_in_4bit", "quantization_config"), ("quantize",)),
    Meaning(
        (
            "fold_ln",
            "center_writing_weights",
            "center_unembed",
            "fold_value_biases",
            "refactor_factored_attn_matrices",
        ),
        (),
        "nothing is processed on loading: model.process_weights({word}=...) gives a processed model",
    ),
    Meaning(("trust_remote_code",), (), "leave it out: code that comes with a checkpoint is never run"),
    Meaning(
        ("low_cpu_mem_usage", "offload_state_dict", "use_safetensors", "weights_only"), (), f"leave it out: {_READ}"
    ),
    Meaning(("attn_implementation",), (), "model.set_attention_backend(...) says how attention is computed"),
    Meaning(("default_padding_side",), ("padding_side",), "each call that pads takes padding_side="),
    Meaning(("dispatch", "scan", "validate", "remote", "backend"), (), f"leave it out: {_HERE}"),
    # Calls.
    Meaning(("input_ids", "inputs", "prompt", "prompts", "idx"), ("input", "text", "prefix", "data", "clean")),
    Meaning(
        ("inputs_embeds", "input_embeds"),
        ("start_at_layer",),
        "model(stream, start_at_layer=0) takes what enters the first block",
    ),
    Meaning(
        ("labels",),
        ("return_type",),
        "model(input, return_type='loss') gives the loss of the next tokens",
    ),
    Meaning(("past_key_values", "past_kv", "kv_cache"), ("past_kv_cache",)),
    Meaning(
        ("use_cache",),
        ("use_past_kv_cache", "past_kv_cache"),
        "model.prefill(prefix) gives a cache of keys and values",
    ),
    Meaning(("position_ids",), ("positions",)),
    Meaning(("logits_to_keep", "num_logits_to_keep"), ("logits_at",)),
    Meaning(("output_attentions",), (), "model.run_with_cache(input, names_filter='pattern') gives the patterns"),
    Meaning(("output_hidden_states",), (), "model.run_with_cache(input, names_filter='resid_post') gives the stream"),
    Meaning(("return_dict", "return_dict_in_generate", "output_scores", "output_logits"), ("return_type",)),
    Meaning(("names", "hook_names", "modules"), ("names_filter",)),
    Meaning(("hook", "hooks", "hook_fns"), ("fwd_hooks", "fn")),
    Meaning(("reset_hooks_end", "return_cache_object"), (), "leave it out: the hooks of a call end with it"),
    Meaning(("dir",), ("bwd_hooks",), "model.add_hook(name, fn, dir='bwd') listens to gradients"),
    Meaning(("clear_contexts",), (), "model.reset_hooks(clear_contexts=True) empties what hooks keep"),
    Meaning(("prepend",), ("prepend_bos",), "model.add_hook(name, fn, prepend=True) puts a hook before the others"),
    Meaning(("is_permanent", "level"), (), "model.add_hook(name, fn, is_permanent=True) adds a hook that stays"),
    # Generation.
    Meaning(("max_length", "max_tokens"), ("max_new_tokens",)),
    Meaning(
        ("num_beams", "early_stopping", "length_penalty"),
        (),
        "there is no beam search: generate(input, do_sample=False) takes the likeliest token at every step",
    ),
    Meaning(("stop", "stop_sequences"), ("stop_strings",)),
    Meaning(("num_samples", "n"), ("num_return_sequences",)),
    Meaning(("frequency_penalty",), ("freq_penalty",)),
    Meaning(("pad_token_id",), (), "leave it out: rows are padded and masked as they need it"),
    # Patching.
    Meaning(("clean_cache", "clean_tokens"), ("clean",)),
    Meaning(("corrupted_tokens", "corrupted_cache"), ("corrupted",)),
    Meaning(("patching_metric",), ("metric",)),
    Meaning(("activation_name", "index_axis_names"), ("sites",)),
    # Configs.
    Meaning(("hidden_size", "n_embd", "embed_dim"), ("d_model",)),
    Meaning(("num_hidden_layers", "num_layers", "n_layer"), ("n_layers", "layers")),
    Meaning(("num_attention_heads", "num_heads", "n_head"), ("n_heads",)),
    Meaning(("num_key_value_heads", "n_key_value_heads", "num_kv_heads"), ("n_kv_heads",)),
    Meaning(("head_dim",), ("d_head",)),
    Meaning(("intermediate_size", "n_inner", "ffn_dim"), ("d_mlp",)),
    Meaning(("vocab_size",), ("d_vocab",)),
    Meaning(("max_position_embeddings", "n_positions", "max_seq_len"), ("n_ctx",)),
    Meaning(("hidden_act", "activation_function"), ("act_fn",)),
    Meaning(("eps", "layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", "normalization_type"), ("norm",)),
    Meaning(
        ("positional_embedding_type", "rotary_dim", "rotary_base", "rope_theta", "rope_parameters"), ("positions",)
    ),
    Meaning(("parallel_attn_mlp", "use_parallel_residual"), ("wiring",)),
    Meaning(("window_size", "sliding_window", "use_local_attn"), ("windows",)),
    Meaning(("tie_word_embeddings",), ("tied_unembed",)),
    Meaning(("attention_dir",), ("causal",)),
    Meaning(("initializer_range",), ("init_std",)),
    Meaning(("init_mode",), ("init_scheme",)),
)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model", "transformer", "gpt_neox", "h", "layers", "decoder"), ("blocks",)),
    **dict.fromkeys(("lm_head", "embed_out", "output"), ("unembed",)),
    **dict.fromkeys(("wte", "word_embeddings", "embed_tokens", "embed_in"), ("embed",)),
    "wpe": ("pos_embed",),
    **dict.fromkeys(("ln_f", "final_layer_norm", "final_layernorm"), ("ln_final",)),
    "config": ("cfg",),
    **dict.fromkeys(("self_attn", "self_attention", "attention"), ("attn",)),
    **dict.fromkeys(("ln_1", "input_layernorm"), ("ln1",)),
    **dict.fromkeys(("ln_2", "post_attention_layernorm"), ("ln2",)),
    **dict.fromkeys(("feed_forward", "block_sparse_moe"), ("mlp",)),
    "q_proj": ("W_Q",),
    "k_proj": ("W_K",),
    "v_proj": ("W_V",),
    **dict.fromkeys(("o_proj", "out_proj"), ("W_O",)),
    **dict.fromkeys(("query_key_value", "c_attn", "qkv_proj"), ("W_Q", "W_K", "W_V")),
    **dict.fromkeys(("c_fc", "up_proj", "dense_h_to_4h", "fc_in", "fc1"), ("W_in",)),
    "gate_proj": ("W_gate",),
    **dict.fromkeys(("down_proj", "dense_4h_to_h", "fc_out", "fc2"), ("W_out",)),
    **dict.fromkeys(("trace", "session", "scan"), ("run_with_cache", "run_with_hooks")),
    "get_input_embeddings": ("embed",),
    "get_output_embeddings": ("unembed",),
    "add_perma_hook": ("add_hook",),
}
"""Attributes of other libraries' models and of their parts, and what they are called here.

Where `model.model.layers` or `model.transformer.h` begins, the blocks are what is sought.
"""

_BY_WORD = {word: meaning for meaning in MEANINGS for word in meaning.words}


def explain_keyword(word: str, known: Collection[str]) -> str:
    """What to write for a keyword that a function does not take, as the end of a message; may be empty.

    Args:
        word: the keyword.
        known: those that the function takes.
    """
    meaning = _BY_WORD.get(word)
    if meaning is None:
        return suggest_names(word, known)
    ours = next((name for name in meaning.keywords if name in known), None)
    if ours is not None:
        return f" Here it is {ours}="
    return f" Instead: {meaning.advice.format(word=word)}" if meaning.advice else suggest_names(word, known)


def explain_attribute(word: str, has: Callable[[str], bool]) -> str:
    """What a module has in the place of an attribute of other libraries' models, as the end of a message; may be empty.

    Args:
        word: the attribute that it lacks.
        has: whether the module has one of ours, told without computing it.
    """
    ours = [f".{name}" for name in ATTRIBUTES.get(word, ()) if has(name)]
    return f". Here it is {', '.join(ours)}" if ours else ""
