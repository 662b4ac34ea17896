"""`HookedTransformer` of TransformerLens 2.x: its calls and settings, on a `hooklens.HookedCausalLM`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens import utils
from hooklens.compat.transformer_lens._state import StateMethods, draw_weights
from hooklens.compat.transformer_lens._text import Side, TextMethods
from hooklens.compat.transformer_lens.ActivationCache import ActivationCache
from hooklens.compat.transformer_lens.components import adopt
from hooklens.compat.transformer_lens.hook_points import Dir, HookedRootModule, HookPoint
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.compat.transformer_lens.loading_from_pretrained import LoadingMethods
from hooklens.compat.transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache
from hooklens.compat.transformer_lens.utils import USE_DEFAULT_VALUE
from hooklens.progress import progress_bar

Model = TypeVar("Model", bound="HookedTransformer")
SingleLoss = Float[Tensor, ""]
LossPerToken = Float[Tensor, "batch pos-1"]
Loss = SingleLoss | LossPerToken
Input = str | list[str] | Tensor

DTYPE_FROM_STRING = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip

# Points that act only while a setting of the config is on, by the end of their names.
_SETTINGS = {
    "attn.hook_result": "use_attn_result", "hook_q_input": "use_split_qkv_input", "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input", "hook_mlp_in": "use_hook_mlp_in", "hook_attn_in": "use_attn_in",
    "hook_tokens": "use_hook_tokens",
}  # fmt: skip
# Points of HookLens that TransformerLens does not have.
_UNKNOWN = ("hook_k_per_head", "hook_v_per_head", "hook_lora_out")
_PARTS = (
    "embed", "hook_embed", "pos_embed", "hook_pos_embed", "hook_tokens", "blocks", "ln_final", "unembed",
)  # fmt: skip


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Loss


class HookedTransformer(TextMethods, StateMethods, LoadingMethods, HookedRootModule):
    """A HookLens model with the names and the behaviour of 2.x.

    Args:
        cfg: the network, in TransformerLens's words.
        tokenizer: None: that of `cfg.tokenizer_name`, if there is one.
        move_to_device: to `cfg.device`.
        default_padding_side: of texts of different length.
        hooked: the model itself, where there is one; it belongs to this one then. None: fresh weights.

    Attributes:
        hooked: the `HookedCausalLM`; what HookLens's own functions take.
    """

    cfg: HookedTransformerConfig
    hooked: HookedCausalLM
    tokenizer: Any

    def __init__(
        self, cfg: HookedTransformerConfig | dict[str, Any] | str, tokenizer: Any = None, move_to_device: bool = True,
        default_padding_side: Literal["left", "right"] = "right", *, hooked: HookedCausalLM | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(cfg, str):
            raise ValueError("cfg is a text; give a HookedTransformerConfig, or call HookedTransformer.from_pretrained")
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.tokenizer, self.dataset = None, None
        self._find_tokenizer(tokenizer, default_padding_side)
        if hooked is None:
            assert self.cfg.d_vocab != -1, "Must provide a tokenizer if d_vocab is not provided"
            # What is drawn here is none of the numbers that 2.x draws.
            with torch.random.fork_rng(devices=[]):
                hooked = HookedCausalLM(self.cfg.to_hooked_config()).to(self.cfg.dtype)
            if self.cfg.init_weights:
                draw_weights(hooked, self.cfg)
        self._take_over(hooked)
        if move_to_device and self.cfg.device is not None:
            self.to(self.cfg.device, print_details=False)

    def _take_over(self, hooked: HookedCausalLM) -> None:
        """Make another HookLens model this one's; hooks stay with the names of their points."""
        before = {name: point.own for name, point in getattr(self, "hook_dict", {}).items() if point.own}
        hooked.tokenizer, hooked.default_prepend_bos = self.tokenizer, self.cfg.default_prepend_bos
        # Past nn.Module: the parts are this module's children, and not those of a child once more.
        self.__dict__["hooked"] = hooked
        self.cfg.network = hooked.cfg
        self.__dict__["_own_unembed"] = hooked._modules["unembed"]
        for name in _PARTS:
            module = hooked._modules.get(name)
            is_there = module is not None and (name != "hook_tokens" or self.cfg.use_hook_tokens)
            if is_there:
                setattr(self, name, module)
            else:
                self._modules.pop(name, None)
        adopt(hooked, self.cfg)
        self.train(hooked.training)
        self.setup()
        for name, own in before.items():
            if name in self.hook_dict:
                self.hook_dict[name].__dict__["own"] = own
                for hook in (*own.hooks, *own.gradient_hooks):
                    hook.point = self.hook_dict[name]

    def setup(self) -> None:
        """Name all modules and find the hook points that 2.x has."""
        super().setup()
        for name in [name for name in self.hook_dict if name.endswith(_UNKNOWN)]:
            del self.hook_dict[name], self.mod_dict[name]
        for name, point in self.hook_dict.items():
            setting = _find_setting(name)
            point.__dict__["turned_on"] = None if setting is None else partial(getattr, self.cfg, setting)

    def check_hooks_to_add(
        self, hook_point: HookPoint, hook_point_name: str, hook: Callable[..., Any], dir: Dir = "fwd",
        is_permanent: bool = False, prepend: bool = False,
    ) -> None:  # fmt: skip
        """Refuse hooks where a setting is off."""
        setting = _find_setting(hook_point_name)
        assert setting is None or getattr(self.cfg, setting), (
            f"{hook_point_name}: no hook acts while cfg.{setting} is off"
        )

    def forward(
        self, input: Input, return_type: str | None = "logits", loss_per_token: bool = False,
        prepend_bos: bool | None = USE_DEFAULT_VALUE, padding_side: Side = USE_DEFAULT_VALUE,
        start_at_layer: int | None = None, tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None, attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None, past_kv_cache: HookedTransformerKeyValueCache | None = None,
    ) -> Any:  # fmt: skip
        """Run the model; `tokens` are for the loss of a call that starts at a layer."""
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type is {return_type!r}; expected 'logits', 'loss', 'both' or None")
        if past_kv_cache is not None and self._is_ungrouped():
            raise RuntimeError(
                "past_kv_cache has an entry for each key-value head, and ungroup_grouped_query_attention makes one for "
                "each query head: run without a cache, or call set_ungroup_grouped_query_attention(False)"
            )
        with utils.LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            if start_at_layer is None:
                input, attention_mask = self._read_input(input, attention_mask, past_kv_cache)
                tokens = input
            else:
                assert isinstance(input, Tensor), "start_at_layer takes the residual stream"
                self._check_positions(input, shortformer_pos_embed, attention_mask)
            self.__dict__["_own_unembed"].softcap = self.cfg.output_logits_soft_cap
            # HookLens takes runs of a pad token for padding where no mask is given; 2.x does not.
            mask = torch.ones(input.shape[:2], device=input.device) if attention_mask is None else attention_mask
            out = self.hooked(
                input, return_type=None if return_type is None else "logits", attention_mask=mask,
                past_kv_cache=past_kv_cache, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer,
            )  # fmt: skip
            if stop_at_layer is not None or return_type in ("logits", None):
                return out
            assert isinstance(out, Tensor)
            assert tokens is not None, "tokens must be passed in if return_type is 'loss' or 'both'"
            loss = self.loss_fn(out, tokens, attention_mask, per_token=loss_per_token)
            return loss if return_type == "loss" else Output(out, loss)

    def _read_input(
        self, input: Input, attention_mask: Tensor | None, past_kv_cache: HookedTransformerKeyValueCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids, and their mask where 2.x makes one: with a cache, or padding on the left."""
        tokens = self.to_tokens(input) if isinstance(input, str | list) else input
        tokens = (tokens[None] if tokens.ndim == 1 else tokens).to(self.hooked.device)
        pads_left = self.tokenizer is not None and self.tokenizer.padding_side == "left"
        if attention_mask is None and (pads_left or past_kv_cache is not None) and self.tokenizer is not None:
            attention_mask = utils.get_attention_mask(self.tokenizer, tokens, self.cfg.default_prepend_bos)
        if attention_mask is not None:
            if past_kv_cache is not None and attention_mask.shape[1] > tokens.shape[1]:
                attention_mask = attention_mask[:, -tokens.shape[1] :]
            assert attention_mask.shape == tokens.shape, (
                f"Attention mask shape {attention_mask.shape} does not match tokens shape {tokens.shape}"
            )
        return tokens, attention_mask

    def _check_positions(self, stream: Tensor, given: Tensor | None, attention_mask: Tensor | None) -> None:
        """Refuse position embeddings that are not the model's own, which it looks up itself."""
        if given is None:
            return
        own = self._embed_positions(stream, attention_mask)
        if own is None or own.shape != given.shape or not torch.allclose(own.to(given), given):
            raise NotImplementedError("shortformer_pos_embed: only the model's own position embeddings can be used")

    def _embed_positions(self, stream: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        if self.cfg.positional_embedding_type not in ("standard", "shortformer"):
            return None
        found: Tensor = self.hooked.pos_embed(stream[..., 0].long(), attention_mask=attention_mask)
        return found

    def input_to_embed(
        self, input: Input, prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Side = USE_DEFAULT_VALUE, attention_mask: Tensor | None = None,
        past_kv_cache: HookedTransformerKeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The stream entering block 0, token ids, shortformer's position embeddings, and the mask."""
        with utils.LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            tokens, attention_mask = self._read_input(input, attention_mask, past_kv_cache)
            frozen: Any = None if past_kv_cache is None else past_kv_cache.clone().freeze()
            stream = self.forward(tokens, attention_mask=attention_mask, past_kv_cache=frozen, stop_at_layer=0)
            is_short = self.cfg.positional_embedding_type == "shortformer"
            return stream, tokens, self._embed_positions(stream, attention_mask) if is_short else None, attention_mask

    def get_pos_offset(self, past_kv_cache: HookedTransformerKeyValueCache | None, batch_size: int) -> int:
        """How many columns a cache holds of each of so many rows."""
        if past_kv_cache is None:
            return 0
        keys = past_kv_cache[0].past_keys
        wanted = (batch_size, keys.shape[1], self.cfg.n_key_value_heads or self.cfg.n_heads, self.cfg.d_head)
        assert keys.shape == wanted, f"past_kv_cache: its keys are {list(keys.shape)}, expected {list(wanted)}"
        return int(keys.shape[1])

    def get_residual(
        self, embed: Tensor, pos_offset: int, prepend_bos: bool | None = USE_DEFAULT_VALUE,
        attention_mask: Tensor | None = None, tokens: Tensor | None = None, return_shortformer_pos_embed: bool = True,
        device: Any = None,
    ) -> Any:  # fmt: skip
        """The stream entering block 0 of embedded tokens, and shortformer's position embeddings."""
        positions = None
        if self.cfg.positional_embedding_type in ("standard", "shortformer"):
            ids = embed[..., 0].long() if tokens is None else tokens
            model: Any = self
            positions = model.hook_pos_embed(model.pos_embed(ids, pos_offset, attention_mask))
        is_short = self.cfg.positional_embedding_type == "shortformer"
        stream = embed if positions is None or is_short else embed + positions
        return (stream, positions if is_short else None) if return_shortformer_pos_embed else stream

    def loss_fn(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None, per_token: bool = False,
    ) -> Tensor:  # fmt: skip
        """The cross-entropy of the next token."""
        return utils.lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run, and keep activations in an `ActivationCache`."""
        out, found = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, found
        return out, ActivationCache(found, self, has_batch_dim=not remove_batch_dim)

    def train(self: Model, mode: bool = True) -> Model:
        """Training mode, of the HookLens model, too."""
        self.hooked.train(mode)
        self.training = mode
        return self

    def to(self: Model, device_or_dtype: Any, print_details: bool = True) -> Model:  # type: ignore[override]
        """Move or cast the model, and say so in the config."""
        if isinstance(device_or_dtype, torch.dtype):
            self.cfg.dtype = device_or_dtype
            if print_details:
                print("Changing model dtype to", device_or_dtype)
        else:
            self.cfg.device = str(torch.device(device_or_dtype).type if device_or_dtype == "cpu" else device_or_dtype)
            if print_details:
                print("Moving model to device: ", self.cfg.device)
        self.hooked.to(device_or_dtype)
        return self

    def cuda(self: Model, device: int | str | torch.device | None = None) -> Model:
        """Move to a GPU."""
        return self.to("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self: Model) -> Model:
        """Move to the CPU."""
        return self.to("cpu")

    def mps(self: Model) -> Model:
        """Move to a GPU of Apple's."""
        return self.to("mps")

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Turn `hook_result` on or off."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Turn `hook_q_input`, `hook_k_input` and `hook_v_input` on or off."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Turn `hook_mlp_in` on or off."""
        assert not self.cfg.attn_only, "Can't use hook_mlp_in with attn_only model"
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Turn `hook_attn_in` on or off."""
        assert self.cfg.n_key_value_heads is None, "Can't use attn_in where query heads share keys and values"
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Give `hook_k`, `hook_v` and what follows them an entry for each query head, or for what query heads share."""
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    def _is_ungrouped(self) -> bool:
        return self.cfg.ungroup_grouped_query_attention and self.cfg.n_key_value_heads not in (None, self.cfg.n_heads)

    def move_model_modules_to_device(self) -> None:
        """Move to `cfg.device`."""
        if self.cfg.device is not None:
            self.to(self.cfg.device, print_details=False)

    @torch.inference_mode()
    def generate(
        self, input: Input = "", max_new_tokens: int = 10, stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None, do_sample: bool = True, top_k: int | None = None,
        top_p: float | None = None, temperature: float = 1.0, freq_penalty: float = 0.0, use_past_kv_cache: bool = True,
        prepend_bos: bool | None = USE_DEFAULT_VALUE, padding_side: Side = USE_DEFAULT_VALUE,
        return_type: str | None = "input", verbose: bool = True,
    ) -> Any:  # fmt: skip
        """Choose tokens one after another, with torch's own generator; texts of a list are padded on the left."""
        assert return_type in ("input", "str", "tokens"), "return_type must be one of ['input', 'str', 'tokens']"
        is_text = isinstance(input, str | list)
        with utils.LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            side: Any = "left" if isinstance(input, list) and len(input) > 1 else USE_DEFAULT_VALUE
            tokens = self.to_tokens(input, padding_side=side) if isinstance(input, str | list) else input
            tokens = new = tokens.to(self.hooked.device)
            are_ids = tokens.ndim == 2 and not tokens.is_floating_point()
            assert are_ids, "generate takes texts, or token ids [batch, pos]"
            mask = torch.ones_like(tokens)
            if side == "left":
                with utils.LocallyOverridenDefaults(self, padding_side="left"):
                    mask = utils.get_attention_mask(self.tokenizer, tokens, self.cfg.default_prepend_bos)
            stops, filler = self._stop_tokens(eos_token_id) if stop_at_eos else ([], 0)
            cache = None
            if use_past_kv_cache and not self._is_ungrouped():
                cache = HookedTransformerKeyValueCache.init_cache(self.cfg, self.hooked.device, len(tokens))
            finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
            self.eval()
            with progress_bar("generating", range(max_new_tokens), unit="token", progress=verbose) as bar:
                for _ in bar:
                    logits = self.forward(
                        tokens if cache is None else new,
                        attention_mask=mask if cache is None else mask[:, -new.shape[1] :],
                        past_kv_cache=cache,
                    )[:, -1]
                    chosen = logits.argmax(-1)
                    if do_sample:
                        chosen = utils.sample_logits(logits, top_k, top_p, temperature, freq_penalty, tokens)
                    if stops:
                        chosen = torch.where(finished, filler, chosen)
                        finished |= torch.isin(chosen, torch.tensor(stops, device=chosen.device))
                    new = chosen[:, None]
                    tokens = torch.cat([tokens, new], 1)
                    mask = torch.cat([mask, torch.ones_like(new)], 1)
                    if stops and finished.all():
                        break
            if return_type == "tokens" or not (is_text or return_type == "str"):
                return tokens
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
            return texts[0] if len(texts) == 1 else texts

    def _stop_tokens(self, given: int | Sequence[int] | None) -> tuple[list[int], int]:
        """The tokens that end a row, and the one that fills it up then."""
        own = getattr(self.tokenizer, "eos_token_id", None)
        if given is not None and not isinstance(given, int):
            return list(given), given[0] if own is None else own
        stop = own if given is None else given
        assert stop is not None, "stop_at_eos: give eos_token_id; there is no tokenizer that has one"
        return [stop], stop


def _find_setting(name: str) -> str | None:
    return next((setting for end, setting in _SETTINGS.items() if name.endswith(end)), None)
