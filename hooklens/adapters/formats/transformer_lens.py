"""TransformerLens's own checkpoints (Nanda and Bloom 2022): `config.json` in its words, and a `.pth` state dict.

The toy models of the field are such: attention-only and SoLU models of one to twelve layers. What the words of
`config.json` mean is told in `transformer_lens_config`, and what tensors are called in
`hooklens.weights.transformer_lens`. Peculiarities:

- Every map has a bias; files of before a bias was added to the library lack it, and it is 0.
- The first files have other layouts; see `early_layouts`.
- Settings of the training run stand in the same file; they are not read.
- Where weights of earlier in training are there, they are in the folder `checkpoints`, and their names end with the
  number of steps or tokens.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from hooklens.adapters.files.disk import load_state, read_json
from hooklens.adapters.formats.early_layouts import in_todays_layout
from hooklens.adapters.formats.opened import FieldModel
from hooklens.adapters.formats.place import EARLIER, Place
from hooklens.adapters.formats.transformer_lens_config import NEEDED, read_words
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, join_names
from hooklens.weights.names import bare_names
from hooklens.weights.transformer_lens import read_state

_CONFIG = "config.json"
# The flags of biases, by the biases that they give.
_BIASES = {
    "q_bias": "b_Q", "k_bias": "b_K", "v_bias": "b_V", "out_bias": "b_O", "mlp_in_bias": "b_in",
    "mlp_out_bias": "b_out", "unembed_bias": "b_U",
}  # fmt: skip


class TransformerLensModel:
    """One state dict of TransformerLens's.

    Args:
        place: the folder that holds `config.json`.
        weights: name of the `.pth` file.
    """

    def __init__(self, place: Place, weights: str) -> None:
        self._place, self._weights = place, weights

    @property
    def place(self) -> Place:
        """The folder that holds `config.json`."""
        return self._place

    @property
    def names(self) -> Collection[str]:
        """`config.json` and the file of weights."""
        return [_CONFIG, self._weights]

    def read_network(self) -> HookedConfig:
        """The network that `config.json` describes, with all biases.

        Raises:
            UnsupportedModelError: values that are missing, of another kind, or not implemented; all are listed.
        """
        return read_words(_read(self._place), where=f"{self._place.where}/{_CONFIG}")

    def open(self) -> FieldModel:
        """The tensors, held against the network.

        Raises:
            CheckpointError: they are not those of this network.
        """
        cfg = self.read_network()
        stored = load_state(self._place.fetch([self._weights]) / self._weights)
        bare = {name: stored[full] for full, name in bare_names(stored).items()}
        state = in_todays_layout(read_state(bare, cfg), n_heads=cfg.n_heads, n_layers=cfg.n_layers)
        where = f"{self._place.where}/{self._weights}"
        return FieldModel(without_absent_biases(cfg, state), state, where=where)


def _read(place: Place) -> dict[str, Any]:
    return read_json(place.fetch([_CONFIG]) / _CONFIG)


def without_absent_biases(cfg: HookedConfig, state: Mapping[str, Tensor]) -> HookedConfig:
    """The network without the biases that no layer has in the file: they are 0."""
    declared, present = ({name.rpartition(".")[2] for name in names} for names in (cfg.description.weights, state))
    changes = {field: False for field, bias in _BIASES.items() if bias in declared - present}
    return cfg.replace(**changes) if changes else cfg


def find(
    place: Place, file: str | None, variant: str | None, *, above: Callable[[], Place] | None = None
) -> TransformerLensModel | None:
    """The checkpoint of a `.pth` file, or the last one in a folder, where `config.json` is in its words.

    Args:
        place: the folder.
        file: name of the file; None: the last one, or that of the variant.
        variant: what the name ends with: `"final"`, or the number of steps or tokens.
        above: gives the folder that this one lies in, where its `config.json` is that of the file.

    Raises:
        CheckpointError: there is no such file, or there are several of which none is the final one.
    """
    if _CONFIG not in place.names():
        # Weights of earlier in training lie below the config.
        return None if above is None else find(above(), f"{EARLIER}/{file}", variant)
    config = _read(place)
    if any(key in config for key in ("model_type", "architectures")) or not all(key in config for key in NEEDED):
        return None
    return TransformerLensModel(place, _choose(place, variant) if file is None else file)


def _choose(place: Place, variant: str | None) -> str:
    """The name of the file that holds the weights."""
    every = sorted(name for name in place.names() if name.endswith(".pth"))
    beside = [name for name in every if "/" not in name]
    if variant is not None:
        found = [name for name in every if _is_of(variant, name)]
        expected = f"one .pth file whose name ends with {variant!r}. Give another variant, or the file itself"
    else:
        finals = [[name for name in names if name.endswith("final.pth")] for names in (beside, every)]
        found = finals[0] or beside or finals[1]
        expected = (
            "one .pth file, or one that ends with 'final.pth'. Give the file itself, or what it ends with as variant"
        )
    if len(found) != 1:
        raise CheckpointError(
            f"{place.where}: holds TransformerLens's config.json and {join_names(every) or 'no .pth'}; expected "
            f"{expected}"
        )
    return found[0]


def _is_of(variant: str, name: str) -> bool:
    """Whether a file's name ends with a variant; numbers may have zeros in front."""
    last = name.rpartition("/")[2].removesuffix(".pth").rpartition("_")[2]
    return last == variant or (last.isdecimal() and variant.isdecimal() and int(last) == int(variant))
