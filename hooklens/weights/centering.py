"""Centring: taking out of the weights what no later computation can see.

**center_writing_weights.** A LayerNorm subtracts the mean over d_model, so what embeddings, heads and MLPs
write along the all-ones direction is never read. Taking the mean out of every map that writes to the stream
leaves the output of each LayerNorm, and the logits, as they are.

**center_unembed.** Softmax ignores a number added to all logits, so the mean over the vocabulary is taken
out of `W_U` and `b_U`: logits move by a constant per position, log-probabilities stay.
"""

from hooklens.config import HookedConfig
from hooklens.weights.draft import WeightDraft
from hooklens.weights.steps import ProcessingStep


def _center(draft: WeightDraft, names: list[str], axis_name: str) -> None:
    for name in names:
        value, axis = draft.read(name), draft.declared[name].axes.index(axis_name)
        draft.write(name, value - value.mean(dim=axis, keepdim=True))


def _center_writers(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    _center(draft, [name for name, weight in draft.declared.items() if weight.writes], "d_model")


def _center_vocabulary(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    _center(draft, [name for name in ("unembed.W_U", "unembed.b_U") if name in draft.declared], "d_vocab_out")


def _writing_obstacles(cfg: HookedConfig) -> list[str]:
    blocks = [block for block in cfg.blocks if block.attn is not None or block.mlp is not None]
    readers = [block.norm for block in blocks if block.norm_before] + [cfg.final_norm]
    obstacles = []
    if kinds := sorted({norm.kind for norm in readers if norm is not None and norm.kind != "layer"}):
        obstacles.append(f"cfg.norm.kind is {kinds[0]!r}, which does not subtract the mean as LayerNorm does")
    if layers := [block.layer for block in blocks if block.norm_after]:
        some = "" if len(layers) == len(blocks) else f" in layers {layers}"
        obstacles.append(f"cfg.norm_after is True{some}: norms, not weights, write to the stream")
    if layers := [block.layer for block in blocks if not block.norm_before]:
        obstacles.append(f"layers {layers} have no norm before their branches: they read the stream with its mean")
    if cfg.embed_norm is not None:
        obstacles.append("cfg.embed_norm: a norm, not weights, writes the embedding to the stream")
    if cfg.final_norm is None:
        obstacles.append("cfg.final_norm is None: the unembedding reads the stream with its mean")
    return obstacles


def _unembed_obstacles(cfg: HookedConfig) -> list[str]:
    if cfg.logits_softcap is None:
        return []
    return [f"cfg.logits_softcap is {cfg.logits_softcap}, so adding a number to all logits changes the softmax"]


def _untied(cfg: HookedConfig) -> HookedConfig:
    return cfg.replace(tied_unembed=False)


center_writing_weights = ProcessingStep(
    name="center_writing_weights",
    find_obstacles=_writing_obstacles,
    # W_E changes and W_U, which reads the final norm, keeps its value.
    change_config=_untied,
    change=_center_writers,
)
"""Takes the mean over d_model out of `W_E`, `W_pos`, `W_O`, `b_O`, `W_out`, `b_out`; unties a tied `W_U`."""

center_unembed = ProcessingStep(
    name="center_unembed",
    find_obstacles=_unembed_obstacles,
    change_config=_untied,
    change=_center_vocabulary,
)
"""Takes the mean over the vocabulary out of `W_U` and `b_U`; unties a tied `W_U`."""
