"""Where a model comes from and goes to: checkpoints, transformers models, state dicts, weight processing."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hooklens.adapters import build_hf_model, open_checkpoint, read_hf_model, write_checkpoint
from hooklens.arguments import (
    optional,
    read_device,
    read_dtype,
    read_flag,
    read_int,
    read_path,
    read_text,
    reads,
    refusal,
    require,
    show,
)
from hooklens.bundled import bundled_path
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, HookLensError
from hooklens.hooks.choice import read_choice
from hooklens.model.decoder import Decoder
from hooklens.model.parameters import ModelWeights, check_tied, fill_parameters, name_as_field
from hooklens.optional import import_package
from hooklens.tokens import Tokenizer, read_tokenizer
from hooklens.weights.processing import process_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="CheckpointMethods")

_RECORD_FILE = "hooklens.json"
_BUNDLED = "bundled:"


_TOKENIZER = optional(read_tokenizer)


def _read_source(given: object, *, what: str, error: type[HookLensError]) -> str | Path:
    path = read_path(given, what=what, error=error)
    return given if isinstance(given, str) else path


def _read_loaded_dtype(given: object, *, what: str, error: type[HookLensError]) -> torch.dtype | str:
    return "auto" if isinstance(given, str) and given == "auto" else read_dtype(given, what=what, error=error)


def _read_layers(given: object, *, what: str, error: type[HookLensError]) -> list[int]:
    """Blocks as a list of numbers; which there are is known when the checkpoint is open."""
    chosen = read_choice(given, what=what, error=error)
    if not isinstance(chosen, tuple):
        raise refusal(given, what, "a list of layers", error)
    return list(chosen)


def _read_shard_size(given: object, *, what: str, error: type[HookLensError]) -> int | str:
    if isinstance(given, str) and re.fullmatch(r"\d+(\.\d+)?\s*[KMGTP]B", given, re.IGNORECASE | re.ASCII):
        return given
    if isinstance(given, str):
        raise refusal(given, what, "a number of bytes, or a text such as '5GB'", error)
    return read_int(given, what=what, least=1, error=error)


def _read_state(given: object, *, what: str, error: type[HookLensError]) -> Mapping[str, Tensor]:
    require(given, kind=Mapping, what=what, expected="a mapping from names to tensors", error=error)
    assert isinstance(given, Mapping)
    wrong = [name for name, value in given.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if wrong:
        listed = ", ".join(f"{show(name)}: {show(given[name])}" for name in wrong[:5])
        raise error(f"{what} holds {listed}, expected tensors by name")
    return given


def _read_transformers_model(given: object, *, what: str, error: type[HookLensError]) -> Any:
    if isinstance(given, nn.Module) and hasattr(getattr(given, "config", None), "to_dict") and hasattr(given, "device"):
        return given
    raise refusal(given, what, "a transformers model (a name or folder goes to from_pretrained)", error)


class CheckpointMethods:
    """Loading, saving and converting a network.

    Attributes:
        tokenizer: a transformers tokenizer, or None.
        transforms: the weight-processing steps that were done, in order.
    """

    cfg: HookedConfig
    tokenizer: Tokenizer | None
    transforms: tuple[str, ...]

    def as_decoder(self) -> Decoder:
        """The network that is loaded or saved."""
        assert isinstance(self, Decoder)
        return self

    @classmethod
    @reads(
        source=_read_source,
        revision=optional(read_text),
        dtype=_read_loaded_dtype,
        device=read_device,
        layers=optional(_read_layers),
        tokenizer=_TOKENIZER,
        cache_dir=optional(read_path),
        local_files_only=read_flag,
    )
    def from_pretrained(
        cls: type[Model],
        source: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        layers: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """Load a checkpoint in Hugging Face format.

        Args:
            source: a name on the hub, a local folder (no network is touched), or a bundled checkpoint
                (`"bundled:tiny-llama"`).
            revision: branch, tag or commit on the hub.
            dtype: of the weights, or its name (`"bfloat16"`); `"auto"` is the checkpoint's own.
            device: where to put the weights.
            layers: keep only these blocks, in this order.
            tokenizer: used in place of the checkpoint's own.
            cache_dir: the hub's cache folder.
            local_files_only: use what the hub's cache holds, and no network.

        Raises:
            CheckpointError: files or tensors are missing, damaged, or too many.
            UnsupportedModelError: the architecture, or a value in its config, is not implemented.
        """
        if isinstance(source, str) and source.startswith(_BUNDLED):
            source = bundled_path(source.removeprefix(_BUNDLED))
        checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        kept = None if layers is None else list(layers)
        model = cls._from_tensors(
            checkpoint.config_for(kept),
            checkpoint.tensors(kept),
            tokenizer=_load_tokenizer(checkpoint.folder) if tokenizer is None else tokenizer,
            device=device,
            dtype=dtype if isinstance(dtype, torch.dtype) else checkpoint.dtype,
        )
        model.transforms = _read_transforms(checkpoint.folder)
        return model

    @classmethod
    @reads(hf_model=_read_transformers_model, tokenizer=_TOKENIZER)
    def from_hf(cls: type[Model], hf_model: "PreTrainedModel", tokenizer: Tokenizer | None = None) -> Model:
        """Take over a transformers model's weights, sharing memory where its layout allows.

        Raises:
            UnsupportedModelError: the architecture, or a value in its config, is not implemented.
        """
        cfg, state = read_hf_model(hf_model)
        return cls._from_tensors(cfg, state.items(), tokenizer=tokenizer, device=hf_model.device)

    @classmethod
    @reads(state=_read_state, cfg=partial(require, kind=HookedConfig, expected="a HookedConfig"), tokenizer=_TOKENIZER)
    def from_state_dict(
        cls: type[Model], state: Mapping[str, Tensor], cfg: HookedConfig, tokenizer: Tokenizer | None = None
    ) -> Model:
        """Build a model from weights under the field's names or those of `state_dict()`.

        They are used as they are, not copied.

        Raises:
            CheckpointError: a missing, unknown or misshapen weight.
        """
        state = name_as_field(cfg, state)
        if "embed.W_E" in state:
            check_tied(state, tied_unembed=cfg.tied_unembed)
        device = state["embed.W_E"].device if "embed.W_E" in state else "cpu"
        return cls._from_tensors(cfg, state.items(), tokenizer=tokenizer, device=device)

    @classmethod
    def _from_tensors(
        cls: type[Model],
        cfg: HookedConfig,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        tokenizer: Tokenizer | None,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> Model:
        with torch.device("meta"):
            model = cls(cfg, tokenizer)  # type: ignore[call-arg]
        # Also what the tensors are made of is read here, one after another.
        with torch.inference_mode(mode=False):
            fill_parameters(model.as_decoder(), tensors, device=device, dtype=dtype)
        return model

    @reads(folder=read_path, dtype=optional(read_dtype), max_shard_size=_read_shard_size)
    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads, tokenizer included.

        Args:
            folder: made if it does not exist.
            dtype: of the written weights; None: the model's.
            max_shard_size: files are split at this size.

        Raises:
            UnsupportedModelError: no Hugging Face architecture can hold this network; the text says why and what
                to do instead.
        """
        write_checkpoint(
            Path(folder),
            self.cfg,
            ModelWeights(self.as_decoder()),
            dtype=dtype,
            max_shard_size=max_shard_size,
            transforms=self.transforms,
        )
        record = Path(folder) / _RECORD_FILE
        if self.transforms:
            record.write_text(json.dumps({"transforms": self.transforms}))
        else:
            record.unlink(missing_ok=True)
        if self.tokenizer is not None and hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(str(folder))

    def to_hf(self) -> "PreTrainedModel":
        """The transformers model with equal logits.

        Raises:
            UnsupportedModelError: no Hugging Face architecture can hold this network.
        """
        return build_hf_model(self.cfg, ModelWeights(self.as_decoder()), transforms=self.transforms)

    @reads(
        fold_ln=read_flag,
        center_writing_weights=read_flag,
        center_unembed=read_flag,
        fold_value_biases=read_flag,
        refactor_factored_attn_matrices=read_flag,
    )
    def process_weights(
        self: Model,
        *,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
        refactor_factored_attn_matrices: bool = False,
    ) -> Model:
        """A new model that computes the same with weights that are easier to read; this one stays as it is.

        See `hooklens.weights.processing` for what each step does, and what it preserves.

        Raises:
            TransformError: a step cannot hold for this architecture; the text says why.
        """
        processed = process_weights(
            ModelWeights(self.as_decoder()),
            self.cfg,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        copied = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in processed.state.items()}
        model = self.from_state_dict(copied, processed.cfg, self.tokenizer)
        model.transforms = (*self.transforms, *processed.steps)
        return model

    def named_weights(self) -> ModelWeights:
        """The weights by name, read when asked for and shared, not copied."""
        return ModelWeights(self.as_decoder())


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None where it ships none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    tokenizer: Tokenizer = import_package("transformers").AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _read_transforms(folder: Path) -> tuple[str, ...]:
    record = folder / _RECORD_FILE
    if not record.exists():
        return ()
    try:
        return tuple(json.loads(record.read_text())["transforms"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{record}: cannot be read as a record of weight processing ({error})") from error
