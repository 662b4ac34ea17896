"""Other processes that work for a call: models that Ray keeps on this machine or on many, and results in order.

What is computed stands in the package that asks for it: a `Work`, which every worker holds, and tasks, which it is
given one by one. `RayWorkers` hands the tasks out, gives the results in the order of the tasks, and has what a worker
was at when it died done again by another.
"""

from hooklens.workers.engine import Engine, check_portable, read_engine
from hooklens.workers.ray_workers import RayWorkers
from hooklens.workers.work import Work

__all__ = ["Engine", "RayWorkers", "Work", "check_portable", "read_engine"]
