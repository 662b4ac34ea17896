"""Where a model is loaded from: checkpoints in folders, on the hub, on any file system; or only their networks."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hooklens.adapters import Checkpoint, Repository, download_checkpoint, open_adapter, open_checkpoint, open_config
from hooklens.adapters.conversion import config_of_layers, config_of_length
from hooklens.adapters.sources.fsspec_files import is_url
from hooklens.arguments import (
    MOST_ENTRIES,
    optional,
    read_device,
    read_dtype,
    read_flag,
    read_int,
    read_one_of,
    read_path,
    read_text,
    reads,
    refusal,
    require,
)
from hooklens.bundled import bundled_path
from hooklens.causal_lm.adapting import read_adapter_name
from hooklens.causal_lm.kept_adapters import DEFAULT_ADAPTER, keep_adapters, take_apart
from hooklens.causal_lm.quantising import (
    Quantisation,
    Value,
    build_kept,
    check_quantisation,
    is_projection,
    quantise_tensors,
)
from hooklens.config import HookedConfig
from hooklens.errors import HookLensError, InputError, UnsupportedModelError, join_names
from hooklens.hooks.choice import read_choice
from hooklens.model.decoder import Decoder
from hooklens.model.parameters import fill_parameters
from hooklens.model.placement.offloading import Offload, open_offload
from hooklens.model.placement.placed import (
    DeviceMap,
    plan_placement,
    read_execution_device,
    read_kind,
    read_max_memory,
    read_offload_folder,
)
from hooklens.model.placement.placement import Placement
from hooklens.tokens import Tokenizer, read_tokenizer

if TYPE_CHECKING:
    from hooklens.adapters.lora import LoraAdapter

Model = TypeVar("Model")
Source = str | Path | Repository

_BUNDLED = "bundled:"
_SEEDS = 2**64


def _read_source(given: object, *, what: str, error: type[HookLensError]) -> Source:
    if isinstance(given, Repository):
        return given
    path = read_path(given, what=what, error=error)
    if isinstance(given, str):
        return bundled_path(given.removeprefix(_BUNDLED)) if given.startswith(_BUNDLED) else given
    return path


def _read_adapter(given: object, *, what: str, error: type[HookLensError]) -> list[Source] | dict[str, Source]:
    """One place where an adapter lies, or several, by name where they have names."""
    if isinstance(given, list | tuple | Mapping):
        if not given:
            raise refusal(given, what, "an adapter, a list of them, or adapters by name", error)
        if isinstance(given, Mapping):
            names = {read_adapter_name(name, what=f"a name in {what}", error=error): name for name in given}
            return {name: _read_source(given[key], what=f"{what}[{key!r}]", error=error) for name, key in names.items()}
        return [_read_source(one, what=f"{what}[{place}]", error=error) for place, one in enumerate(given)]
    return [_read_source(given, what=what, error=error)]


def _read_token(given: object, *, what: str, error: type[HookLensError]) -> str | bool:
    if isinstance(given, bool):
        return given
    if isinstance(given, str) and given:
        return given
    # The text of an error is no place for a token.
    raise error(f"{what} is {type(given).__name__}; expected a text, or False for none")


def read_loaded_dtype(given: object, *, what: str, error: type[HookLensError]) -> torch.dtype | str:
    """A dtype, or "auto"."""
    return "auto" if isinstance(given, str) and given == "auto" else read_dtype(given, what=what, error=error)


def _read_layers(given: object, *, what: str, error: type[HookLensError]) -> list[int]:
    """Blocks as a list of numbers; which there are is known when the checkpoint is open."""
    chosen = read_choice(given, what=what, error=error)
    if not isinstance(chosen, tuple):
        raise refusal(given, what, "a list of layers", error)
    return list(chosen)


_ON_THE_HUB: dict[str, Any] = {
    "source": _read_source,
    "revision": optional(read_text),
    "subfolder": optional(read_text),
    "token": optional(_read_token),
    "cache_dir": optional(read_path),
}
PLACES: dict[str, Any] = {
    **_ON_THE_HUB,
    "local_files_only": read_flag,
    "storage_options": optional(partial(require, kind=Mapping, expected="options of the file system, by name")),
}
"""Readers of the arguments that say where a checkpoint lies."""
VARIANT: dict[str, Any] = {"variant": optional(read_text)}
_KEPT: dict[str, Any] = {
    "layers": optional(_read_layers),
    "n_ctx": optional(partial(read_int, least=1, most=MOST_ENTRIES)),
}


class LoadingMethods:
    """Loading a network, with its weights or without."""

    @classmethod
    @reads(
        **PLACES,
        **VARIANT,
        **_KEPT,
        dtype=read_loaded_dtype,
        device=read_device,
        device_map=optional(read_kind),
        max_memory=read_max_memory,
        offload_folder=read_offload_folder,
        execution_device=read_execution_device,
        tokenizer=optional(read_tokenizer),
        quantize=partial(read_one_of, options=("int8", "int4", "keep", None)),
        adapter=optional(_read_adapter),
        merge=read_flag,
    )
    def from_pretrained(
        cls: type[Model],
        source: Source,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        device_map: DeviceMap | None = None,
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | Path | None = None,
        execution_device: torch.device | str | int | None = None,
        layers: Sequence[int] | None = None,
        n_ctx: int | None = None,
        tokenizer: Tokenizer | None = None,
        quantize: Quantisation | None = None,
        adapter: Source | Sequence[Source] | Mapping[str, Source] | None = None,
        merge: bool = True,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """Load a checkpoint in Hugging Face format.

        The config is read and checked before any weight is fetched. From a URL or a `Repository` safetensors files are
        read by ranges, tensor by tensor: no copy of them is written, and `layers=` fetches only what those blocks need.

        Quantised weights (fp8, mxfp4, compressed-tensors, GPTQ, AWQ, bitsandbytes, torchao's int8) are
        dequantised, one by one, unless `quantize="keep"`. A model with quantised projections runs, and is hooked and
        edited, as any other; its `W_Q` and the field's other names give what they are dequantised, copies that are not
        assigned. `model.dequantize()` is the plain model.

        A source of every kind may be in an old format of the field, which is read and not written: TransformerLens's
        (`config.json` and a `.pth` file), nanoGPT's (`ckpt.pt`), Meta's (`params.json` and `consolidated.*.pth`).

        A source that is a LoRA adapter of PEFT gives the base that it names with the adapter merged, which a warning
        says. Merging needs no package: weights become `W + s B A` (with DoRA their rows have the lengths that it says),
        added in float32 or float64 and rounded once, to `dtype`. Where embedding and unembedding are tied and an
        adapter changes one of them, they part, as they do in PEFT until it merges; PEFT then changes both.

        Args:
            source: a name on the hub, a local folder (no network is touched), an fsspec URL (`"s3://bucket/folder"`,
                `"gs://..."`, `"memory://..."`), a `hooklens.adapters.Repository`, a bundled checkpoint
                (`"bundled:tiny-llama"`), or the path or URL of a file in an old format.
            revision: branch, tag or commit on the hub.
            subfolder: folder inside the source that holds the checkpoint, or file there in an old format.
            variant: of several weights in one folder, which: `"fp16"` for `model.fp16.safetensors`; of files of
                TransformerLens's from several times in training, the number of steps or tokens that the name ends with.
            token: for the hub; None: the one that is logged in, False: none.
            dtype: of the weights, or its name (`"bfloat16"`); `"auto"` is the checkpoint's own.
            device: where to put the weights.
            device_map: puts the weights on several devices, each read straight to its own, see `dispatch`: a mapping
                from parts (`"embed"`, `"pos_embed"`, `"blocks.0"` and so on or `"blocks"` for all of them,
                `"ln_final"`, `"unembed"`; `""` is the whole network) to devices, or `"auto"`, `"balanced"`,
                `"balanced_low_0"`, `"sequential"`, which need the package accelerate. What finds no room on the
                accelerators lies on the CPU, and what finds none there, with `offload_folder`, on the disk. A mapping
                may say `"disk"`, too.
            max_memory: what an automatic `device_map` may use, bytes or a text such as `"10GiB"` by number of an
                accelerator, or `"cpu"`; None: what is free.
            offload_folder: where the weights of parts on `"disk"` are written, each once, while they are read: as many
                bytes as they have. They are mapped from there, and their files have no names: the room is free
                again when the model, or the process, is gone. Such weights cannot be changed or trained.
            execution_device: where parts on `"cpu"` and `"disk"` compute: each weight is brought to it for the operator
                that reads it, and let go of. None: parts on `"cpu"` compute there, those on `"disk"` on the first
                accelerator of `device_map`, else on the CPU.
            layers: keep only these blocks, in this order.
            n_ctx: longest sequence the model accepts; None: the checkpoint's. Computed positions (rotary, ALiBi) go on
                past the checkpoint's length, unchanged; of learned ones there are only those that were learned.
            tokenizer: used in place of the checkpoint's own.
            quantize: have the projections of attention, MLPs and experts quantised, one by one while they are read
                (the experts of a layer: all that have one name); embeddings, unembedding, norms, biases, routers and
                gates stay plain, and `dtype` is the one that is computed in. `"int8"`: 8 bits, a scale for each output
                (torchao); `"int4"`: 4 bits, NF4 in blocks of 64 (bitsandbytes); `"keep"`: what the checkpoint holds
                quantised stays as few bits as it has there, in any of the formats that are read, experts too. int8 with
                a scale for each output is multiplied with by torchao, bitsandbytes' 4 bits by bitsandbytes; all others
                on any device and without a further package, by what is dequantised at each call: to the bit the
                weights that None gives. No inputs are rounded to fewer bits. None: all is plain.
            adapter: a LoRA adapter of PEFT, as a source is given, or a list of them, which are added one after the
                other; with `merge=False` one, which is called `"default"`, or several by name. `token`, `cache_dir` and
                `local_files_only` hold for adapters on the hub, and `storage_options` for URLs.
            merge: add the adapter to the weights. False: keep it beside them, in layers of peft's, with a hook point at
                what it adds, trainable and switchable, see `add_adapter`; of several the first acts.
            storage_options: what the file system of a URL is made with (credentials, endpoint).
            cache_dir: the hub's cache folder.
            local_files_only: use what the hub's cache holds, and no network.

        Raises:
            CheckpointError: files or tensors are missing, damaged, or too many, or an adapter does not fit the model.
                Damage inside the entries of a tensor is not seen.
            UnsupportedModelError: the architecture, or a value in its config, is not implemented; or weights cannot be
                kept as they are. Or an adapter is of a kind that is not implemented, or cannot be added to these
                weights.
            InputError: a layer does not exist, there are fewer than `n_ctx` learned positions, an option that this
                kind of source has not, a dtype in which quantised maps do not compute, names, devices or memory in
                `device_map` that do not fit the network, quantised weights that would be offloaded, or a folder that
                cannot be written to or has too little room; before any weight is read.
            MissingDependencyError: the package of the URL's file system, or the one that quantises, is not installed,
                or accelerate is not.
        """
        if device_map is not None and torch.device(device).type != "cpu":
            raise InputError(f"device={str(device)!r} and device_map both say where weights go; give one of them")
        if max_memory is not None and device_map is None:
            raise InputError("max_memory goes with device_map='auto', and no device_map was given")
        for word, value in (("offload_folder", offload_folder), ("execution_device", execution_device)):
            if value is not None and device_map is None:
                raise InputError(f"{word} goes with device_map, and no device_map was given")
        named = _open_adapters(
            adapter,
            merge=merge,
            token=token,
            storage_options=storage_options,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        checkpoint = open_checkpoint(
            source,
            adapters=list(named.values()) if merge else [],
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            token=token,
            storage_options=storage_options,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        kept = None if layers is None else list(layers)
        beside = {} if merge else take_apart(named, checkpoint, kept)
        cfg, made_in = checkpoint.config_for(kept, n_ctx=n_ctx), dtype
        if not isinstance(made_in, torch.dtype):
            made_in = checkpoint.dtype
        place: torch.device | str | Placement = device
        offload: Offload | None = None
        if device_map is not None:
            make_meta: Any = cls
            # Read above.
            folder: Any = offload_folder
            computes: Any = execution_device
            place = plan_placement(
                device_map,
                cfg,
                made_in,
                make_meta,
                max_memory=max_memory,
                may_spill=folder is not None,
                execution_device=computes,
            )
            _refuse_offloading(place, quantize)
            offload = open_offload(place, cfg, made_in, folder, device_map=device_map)
        model: Any = build_from_tensors(
            cls,
            cfg,
            _read_tensors(checkpoint, kept, n_ctx=n_ctx, quantize=quantize, device=place, dtype=made_in),
            tokenizer=checkpoint.load_tokenizer() if tokenizer is None else tokenizer,
            device=place,
            dtype=made_in,
            by_columns=True,
            offload=offload,
        )
        model.transforms = checkpoint.transforms
        model.generation_config = dict(checkpoint.generation_config)
        keep_adapters(model, beside, checkpoint.cfg, kept)
        return model  # type: ignore[no-any-return]

    @classmethod
    @reads(
        **PLACES,
        **_KEPT,
        dtype=read_dtype,
        device=read_device,
        seed=optional(partial(read_int, least=0, most=_SEEDS - 1)),
    )
    def from_config_of(
        cls: type[Model],
        source: Source,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "meta",
        seed: int | None = None,
        layers: Sequence[int] | None = None,
        n_ctx: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """The network of a checkpoint without its weights: of the source only `config.json` is fetched.

        Args:
            source: as for `from_pretrained`.
            revision: branch, tag or commit on the hub.
            subfolder: folder inside the source that holds the checkpoint.
            token: for the hub; None: the one that is logged in, False: none.
            dtype: of the weights.
            device: `"meta"`: the weights have shapes and no values, and take no memory. Any other: fresh random ones.
            seed: of fresh weights; None: drawn from torch's own generator.
            layers: keep only these blocks, in this order.
            n_ctx: longest sequence the model accepts; None: the checkpoint's.
            storage_options: what the file system of a URL is made with.
            cache_dir: the hub's cache folder.
            local_files_only: use what the hub's cache holds, and no network.

        Raises:
            CheckpointError: there is no `config.json`, or it is damaged.
            UnsupportedModelError: the architecture, or a value in its config, is not implemented.
            InputError: a layer does not exist, there are fewer than `n_ctx` learned positions, or an option that this
                kind of source has not.
        """
        cfg = open_config(
            source,
            revision=revision,
            subfolder=subfolder,
            token=token,
            storage_options=storage_options,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        with torch.device("meta"):
            made: Any = cls(config_of_length(config_of_layers(cfg, layers), n_ctx))  # type: ignore[call-arg]
        made = made.to(dtype)
        if torch.device(device).type != "meta":
            with torch.inference_mode(mode=False):
                made = made.to_empty(device=device)
                made.initialize(seed=seed)
        return made  # type: ignore[no-any-return]


def _refuse_offloading(place: Placement, quantize: Quantisation | None) -> None:
    """Refuse quantised weights that would lie elsewhere than they compute.

    Raises:
        InputError: there would be some.
    """
    if quantize is not None and place.offloaded:
        raise InputError(
            f"quantize={quantize!r} and device_map offloads {join_names(list(place.offloaded), limit=6)}: quantised "
            "weights are not offloaded. Leave out one of the two"
        )


def _open_adapters(
    sources: Source | Sequence[Source] | Mapping[str, Source] | None,
    *,
    merge: bool,
    token: str | bool | None,
    storage_options: Mapping[str, Any] | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> "dict[str, LoraAdapter]":
    """The adapters that are to be merged, or kept beside the weights, by name.

    Raises:
        InputError: names of adapters that are merged, several without names that are not, or none that are not.
    """
    if merge and isinstance(sources, dict):
        raise InputError(
            f"adapter holds adapters by name, {join_names(sources)}, and merged into the weights they have none; give "
            "a list of them, or merge=False to keep them beside the weights"
        )
    if not merge and (sources is None or (isinstance(sources, list) and len(sources) > 1)):
        found = "no adapter" if sources is None else "adapters without names"
        raise InputError(
            f"merge=False and {found} given; expected adapter=, the place of one, or several by name: "
            "adapter={'one': ..., 'other': ...}. The source is their base"
        )
    if sources is None:
        return {}
    if isinstance(sources, list):
        sources = {str(place) if merge else DEFAULT_ADAPTER: one for place, one in enumerate(sources)}
    assert isinstance(sources, dict)
    return {
        name: open_adapter(
            one,
            **_options_of(
                one,
                storage_options=storage_options,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            ),
        )
        for name, one in sources.items()
    }


def _options_of(source: Source, *, storage_options: Mapping[str, Any] | None, **hub: Any) -> dict[str, Any]:
    """Of the options for where files lie those that this kind of source has."""
    if isinstance(source, Repository):
        return {}
    return {"storage_options": storage_options} if isinstance(source, str) and is_url(source) else hub


def _read_tensors(
    checkpoint: Checkpoint,
    layers: list[int] | None,
    *,
    n_ctx: int | None,
    quantize: Quantisation | None,
    device: torch.device | str | Placement,
    dtype: torch.dtype,
) -> Iterable[tuple[str, Value]]:
    """A checkpoint's weights, and for those that are to be quantised linear maps."""
    if quantize is None:
        return checkpoint.tensors(layers, n_ctx=n_ctx)
    check_quantisation(quantize, dtype)
    if quantize == "keep":
        return build_kept(checkpoint.kept_tensors(layers, n_ctx=n_ctx), device=device, dtype=dtype)
    cfg = checkpoint.config_for(layers, n_ctx=n_ctx)
    projections = {name for name, weight in cfg.description.weights.items() if is_projection(weight)}
    dense = checkpoint.tensors(layers, n_ctx=n_ctx, let_go=projections)
    return quantise_tensors(dense, cfg, quantize, device=device, dtype=dtype)


def build_from_tensors(
    kind: type[Model],
    cfg: HookedConfig,
    tensors: Iterable[tuple[str, Value]],
    *,
    tokenizer: Tokenizer | None,
    device: torch.device | str | Placement,
    dtype: torch.dtype | None = None,
    by_columns: bool = False,
    offload: Offload | None = None,
) -> Model:
    """A model of a class from its weights, read one after another.

    Args:
        kind: the class.
        cfg: the network.
        tensors: names and weights in their logical shapes, or linear maps in their place.
        tokenizer: of the model.
        device: where to put the weights, all of them or each part.
        dtype: of the weights; None: their own.
        by_columns: see `fill_parameters`.
        offload: likewise.
    """
    with torch.device("meta"):
        model = kind(cfg, tokenizer)  # type: ignore[call-arg]
    assert isinstance(model, Decoder)
    # Also what the tensors are made of is read here.
    with torch.inference_mode(mode=False):
        fill_parameters(model, tensors, device=device, dtype=dtype, by_columns=by_columns, offload=offload)
        if isinstance(device, Placement):
            model.settle_placement(device)
    return model


@reads(**PLACES)
def is_supported(
    source: Source,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> bool:
    """Whether HookLens has the network of a checkpoint, by its `config.json`, all that is fetched.

    Why one is not supported is told by `HookedCausalLM.from_config_of(source)`.

    Args:
        source: as for `HookedCausalLM.from_pretrained`.
        revision: branch, tag or commit on the hub.
        subfolder: folder inside the source that holds the checkpoint.
        token: for the hub; None: the one that is logged in, False: none.
        storage_options: what the file system of a URL is made with.
        cache_dir: the hub's cache folder.
        local_files_only: use what the hub's cache holds, and no network.

    Raises:
        CheckpointError: there is no `config.json`, or it is damaged.
        InputError: an option that this kind of source has not.
    """
    try:
        open_config(
            source,
            revision=revision,
            subfolder=subfolder,
            token=token,
            storage_options=storage_options,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except UnsupportedModelError:
        return False
    return True


@reads(**_ON_THE_HUB, **VARIANT)
def download(
    source: Source,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Fetch a checkpoint from the hub into its cache, to be loaded later, also without network; give the folder.

    Nothing is fetched of a checkpoint that HookLens could not load. A local folder is given back as it is.

    Args:
        source: a name on the hub.
        revision: branch, tag or commit.
        subfolder: folder of the repository that holds the checkpoint.
        variant: of several weights in one folder, which.
        token: None: the one that is logged in; False: none.
        cache_dir: the hub's cache folder.

    Raises:
        CheckpointError: there is no such repository, it is not open to you, or the download failed.
        UnsupportedModelError: the architecture, or a value in its config, is not implemented.
        InputError: a URL or a `Repository`, of which no copy is kept.
    """
    return download_checkpoint(
        source, revision=revision, subfolder=subfolder, variant=variant, token=token, cache_dir=cache_dir
    )
