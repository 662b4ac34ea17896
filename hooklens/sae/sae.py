"""A sparse autoencoder as a module: encode, decode, load, save, and put at a hook point."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.arguments import refusal
from hooklens.display import Displayed, Listing, Summary, format_bytes, format_count, format_shape
from hooklens.errors import CheckpointError, InputError, join_names
from hooklens.sae.config import SAEConfig
from hooklens.sae.formats import open_sae, write_sae
from hooklens.sae.splice import SAESplice

_ENCODERS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "r_mag", "b_mag"),
}


class SAE(Displayed, nn.Module):
    """A sparse autoencoder, or a transcoder.

    Its parameters can be trained. `encode` and `decode` are plain functions of tensors; hook points come with `at`.

    Args:
        cfg: what it computes. Weights are drawn small, biases and thresholds 0; `load` and `from_state_dict` fill them.

    Attributes:
        cfg: as above.
        W_enc: `[d_in d_sae]`.
        W_dec: `[d_sae d_out]`.
        b_enc, threshold, b_gate, r_mag, b_mag: `[d_sae]`, those that the architecture has.
        b_dec: `[d_out]`.
        W_skip: `[d_out d_in]`, where there is one.

    Example:
        >>> sae = SAE.load("autoencoders/blocks.8.hook_resid_pre")
        >>> with model.hooks(splices=[sae.at("blocks.8.hook_resid_pre", error="keep")]):
        ...     logits, cache = model.run_with_cache(prompt, names_filter="sae_acts")
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    threshold: nn.Parameter
    b_gate: nn.Parameter
    r_mag: nn.Parameter
    b_mag: nn.Parameter
    W_skip: nn.Parameter

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_enc = nn.Parameter(torch.randn(cfg.d_in, cfg.d_sae) * cfg.d_in**-0.5)
        self.W_dec = nn.Parameter(torch.randn(cfg.d_sae, cfg.width_out) * cfg.d_in**-0.5)
        for name in _ENCODERS[cfg.architecture]:
            self.register_parameter(name, nn.Parameter(torch.zeros(cfg.d_sae)))
        self.b_dec = nn.Parameter(torch.zeros(cfg.width_out))
        if cfg.has_skip:
            self.W_skip = nn.Parameter(torch.zeros(cfg.width_out, cfg.d_in))

    def _summary(self) -> Summary:
        cfg, trained = self.cfg, self.cfg.training
        own = dict(self.named_parameters())
        where = (
            trained.hook_name
            if trained.hook_name_out in (None, trained.hook_name)
            else (f"{trained.hook_name} to {trained.hook_name_out}")
        )
        return Summary(
            title=f"SAE: {cfg.architecture}, {cfg.d_in} -> {cfg.d_sae:,} latents -> {cfg.width_out}",
            facts={
                "k": None if cfg.k is None else f"{cfg.k} latents of a token are on",
                "normalizes": None if cfg.normalize_activations == "none" else cfg.normalize_activations,
                "reads": where,
                "trained on": trained.model_name,
                "parameters": f"{format_count(sum(one.numel() for one in own.values()))}, "
                f"{format_bytes(sum(one.nbytes for one in own.values()))}, {self.W_enc.dtype} on {self.W_enc.device}",
            },
            listing=Listing(
                columns=("weight", "shape"),
                rows=[(name, format_shape(one.shape)) for name, one in own.items()],
                what="weights",
                more="named_parameters() has all",
            ),
        )

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], cfg: SAEConfig) -> "SAE":
        """An autoencoder of weights by the names of the attributes; they keep their dtype.

        Raises:
            CheckpointError: names are missing or unknown, or shapes differ.
        """
        with torch.device("meta"):
            sae = cls(cfg)
        own = dict(sae.named_parameters())
        problems = [f"missing {join_names(sorted(own.keys() - state.keys()))}"] if own.keys() - state.keys() else []
        if unknown := sorted(state.keys() - own.keys()):
            problems.append(f"unknown {join_names(unknown)}")
        problems += [
            f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ]
        if problems:
            raise CheckpointError(f"weights of a {cfg.architecture} autoencoder: {'; '.join(problems)}")
        for name in own:
            sae.register_parameter(name, nn.Parameter(state[name].detach().contiguous()))
        return sae

    @classmethod
    def load(
        cls,
        source: str,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        hook_name: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> "SAE":
        """An autoencoder from SAELens's, Gemma Scope's or dictionary_learning's files.

        Args:
            source: a folder, a name on the hub (`"owner/name"`), or any URL that fsspec reads.
            subfolder: the folder in it.
            revision, token: of the hub.
            hook_name: the hook point that it reads, where its files do not say so.
            device: where to put it.
            dtype: of its weights; None: as stored.
            storage_options: for fsspec.

        Raises:
            CheckpointError: the files are not there, are damaged, or in none of these formats.
            ConfigError: a kind that is not implemented, or values that are none.
        """
        cfg, state = open_sae(
            source, subfolder=subfolder, revision=revision, token=token, storage_options=storage_options
        )
        if hook_name is not None:
            cfg = cfg.replace(hook_name=hook_name)
        return cls.from_state_dict(state, cfg).to(device=device, dtype=dtype)

    def save(self, folder: str) -> None:
        """Write it as SAELens reads it: `cfg.json` and `sae_weights.safetensors`."""
        write_sae(folder, self.cfg, {name: one.detach() for name, one in self.named_parameters()})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which it computes."""
        return self.W_enc.dtype

    def pre_activations(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_sae"]:
        """What decides on the latents: of a gated one their magnitudes, before the gate."""
        normed, _ = self._norm(x.to(self.dtype))
        return self._pre(self._centre(normed))

    def encode(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_sae"]:
        """The latents of vectors."""
        return self.read(x)[1]

    def decode(
        self, acts: Float[Tensor, "*axes d_sae"], x: Float[Tensor, "*axes d_in"] | None = None
    ) -> Float[Tensor, "*axes d_out"]:
        """What latents stand for.

        Args:
            acts: the latents.
            x: what they were read of, where that is needed: with norms of vectors, or a skip connection.

        Raises:
            InputError: it is needed and missing.
        """
        has_norm = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        needs_x = self.cfg.has_skip or (has_norm and not self.cfg.is_transcoder)
        if needs_x and x is None:
            raise InputError("decode: what the latents were read of is needed (norms or a skip connection); give x=")
        undo = _nothing if x is None else self._norm(x.to(self.dtype))[1]
        return self.write(acts, undo, x)

    def forward(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_out"]:
        """The reconstruction of vectors, or what a transcoder makes of them."""
        return self.decode(self.encode(x), x)

    def read(self, x: Float[Tensor, "*axes d_in"]) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Pre-activations, latents, and what takes the norm back from a reconstruction."""
        normed, undo = self._norm(x.to(self.dtype))
        centred = self._centre(normed)
        pre = self._pre(centred)
        return pre, self.activate(pre, centred), undo

    def activate(self, pre: Float[Tensor, "*axes d_sae"], centred: Float[Tensor, "*axes d_in"]) -> Tensor:
        """Latents from their pre-activations."""
        kind = self.cfg.architecture
        if kind == "topk":
            best = pre.topk(self.cfg.k or 1, dim=-1)
            return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
        acts = pre.relu()
        if kind == "jumprelu":
            return acts * (pre > self.threshold)
        if kind == "gated":
            return acts * (centred @ self.W_enc + self.b_gate > 0)
        return acts

    def write(self, acts: Tensor, undo: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor:
        """The reconstruction of latents, given what takes the norm back."""
        if self.cfg.rescale_acts_by_decoder_norm:
            acts = acts / self.W_dec.norm(dim=-1)
        out = undo(acts @ self.W_dec + self.b_dec)
        return out + x.to(self.dtype) @ self.W_skip.T if self.cfg.has_skip and x is not None else out

    def at(
        self,
        name: str | None = None,
        *,
        error: str = "keep",
        name_out: str | None = None,
        check: bool = True,
    ) -> SAESplice:
        """A splice that computes with the latents at a hook point; see `SAESplice`.

        Args:
            name: the hook point; None: the one it was trained on.
            error: `"keep"` adds what the reconstruction misses, `"drop"` goes on with the reconstruction.
            name_out: of a transcoder the hook point whose tensor it gives; None: the one it was trained on.
            check: refuse a model that differs from the one it was trained on, as far as that is known.

        Raises:
            InputError: no hook point is known, or another than it was trained on is given.
        """
        if error not in ("keep", "drop"):
            raise refusal(error, "error", "'keep' or 'drop'", InputError)
        return SAESplice(self, name, error=error, name_out=name_out, check=check)

    def _centre(self, normed: Tensor) -> Tensor:
        subtracts = self.cfg.apply_b_dec_to_input and not self.cfg.is_transcoder
        return normed - self.b_dec if subtracts else normed

    def _pre(self, centred: Tensor) -> Tensor:
        if self.cfg.architecture == "gated":
            return centred @ (self.W_enc * self.r_mag.exp()) + self.b_mag
        pre = centred @ self.W_enc + self.b_enc
        return pre * self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre

    def _norm(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Normed vectors, and what takes the norm back from others; a transcoder gives what has another norm."""
        keeps = self.cfg.is_transcoder
        if self.cfg.normalize_activations == "constant_norm_rescale":
            factor = self.cfg.d_in**0.5 / x.norm(dim=-1, keepdim=True)
            return x * factor, _nothing if keeps else lambda out: out / factor
        if self.cfg.normalize_activations == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            # As SAELens computes it: the sample's deviation, and eps beside it.
            std = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), _nothing if keeps else lambda out: out * std + mean
        return x, _nothing


def _nothing(out: Tensor) -> Tensor:
    return out
