"""`HookedTransformerConfig` of TransformerLens 2.x: its flat, mutable fields, and `HookedConfig` in both directions."""

import dataclasses
import logging
import pprint
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hooklens.adapters.formats.transformer_lens_config import read_words, write_words
from hooklens.compat.transformer_lens.utilities import SUPPORTED_ACTIVATIONS
from hooklens.config import HookedConfig
from hooklens.errors import ConfigError, warn_caller
from hooklens.training.keeping.randomness import seed_random

_INIT_MODES = ("gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP")


class _OfModel:
    """Beside the fields of a config, the network of the model that it belongs to."""

    __slots__ = ("network",)
    network: HookedConfig


@dataclass(repr=False)
class HookedTransformerConfig(_OfModel):
    """The description of a network in TransformerLens's words, whose documentation tells of each.

    `attn_scale` divides. -1 stands for a value that is not given. `to_hooked_config` gives HookLens's description.
    """

    n_layers: int
    d_model: int
    n_ctx: int
    d_head: int
    model_name: str = "custom"
    n_heads: int = -1
    d_mlp: int | None = None
    act_fn: str | None = None
    d_vocab: int = -1
    eps: float = 1e-5
    use_attn_result: bool = False
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    use_qk_norm: bool = False
    use_local_attn: bool = False
    ungroup_grouped_query_attention: bool = False
    original_architecture: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    tokenizer_name: str | None = None
    window_size: int | None = None
    attn_types: list[str] | None = None
    init_mode: str = "gpt2"
    normalization_type: str | None = "LN"
    device: str | torch.device | None = None
    n_devices: int = 1
    attention_dir: str = "causal"
    attn_only: bool = False
    seed: int | None = None
    initializer_range: float = -1.0
    init_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    positional_embedding_type: str = "standard"
    final_rms: bool = False
    d_vocab_out: int = -1
    parallel_attn_mlp: bool = False
    rotary_dim: int | None = None
    n_params: int | None = None
    use_hook_tokens: bool = False
    gated_mlp: bool = False
    default_prepend_bos: bool = True
    dtype: torch.dtype = torch.float32
    tokenizer_prepends_bos: bool | None = None
    n_key_value_heads: int | None = None
    post_embedding_ln: bool = False
    rotary_base: float = 10000
    rotary_base_local: float | None = None
    trust_remote_code: bool = False
    rotary_adjacent_pairs: bool = False
    load_in_4bit: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_normalization_before_and_after: bool = False
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192

    def __post_init__(self) -> None:
        if self.n_heads == -1:
            self.n_heads = self.d_model // self.d_head
            if self.d_model % self.d_head:
                logging.warning(f"d_model={self.d_model} is not a multiple of d_head={self.d_head}")
        if self.seed is not None:
            self.set_seed_everywhere(self.seed)
        self._check()
        if not self.attn_only and self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        if self.initializer_range < 0:
            self.initializer_range = 0.8 / np.sqrt(self.d_model) if self.init_mode == "gpt2" else 1.0
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head
        if self.device is None:
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = np.sqrt(self.d_head)
        self.n_params = self._count_params()

    def _check(self) -> None:
        """Refuse what 2.x refuses, with its class of errors."""
        mixture, local = self.num_experts, self.use_local_attn
        needs = {
            "use_local_attn needs window_size": not local or self.window_size is not None,
            "use_local_attn needs attn_types": not local or self.attn_types is not None,
            "num_experts and experts_per_token go together": (mixture is None) == (self.experts_per_token is None),
            f"there are fewer than n_devices={self.n_devices}": self.n_devices <= max(1, torch.cuda.device_count()),
            f"default_prepend_bos={self.default_prepend_bos!r}, not a bool": self.default_prepend_bos in (True, False),
        }
        if not self.attn_only:
            known = ", ".join(SUPPORTED_ACTIVATIONS)
            needs[f"act_fn={self.act_fn!r} must be one of {known}"] = self.act_fn in SUPPORTED_ACTIVATIONS
        if wrong := [need for need, is_met in needs.items() if not is_met]:
            raise AssertionError("; ".join(wrong))

    def _count_params(self) -> int:
        """Parameters of the blocks' maps, as scaling laws count them."""
        attention = 4 * self.d_model * self.d_head * self.n_heads
        if self.attn_only or self.d_mlp is None:
            return self.n_layers * attention
        mlp = self.d_model * self.d_mlp * (2 + self.gated_mlp)
        return self.n_layers * (attention + ((mlp + self.d_model) * self.num_experts if self.num_experts else mlp))

    @classmethod
    def unwrap(cls, config: "dict[str, Any] | HookedTransformerConfig") -> "HookedTransformerConfig":
        """A config, from itself or its fields."""
        return cls.from_dict(config) if isinstance(config, dict) else config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "HookedTransformerConfig":
        """A config from its fields."""
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are held."""
        return self.__dict__

    def __repr__(self) -> str:
        return "HookedTransformerConfig:\n" + pprint.pformat(self.to_dict())

    def set_seed_everywhere(self, seed: int) -> None:
        """Seed torch, Python and NumPy."""
        seed_random(seed)

    def is_layer_norm_activation(self) -> bool:
        """Whether a norm stands behind the activation."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")

    def to_hooked_config(self) -> HookedConfig:
        """HookLens's description of the network, with all biases that it has in 2.x.

        Raises:
            UnsupportedModelError: it describes no network that HookLens builds; all reasons are listed.
            ConfigError: an unknown `init_mode`.
        """
        if self.init_mode not in _INIT_MODES:
            raise ConfigError(f"init_mode={self.init_mode!r}; expected one of {', '.join(_INIT_MODES)}")
        words = {
            spec.name: value.item() if isinstance(value := getattr(self, spec.name), np.generic) else value
            for spec in dataclasses.fields(self)
        }
        words["attn_types"] = None if self.attn_types is None else list(self.attn_types)
        drawn = {"init_std": float(self.initializer_range)} if self.init_mode == "gpt2" else {}
        return read_words(words, where="HookedTransformerConfig").replace(init_scheme=self.init_mode, **drawn)

    @classmethod
    def from_hooked_config(cls, cfg: HookedConfig, **more: Any) -> "HookedTransformerConfig":
        """2.x's description of a network, or the nearest one, with a warning that lists what it does not say.

        Args:
            cfg: the network.
            more: fields of which HookLens's description says nothing (`model_name`, `device`, ...), or in place of it.
        """
        words, unsaid = write_words(cfg)
        if unsaid:
            warn_caller(
                f"TransformerLens's config has no words for {'; '.join(unsaid)}: its fields are the nearest, and a new "
                "model made from them is another network"
            )
        words |= {"init_mode": cfg.init_scheme} if cfg.init_scheme in _INIT_MODES else {}
        words["initializer_range"] = cfg.init_std if cfg.init_scheme == "gpt2" else -1.0
        return cls(**{**words, **more})
