"""Weights of a `HookedTransformer`: stacked, as a state dict of 2.x, processed, and drawn anew."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens import utils
from hooklens.compat.transformer_lens.components import parameter_names, state_of
from hooklens.compat.transformer_lens.FactoredMatrix import FactoredMatrix
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.weights.constants import drop_trivial_norms, is_trivial

State = dict[str, Tensor]


def _stacked(name: str, per_query_head: bool = False) -> Any:
    def read(self: Any) -> Tensor:
        weight: Tensor = getattr(self.hooked, name)
        group = self.cfg.n_heads // weight.shape[1] if per_query_head else 1
        return weight if group == 1 else weight.repeat_interleave(group, dim=1)

    return property(read, doc=f"{name} of all layers.")


def _process_state(model: "StateMethods", state_dict: State, step: str) -> State:
    other: Any = _Bare(model.cfg, process(model._from_state(state_dict), model.cfg, **{step: True}))
    return {**state_dict, **other.state_dict()}


def _step(name: str, doc: str) -> Callable[["StateMethods", State], State]:
    def run(self: "StateMethods", state_dict: State) -> State:
        return _process_state(self, state_dict, name)

    run.__doc__ = f"The state dict {doc}."
    return run


class StateMethods(nn.Module):
    """What reads, writes and processes weights."""

    cfg: HookedTransformerConfig
    hooked: HookedCausalLM

    W_U, b_U, W_E, W_pos = (_stacked(name) for name in ("W_U", "b_U", "W_E", "W_pos"))
    W_Q, W_O, b_Q, b_O = (_stacked(name) for name in ("W_Q", "W_O", "b_Q", "b_O"))
    W_K, W_V, b_K, b_V = (_stacked(name, per_query_head=True) for name in ("W_K", "W_V", "b_K", "b_V"))
    W_in, W_out, b_in, b_out = (_stacked(name) for name in ("W_in", "W_out", "b_in", "b_out"))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by 2.x's names, so that those of a name can be chosen; linear maps hold `[out, in]`."""
        names, before = parameter_names(self), f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield before + names[id(parameter)] if id(parameter) in names else name, parameter

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters, of which nobody asks the names."""
        return (parameter for _, parameter in super().named_parameters(recurse=recurse))

    @property
    def W_gate(self) -> Tensor | None:
        """W_gate of all layers; None where MLPs are not gated."""
        return self.hooked.W_gate if self.cfg.gated_mlp else None

    @property
    def W_E_pos(self) -> Tensor:
        """Token and position embeddings below each other, `[d_vocab+n_ctx d_model]`."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_K^T` of every head."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O` of every head."""
        return FactoredMatrix(self.W_V, self.W_O)

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """The sum of the biases written to the stream below a layer."""
        total: Tensor = self.b_O[: layer + mlp_input].sum(0)
        return total + self.b_out[:layer].sum(0) if include_mlp_biases and not self.cfg.attn_only else total

    def all_composition_scores(self, mode: str) -> Tensor:
        """How much each head writes into what each later head reads."""
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode must be one of ['Q', 'K', 'V'] not {mode}")
        return self.hooked.all_composition_scores(mode)

    def all_head_labels(self) -> list[str]:
        """`["L0H0", ...]`."""
        return self.hooked.all_head_labels()

    def init_weights(self) -> None:
        """Draw fresh weights as `cfg.init_mode` says."""
        draw_weights(self.hooked, self.cfg)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Weights and buffers under the names of 2.x, which hold the memory of the model's own."""
        state = {} if destination is None else destination
        is_folded = (self.cfg.normalization_type or "").endswith("Pre")
        for name, tensor in state_of(self.hooked).items():
            if not (is_folded and name.rpartition(".")[0].endswith((".ln1", ".ln2", "ln_final"))):
                state[prefix + name] = tensor if keep_vars else tensor.detach()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of 2.x, or of HookLens."""
        given = {name: value for name, value in state_dict.items() if not _is_absent(self.hooked, name, value)}
        return self.hooked.load_state_dict(given, strict=strict, assign=assign)

    def load_and_process_state_dict(
        self, state_dict: State, fold_ln: bool = True, center_writing_weights: bool = True, center_unembed: bool = True,
        fold_value_biases: bool = True, refactor_factored_attn_matrices: bool = False,
    ) -> None:  # fmt: skip
        """Load a state dict and process what it holds; steps that cannot hold for the network are left out, told."""
        self._become(
            self._from_state(state_dict), fold_ln=fold_ln, center_writing_weights=center_writing_weights,
            center_unembed=center_unembed, fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )  # fmt: skip

    def process_weights_(
        self, fold_ln: bool = True, center_writing_weights: bool = True, center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False, fold_value_biases: bool = True,
    ) -> None:  # fmt: skip
        """Process the weights in place; parameters are new ones then, hooks stay."""
        self._become(
            self.hooked, fold_ln=fold_ln, center_writing_weights=center_writing_weights, center_unembed=center_unembed,
            fold_value_biases=fold_value_biases, refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )  # fmt: skip

    def _from_state(self, state_dict: State) -> HookedCausalLM:
        """A model of the weights, which may have norms that this network has without weights."""
        cfg = self.hooked.cfg
        kind = self.cfg.normalization_type
        if kind in ("LNPre", "RMSPre") and any(name.endswith("ln_final.w") for name in state_dict):
            unfolded = HookedTransformerConfig.unwrap({**self.cfg.to_dict(), "normalization_type": kind[:-3]})
            cfg = unfolded.to_hooked_config()
        model = HookedCausalLM(cfg).to(self.hooked.device, self.hooked.dtype)
        given = {name: value for name, value in state_dict.items() if not _is_absent(model, name, value)}
        model.load_state_dict(given)
        return model

    def _become(self: Any, hooked: HookedCausalLM, **steps: bool) -> None:
        """Take over a model with its weights processed."""
        processed = process(hooked, self.cfg, **steps)
        if steps.get("fold_ln") and not self.cfg.num_experts and self.cfg.normalization_type in ("LN", "RMS"):
            self.cfg.normalization_type += "Pre"
        self._take_over(processed)

    def fill_missing_keys(self, state_dict: State) -> State:
        """The state dict with this model's values for what it lacks."""
        return {**self.state_dict(), **state_dict}

    center_writing_weights = _step("center_writing_weights", "with the weights centred that write to the stream")
    center_unembed = _step("center_unembed", "with the unembedding centred")
    fold_value_biases = _step("fold_value_biases", "with value biases folded into `b_O`")
    refactor_factored_attn_matrices = _step(
        "refactor_factored_attn_matrices", "with `W_Q W_K^T` and `W_V W_O` factored evenly"
    )

    def fold_layer_norm(self, state_dict: State, fold_biases: bool = True, center_weights: bool = True) -> State:
        """The state dict with norms folded."""
        folded = _process_state(self, state_dict, "fold_ln")
        return {name: one for name, one in folded.items() if not name.endswith((".w", ".b"))}


class _Bare(StateMethods):
    """A model of which the weights are wanted only."""

    def __init__(self, cfg: HookedTransformerConfig, hooked: HookedCausalLM) -> None:
        super().__init__()
        self.cfg = cfg
        self.__dict__["hooked"] = hooked


def _is_absent(hooked: HookedCausalLM, name: str, value: object) -> bool:
    """Whether a norm's weights say what the network's norm, which has none, does anyway."""
    is_norms = name.rpartition(".")[2] in ("w", "b") and name not in hooked.named_weights()
    return is_norms and isinstance(value, Tensor) and is_trivial(name, value)


def process(hooked: HookedCausalLM, cfg: HookedTransformerConfig, **steps: bool) -> HookedCausalLM:
    """A model with its weights processed, as far as 2.x would: what cannot hold is told and left out."""
    reasons = {
        "fold_ln": "mixtures of experts" if cfg.num_experts else None if _weighs(hooked) else "no norms with weights",
        "center_writing_weights": None
        if cfg.normalization_type in ("LN", "LNPre") and not cfg.final_rms
        else "no LayerNorm",
        "center_unembed": "a soft cap on logits" if cfg.output_logits_soft_cap > 0 else None,
    }
    if cfg.positional_embedding_type == "shortformer":
        reasons = dict.fromkeys(reasons, "shortformer positions")
    for name, reason in reasons.items():
        if reason and steps.get(name):
            logging.warning(f"{name}: left out, since the network has {reason}")
            steps[name] = False
    if not any(steps.values()):
        return hooked
    processed = hooked.process_weights(**steps)
    return _without_weights(processed) if steps.get("fold_ln") else processed


def _weighs(hooked: HookedCausalLM) -> bool:
    return any(norm.weight for norm in hooked.cfg.description.norms.values())


def _without_weights(hooked: HookedCausalLM) -> HookedCausalLM:
    """The model whose folded norms have no weights, where those behind branches do not need theirs."""
    state, plain = drop_trivial_norms(hooked.named_weights(), hooked.cfg)
    model = HookedCausalLM.from_state_dict(state, plain, hooked.tokenizer)
    model.transforms, model.generation_config = hooked.transforms, dict(hooked.generation_config)
    return model


@torch.no_grad()
def draw_weights(hooked: HookedCausalLM, cfg: HookedTransformerConfig) -> None:
    """Draw all maps and embeddings anew, on the host; biases and norms stay.

    One seed gives the numbers that it gives there, since each weight is drawn in its turn.
    """
    if cfg.seed is not None:
        torch.manual_seed(cfg.seed)
    for name, weight in _in_turn(hooked, cfg):
        drawn = torch.empty(weight.shape, dtype=cfg.dtype)
        _draw(drawn, name, cfg)
        weight.copy_(drawn)


def _in_turn(hooked: HookedCausalLM, cfg: HookedTransformerConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights in the order and shape of 2.x's parameters."""
    yield "embed.W_E", hooked.embed.W_E
    if cfg.positional_embedding_type != "rotary":
        # Networks with linear biases have such a table there.
        yield "pos_embed.W_pos", getattr(hooked.pos_embed, "W_pos", torch.empty(cfg.n_ctx, cfg.d_model))
    for block in hooked.block_list():
        for name in ("W_Q", "W_O", "W_K", "W_V"):
            yield name, block.attn.read_weight(name)
        if not block.has_mlp:
            continue
        if cfg.num_experts:
            for expert in range(cfg.num_experts):
                yield from ((name, getattr(block.mlp, name)[expert].mT) for name in ("W_in", "W_out", "W_gate"))
            yield "W_gate", block.mlp.W_router.mT
            continue
        for name in ("W_in", "W_out", "W_gate") if cfg.gated_mlp else ("W_in", "W_out"):
            yield name, getattr(block.mlp, name)
    yield "unembed.W_U", hooked.unembed.W_U


def _draw(weight: Tensor, name: str, cfg: HookedTransformerConfig) -> None:
    gain, mode = float(cfg.initializer_range), cfg.init_mode
    if mode == "gpt2":
        nn.init.normal_(weight, std=gain)
    elif mode == "muP":
        # There, the unembedding counts as an embedding.
        fan_in, _ = utils.calc_fan_in_and_fan_out(weight)
        nn.init.normal_(weight, std=1.0 if "embed" in name else 1 / math.sqrt(fan_in))
    else:
        getattr(utils, f"init_{mode}_")(weight, gain=gain)
