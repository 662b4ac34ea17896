"""Names of weights as they are without what runs a model: compiled, or on several devices."""

import re
from collections.abc import Collection

# Put into the names of what `torch.compile` and sharded data parallelism are around, at any depth.
_AROUND = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module)\.")
# Put before all names by `DataParallel` and `DistributedDataParallel`.
_PARALLEL = "module."


def bare_names(names: Collection[str]) -> dict[str, str]:
    """The names of a state dict, each with what it is without the prefixes of wrappers."""
    bare = {name: _AROUND.sub("", name) for name in names}
    while bare and all(name.startswith(_PARALLEL) for name in bare.values()):
        bare = {name: known.removeprefix(_PARALLEL) for name, known in bare.items()}
    return bare
