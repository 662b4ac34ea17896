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


def _center_writers(draft: WeightDraft, cfg: HookedConfig) -> None:
    _center(draft, [name for name, weight in draft.declared.items() if weight.writes], "d_model")


def _center_block_writers(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    _center_writers(draft, cfg)


def _center_vocabulary(draft: WeightDraft, cfg: HookedConfig) -> None:
    _center(draft, draft.present(("unembed.W_U", "unembed.b_U")), "d_vocab")


def _writing_obstacles(cfg: HookedConfig) -> list[str]:
    obstacles = []
    if cfg.norm.kind != "layer":
        obstacles.append(f"cfg.norm.kind is {cfg.norm.kind!r}, which does not subtract the mean as LayerNorm does")
    if cfg.norm_after:
        obstacles.append("cfg.norm_after is True: norms, not weights, write to the stream")
    if not cfg.norm_before:
        obstacles.append("cfg.norm_before is False: the blocks read the stream with its mean")
    return obstacles


def _unembed_obstacles(cfg: HookedConfig) -> list[str]:
    if cfg.logits_softcap is None:
        return []
    return [f"cfg.logits_softcap is {cfg.logits_softcap}, so adding a number to all logits changes the softmax"]


def _untied(cfg: HookedConfig) -> HookedConfig:
    return cfg.replace(tied_unembed=False)


CENTER_WRITING_WEIGHTS = ProcessingStep(
    name="center_writing_weights",
    find_obstacles=_writing_obstacles,
    # W_E changes and W_U, which reads the final norm, keeps its value.
    change_config=_untied,
    change_block=_center_block_writers,
    change_ends=_center_writers,
)

CENTER_UNEMBED = ProcessingStep(
    name="center_unembed",
    find_obstacles=_unembed_obstacles,
    change_config=_untied,
    change_ends=_center_vocabulary,
)
