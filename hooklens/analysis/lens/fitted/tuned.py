r"""The tuned lens: an affine translator for each layer, trained to make its stream predict as the last one does.

**Method** (Belrose et al. 2023, "Eliciting latent predictions from transformers with the tuned lens", arXiv
2303.08112). The stream `x_l` at the entrance of layer `l` is carried to the end by

    T_l(x) = x + A_l x + b_l

which starts at the identity, where the reading is the plain logit lens, and is trained by the mean over tokens of
`KL(p || softmax(read(T_l(x_l))))`, with `p` what the model itself predicts. Each layer has a loss of its own.

**How to read it.** What it predicts is what an affine map can make of the stream: information that was there in other
directions than the unembedding reads. It is trained on some text, so it also knows what is likely there; its losses on
held-out rows are part of the value.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.analysis.lens.fitted.published import find_published, read_tuned_lens
from hooklens.analysis.lens.fitted.storage import read_lens, write_lens
from hooklens.analysis.lens.fitted.tuning import Recipe, train_translators
from hooklens.analysis.lens.losses import LayerLoss
from hooklens.analysis.lens.origin import Origin
from hooklens.analysis.lens.rows import Data, read_data
from hooklens.analysis.lens.transport import Transport, apply_affine
from hooklens.analysis.reading.connection import read_model
from hooklens.arguments import optional, read_device, read_flag, read_int, read_number, read_path, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.display import Displayed, Listing, Summary, format_bytes, format_numbers
from hooklens.errors import CheckpointError, InputError
from hooklens.optional import import_package
from hooklens.viz.charts import Backend, draw_lines

if TYPE_CHECKING:
    import pandas

_POSITIVE = partial(read_number, expected="a number above 0", allows=lambda number: number > 0)
_SHARE = partial(read_number, expected="a number between 0 and 1", allows=lambda number: 0 < number < 1)


@dataclass(frozen=True, kw_only=True)
class TunedLens(Displayed, Transport):
    """An affine translator for each layer; `TunedLens.fit(model, texts)` trains one.

    Attributes:
        weight: `A_l`.
        bias: `b_l`.
        before: losses of the plain logit lens on the rows that were held out; empty for published files.
        after: those of this lens on the same rows.
    """

    weight: Float[Tensor, "layer out into"]
    bias: Float[Tensor, "layer out"]
    before: tuple[LayerLoss, ...] = ()
    after: tuple[LayerLoss, ...] = ()

    @classmethod
    @reads(
        model=read_model,
        data=read_data,
        steps=partial(read_int, least=1),
        lr=_POSITIVE,
        batch_size=partial(read_int, least=1),
        held_out=_SHARE,
        seed=read_seed,
        progress=read_flag,
    )
    def fit(
        cls,
        model: HookedCausalLM,
        data: Data,
        *,
        steps: int = 250,
        lr: float = 1e-3,
        batch_size: int = 8,
        held_out: float = 0.1,
        seed: int = 0,
        progress: bool = True,
    ) -> "TunedLens":
        """Train translators for all layers at once, by Adam with a rate that falls to 0 in a line.

        Rows are drawn and run a batch at a time, so memory does not grow with their number. The model is run without
        gradients and stays as it is.

        Args:
            model: the model.
            data: a list of texts, or token ids `[row pos]`.
            steps: how many batches.
            lr: the rate in the beginning.
            batch_size: rows of a batch.
            held_out: share of the rows that is measured on, not trained on.
            seed: decides which rows these are, and the order of the others.
            progress: show bars.

        Raises:
            InputError: arguments out of range, or data of another kind or of a single row.
        """
        refuse_other_outputs(model.cfg, "TunedLens.fit: a lens on tokens", InputError)
        trained = train_translators(
            model, data, Recipe(steps=steps, lr=lr, batch_size=batch_size, held_out=held_out, seed=seed),
            make=partial(cls._of, Origin.of(model)), progress=progress,
        )  # fmt: skip
        return replace(trained.lens, before=tuple(trained.before), after=tuple(trained.after))

    @classmethod
    def _of(cls, origin: Origin, weight: Tensor, bias: Tensor) -> "TunedLens":
        return cls(layers=tuple(range(len(weight))), origin=origin, weight=weight, bias=bias)

    def apply(self, stream: Float[Tensor, "*axes d_model"], layer: int) -> Float[Tensor, "*axes d_model"]:
        """`x + A_l x + b_l`.

        Args:
            stream: `resid_pre` of the layer.
            layer: the layer.

        Raises:
            InputError: the lens has no translator for the layer.
        """
        place = self.place_of(layer)
        return stream + apply_affine(stream, self.weight[place], self.bias[place])

    @property
    def d_model(self) -> int:
        """The width of the streams."""
        return self.weight.shape[-1]

    @reads(device=read_device)
    def to(self, device: torch.device | str) -> "TunedLens":
        """The lens with its translators on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def to_dataframe(self) -> "pandas.DataFrame":
        """Losses on the rows that were held out, without and with the lens.

        Columns: `layer`, `kl_logit_lens`, `kl`, `cross_entropy_logit_lens`, `cross_entropy`, in nats. Empty for a lens
        from published files: `lens_losses(model, texts, transport=lens)` measures any.
        """
        rows = [
            (old.layer, old.kl, new.kl, old.cross_entropy, new.cross_entropy)
            for old, new in zip(self.before, self.after, strict=True)
        ]
        columns = ["layer", "kl_logit_lens", "kl", "cross_entropy_logit_lens", "cross_entropy"]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=columns)
        return table

    def plot(self, *, backend: Backend = "plotly") -> Any:
        """The losses of `to_dataframe` over layers.

        Raises:
            InputError: the lens has none.
            MissingDependencyError: the package that draws is not installed.
        """
        if not self.before:
            raise InputError("this TunedLens was read from published files, which hold no losses; see lens_losses")
        panels = {
            "KL from the model, nats": _lines(self.before, self.after, "kl"),
            "cross-entropy, nats": _lines(self.before, self.after, "cross_entropy"),
        }
        layers = [str(loss.layer) for loss in self.before]
        return draw_lines(("layer", layers), panels, backend=backend, title="held-out losses of a tuned lens")

    @reads(path=read_path)
    def save(self, path: str | Path) -> None:
        """Write the lens into a folder.

        Args:
            path: the folder; made where there is none.

        Raises:
            CheckpointError: it cannot be written to.
        """
        described = {
            "layers": list(self.layers),
            "before": [list(loss) for loss in self.before],
            "after": [list(loss) for loss in self.after],
        }
        write_lens(Path(path), "TunedLens", {"weight": self.weight, "bias": self.bias}, self.origin, described)

    @classmethod
    @reads(path=read_path, model=optional(read_model))
    def load(cls, path: str | Path, *, model: HookedCausalLM | None = None) -> "TunedLens":
        """A lens from the folder that `save` wrote, or from one of the `tuned-lens` package (AlignmentResearch).

        The package's folder holds `config.json` and `params.pt`; layer `l` there is the stream that enters block `l`
        here, too. It does not say which weights it was trained on but by name (its `unembed_hash` is over the memory
        of a tensor whose dtype it does not say), so `model` has to be given, and the lens holds for that model.

        Args:
            path: the folder.
            model: the model to use it with. It is checked; for published files it is what the lens is said to hold for.

        Raises:
            CheckpointError: no lens is there, or it is damaged.
            InputError: the lens is of another model, or published files are read without a model.
            TransformError: the model's weights were processed; published files are of weights as they are.
        """
        folder = Path(path)
        if find_published(folder):
            return cls._from_published(folder, model)
        shapes = {"weight": (-1, -2, -2), "bias": (-1, -2)}
        tensors, origin, about = read_lens(folder, "TunedLens", shapes)
        layers = about.get("layers")
        if not isinstance(layers, list) or len(layers) != len(tensors["bias"]):
            raise CheckpointError(f"{folder} is damaged: layers are {layers!r}")
        losses = {
            name: tuple(LayerLoss(*loss) for loss in about.get(name, ()) if len(loss) == len(LayerLoss._fields))
            for name in ("before", "after")
        }
        lens = cls(
            layers=tuple(layers), origin=origin, weight=tensors["weight"], bias=tensors["bias"],
            before=losses["before"], after=losses["after"],
        )  # fmt: skip
        if model is not None:
            lens.check(model)
        return lens

    @classmethod
    def _from_published(cls, folder: Path, model: HookedCausalLM | None) -> "TunedLens":
        weight, bias = read_tuned_lens(folder, model)
        assert model is not None
        return cls._of(Origin.of(model), weight, bias)

    def _summary(self) -> Summary:
        losses = ""
        if self.before:
            old, new = (sum(loss.kl for loss in one) / len(one) for one in (self.before, self.after))
            losses = f"; held-out KL {old:.3f} -> {new:.3f} nats, mean over layers"
        held_out = zip(self.layers, self.before, self.after, strict=False)
        return Summary(
            title=f"TunedLens({len(self.layers)} layers, d_model={self.d_model}{losses})",
            facts={"layers": format_numbers(self.layers), "bytes": format_bytes(self.weight.nbytes + self.bias.nbytes)},
            listing=Listing(
                columns=("layer", "KL of the logit lens", "KL of the tuned lens"),
                rows=[(str(layer), old.kl, new.kl) for layer, old, new in held_out],
                what="layers",
                caption="mean divergence from the model's predictions on held-out rows, in nats",
                more="before and after have all",
            ),
        )


def _lines(before: Iterable[LayerLoss], after: Iterable[LayerLoss], field: str) -> dict[str, list[float]]:
    return {
        "logit lens": [getattr(loss, field) for loss in before],
        "tuned lens": [getattr(loss, field) for loss in after],
    }
