"""Keywords of TransformerLens, nnsight and transformers, and what says the same here.

An unknown keyword is a `TypeError`; where another library has it, the text names the keyword of the called function
that means the same, or what else does it. There is one table for all functions, by meaning.
"""

from collections.abc import Collection
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
    Meaning(("first_n_layers", "num_hidden_layers"), ("layers",)),
    Meaning(("n_devices", "device_mesh"), ("device_map",)),
    Meaning(("device_map", "move_to_device"), ("device",), "model.to(device) moves a model"),
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
)

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
