"""What a sparse autoencoder computes, and what it was trained on."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hooklens.errors import ConfigError

Architecture = Literal["standard", "gated", "jumprelu", "topk"]
Normalization = Literal["none", "constant_norm_rescale", "layer_norm", "expected_average_only_in"]


@dataclass(frozen=True, kw_only=True)
class SAETraining:
    """What an autoencoder was trained on; None is not known.

    Attributes:
        model_name: the model.
        hook_name: the hook point that it reads, by its name in HookLens.
        hook_name_out: the one it writes to, of a transcoder.
        head: the head that it reads, where the point has several.
        prepend_bos: whether a BOS token stood before each text.
        context_size: how many tokens a text had.
        processing: the weight-processing steps that the model had been through.
    """

    model_name: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None
    head: int | None = None
    prepend_bos: bool | None = None
    context_size: int | None = None
    processing: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """All that decides what an autoencoder computes.

    Attributes:
        d_in: width of what it reads.
        d_sae: number of latents.
        d_out: width of what it gives; None: `d_in`.
        architecture: `"standard"`: `relu(x W_enc + b_enc)`; `"gated"` (Rajamanoharan et al. 2024a): a gate of its own
            decides which latents are on; `"jumprelu"` (Rajamanoharan et al. 2024b): a latent is on above its threshold;
            `"topk"` (Gao et al. 2024): the `k` largest are on.
        k: of `"topk"`.
        apply_b_dec_to_input: `b_dec` is subtracted from what is read; never of a transcoder.
        normalize_activations: what is read is brought to norm `sqrt(d_in)` (`"constant_norm_rescale"`), or to mean 0
            and standard deviation 1 (`"layer_norm"`), each vector for itself, and what comes out back, except of a
            transcoder. What was divided by a number in training has that in its weights
            (`"expected_average_only_in"`).
        rescale_acts_by_decoder_norm: of `"topk"`: latents are chosen, and given, times the norm of what they write.
        has_skip: a transcoder adds `x W_skip^T`.
        training: what it was trained on.

    Raises:
        ConfigError: values that are none, all of them.
    """

    d_in: int
    d_sae: int
    d_out: int | None = None
    architecture: str = "standard"
    k: int | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    has_skip: bool = False
    training: SAETraining = field(default=SAETraining())

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}, expected a whole number above 0"
            for name, value in (("d_in", self.d_in), ("d_sae", self.d_sae), ("d_out", self.d_out), ("k", self.k))
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
        ]
        for name, kinds in (("architecture", Architecture), ("normalize_activations", Normalization)):
            if getattr(self, name) not in get_args(kinds):
                problems.append(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(kinds))}")
        if (self.architecture == "topk") != (self.k is not None):
            problems.append(
                f"k is {self.k!r} and architecture {self.architecture!r}: k belongs to 'topk', which needs it"
            )
        if isinstance(self.k, int) and isinstance(self.d_sae, int) and self.k > self.d_sae:
            problems.append(f"k is {self.k}, more than the {self.d_sae} latents")
        if self.has_skip and not self.is_transcoder:
            problems.append("has_skip: only a transcoder has a skip connection; give d_out or training.hook_name_out")
        if problems:
            raise ConfigError(f"SAEConfig: {'; '.join(problems)}")

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        out = self.training.hook_name_out
        return self.d_out is not None or (out is not None and out != self.training.hook_name)

    @property
    def width_out(self) -> int:
        """The width of what it gives."""
        return self.d_in if self.d_out is None else self.d_out

    def replace(self, **changes: Any) -> "SAEConfig":
        """A copy with some fields changed; those of `training` can be named, too."""
        known = {spec.name for spec in dataclasses.fields(SAETraining)}
        trained = {name: changes.pop(name) for name in known & changes.keys()}
        training = dataclasses.replace(self.training, **trained)
        return dataclasses.replace(self, **{"training": training, **changes})
