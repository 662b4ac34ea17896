"""Loading a checkpoint into several processes, each of which keeps its part."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hooklens.adapters import open_checkpoint
from hooklens.arguments import optional, reads, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.loading import PLACES, VARIANT, Source, read_loaded_dtype
from hooklens.errors import ConfigError, InputError
from hooklens.model.decoder import Decoder
from hooklens.parallel.config import ParallelConfig, make_mesh, own_device
from hooklens.parallel.filling import fill_own_parts
from hooklens.parallel.processes import BlockRunner, SharedBlocks
from hooklens.parallel.tensor import TensorParallel
from hooklens.tokens import Tokenizer, read_tokenizer


@reads(
    **PLACES,
    **VARIANT,
    config=partial(require, kind=ParallelConfig, expected="a hooklens.parallel.ParallelConfig"),
    dtype=read_loaded_dtype,
    tokenizer=optional(read_tokenizer),
)
def load(
    source: Source,
    config: ParallelConfig,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype | str = "auto",
    tokenizer: Tokenizer | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> HookedCausalLM:
    """Load a checkpoint into the processes that `torchrun` started, each of which keeps its part of the blocks.

    All processes run the same script and make the same calls on the same input, and all get the whole result: logits,
    caches, what hook points show, gradients of activations. What is divided is the blocks; embeddings, final norm and
    unembedding are whole in each process.

    Parameters are DTensors where processes share them (`parameter.full_tensor()` gives the whole one), and of layers
    that another process has they lie on the meta device and are not trained. Gradients of parameters are what one
    process would have, of each its own part.

    Args:
        source: as for `HookedCausalLM.from_pretrained`.
        config: what is shared.
        revision: branch, tag or commit on the hub.
        subfolder: folder inside the source that holds the checkpoint.
        variant: of several weights in one folder, which.
        token: for the hub; None: the one that is logged in, False: none.
        dtype: of the weights; `"auto"` is the checkpoint's own.
        tokenizer: used in place of the checkpoint's own.
        storage_options: what the file system of a URL is made with.
        cache_dir: the hub's cache folder.
        local_files_only: use what the hub's cache holds, and no network.

    Raises:
        InputError: not under `torchrun`, with another number of processes than the config says, or weights in shares
            with a PyTorch that only averages their gradients.
        ConfigError: heads or neurons that processes cannot share equally, or more stages than layers.
        CheckpointError: files or tensors are missing, damaged, or too many.
        UnsupportedModelError: the architecture is not implemented.

    Example:
        In a script that `torchrun --nproc-per-node=2` starts::

            model = hl.parallel.load("bundled:tiny-llama", hl.parallel.ParallelConfig(tensor=2))
            logits, cache = model.run_with_cache("When Mary and John went to the store ,")
    """
    _check_torch(config)
    mesh = make_mesh(config)
    device = own_device()
    checkpoint = open_checkpoint(
        source,
        adapters=[],
        dtype=dtype if isinstance(dtype, torch.dtype) else None,
        revision=revision,
        subfolder=subfolder,
        variant=variant,
        token=token,
        storage_options=storage_options,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    made_in = dtype if isinstance(dtype, torch.dtype) else checkpoint.dtype
    with torch.device("meta"):
        model = HookedCausalLM(checkpoint.cfg, checkpoint.load_tokenizer() if tokenizer is None else tokenizer)
    model = model.to(made_in)
    shared = SharedBlocks(model, config, mesh)
    own = shared.stages[shared.stage]
    heads = TensorParallel(model, mesh["tensor"]) if config.tensor > 1 else None
    if heads is not None:
        heads.install(model)
    if config.fully_sharded > 1:
        _check_combination(config, heads)
        shared.runner = _shard(model, config, mesh)
    layers = None if config.pipeline == 1 else list(own)
    with torch.inference_mode(mode=False):
        fill_own_parts(model, checkpoint.tensors(layers), heads, layers=own, device=device, dtype=made_in)
    _settle(model, own, device)
    if heads is not None:
        heads.sum_gradients(shared.sums)
    if config.data > 1 and config.fully_sharded == 1:
        for block in model.block_list():
            for parameter in block.parameters():
                if parameter.requires_grad:
                    shared.sums.add(parameter, mesh["data"])
    model.processes = shared
    model.transforms = checkpoint.transforms
    model.generation_config = dict(checkpoint.generation_config)
    return model


def _check_torch(config: ParallelConfig) -> None:
    """Refuse what this PyTorch cannot do.

    Raises:
        InputError: says what, and what to take instead.
    """
    if config.fully_sharded > 1 and not hasattr(FSDPModule, "set_gradient_divide_factor"):
        raise InputError(
            f"fully_sharded={config.fully_sharded} needs a PyTorch whose fully_shard sums gradients, 2.8 or newer, and "
            f"this is {torch.__version__}: install a newer one, or share layers (pipeline=), heads (tensor=) or rows "
            "(data=), which older ones do"
        )


def _check_combination(config: ParallelConfig, heads: TensorParallel | None) -> None:
    """Refuse what torch's sharded weights do not go together with.

    Raises:
        ConfigError: says what, and what to take instead.
    """
    if config.pipeline > 1:
        raise ConfigError(
            f"{config}: weights that lie in shares take no gradient inside a stage of the pipeline; share layers "
            "(pipeline=) or weights (fully_sharded=), not both"
        )
    if heads is not None and heads.has_replicated:
        raise ConfigError(
            f"{config}: this network has weights that act on the heads or neurons of each process (norms of queries "
            "and keys, or of its activation), whose gradients would stay apart where they lie in shares; take tensor= "
            "with data= or pipeline="
        )


def _shard(model: Decoder, config: ParallelConfig, mesh: DeviceMesh) -> BlockRunner:
    """Have each block's weights lie in shares, put together for the time that it runs, by torch's FSDP2.

    Returns:
        What runs the blocks: inside of one module they let go of each other's buffers.
    """
    axes = ("data", "fully_sharded") if config.data > 1 else ("fully_sharded",)
    for block in model.block_list():
        sharded: Any = fully_shard(block, mesh=mesh[axes], reshard_after_forward=True)
        # Each process has the gradient of its own rows, and what is wanted is their sum.
        sharded.set_gradient_divide_factor(1.0)
    runner = BlockRunner(model.block_list())
    fully_shard(runner, mesh=mesh[axes])
    return runner


def _refuse_block(layer: int, *arguments: Any, **keywords: Any) -> Any:
    """In the place of a block's forward in a process that does not have it.

    Raises:
        InputError: says why it cannot run by itself.
    """
    raise InputError(
        f"layer {layer} lies in another process (pipeline=), and runs there in calls of the whole network only. What "
        "runs single blocks (sweeps of patches, paths, circuits) needs all layers in each process: share the network "
        "by tensor=, data= or fully_sharded="
    )


def _settle(model: Decoder, own: range, device: torch.device) -> None:
    """What is no weight comes to the device; layers of other processes stay without values, and are not trained."""
    for layer, block in enumerate(model.block_list()):
        if layer not in own:
            block.requires_grad_(requires_grad=False)
            # Not through nn.Module, which would look for a module.
            block.__dict__["forward"] = partial(_refuse_block, layer)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
