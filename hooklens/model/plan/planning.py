"""Which tokens a call runs: what a caller says of them, checked against the network and a key-value cache."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.config import AlibiPositions, BlockConfig, HookedConfig, NoPositions
from hooklens.errors import InputError
from hooklens.hooks.call import Phase
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.kv_cache.documents import ColumnDocuments
from hooklens.model.embed import embeds_positions
from hooklens.model.plan.documents import DocumentMarks, hide_padding, place_documents, read_marks
from hooklens.model.plan.positions import TokenPlan, check_attention_mask, check_positions

Tokens = Int[Tensor, "batch pos"]
Stream = Float[Tensor, "batch pos d_model"]


class Planning:
    """A network that works out which tokens a call runs, before it runs any."""

    cfg: HookedConfig
    transforms: tuple[str, ...]

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device:
            """Where token ids go."""
            ...

        @property
        def cache_device(self) -> torch.device | tuple[torch.device, ...]:
            """Where keys and values lie."""
            ...

        @property
        def dtype(self) -> torch.dtype:
            """The dtype of the weights."""
            ...

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the adapters beside the weights that act; a network alone has none."""
        return ()

    @staticmethod
    def read_documents(
        input: Tokens | Stream,
        document_ids: object = None,
        document_borders: object = None,
        restart_positions: bool | None = None,  # noqa: FBT001
    ) -> DocumentMarks | None:
        """What a caller says about the documents of an input; see `hooklens.model.plan.documents.read_marks`."""
        batch, n_new = input.shape[:2]
        return read_marks(document_ids, document_borders, restart_positions, batch=batch, n_new=n_new)

    def make_plan(
        self,
        input: Tokens | Stream,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
        *,
        phase: Phase = "prefill",
        marks: DocumentMarks | None = None,
    ) -> TokenPlan:
        """Work out which tokens a call runs, and check them against the model and the cache.

        Args:
            input: token ids or a residual stream; only its first two sizes count.
            attention_mask: `[batch pos]`, real (1) and padding (0) columns.
            positions: `[pos]` or `[batch pos]`, in place of what the mask says.
            past_kv_cache: what came before these tokens.
            phase: `"decode"` for generated tokens, of which edits are told.
            marks: the documents of these tokens, from `read_documents`. None: of the row, or of a cache with
                documents the last one.

        Raises:
            InputError: a mask or positions of the wrong shape, positions that change nothing, or too many, or
                documents that do not go with them.
            CacheError: the cache does not fit the model, the batch or the documents.
        """
        cache = past_kv_cache
        batch, n_new = input.shape[:2]
        n_past, past_mask = 0, None
        if cache is not None:
            cache.check_fits(
                self.cfg,
                transforms=self.transforms,
                adapters=self.active_adapters,
                device=self.cache_device,
                dtype=self.dtype,
                batch=batch,
            )
            n_past = len(cache)
            past_mask = cache.previous_attention_mask.to(input.device) if cache.has_padding else None
        # Looked at where it was given: a mask on the host keeps no device waiting.
        checked = check_attention_mask(attention_mask, batch, n_new, n_past)
        given = self._check_positions(positions, batch, n_new, cache)
        if marks is not None:
            checked = hide_padding(checked, marks, batch=batch, n_past=n_past)
        plan = TokenPlan(
            batch=batch,
            n_new=n_new,
            device=input.device,
            attention_mask=None if checked is None else checked.to(input.device),
            past_mask=past_mask,
            n_past=n_past,
            positions=None if given is None else given.to(input.device),
            phase=phase,
            causal=self.cfg.causal,
            document_mask=self.cfg.document_mask,
        )
        if marks is not None or (cache is not None and cache.document_ids is not None):
            plan.documents = place_documents(marks, cache, plan, checked)
        self._check_context(plan)
        return plan

    def _check_positions(
        self, positions: Tensor | None, batch: int, n_new: int, cache: HookedKeyValueCache | None
    ) -> Int[Tensor, "rows pos"] | None:
        """Positions as `[rows pos]`, where giving them has a meaning in this network."""
        given = check_positions(positions, batch, n_new, self.cfg.n_ctx)
        if given is None:
            return None
        if not reads_positions(self.cfg):
            raise InputError("positions were given, and nothing in this network reads them (cfg.positions is none)")
        attending = _attending(self.cfg)
        compared = _hides_by_position(attending) or any(isinstance(one.positions, AlibiPositions) for one in attending)
        if cache is not None and compared:
            raise InputError(
                "positions with a key-value cache: linear biases, sliding windows and chunks need the positions of the "
                "cached keys, which a cache counts from its mask; leave positions or past_kv_cache out"
            )
        return given

    def _check_context(self, plan: TokenPlan) -> None:
        n_ctx = self.cfg.n_ctx
        if plan.n_keys <= n_ctx:
            return
        if plan.counts_within_documents:
            longest = int(plan.document_positions.max()) + 1
        else:
            longest = plan.n_keys if plan.key_mask is None else int(plan.n_tokens.max())
        if longest > n_ctx:
            past = f" ({plan.n_past} of them in the cache)" if plan.n_past else ""
            raise InputError(
                f"the input needs {longest} positions{past}, the model has n_ctx={n_ctx}; shorten the input, or for "
                "positions that extrapolate load with a larger one (from_pretrained(..., n_ctx=...))"
            )


def reads_positions(cfg: HookedConfig) -> bool:
    """Whether anything in a network depends on the positions of tokens, beside their order."""
    attending = _attending(cfg)
    return (
        embeds_positions(cfg)
        or _hides_by_position(attending)
        or any(block.query_temperature is not None for block in attending)
        or not all(isinstance(block.positions, NoPositions) for block in attending)
    )


def _attending(cfg: HookedConfig) -> list[BlockConfig]:
    return [block for block in cfg.blocks if block.attn is not None]


def _hides_by_position(attending: Sequence[BlockConfig]) -> bool:
    return any(block.window is not None or block.chunk is not None for block in attending)


def documents_to_keep(plan: TokenPlan) -> ColumnDocuments | None:
    """What a cache remembers of the documents of a call's tokens."""
    documents = plan.documents
    return None if documents is None else ColumnDocuments(documents.ids, documents.restarts)


def new_mask(plan: TokenPlan) -> Bool[Tensor, "batch pos"]:
    """Which of a call's columns are tokens, as a cache remembers them."""
    if plan.attention_mask is not None:
        return plan.attention_mask
    return torch.ones(plan.batch, plan.n_new, dtype=torch.bool, device=plan.device)
