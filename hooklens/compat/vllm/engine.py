"""Everything that depends on vLLM's inner workings, read against the versions in `READ_AGAINST`.

What is relied upon: a worker has `vllm_config`, `model_runner` and `get_model()`; model runner V2 makes each step's
batch in `prepare_inputs`, whose result has `req_ids`, `num_scheduled_tokens` (a number for each request, in the order
of their tokens) and `positions`; a request's id in the worker is its public id and a random suffix behind a hyphen;
decoder layers take `(positions, hidden_states, residual)` and return `(hidden_states, residual)`, whose sum is the
stream, tokens of all requests one behind the other, padding last.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.axes import find_site
from hooklens.compat.vllm.messages import edit_from_plain, pack, unpack
from hooklens.errors import HookLensError
from hooklens.hooks.edit import Edit
from hooklens.hooks.point import HookPoint

READ_AGAINST = ("0.33",)
# Layers with norms before the branches only, so that a branch's output is what is added to the stream.
LAYOUTS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
POINTS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
EXTENSION = "hooklens.compat.vllm.WorkerExtension"


def version_problem() -> str | None:
    """Why the installed vLLM cannot be used, if it cannot."""
    try:
        found = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "vllm is not installed; it has to be, in the environment that serves the model"
    if ".".join(found.split(".")[:2]) in READ_AGAINST:
        return None
    return f"vllm is {found}, and its inner workings were read in {', '.join(READ_AGAINST)}; install one of these"


def config_problems(config: Any) -> list[str]:
    """What of an engine's configuration makes captures wrong or impossible, each with what to do."""
    parallel = config.parallel_config
    checks = (
        (not config.model_config.enforce_eager, "CUDA graphs replay kernels past all hooks: give enforce_eager=True"),
        (
            config.cache_config.enable_prefix_caching,
            "prefix caching skips tokens, and would keep keys of edited ones: give enable_prefix_caching=False",
        ),
        (config.speculative_config is not None, "speculative decoding runs tokens that are taken back: leave it out"),
        (config.kv_transfer_config is not None, "keys from elsewhere skip tokens: leave kv_transfer_config out"),
        (parallel.pipeline_parallel_size > 1, "no worker has all layers: give pipeline_parallel_size=1"),
        (parallel.data_parallel_size > 1, "each replica sees some requests: give data_parallel_size=1"),
        (parallel.prefill_context_parallel_size > 1, "a worker sees parts of prompts: leave context parallelism out"),
        (parallel.use_ubatching, "micro-batches interleave the requests' tokens: give enable_dbo=False"),
        (not config.use_v2_model_runner, "model runner V1 is used: set VLLM_USE_V2_MODEL_RUNNER=1, if the model can"),
    )
    return [text for is_so, text in checks if is_so]


@dataclass
class _Request:
    row: int
    n_prompt: int
    pieces: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tokens:
    """Neighbouring tokens of one request, as edits ask for them (`hooklens.hooks.call.TokenIndex`)."""

    positions_by_column: range
    length: int
    phase: Any

    @property
    def token_index(self) -> Tensor:
        return torch.tensor([list(self.positions_by_column)])

    @property
    def n_tokens(self) -> Tensor:
        return torch.tensor([self.length])

    columns = None

    @property
    def n_run(self) -> int:
        return len(self.positions_by_column)


class _Session:
    """What is captured and edited between `hooklens_begin` and `hooklens_end`."""

    def __init__(self, order: dict[str, Any], device: torch.device) -> None:
        self.requests = {key: _Request(row, n_prompt) for row, (key, n_prompt) in enumerate(order["requests"])}
        self.names: list[str] = order["names"]
        self.edits: list[tuple[Edit, set[int]]] = [
            (edit_from_plain(plain, device), set(rows)) for plain, rows in order["edits"]
        ]
        self.points: dict[str, HookPoint] = {}
        for name in [*self.names, *(str(edit.name) for edit, _ in self.edits)]:
            self.points[name] = HookPoint(find_site(name))
            self.points[name].__dict__["name"] = name
        self.batch: list[tuple[_Request | None, int, int]] = []
        self.undo: list[Callable[[], Any]] = []
        self.error: str | None = None

    def see_batch(self, batch: Any) -> None:
        """Note which tokens the step to come runs."""
        positions, self.batch, at = batch.positions.tolist(), [], 0
        for key, n_tokens in zip(batch.req_ids, batch.num_scheduled_tokens.tolist(), strict=True):
            known = self.requests.get(key) or self.requests.get(key.rpartition("-")[0])
            start = positions[at]
            if known is not None and positions[at : at + n_tokens] != list(range(start, start + n_tokens)):
                self.error = self.error or f"request {key}: its tokens are not neighbours; positions are not plain"
            self.batch.append((known, start, n_tokens))
            at += n_tokens

    def visit(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        """Edit and capture what passes a point, `[token d_model]`.

        An error inside a step would end the engine, so it is kept until the session ends.

        Returns:
            The tensor and which tokens were edited `[token 1]`; None where none was.
        """
        if self.error is not None:
            return None
        try:
            return self._visit(name, tensor)
        except HookLensError as error:
            self.error = str(error)
            return None

    def _visit(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        edited, at = None, 0
        is_edited = torch.zeros(len(tensor), 1, dtype=torch.bool, device=tensor.device)
        for request, start, n_tokens in self.batch:
            if request is not None:
                part = tensor[at : at + n_tokens]
                if len(part) != n_tokens:
                    raise HookLensError(f"{name}: {len(tensor)} tokens pass, fewer than the step's requests have")
                changed = self._edit(name, part, request, start)
                if changed is not None:
                    edited = tensor.clone() if edited is None else edited
                    edited[at : at + n_tokens] = part = changed
                    is_edited[at : at + n_tokens] = True
                if name in self.names:
                    request.pieces.setdefault(name, []).append((start, part.detach().to("cpu", copy=True)))
            at += n_tokens
        return None if edited is None else (edited, is_edited)

    def _edit(self, name: str, part: Tensor, request: _Request, start: int) -> Tensor | None:
        edits = [edit for edit, rows in self.edits if edit.name == name and request.row in rows]
        if not edits:
            return None
        pieces, is_changed, at = [], False, 0
        for tokens in _split(start, len(part), request.n_prompt):
            piece = part[None, at : at + tokens.n_run]
            at += tokens.n_run
            for edit in edits:
                made = edit.apply(piece, self.points[name], tokens)
                if made is not None:
                    piece, is_changed = made, True
            pieces.append(piece[0])
        return torch.cat(pieces) if is_changed else None

    def close(self) -> None:
        """Take everything off the model."""
        while self.undo:
            self.undo.pop()()


def _split(start: int, n_tokens: int, n_prompt: int) -> Iterator[_Tokens]:
    """Prompt tokens together, new ones each as the step of its own that it is in generation.

    A request that was pushed out runs its new tokens again, behind its prompt.
    """
    end = start + n_tokens
    if start < n_prompt:
        yield _Tokens(range(start, min(end, n_prompt)), n_prompt, "prefill")
    for position in range(max(start, n_prompt), end):
        yield _Tokens(range(position, position + 1), position + 1, "decode")


def check_edit(plain: dict[str, Any], n_prompt: int, d_model: int, dtype: torch.dtype) -> None:
    """Try an edit on a prompt of zeros, before the engine runs anything.

    Raises:
        EditError: what the edit raises.
    """
    edit = edit_from_plain(plain, torch.device("cpu"))
    point = HookPoint(find_site(str(edit.name)))
    point.__dict__["name"] = edit.name
    zeros = torch.zeros(1, n_prompt, d_model, dtype=dtype)
    edit.apply(zeros, point, _Tokens(range(n_prompt), n_prompt, "prefill"))
    edit.apply(zeros[:, :1], point, _Tokens(range(n_prompt, n_prompt + 1), n_prompt + 1, "decode"))


class WorkerExtension:
    """What vLLM adds to its workers: `LLM(..., worker_extension_cls="hooklens.compat.vllm.WorkerExtension")`.

    The methods are called by `VLLMModel`, through `collective_rpc`. Every worker of a tensor-parallel model has the
    whole stream, and edits it alike; the first one's captures count.
    """

    # What vLLM's worker has.
    vllm_config: Any
    model_runner: Any
    get_model: Callable[[], Any]

    def hooklens_describe(self) -> bytes:
        """Sizes of the model, and why hooks cannot be used on it: nothing is raised in the worker."""
        found = version_problem()
        problems = [found] if found else config_problems(self.vllm_config)
        layers = [] if problems else self._hooklens_layers()
        names = sorted({type(layer).__name__ for layer in layers} - set(LAYOUTS))
        if not problems and (names or not layers):
            problems.append(
                f"layers are {', '.join(names) or 'not at model.model.layers'}; known are {', '.join(LAYOUTS)}; load "
                "the checkpoint with HookedCausalLM instead"
            )
        config = self.vllm_config.model_config
        sizes = {"n_layers": len(layers), "d_model": config.get_hidden_size(), "dtype": str(config.dtype)}
        return pack({"problems": problems, **sizes})

    def hooklens_begin(self, order: bytes) -> None:
        """Put hooks on the layers that captures and edits need.

        Args:
            order: packed `requests` (public id and prompt tokens, in the order of the prompts), `names` of hook points
                to capture, `edits` with the rows each acts on.
        """
        self.hooklens_end()
        layers = self._hooklens_layers()
        session = _Session(unpack(order), next(iter(layers[0].parameters())).device)
        self._hooklens_session = session
        runner = self.model_runner
        prepare = runner.prepare_inputs

        def prepare_inputs(*args: Any, **keywords: Any) -> Any:
            batch = prepare(*args, **keywords)
            session.see_batch(batch)
            return batch

        runner.prepare_inputs = prepare_inputs
        session.undo.append(lambda: delattr(runner, "prepare_inputs"))
        # Steps without requests (warming up, profiling) prepare no inputs, and must not meet the last step's.
        session.undo.append(self.get_model().register_forward_hook(lambda *_: session.batch.clear()).remove)
        for name in session.points:
            session.undo.append(_attach(session, name, layers))

    def hooklens_end(self) -> bytes:
        """Take the hooks off; packed `error`, and `rows`: for each prompt, of each name, pieces `(start, tensor)`."""
        session: _Session | None = getattr(self, "_hooklens_session", None)
        if session is None:
            return pack({"error": None, "rows": []})
        session.close()
        del self._hooklens_session
        # Other workers' copies would be sent for nothing.
        rows = [request.pieces for request in session.requests.values()] if getattr(self, "rank", 0) == 0 else []
        return pack({"error": session.error, "rows": rows})

    def _hooklens_layers(self) -> list[nn.Module]:
        return list(getattr(getattr(self.get_model(), "model", None), "layers", ()))


def _attach(session: _Session, name: str, layers: list[nn.Module]) -> Callable[[], None]:
    found = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name)
    assert found is not None
    layer, kind = layers[int(found[1])], found[2]
    if kind in ("hook_attn_out", "hook_mlp_out"):
        branch: Any = layer.self_attn if kind == "hook_attn_out" else layer.mlp

        def see_branch(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            changed = session.visit(name, output)
            return None if changed is None else changed[0]

        return branch.register_forward_hook(see_branch).remove  # type: ignore[no-any-return]
    if kind == "hook_resid_post":

        def see_output(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
            return _visit_stream(session, name, *output)

        return layer.register_forward_hook(see_output).remove

    def see_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        positions, hidden, residual, *rest = args
        if residual is None:
            changed = session.visit(name, hidden)
            return None if changed is None else (positions, changed[0], None, *rest)
        pair = _visit_stream(session, name, hidden, residual)
        return None if pair is None else (positions, *pair, *rest)

    return layer.register_forward_pre_hook(see_input).remove


def _visit_stream(session: _Session, name: str, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
    """Visit a sum that the next norm takes; edited tokens go on as the new sum and zero, which add up exactly."""
    changed = session.visit(name, hidden + residual)
    if changed is None:
        return None
    edited, at = changed
    return torch.where(at, edited, hidden), torch.where(at, torch.zeros_like(residual), residual)
