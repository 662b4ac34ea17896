"""A base model with a LoRA adapter of PEFT, by the arguments of FusionBench's `load_peft_causal_lm`."""

from pathlib import Path
from typing import Any

import torch

from hooklens.arguments import read_flag, read_path, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.optional import import_package
from hooklens.pool.config.dtypes import read_pool_dtype
from hooklens.pool.tokenizer import expand_source


def _read_place(given: object, *, what: str, error: type[HookLensError] = InputError) -> str:
    """A path or a name on the hub, as text."""
    return given if isinstance(given, str) and given else str(read_path(given, what=what, error=error))


@reads(
    base_model_path=_read_place,
    peft_model_path=_read_place,
    torch_dtype=read_pool_dtype,
    is_trainable=read_flag,
    merge_and_unload=read_flag,
    hooked=read_flag,
)
def load_peft_causal_lm(
    base_model_path: str | Path,
    peft_model_path: str | Path,
    torch_dtype: torch.dtype | str | None = "bfloat16",
    # FusionBench's order and kinds of arguments.
    is_trainable: bool = True,  # noqa: FBT001, FBT002
    merge_and_unload: bool = False,  # noqa: FBT001, FBT002
    *,
    hooked: bool = True,
) -> Any:
    """A base model with an adapter, merged into its weights or kept beside them.

    Args:
        base_model_path: the base, a folder or a name on the hub.
        peft_model_path: the adapter, a folder or a name on the hub.
        torch_dtype: of the weights, or its name, FusionBench's short ones too (`"bf16"`); `"auto"` or None: the base's.
        is_trainable: False: no parameter asks for gradients.
        merge_and_unload: merge the adapter, see `HookedCausalLM.from_pretrained(adapter=...)`.
        hooked: give a `HookedCausalLM`; False: PEFT's `PeftModel`, or where it is merged transformers' model.

    Raises:
        CheckpointError: the base or the adapter cannot be found or read, or they do not fit together.
        UnsupportedModelError: the architecture, or the kind of adapter, is not implemented.
        InputError: an argument is not of its kind.
        MissingDependencyError: PEFT is needed (`hooked=False`) and not installed.
    """
    dtype = "auto" if torch_dtype is None else torch_dtype
    if hooked:
        model: Any = HookedCausalLM.from_pretrained(
            base_model_path, adapter=peft_model_path, merge=merge_and_unload, dtype=dtype
        )
    else:
        peft = import_package("peft")
        base = import_package("transformers").AutoModelForCausalLM.from_pretrained(
            expand_source(str(base_model_path)), dtype=dtype
        )
        model = peft.PeftModel.from_pretrained(base, str(peft_model_path), is_trainable=is_trainable)
        model = model.merge_and_unload() if merge_and_unload else model
    if not is_trainable:
        model.requires_grad_(requires_grad=False)
    return model
