"""Config maps: `config.json` keys and `HookedConfig` fields, read in both directions.

Every key is accounted for. A *part* reads some keys into fields and writes them back; a *pinned* key may
only hold the value that HookLens implements; an *inert* key carries no architecture. Any other key is
reported in one warning. All that is wrong with a config is collected and raised once.
"""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from hooklens.adapters.keys.parts import ConfigPart
from hooklens.adapters.keys.reader import ConfigReader
from hooklens.errors import ConfigError, UnsupportedModelError, join_names

# Keys that any config may have and that change nothing in the network: bookkeeping, dropout (which is said where a
# model is trained), tokens, training, and settings of other heads.
INERT_KEYS = frozenset(
    {
        "architectures", "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "auto_map",
        "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
        "cross_attention_hidden_size", "custom_pipeline", "custom_pipelines", "decoder_start_token_id", "dtype",
        "embd_pdrop", "embedding_dropout", "eos_token_id", "eos_token_ids", "finetuning_task",
        "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label", "is_decoder",
        "keys_to_ignore_at_inference", "label2id", "max_sequence_length", "model_type", "num_labels",
        "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
        "pretraining_tp", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
        "task_specific_params", "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript",
        "transformers_version", "use_bfloat16", "use_cache", "unk_token_id", "xla_device",
        # Sampling settings, which transformers 4 kept in config.json.
        "bad_words_ids", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
        "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
        "num_return_sequences", "remove_invalid_values", "repetition_penalty", "temperature", "top_k", "top_p",
        "typical_p",
        # Notes of the programs that wrote the config.
        "activation_dropout", "dropout", "is_llama_config", "resid_dropout", "resid_pdrop", "residual_dropout",
        "transformers.js_config", "unsloth_fixed", "unsloth_version",
        # More names of dropout, and the head that classifies a whole row.
        "attn_pdrop", "emb_pdrop", "embed_dropout", "layerdrop", "output_past", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    }
)  # fmt: skip


_QUANTISED = (
    "none: the weights are quantised, and HookLens computes with plain ones. Loading files, it dequantises fp8, mxfp4, "
    "compressed-tensors, GPTQ, AWQ, bitsandbytes and torchao's int8. Take the checkpoint that was quantised, "
    "or dequantise this one: AutoModelForCausalLM.from_pretrained(...).dequantize(), which goes to "
    "HookedCausalLM.from_hf"
)
# Under one of these the several ways to quantise say which one it was (`quantization` is that of MLX).
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True, kw_only=True)
class ConfigMap:
    """How one family's `config.json` and `HookedConfig` translate into each other.

    Attributes:
        parts: what is read and written; a part sees the fields of those before it.
        fixed: fields that are the same in every checkpoint of the family.
        pinned: keys that must hold the one value that is implemented, where they are present.
        inert: further keys that carry no architecture, besides `INERT_KEYS`.
        called: what texts of errors call the config.
    """

    parts: tuple[ConfigPart, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    pinned: Mapping[str, Any] = field(default_factory=dict)
    inert: Collection[str] = ()
    called: str = "config.json"

    # What no family implements, and what these values would have to be.
    always_pinned: Mapping[str, Any] = field(
        default_factory=lambda: {
            "add_cross_attention": False,
            "is_encoder_decoder": False,
            "pruned_heads": {},
            "tie_encoder_decoder": False,
        }
    )

    def read(self, config: Mapping[str, Any], *, where: str, warn: bool = True) -> dict[str, Any]:
        """The fields of `HookedConfig` that `config` decides. With `warn`, unknown keys give one warning.

        Raises:
            UnsupportedModelError: keys are missing, mistyped or hold values that are not implemented; all are
                listed.
        """
        fields, reader = self._read(config)
        if reader.problems:
            listed = "; ".join(reader.problems)
            raise UnsupportedModelError(
                f"{where}: {self.called} describes a network that HookLens cannot build: {listed}. "
                "Correct the config if it is wrong, or take another checkpoint"
            )
        if warn:
            unknown = self._unknown_keys(reader)
            if unknown:
                warnings.warn(
                    f"{where}: {self.called} has keys that HookLens does not know: {join_names(unknown)}. They are "
                    "ignored; if one of them changes the network, the numbers will be wrong",
                    stacklevel=2,
                )
        return fields

    def survey(self, config: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
        """What of a config the family knows: keys that it reads, what is wrong with their values, and other keys."""
        _, reader = self._read(config)
        unknown = self._unknown_keys(reader)
        read = {key for part in self.parts for key in part.keys}
        return [key for key in config if key in read], reader.problems, unknown

    def _read(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], ConfigReader]:
        """The fields, and the reader that knows what was used and what is wrong."""
        reader = ConfigReader(config)
        fields = dict(self.fixed)
        for part in self.parts:
            reader.used.update(part.keys)
            # Parts build on the fields of those before.
            if not reader.impossible:
                try:
                    fields |= part.read(reader, fields)
                except ConfigError as error:
                    reader.impossible = str(error)
                    reader.problems.append(reader.impossible)
        for key, value in {**self.always_pinned, **self.pinned}.items():
            reader.used.add(key)
            if config.get(key) not in (None, value):
                reader.reject(key, f"{value!r}, the only value implemented")
        for key in QUANTISATION_KEYS:
            if reader.has(key):
                reader.reject(key, _QUANTISED)
        return fields, reader

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The architecture's keys for the fields of a `HookedConfig`."""
        written: dict[str, Any] = {}
        for part in self.parts:
            written |= part.write(fields)
        return written

    def update(self, config: Mapping[str, Any], known: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """`config`, which describes the fields `known`, changed to describe `fields`; the rest stays as spelled."""
        updated = dict(config)
        for part in self.parts:
            written = part.write(fields)
            if written != part.write(known):
                updated = {key: value for key, value in updated.items() if key not in part.keys} | written
        return updated

    def _unknown_keys(self, reader: ConfigReader) -> list[str]:
        # What any config may have, the configs inside of it may have, too.
        inert = {*INERT_KEYS, *self.always_pinned}
        return [
            key
            for key in reader.unused()
            if key not in self.inert and not inert & {key, name := key.rpartition(".")[2]} and not name.startswith("_")
        ]
