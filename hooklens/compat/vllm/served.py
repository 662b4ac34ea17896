"""A served model in the process that drives it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooklens.arguments import read_flag
from hooklens.arguments.signature import reads
from hooklens.compat.vllm.engine import EXTENSION, POINTS, check_edit, version_problem
from hooklens.compat.vllm.messages import edit_to_plain, pack, unpack
from hooklens.errors import EditError, HookLensError, InputError, UnsupportedModelError
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.choice import read_choice, resolve_choice
from hooklens.hooks.edit import Edit
from hooklens.hooks.names import NamesFilter, select_names
from hooklens.optional import import_package


class VLLMModel:
    """A model that vLLM serves, with HookLens' hook points at the stream and at what the branches add to it.

    Example:
        `llm = LLM(folder, enforce_eager=True, enable_prefix_caching=False, worker_extension_cls=EXTENSION)` with
        `EXTENSION = "hooklens.compat.vllm.WorkerExtension"`, then
        `VLLMModel(llm).run_with_cache(prompts, "resid_post")`.

    Attributes:
        llm: the engine, `vllm.LLM`.
        hook_names: the hook points there are.

    Raises:
        UnsupportedModelError: the engine's version, settings or layers; all that is wrong is listed, with what to do.
    """

    def __init__(self, llm: Any) -> None:
        extension = llm.llm_engine.vllm_config.parallel_config.worker_extension_cls
        if extension != EXTENSION:
            raise UnsupportedModelError(
                f"the engine's worker_extension_cls is {extension!r}; make it with LLM(..., worker_extension_cls="
                f"{EXTENSION!r})"
            )
        found = version_problem()
        if found is not None:
            raise UnsupportedModelError(found)
        about = unpack(llm.collective_rpc("hooklens_describe")[0])
        if about["problems"]:
            raise UnsupportedModelError("this engine cannot be hooked: " + "; ".join(about["problems"]))
        self.llm = llm
        self._n_layers: int = about["n_layers"]
        self._d_model: int = about["d_model"]
        self._dtype: torch.dtype = getattr(torch, about["dtype"].removeprefix("torch."))
        self.hook_names = tuple(f"blocks.{layer}.{point}" for layer in range(self._n_layers) for point in POINTS)

    @reads(edits=read_edits, generated=read_flag)
    def run_with_cache(
        self,
        prompts: Sequence[str | Sequence[int]],
        names_filter: NamesFilter = "resid_post",
        *,
        edits: Sequence[Edit] = (),
        generated: bool = False,
        sampling_params: Any = None,
    ) -> tuple[list[Any], list[dict[str, Tensor]]]:
        """Run prompts and keep what passes hook points.

        Args:
            prompts: texts, which the engine's tokenizer encodes with its special tokens, or token ids.
            names_filter: which of `hook_names`, as in `HookedCausalLM.run_with_cache`.
            edits: values from `hooklens.edits`; `rows` are places in `prompts`.
            generated: keep new tokens, too: all but the last, which never passes the layers.
            sampling_params: `vllm.SamplingParams`; None: one new token, the most likely.

        Returns:
            vLLM's outputs, and for each prompt a dict from names to `[pos d_model]`, in the model's dtype on the CPU;
            both in the order of the prompts.

        Raises:
            InputError: prompts that are none, or several samples for each.
            HookNameError: names that select nothing.
            EditError: edits that do not fit, or cannot act on a served model.
            HookLensError: tokens that passed no hook.
        """
        names = select_names(names_filter, self.hook_names, n_layers=self._n_layers)
        return self._run(prompts, names, edits, sampling_params, generated=generated)

    @reads(edits=read_edits)
    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling_params: Any = None, *, edits: Sequence[Edit] = ()
    ) -> list[Any]:
        """VLLM's outputs with edits in force, on the prompts and on new tokens (an edit's `when`).

        Arguments and errors are those of `run_with_cache`.
        """
        return self._run(prompts, [], edits, sampling_params, generated=False)[0]

    def _run(
        self,
        prompts: Sequence[str | Sequence[int]],
        names: list[str],
        edits: Sequence[Edit],
        sampling_params: Any,
        *,
        generated: bool,
    ) -> tuple[list[Any], list[dict[str, Tensor]]]:
        ids = self._encode(prompts)
        if sampling_params is None:
            sampling_params = import_package("vllm").SamplingParams(max_tokens=1, temperature=0.0)
        if getattr(sampling_params, "n", 1) != 1:
            raise InputError(f"sampling_params has n={sampling_params.n}; expected n=1: repeat the prompts instead")
        placed = self._place(edits, [len(row) for row in ids])
        first = self.llm.request_counter.counter
        keys = [str(first + row) for row in range(len(ids))]
        requests = [(key, len(row)) for key, row in zip(keys, ids, strict=True)]
        order = pack({"requests": requests, "names": names, "edits": placed})
        try:
            self.llm.collective_rpc("hooklens_begin", args=(order,))
            asked = [{"prompt_token_ids": row} for row in ids]
            outputs = self.llm.generate(asked, sampling_params, use_tqdm=False)
        finally:
            reports = [unpack(report) for report in self.llm.collective_rpc("hooklens_end")]
        errors = [report["error"] for report in reports if report["error"]]
        if errors:
            raise HookLensError(f"in the engine: {errors[0]}; the outputs of this run are thrown away")
        if [output.request_id for output in outputs] != keys:
            raise HookLensError("the engine numbered the requests in another way than expected; nobody else may use it")
        rows = next(report["rows"] for report in reports if report["rows"])
        caches = []
        for row, output in enumerate(outputs):
            n_tokens = len(ids[row]) + (len(output.outputs[0].token_ids) - 1 if generated else 0)
            caches.append({name: _join(rows[row].get(name, []), n_tokens, f"prompt {row}, {name}") for name in names})
        return outputs, caches

    def _encode(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
            raise InputError(f"prompts is {prompts!r}; expected a list of texts or of lists of token ids")
        rows: list[list[int]] = []
        for place, prompt in enumerate(prompts):
            row = self.llm.get_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
            if not isinstance(row, list | tuple) or not row or not all(type(token) is int for token in row):
                raise InputError(f"prompts[{place}] is {prompt!r}; expected a text or a list of token ids, not empty")
            rows.append(list(row))
        return rows

    def _place(self, edits: Sequence[Edit], lengths: list[int]) -> list[tuple[dict[str, Any], list[int]]]:
        """Each edit at each of its hook points, with its rows."""
        placed = []
        for edit in edits:
            what = f"edit {type(edit).__name__}({edit.name!r})"
            if edit.head is not None or edit.query_head is not None:
                raise EditError(f"{what}: no hook point of a served model has heads; leave head and query_head out")
            rows = resolve_choice(
                read_choice(edit.rows, what=f"{what}: rows", error=EditError),
                len(lengths),
                what=f"{what}: rows",
                noun="prompts",
                error=EditError,
            )
            for name in select_names(edit.name, self.hook_names, n_layers=self._n_layers):
                one = dataclasses.replace(edit, name=name, rows=None)
                plain = edit_to_plain(one)
                for length in sorted({lengths[row] for row in rows}):
                    check_edit(plain, length, self._d_model, self._dtype)
                placed.append((plain, rows))
        return placed


def _join(pieces: list[tuple[int, Tensor]], n_tokens: int, what: str) -> Tensor:
    """Pieces `(start, [token d_model])` as `[pos d_model]`; of a position that was run again, the last.

    Raises:
        HookLensError: positions that are in no piece.
    """
    have = torch.zeros(n_tokens, dtype=torch.bool)
    whole: Tensor | None = None
    for start, piece in pieces:
        whole = piece.new_empty(n_tokens, piece.shape[-1]) if whole is None else whole
        # A finished request may have run one more token before the engine knew.
        end = min(start + len(piece), n_tokens)
        if start < end:
            whole[start:end], have[start:end] = piece[: end - start], True
    if whole is None or not bool(have.all()):
        raise HookLensError(f"{what}: {int(have.sum())} of {n_tokens} tokens passed the hook point; the rest never did")
    return whole
