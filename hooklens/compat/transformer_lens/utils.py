"""`transformer_lens.utils` of 2.x."""

import importlib.util
import inspect
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from rich import print as rprint
from torch import Tensor, nn

from hooklens import analysis, generation
from hooklens.compat.transformer_lens import _tokenizing, utilities
from hooklens.optional import import_package
from hooklens.weights import composition

# What stands elsewhere has its name here, too.
USE_DEFAULT_VALUE = _tokenizing.USE_DEFAULT_VALUE
LocallyOverridenDefaults = _tokenizing.LocallyOverridenDefaults
get_attention_mask, get_cumsum_along_dim = _tokenizing.get_attention_mask, _tokenizing.get_cumsum_along_dim
get_input_with_manually_prepended_bos = _tokenizing.get_input_with_manually_prepended_bos
get_tokenizer_with_bos = _tokenizing.get_tokenizer_with_bos
get_tokens_with_bos_removed = _tokenizing.get_tokens_with_bos_removed
get_offset_position_ids, keep_single_column = _tokenizing.get_offset_position_ids, _tokenizing.keep_single_column
override_or_use_default_value = _tokenizing.override_or_use_default_value
tokenize_and_concatenate = _tokenizing.tokenize_and_concatenate
ACTIVATION_FN_DICT, XIELU, xielu = utilities.SUPPORTED_ACTIVATIONS, utilities.XIELU, utilities.xielu
gelu_new = gelu_fast = gelu_pytorch_tanh = utilities.gelu_new
solu = utilities.solu

CACHE_DIR = import_package("huggingface_hub.constants").HUGGINGFACE_HUB_CACHE
SliceInput = int | tuple[int | None, ...] | list[int] | Tensor | np.ndarray | None

_DATASETS = {
    "openwebtext": "stas/openwebtext-10k", "owt": "stas/openwebtext-10k", "pile": "NeelNanda/pile-10k",
    "c4": "NeelNanda/c4-10k", "code": "NeelNanda/code-10k", "python": "NeelNanda/code-10k",
    "c4_code": "NeelNanda/c4-code-20k", "c4-code": "NeelNanda/c4-code-20k", "wiki": "NeelNanda/wiki-10k",
}  # fmt: skip
_LAYER_TYPES = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}
_ACT_NAMES = {
    "attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v", "mlp_pre": "pre",
    "mlp_mid": "mid", "mlp_post": "post",
}  # fmt: skip
_IN_ATTN = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
_IN_MLP = ("pre", "post", "mid", "pre_linear")


class Slice:
    """Part of an axis: an int drops it, a tuple is the arguments of `slice`, a list or tensor chooses, None is all."""

    def __init__(self, input_slice: SliceInput | slice = None) -> None:
        if isinstance(input_slice, tuple | slice):
            self.slice: Any = slice(*input_slice) if isinstance(input_slice, tuple) else input_slice
            self.mode = "slice"
        elif isinstance(input_slice, int):
            self.slice, self.mode = input_slice, "int"
        elif isinstance(input_slice, list | Tensor | np.ndarray):
            self.slice, self.mode = to_numpy(input_slice), "array"
        elif input_slice is None:
            self.slice, self.mode = slice(None), "identity"
        else:
            raise ValueError(f"Invalid input_slice {input_slice}")

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The part of a tensor."""
        index: list[Any] = [slice(None)] * tensor.ndim
        index[dim] = self.slice
        return tensor[tuple(index)]

    def indices(self, max_ctx: int | None = None) -> Any:
        """The numbers of the entries chosen."""
        if self.mode == "int":
            return np.array([self.slice], dtype=np.int64)
        if max_ctx is None:
            raise ValueError("max_ctx must be specified if slice is not an integer")
        return np.arange(max_ctx, dtype=np.int64)[self.slice]

    def __repr__(self) -> str:
        return f"Slice: {self.slice} Mode: {self.mode} "

    @classmethod
    def unwrap(cls, slice_input: "Slice | SliceInput") -> "Slice":
        """A slice of itself or of its input; an int keeps the axis."""
        if isinstance(slice_input, Slice):
            return slice_input
        return cls([slice_input] if isinstance(slice_input, int) else slice_input)


def to_numpy(tensor: Any) -> Any:
    """An array of a tensor, a list, an array or a number."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if isinstance(tensor, list | tuple):
        return np.array(tensor)
    if isinstance(tensor, Tensor):
        return tensor.detach().cpu().numpy()
    if isinstance(tensor, bool | int | float | str):
        return np.array(tensor)
    raise ValueError(f"Input to to_numpy has invalid type: {type(tensor)}")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The name of a hook point by its shorthand: `("k", 6, "a")`, `"k6a"`, `("scale", 4, "ln1")`, `"embed"`."""
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    if (found := re.match(r"([a-z]+)(\d+)([a-z]?.*)", name)) is not None:
        name, layer, layer_type = found.groups(0)  # type: ignore[assignment]
    name = _ACT_NAMES.get(name, name)
    block = "" if layer is None else f"blocks.{layer}."
    part = "attn" if name in _IN_ATTN else "mlp" if name in _IN_MLP else _LAYER_TYPES.get(layer_type or "", layer_type)
    full = f"{block}{part}.hook_{name}" if part else f"{block}hook_{name}"
    return f"ln_final.{full}" if name in ("scale", "normalized") and layer is None else full


def lm_cross_entropy_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"],
    attention_mask: Tensor | None = None, per_token: bool = False,
) -> Tensor:  # fmt: skip
    """The cross-entropy of the next token; pairs of which one is masked count 0."""
    losses = -logits.log_softmax(-1)[..., :-1, :].gather(-1, tokens[..., 1:, None])[..., 0]
    count: Any = losses.numel()
    if attention_mask is not None:
        counts = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
        losses, count = losses * counts, counts.sum()
    return losses if per_token else losses.sum() / count


def lm_accuracy(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """Where the next token is the likeliest one, or how often."""
    hits = logits[..., :-1, :].argmax(-1) == tokens[..., 1:]
    return hits if per_token else hits.sum() / hits.numel()


def sample_logits(
    final_logits: Float[Tensor, "batch d_vocab"], top_k: int | None = None, top_p: float | None = None,
    temperature: float = 1.0, freq_penalty: float = 0.0, tokens: Int[Tensor, "batch pos"] | None = None,
) -> Int[Tensor, " batch"]:  # fmt: skip
    """Draw a token for each row from torch's own generator; at temperature 0 the likeliest."""
    if temperature == 0.0:
        return final_logits.argmax(-1)
    if freq_penalty > 0:
        assert tokens is not None, "Must provide input_tokens if applying a frequency penalty"
        assert tokens.ndim == 2, "Frequency penalty needs tokens [batch, pos]"
    assert top_k is None or top_k > 0, "top_k has to be greater than 0"
    assert top_k is not None or top_p is None or 1.0 >= top_p > 0.0, "top_p has to be in (0, 1]"
    chosen: dict[str, Any] = {"top_k": top_k} if top_k is not None else {"top_p": top_p}
    penalty: dict[str, Any] = {"freq_penalty": freq_penalty, "tokens": tokens} if freq_penalty > 0 else {}
    return generation.sample_logits(final_logits, temperature=temperature, **chosen, **penalty)


def test_prompt(
    prompt: str, answer: str | list[str], model: Any, prepend_space_to_answer: bool = True,
    print_details: bool = True, prepend_bos: bool | None = USE_DEFAULT_VALUE, top_k: int = 10,
) -> None:  # fmt: skip
    """Print rank, logit and probability of an answer (of several: of their first tokens), and the likeliest tokens."""
    answers = [answer] if isinstance(answer, str) else list(answer)
    if prepend_space_to_answer:
        answers = [one if one.startswith(" ") else f" {one}" for one in answers]
    several = len(answers) > 1
    words = [model.to_str_tokens(one, prepend_bos=False) for one in answers]
    asked = model.to_str_tokens(prompt, prepend_bos=prepend_bos)
    behind = model.to_tokens(answers, prepend_bos=False)[:, : 1 if several else None]
    tokens = torch.cat([model.to_tokens(prompt, prepend_bos=prepend_bos).repeat(len(answers), 1), behind], 1)
    if print_details:
        print("Tokenized prompt:", asked)
        print("Tokenized answers:" if several else "Tokenized answer:", words if several else words[0])
    logits, ranks = model(tokens), []
    for index in range(len(asked), len(asked) + (1 if several else len(words[0]))):
        texts = [one[index - len(asked)] for one in words]
        found = list(map(_look_up, logits[:, index - 1], tokens[:, index].tolist()))
        ranks.append([(text, one.Index) for text, one in zip(texts, found, strict=True)])
        if not print_details:
            continue
        lines = [f"[b]Rank: {one.Index: <8} {_tell(one, text)}[/b]" for text, one in zip(texts, found, strict=True)]
        rprint("\n".join([f"Performance on answer token{'s' if several else ''}:", *lines]))
        for best in analysis.logits_to_frame(logits[0, index - 1], k=max(top_k, 1)).head(top_k).itertuples():
            print(f"Top {best.Index}th token. {_tell(best, model.to_string(best.token))}")
    rprint(f"[b]Ranks of the answer tokens:[/b] {ranks if several else [one[0] for one in ranks]}")


def _look_up(logits: Tensor, token: int) -> Any:
    return next(analysis.logits_to_frame(logits, tokens=[token]).itertuples())


def _tell(found: Any, text: str) -> str:
    return f"Logit: {found.logit:5.2f} Prob: {found.probability:6.2%} Token: |{text}|"


test_prompt.__test__ = False  # type: ignore[attr-defined]


def composition_scores(left: Any, right: Any, broadcast_dims: bool = True) -> Tensor:
    """The norm of a product over the product of the norms, of two factored matrices."""
    if broadcast_dims:
        n_left, n_right = left.ndim - 2, right.ndim - 2
        for axis in range(n_left):
            right = right.unsqueeze(axis)
        for axis in range(n_right):
            left = left.unsqueeze(axis + n_left)
    assert left.rdim == right.ldim, f"Composition scores need left.rdim == right.ldim, got {left.shape}, {right.shape}"
    return composition.composition_scores(left, right)


def logits_to_df(logits: Float[Tensor, " d_vocab"], tokenizer: Any = None, top_k: int | None = None) -> Any:
    """The tokens of one position, the likeliest first."""
    table = analysis.logits_to_frame(logits, tokenizer, k=top_k).reset_index(drop=True)
    return table.rename(columns={"token": "token_index", "text": "token_string", "logprob": "log_prob"})


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first entries of every axis."""
    return tensor[tuple(slice(n) for _ in range(tensor.ndim))] if isinstance(tensor, Tensor) else tensor.get_corner(n)


def remove_batch_dim(tensor: Tensor) -> Tensor:
    """The tensor without a first axis of size 1."""
    return tensor.squeeze(0) if tensor.shape[0] == 1 else tensor


def transpose(tensor: Tensor) -> Tensor:
    """The last two axes exchanged."""
    return tensor.transpose(-1, -2)


def is_square(x: Tensor) -> bool:
    """Whether it is a square matrix."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Whether it is a square matrix with zeros above its diagonal."""
    return is_square(x) and x.equal(x.tril())


def repeat_along_head_dimension(tensor: Tensor, n_heads: int, clone_tensor: bool = True) -> Tensor:
    """A copy for each head, `[batch pos n_heads d_model]`; without `clone_tensor` one memory."""
    repeated = tensor[:, :, None].expand(-1, -1, n_heads, -1)
    return repeated.clone() if clone_tensor else repeated


def filter_dict_by_prefix(dictionary: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a prefix, without it and the dot behind it."""
    dotted = f"{prefix.removesuffix('.')}."
    return {name[len(dotted) :]: value for name, value in dictionary.items() if name.startswith(dotted)}


def get_nested_attr(obj: Any, attr_str: str) -> Any:
    """An attribute of an attribute."""
    for name in attr_str.split("."):
        obj = getattr(obj, name)
    return obj


def set_nested_attr(obj: Any, attr_str: str, value: Any) -> None:
    """Set an attribute of an attribute."""
    *path, last = attr_str.split(".")
    setattr(get_nested_attr(obj, ".".join(path)) if path else obj, last, value)


def check_structure(t1: Tensor, t2: Tensor, *, verbose: bool = False) -> None:
    """Print whether neighbouring rows, and columns, of two matrices compare alike."""
    assert t1.ndim == 2
    assert t1.shape == t2.shape
    wrong = {}
    for axis, what in enumerate(("row", "column")):
        one, other = (t.movedim(axis, 0) for t in (t1, t2))
        differs = ((one[:-1] >= one[1:]) != (other[:-1] >= other[1:])).any(1)
        wrong[what] = differs.nonzero().flatten().tolist()
        if verbose:
            print(f"{what}s that differ: {wrong[what]}")
    found = next((f"{what} mismatch: {places}" for what, places in wrong.items() if places), "PASSED")
    print(found)


def is_library_available(name: str) -> bool:
    """Whether a package can be imported."""
    return name in sys.modules or importlib.util.find_spec(name) is not None


def select_compatible_kwargs(kwargs_dict: dict[str, Any], callable: Any) -> dict[str, Any]:
    """The arguments that a function has."""
    return {name: value for name, value in kwargs_dict.items() if name in inspect.getfullargspec(callable).args}


def get_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def warn_if_mps(device: Any) -> None:
    """Say that PyTorch's results on Apple's GPUs may be wrong."""
    if str(device).startswith("mps"):
        logging.warning("mps: PyTorch's results there may be silently wrong")


def print_gpu_mem(step_name: str = "") -> None:
    """Print how much memory of the GPU is in use."""
    print(f"{step_name} ~ {np.round(torch.cuda.memory_allocated() / 2e30, 2)} GiB allocated on GPU.")


def get_dataset(dataset_name: str, **kwargs: Any) -> Any:
    """A small data set of texts by its short name."""
    if dataset_name not in _DATASETS:
        raise ValueError(f"Dataset {dataset_name} not supported")
    return import_package("datasets").load_dataset(_DATASETS[dataset_name], split="train", **kwargs)


def download_file_from_hf(
    repo_name: str, file_name: str, subfolder: str = ".", cache_dir: str | None = CACHE_DIR,
    force_is_torch: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """A file of the hub, read where it is JSON or holds tensors; else its path."""
    hub = import_package("huggingface_hub")
    path = hub.hf_hub_download(repo_name, file_name, subfolder=subfolder, cache_dir=cache_dir, **kwargs)
    if file_name.endswith(".pth") or force_is_torch:
        return torch.load(path, map_location="cpu", weights_only=True)
    return import_package("json").loads(Path(path).read_text(encoding="utf-8")) if file_name.endswith(".json") else path


def clear_huggingface_cache() -> None:
    """Delete what was downloaded from the hub."""
    print("Deleting Hugging Face cache directory and all its contents.")
    shutil.rmtree(CACHE_DIR)


def calc_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    """Inputs and outputs of a map, `[n_heads d_in d_out]` or `[d_in d_out]`; a vector has one input."""
    if not 1 <= tensor.ndim <= 3:
        raise ValueError(f"Fan in and fan out are those of 1 to 3 axes, not of shape {tuple(tensor.shape)}")
    heads, fan_in, fan_out = (1, 1, 1, *tensor.shape)[-3:]
    return fan_in, heads * fan_out


def _init(param: Tensor, gain: float, over: float, kind: Literal["uniform", "normal"]) -> Tensor:
    std = gain / np.sqrt(over)
    if kind == "normal":
        return nn.init.normal_(param, mean=0.0, std=std)
    return nn.init.uniform_(param, -np.sqrt(3.0) * std, np.sqrt(3.0) * std)


def init_xavier_uniform_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Glorot and Bengio 2010, uniform."""
    return _init(param, gain, sum(calc_fan_in_and_fan_out(param)) / 2, "uniform")


def init_xavier_normal_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Glorot and Bengio 2010, normal."""
    return _init(param, gain, sum(calc_fan_in_and_fan_out(param)) / 2, "normal")


def init_kaiming_uniform_(
    param: Tensor, a: float = 0, nonlinearity: Any = "relu", gain: float = 1.0, mode: str = "fan_in"
) -> Tensor:
    """He et al. 2015, uniform."""
    over = calc_fan_in_and_fan_out(param)[mode == "fan_out"]
    return _init(param, gain * nn.init.calculate_gain(nonlinearity, a), over, "uniform")


def init_kaiming_normal_(
    param: Tensor, a: float = 0, nonlinearity: Any = "relu", gain: float = 1.0, mode: str = "fan_in"
) -> Tensor:
    """He et al. 2015, normal."""
    over = calc_fan_in_and_fan_out(param)[mode == "fan_out"]
    return _init(param, gain * nn.init.calculate_gain(nonlinearity, a), over, "normal")
