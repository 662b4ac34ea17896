r"""The Jacobian lens: each layer's stream carried to the end by what, on average, becomes of a small change in it.

**Method** (the `jlens` package, Anthropic 2026; `jacobian_fit` has the definition). The stream is read through the
mean Jacobian of the last stream,

    T_l(x) = J_l x,        J_l = mean of d y / d x_l

so a direction of the stream is read as what it *does* to later predictions, not as what it resembles there. The
direction that raises the logit of token `t`, its dictionary vector, is `v_t = J_l^T (w * W_U[:, t])`, with the weight
(and the centring) of the final norm and without its denominator; the package leaves out the weight, too, which is the
same where norms are folded. Swapping two tokens exchanges the coordinates of the stream along their unit vectors
`V = [v_s v_t]`, by least squares, and leaves what is orthogonal to both as it is:

    x'  =  x + V (swap(c) - c),        c = V^+ x

**How to read it.** A Jacobian is the first order at the prompts' own streams: large changes need not do what it says,
which a run with the swap tells. There is no constant term, so what the lens reads of the mean stream is no prediction;
compare layers and tokens. `lens_losses(model, texts, transport=lens)` tells how far it is from the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.analysis.circuit_weights import fold_norm, unembedding
from hooklens.analysis.lens.fitted.jacobian_fit import Cost, Targets, average_jacobians
from hooklens.analysis.lens.fitted.published import find_jacobian_file, read_jacobian_lens
from hooklens.analysis.lens.fitted.storage import read_lens, write_lens
from hooklens.analysis.lens.fitted.swap import SwapCoordinates
from hooklens.analysis.lens.origin import Origin
from hooklens.analysis.lens.rows import Data, read_data
from hooklens.analysis.lens.transport import Transport, apply_affine
from hooklens.analysis.reading.connection import read_model
from hooklens.analysis.reading.token_names import Tokens, name_tokens, read_token, read_tokens
from hooklens.arguments import (
    optional,
    read_device,
    read_flag,
    read_int,
    read_one_of,
    read_path,
    read_tensor,
    reads,
    refusal,
)
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Summary, format_bytes, format_numbers
from hooklens.errors import CheckpointError, HookLensError, InputError
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas


def _read_lenses(given: object, *, what: str, error: type[HookLensError] = InputError) -> "list[JacobianLens]":
    """Some lenses.

    Raises:
        HookLensError: anything else, or none.
    """
    if not isinstance(given, Sequence) or not given or not all(isinstance(one, JacobianLens) for one in given):
        raise refusal(given, what, "a list of JacobianLens", error)
    return list(given)


@dataclass(frozen=True, kw_only=True)
class JacobianLens(Displayed, Transport):
    """The mean Jacobian of the last stream for each of some layers; `JacobianLens.fit(model, texts)` measures them.

    Attributes:
        jacobians: `J_l`, in the order of `layers`.
        n_prompts: how many prompts it is a mean over.
        targets: what it is the Jacobian of, see `fit`; None: a published file, which does not say.
        cost: what the fit took; None: the lens was read from a file.
    """

    jacobians: Float[Tensor, "layer out into"]
    n_prompts: int
    targets: Targets | None = None
    cost: Cost | None = None

    @classmethod
    @reads(
        model=read_model,
        data=read_data,
        targets=partial(read_one_of, options=get_args(Targets)),
        skip_first=partial(read_int, least=0),
        batch_size=partial(read_int, least=1),
        progress=read_flag,
    )
    def fit(
        cls,
        model: HookedCausalLM,
        data: Data,
        *,
        layers: Choice = None,
        targets: Targets = "later",
        skip_first: int = 16,
        batch_size: int = 32,
        progress: bool = True,
    ) -> "JacobianLens":
        """Measure the mean Jacobian of the last stream with respect to the stream that enters each layer.

        Exact: all rows of all Jacobians, by one forward a prompt and `ceil(d_model / batch_size)` backwards. Nothing is
        drawn at random.

        Args:
            model: the model; no gradient is left on its weights.
            data: a list of texts, or token ids `[row pos]`; prompts count alike, whatever their length.
            layers: the layers, an int, a slice or a list; None: all. All cost what the lowest one does.
            targets: `"later"`: of the sum of the last stream over a token and those behind it, as published; `"same"`:
                of the last stream at the token itself, which takes as many backwards for each token.
            skip_first: tokens at the beginning of a prompt that do not count.
            batch_size: output directions at a time, each in a row of its own.
            progress: show a bar.

        Raises:
            InputError: layers that the model lacks, data of another kind, or prompts of which no token counts.
        """
        chosen = sorted(
            resolve_choice(read_choice(layers, what="layers"), model.cfg.n_layers, what="layers", noun="layers")
        )
        if not chosen:
            raise InputError(f"layers={layers!r} selects none of the {model.cfg.n_layers} layers")
        jacobians, cost = average_jacobians(
            model, data, chosen, targets=targets, skip_first=skip_first, batch_size=batch_size, progress=progress
        )
        return cls(
            layers=tuple(chosen), origin=Origin.of(model), jacobians=jacobians, n_prompts=len(data), targets=targets,
            cost=cost,
        )  # fmt: skip

    @classmethod
    @reads(lenses=_read_lenses)
    def merge(cls, lenses: Sequence["JacobianLens"]) -> "JacobianLens":
        """The lens of all prompts, from lenses of some of them each: a long fit in parts, on several machines say.

        Args:
            lenses: fitted on one model, for the same layers and targets, on prompts of their own.

        Raises:
            InputError: they are not.
        """
        first, *others = lenses
        for place, other in enumerate(others, 1):
            for name in ("layers", "targets", "origin"):
                if getattr(other, name) != getattr(first, name):
                    what = "model" if name == "origin" else f"{name}: {getattr(other, name)} and {getattr(first, name)}"
                    raise InputError(f"merge: lens {place} and lens 0 differ in their {what}; fit them alike")
        n_prompts = sum(lens.n_prompts for lens in lenses)
        total = torch.zeros_like(first.jacobians)
        for lens in lenses:
            total.add_(lens.jacobians.to(total), alpha=lens.n_prompts / n_prompts)
        return replace(first, jacobians=total, n_prompts=n_prompts, cost=None)

    def apply(self, stream: Float[Tensor, "*axes d_model"], layer: int) -> Float[Tensor, "*axes d_model"]:
        """`J_l x`.

        Args:
            stream: `resid_pre` of the layer.
            layer: the layer.

        Raises:
            InputError: the lens has no Jacobian of the layer.
        """
        return apply_affine(stream, self.jacobians[self.place_of(layer)], None)

    @property
    def d_model(self) -> int:
        """The width of the streams."""
        return self.jacobians.shape[-1]

    @reads(model=read_model, layer=read_int)
    @torch.no_grad()
    def directions(self, model: HookedCausalLM, tokens: Tokens, *, layer: int) -> Float[Tensor, "*tokens d_model"]:
        """The dictionary vectors of tokens: the directions of a layer's stream that raise their logits.

        Args:
            model: the model.
            tokens: a token or several, text or ids.
            layer: the layer whose stream is meant.

        Raises:
            InputError: no token, a layer without a Jacobian, or another model.
            TransformError: the model's weights were processed otherwise.
        """
        self.check(model)
        jacobian = self.jacobians[self.place_of(layer)]
        ids = read_tokens(model, tokens, what="tokens")
        wanted = fold_norm(model.ln_final, model.tokens_to_residual_directions(ids.flatten()).T).T
        dtype = torch.promote_types(wanted.dtype, jacobian.dtype)
        found: Tensor = wanted.to(jacobian.device, dtype) @ jacobian.to(dtype)
        return found.reshape(*ids.shape, self.d_model)

    @reads(model=read_model, direction=read_tensor, layer=read_int, k=partial(read_int, least=1))
    @torch.no_grad()
    def top_tokens(self, model: HookedCausalLM, direction: Tensor, *, layer: int, k: int = 10) -> "pandas.DataFrame":
        """The tokens whose logits a direction of a layer's stream raises most, to first order.

        Columns: `token` (text, or its id without a tokenizer) and `value`: the change of its logit, up to the final
        norm's denominator.

        Args:
            model: the model.
            direction: `[d_model]`, of an SAE's decoder, a probe or a steering vector, say.
            layer: the layer whose stream it lies in.
            k: how many tokens.

        Raises:
            InputError: a direction of another shape, a layer without a Jacobian, or another model.
            TransformError: the model's weights were processed otherwise.
        """
        self.check(model)
        if list(direction.shape) != [self.d_model] or not direction.is_floating_point():
            raise refusal(direction, "direction", f"floating numbers [{self.d_model}]", InputError)
        values = self._read_tokens(model, self.apply(direction, layer)[:, None])[:, 0]
        best = values.topk(min(k, len(values)))
        table: pandas.DataFrame = import_package("pandas").DataFrame(
            {"token": name_tokens(model, best.indices), "value": best.values.tolist()}
        )
        return table

    @reads(model=read_model, layer=read_int, n_directions=partial(read_int, least=1), k=partial(read_int, least=1))
    @torch.no_grad()
    def read_directions(
        self, model: HookedCausalLM, *, layer: int, n_directions: int = 5, k: int = 5
    ) -> "pandas.DataFrame":
        """The directions of a layer's stream that the model above is most sensitive to, as tokens that they promote.

        The right singular vectors of the Jacobian. Columns: `direction`, `singular_value`, `end` (`"+"` or `"-"`),
        `writes`: the `k` tokens furthest towards that end.

        Args:
            model: the model.
            layer: the layer.
            n_directions: how many, the largest singular values first.
            k: tokens for each end.

        Raises:
            InputError: a layer without a Jacobian, or another model.
            TransformError: the model's weights were processed otherwise.
        """
        self.check(model)
        U, S, _ = torch.linalg.svd(self.jacobians[self.place_of(layer)])
        n = min(n_directions, len(S))
        logits = self._read_tokens(model, U[:, :n])
        lines = [
            {
                "direction": place,
                "singular_value": float(S[place]),
                "end": end,
                "writes": name_tokens(model, (sign * logits[:, place]).topk(min(k, len(logits))).indices),
            }
            for place in range(n)
            for end, sign in (("+", 1), ("-", -1))
        ]
        table: pandas.DataFrame = import_package("pandas").DataFrame(lines)
        return table

    def _read_tokens(self, model: HookedCausalLM, carried: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_vocab n"]:
        reader = unembedding(model) * model.cfg.logits_scale
        dtype = torch.promote_types(reader.dtype, carried.dtype)
        return reader.to(dtype).T @ carried.to(reader.device, dtype)

    @reads(model=read_model)
    def swap(
        self,
        model: HookedCausalLM,
        source: str | int,
        target: str | int,
        *,
        layers: Choice = None,
        pos: Choice = None,
    ) -> list[SwapCoordinates]:
        """Edits that exchange what the stream holds of two tokens, at the entrance of some layers.

        `model.run_with_hooks(prompt, edits=lens.swap(model, " Rome", " Paris", layers=[2, 3]))` runs them.

        Args:
            model: the model.
            source, target: the two tokens, text or ids.
            layers: layers of the model that the lens has, an int, a slice or a list of their numbers; None: all it has.
            pos: token positions, as for any edit; None: all.

        Raises:
            InputError: no tokens, one and the same token, a layer without a Jacobian, or another model.
            TransformError: the model's weights were processed otherwise.
        """
        pair = [read_token(model, source, what="source"), read_token(model, target, what="target")]
        if pair[0] == pair[1]:
            raise InputError(f"source and target are both token {pair[0]}; expected two tokens")
        chosen = list(self.layers)
        if layers is not None:
            chosen = resolve_choice(
                read_choice(layers, what="layers"), model.cfg.n_layers, what="layers", noun="layers"
            )
        return [
            SwapCoordinates(f"blocks.{layer}.hook_resid_pre", self.directions(model, pair, layer=layer), pos=pos)
            for layer in chosen
        ]

    @reads(device=read_device)
    def to(self, device: torch.device | str) -> "JacobianLens":
        """The lens with its Jacobians on a device."""
        return replace(self, jacobians=self.jacobians.to(device))

    @reads(path=read_path)
    def save(self, path: str | Path) -> None:
        """Write the lens into a folder.

        Args:
            path: the folder; made where there is none.

        Raises:
            CheckpointError: it cannot be written to.
        """
        described = {"layers": list(self.layers), "n_prompts": self.n_prompts, "targets": self.targets}
        write_lens(Path(path), "JacobianLens", {"jacobians": self.jacobians}, self.origin, described)

    @classmethod
    @reads(path=read_path, model=optional(read_model))
    def load(cls, path: str | Path, *, model: HookedCausalLM | None = None) -> "JacobianLens":
        """A lens from the folder that `save` wrote, or from a file of the `jlens` package.

        That file does not say which weights it was fitted on, so `model` has to be given, and the lens holds for it.

        Args:
            path: the folder; for the package the file, or a folder with it as `lens.pt`.
            model: the model to use it with. It is checked; for published files it is what the lens is said to hold for.

        Raises:
            CheckpointError: no lens is there, or it is damaged.
            InputError: the lens is of another model, or a published file is read without a model.
            TransformError: the model's weights were processed; published files are of weights as they are.
        """
        folder = Path(path)
        published = find_jacobian_file(folder)
        if published is not None:
            carried, jacobians, n_read = read_jacobian_lens(published, model)
            assert model is not None
            return cls(layers=carried, origin=Origin.of(model), jacobians=jacobians, n_prompts=n_read)
        tensors, origin, about = read_lens(folder, "JacobianLens", {"jacobians": (-1, -2, -2)})
        layers, n_prompts, targets = about.get("layers"), about.get("n_prompts"), about.get("targets")
        jacobians = tensors["jacobians"]
        counts = isinstance(layers, list) and len(layers) == len(jacobians) and isinstance(n_prompts, int)
        if not counts or targets not in (*get_args(Targets), None):
            raise CheckpointError(
                f"{folder} is damaged: layers {layers!r}, n_prompts {n_prompts!r}, targets {targets!r}"
            )
        lens = cls(
            layers=tuple(about["layers"]), origin=origin, n_prompts=about["n_prompts"], targets=targets,
            jacobians=jacobians,
        )  # fmt: skip
        if model is not None:
            lens.check(model)
        return lens

    def _summary(self) -> Summary:
        return Summary(
            title=(
                f"JacobianLens(layers {format_numbers(self.layers)}, d_model={self.d_model}, "
                f"mean over {self.n_prompts} prompts)"
            ),
            facts={
                "targets": self.targets or "not said by the published file",
                "bytes": f"{format_bytes(self.jacobians.nbytes)}, {self.jacobians.dtype}".replace("torch.", ""),
                "cost": None if self.cost is None else str(self.cost),
            },
        )
