"""The Llama of xlstm-jax in plain numpy, one query of one head after another, after its description alone.

Nothing of HookLens is used: names are those of the parameter tree, and every number is float64.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "qk_norm": False,
    "causal": True,
    "theta": 1e4,
    "ffn_multiple_of": 64,
    "ffn_dim_multiplier": 1.0,
    "use_bias": False,
    "mask_across_document_boundaries": False,
    "logits_soft_cap": None,
}


def neurons(embedding_dim: int, multiple_of: int, multiplier: float | None) -> int:
    width = int(8 * embedding_dim / 3)
    width = int(width * multiplier) if multiplier else width
    return -(-width // multiple_of) * multiple_of


def draw_params(config: Mapping[str, Any], seed: int, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Random parameters of a network, norms and biases included, under flat names, blocks one by one."""
    c = {**DEFAULTS, **config}
    d, dh, v = c["embedding_dim"], c["head_dim"], c["vocab_size"]
    nh, h = d // dh, neurons(d, c["ffn_multiple_of"], c["ffn_dim_multiplier"])
    shapes: dict[str, tuple[int, ...]] = {"token_embedding/sharded/embedding": (1, v, d)}
    for i in range(c["num_blocks"]):
        block = f"block_stack/block_{i}"
        maps: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "attn/attn/dense_q": ((d, nh, dh), (nh, dh)),
            "attn/attn/dense_k": ((d, nh, dh), (nh, dh)),
            "attn/attn/dense_v": ((d, nh, dh), (nh, dh)),
            "attn/attn/dense_out": ((nh, dh, d), (d,)),
            "ffn/ffn/proj_up": ((d, h), (h,)),
            "ffn/ffn/proj_up_gate": ((d, h), (h,)),
            "ffn/ffn/proj_down": ((h, d), (d,)),
        }
        for name, (kernel, bias) in maps.items():
            shapes[f"{block}/{name}/kernel"] = kernel
            if c["use_bias"]:
                shapes[f"{block}/{name}/bias"] = bias
        shapes[f"{block}/attn/pre_norm/scale"] = shapes[f"{block}/ffn/pre_norm/scale"] = (d,)
        if c["qk_norm"]:
            shapes[f"{block}/attn/attn/q_norm/scale"] = shapes[f"{block}/attn/attn/k_norm/scale"] = (dh,)
    shapes |= {"lm_head/out_norm/scale": (d,), "lm_head/out_dense/kernel": (d, v)}
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.items():
        # Small embeddings, so that the epsilon of the first norms counts.
        scale, centre = (0.2, 1.0) if name.endswith("scale") else (0.05 if "embedding" in name else 0.3, 0.0)
        params[f"params/{name}"] = (centre + scale * rng.standard_normal(shape)).astype(dtype)
    return params


def stack_blocks(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same parameters as `scan_blocks` lays them out."""
    stacked: dict[str, Any] = {}
    for name, array in params.items():
        *before, block, rest = name.split("/", 3) if "/block_stack/" in name else ("", "", "")
        if not block:
            stacked[name] = array
        else:
            stacked.setdefault("/".join([*before, "block", rest]), []).append((int(block.split("_")[1]), array))
    return {
        name: np.stack([array for _, array in sorted(found, key=lambda one: one[0])]) if type(found) is list else found
        for name, found in stacked.items()
    }


def nest(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters as a tree."""
    tree: dict[str, Any] = {}
    for name, array in params.items():
        *path, last = name.split("/")
        inside = tree
        for word in path:
            inside = inside.setdefault(word, {})
        inside[last] = array
    return tree


def run(
    params: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    ids: np.ndarray,
    pos_idx: np.ndarray | None = None,
    document_borders: np.ndarray | None = None,
) -> np.ndarray:
    """Logits `[batch, pos, vocab]`."""
    c = {**DEFAULTS, **config}
    p = {name.removeprefix("params/"): array.astype(np.float64) for name, array in params.items()}
    n = ids.shape[1]
    logits = []
    for row, tokens in enumerate(ids):
        positions = np.arange(n) if pos_idx is None else pos_idx[row]
        segments = np.zeros(n, dtype=int)
        if document_borders is not None and c["mask_across_document_boundaries"]:
            segments = np.cumsum(document_borders[row].astype(int))
        x = p["token_embedding/sharded/embedding"][0][tokens]
        for i in range(c["num_blocks"]):
            block = {
                name.removeprefix(f"block_stack/block_{i}/"): array
                for name, array in p.items()
                if name.startswith(f"block_stack/block_{i}/")
            }
            x = x + _attend(block, c, _rms(x, block["attn/pre_norm/scale"]), positions, segments)
            x = x + _feed(block, _rms(x, block["ffn/pre_norm/scale"]))
        out = _rms(x, p["lm_head/out_norm/scale"]) @ p["lm_head/out_dense/kernel"]
        cap = c["logits_soft_cap"]
        logits.append(out if cap is None else cap * np.tanh(out / cap))
    return np.stack(logits)


def _rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def _attend(
    block: Mapping[str, np.ndarray], c: Mapping[str, Any], x: np.ndarray, positions: np.ndarray, segments: np.ndarray
) -> np.ndarray:
    n, n_heads = len(x), block["attn/attn/dense_q/kernel"].shape[1]
    out = np.zeros_like(x) + block.get("attn/attn/dense_out/bias", 0.0)
    for head in range(n_heads):
        q, k, v = (
            x @ block[f"attn/attn/dense_{name}/kernel"][:, head]
            + block.get(f"attn/attn/dense_{name}/bias", [0.0] * 99)[head]
            for name in "qkv"
        )
        if c["qk_norm"]:
            q, k = _rms(q, block["attn/attn/q_norm/scale"]), _rms(k, block["attn/attn/k_norm/scale"])
        q, k = (
            np.stack([_rotate(vector, at, c["theta"]) for vector, at in zip(heads, positions, strict=True)])
            for heads in (q, k)
        )
        for query in range(n):
            seen = [key for key in range(n) if (key <= query or not c["causal"]) and segments[key] == segments[query]]
            scores = np.array([q[query] @ k[key] for key in seen]) * n_heads**-0.5
            weights = np.exp(scores - scores.max())
            z = sum(weight * v[key] for weight, key in zip(weights / weights.sum(), seen, strict=True))
            out[query] += z @ block["attn/attn/dense_out/kernel"][head]
    return out


def _rotate(vector: np.ndarray, position: int, theta: float) -> np.ndarray:
    turned = np.empty_like(vector)
    for pair in range(len(vector) // 2):
        angle = position * theta ** (-2 * pair / len(vector))
        a, b = vector[2 * pair], vector[2 * pair + 1]
        turned[2 * pair] = a * np.cos(angle) - b * np.sin(angle)
        turned[2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
    return turned


def _feed(block: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    up, gate = (
        x @ block[f"ffn/ffn/{name}/kernel"] + block.get(f"ffn/ffn/{name}/bias", 0.0)
        for name in ("proj_up", "proj_up_gate")
    )
    return (up * gate / (1 + np.exp(-gate))) @ block["ffn/ffn/proj_down/kernel"] + block.get(
        "ffn/ffn/proj_down/bias", 0.0
    )
