"""The config part for mixtures of experts: which layers have one, how tokens are routed, what an expert is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hooklens.adapters.keys.parts import ConfigPart, Key
from hooklens.adapters.keys.reader import ConfigReader
from hooklens.config import MoEConfig, PartConfig

DENSE = PartConfig(kind="mlp")
# Of training, and of what a forward pass gives back besides logits.
INERT_ROUTER_KEYS = ("output_router_logits", "router_aux_loss_coef")
# Written where a network has no mixture; differs from what it has, and is refused there.
_SMALLEST = MoEConfig(n_experts=1, experts_per_token=1, d_expert=1)


def everywhere(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
    """The rule of families all of whose layers have a mixture."""
    return [True] * n_layers


def norm_topk_key(*, default: bool = False) -> Key:
    """The flag for gates that sum to one over the chosen experts; `default` where it is absent."""
    return Key(
        "norm_topk_prob",
        "gate_norm",
        bool,
        default=default,
        decode=lambda is_normed: 1.0 if is_normed else None,
        encode=lambda norm: norm is not None,
    )


def layers_in(reader: ConfigReader, key: str, n_layers: int) -> list[int]:
    """The layers listed under a key, none where it is absent or null. What is no layer goes into `problems`."""
    listed = reader.entries(key, int) if reader.has(key) else []
    if any(not 0 <= layer < n_layers for layer in listed):
        reader.reject(key, f"layers from 0 to {n_layers - 1}")
    return listed


@dataclass(frozen=True, kw_only=True)
class MixtureKeys:
    """A mixture of experts at the MLP's place, in all layers or in some: `mlp`.

    Attributes:
        options: parts that read and write fields of `MoEConfig`, in place of fields of `HookedConfig`.
        fixed: fields of `MoEConfig` that are the same in every checkpoint of the family.
        sparse: which layers have a mixture, from the config and the number of layers; the others have an MLP.
        sparse_keys: what `sparse` reads.
        write_sparse: the keys of `sparse`, from whether each layer has a mixture; None: there are none to write.
    """

    options: tuple[ConfigPart, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    sparse: Callable[[ConfigReader, int], Sequence[bool]] = everywhere
    sparse_keys: tuple[str, ...] = ()
    write_sparse: Callable[[Sequence[bool]], dict[str, Any]] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads."""
        return (*(key for part in self.options for key in part.keys), *self.sparse_keys)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read `mlp`: one description where all layers are alike, else one for each."""
        options = dict(self.fixed)
        for part in self.options:
            options |= part.read(reader, {**fields, **options})
        n_layers = len(reader.layers(fields.get("n_layers", 0)))
        reader.used.update(self.sparse_keys)
        is_sparse = self.sparse(reader, n_layers)
        if reader.problems:
            return {}
        mixture = MoEConfig(**options)
        by_layer = tuple(mixture if sparse else DENSE for sparse in is_sparse)
        return {"mlp": by_layer if len(set(by_layer)) > 1 else (*by_layer, mixture)[0]}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the mixture of the first layer that has one, and which layers have it."""
        given = fields["mlp"]
        by_layer = given if isinstance(given, tuple) else (given,) * fields["n_layers"]
        mixture = next((part for part in (*by_layer, given) if isinstance(part, MoEConfig)), _SMALLEST)
        written: dict[str, Any] = {}
        for part in self.options:
            written |= part.write({**fields, **mixture.options})
        if self.write_sparse is not None:
            written |= self.write_sparse([isinstance(part, MoEConfig) for part in by_layer])
        return written


def every_few_layers(reader: ConfigReader, key: str, n_layers: int) -> list[bool]:
    """Which layers are the last ones of groups as large as a key says, 1 where it is absent."""
    step = reader.get(key, int, 1)
    if step == 0:
        reader.reject(key, "a number of layers, at least 1")
    return [(layer + 1) % max(step, 1) == 0 for layer in range(n_layers)]


def _read_stepped(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
    dense = layers_in(reader, "mlp_only_layers", n_layers)
    sparse = every_few_layers(reader, "decoder_sparse_step", n_layers)
    return [is_sparse and layer not in dense for layer, is_sparse in enumerate(sparse)]


def _write_stepped(is_sparse: Sequence[bool]) -> dict[str, Any]:
    dense = [layer for layer, sparse in enumerate(is_sparse) if not sparse]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def stepped_mixture_keys(*options: ConfigPart, **fixed: Any) -> MixtureKeys:
    """Qwen's mixture: in every so many layers (`decoder_sparse_step`), but in none of those in `mlp_only_layers`.

    Args:
        *options: further parts that read and write fields of `MoEConfig`.
        **fixed: fields of `MoEConfig` that are the same in every checkpoint of the family.
    """
    return MixtureKeys(
        options=(
            # transformers 5 writes the second spelling for some of the families.
            Key("num_experts", "n_experts", int, alias="num_local_experts"),
            Key("num_experts_per_tok", "experts_per_token", int),
            Key("moe_intermediate_size", "d_expert", int),
            norm_topk_key(),
            *options,
        ),
        fixed=fixed,
        sparse=_read_stepped,
        sparse_keys=("mlp_only_layers", "decoder_sparse_step"),
        write_sparse=_write_stepped,
    )
