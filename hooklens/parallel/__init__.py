"""One network in several processes: heads, layers, rows and weights shared under `torchrun`.

    model = hl.parallel.load("some-lab/model-of-70b", hl.parallel.ParallelConfig(tensor=4, pipeline=2))

Every process runs the same script, makes the same calls on the same input, and gets the whole result. Hook functions
run in each, on whole activations; `local_parts` shows what the process itself holds.
"""

from hooklens.hooks.spread import local_parts
from hooklens.parallel.caches import gather_cache
from hooklens.parallel.config import ParallelConfig
from hooklens.parallel.loading import load

__all__ = ["ParallelConfig", "gather_cache", "load", "local_parts"]
