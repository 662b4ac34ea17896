"""Short hashes of what decides a score: the model with every entry of its weights, its tokenizer, and tokens."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.causal_lm import HookedCausalLM

_LENGTH = 16
# Bytes that are brought to the CPU, or made contiguous, at a time.
_CHUNK = 2**26
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
# What a call sets on a fast tokenizer, and HookLens sets itself.
_SETTINGS_OF_CALLS = ("padding", "truncation")


def hash_values(*values: Any) -> str:
    """A hash of values that JSON has."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:_LENGTH]


def model_fingerprint(model: HookedCausalLM) -> str:
    """A hash of configuration, weight processing, the classes of all modules, and every entry of all weights.

    SHA-256 over the memory of parameters and buffers, with a thread per core: about 0.7 seconds for each GB and core.
    """
    modules = [[name, _name_class(module)] for name, module in model.named_modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as threads:
        digests = list(threads.map(tensor_fingerprint, [tensor for _, tensor in tensors]))
    weights = [[name, digest] for (name, _), digest in zip(tensors, digests, strict=True)]
    return hash_values(model.cfg.fingerprint, list(map(str, model.transforms)), modules, weights)


def _name_class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@torch.no_grad()
def tensor_fingerprint(tensor: Tensor) -> str:
    """A hash of a tensor's dtype, shape and every entry, whatever its strides and device."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for part in _split(tensor.detach()):
        # As bytes, since numpy lacks some dtypes.
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _split(tensor: Tensor) -> Iterator[Tensor]:
    """The entries in order, as rows that are not larger than a chunk; only what is not contiguous is copied."""
    entries = max(1, _CHUNK // tensor.itemsize)
    if tensor.is_contiguous() or tensor.ndim < 2:
        yield from (part for part in torch.split(tensor.reshape(-1), entries) if len(part))
        return
    per_row = max(1, tensor[0].numel()) if len(tensor) else 1
    for rows in torch.split(tensor, max(1, entries // per_row)):
        yield rows.reshape(-1)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that a tokenizer is made of, or of its vocabulary where it is no fast one.

    What cannot be seen in a tokenizer of another kind is seen in the tokens of what it encodes.
    """
    if tokenizer is None:
        return hash_values(None)
    special = [str(getattr(tokenizer, name, None)) for name in _SPECIAL_IDS]
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(fast, "to_str"):
        parts = json.loads(fast.to_str())
        made_of: Any = {key: value for key, value in parts.items() if key not in _SETTINGS_OF_CALLS}
    elif callable(getattr(tokenizer, "get_vocab", None)):
        made_of = sorted(map(str, tokenizer.get_vocab().items()))
    else:
        made_of = len(tokenizer)
    return hash_values(type(tokenizer).__qualname__, special, made_of)


def token_fingerprint(tokens: Sequence[int]) -> str:
    """A hash of token ids."""
    return hash_values(list(tokens))


def describe_precision() -> str:
    """Settings of torch under which the same weights give other numbers than by rounding; `"full"` without any."""
    modes = [
        f"autocast on {device} to {torch.get_autocast_dtype(device)}"
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    if torch.get_float32_matmul_precision() != "highest":
        modes.append(f"float32 products are {torch.get_float32_matmul_precision()!r}")
    return ", ".join(modes) or "full"
