"""What workers hold and do, and how it reaches them bit for bit."""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hooklens.optional import import_package


class Work(ABC):
    """What each worker holds: a model, and how a task is done with it. It is pickled, and models are with it."""

    def begin(self, shared: Any) -> None:  # noqa: B027 -- most work has nothing to take up
        """Take up what the tasks to come have in common; called before the first of them on each worker."""

    @abstractmethod
    def run(self, task: Any) -> Any:
        """The result of a task: the same, bit for bit, on every worker, and harmless to do twice."""


Packed = np.ndarray[Any, np.dtype[np.uint8]]


def pack(content: Any) -> Packed:
    """Anything as bytes, with every tensor as it is: strides, shared memory, dtype and all entries."""
    buffer = io.BytesIO()
    # Functions and classes of notebooks travel by value.
    torch.save(content, buffer, pickle_module=import_package("ray.cloudpickle"))
    return np.frombuffer(buffer.getbuffer(), dtype=np.uint8)


def unpack(packed: Packed) -> Any:
    """The same again; what lay on a GPU lies on the one that this process sees."""
    return torch.load(io.BytesIO(packed.data), map_location=_place, weights_only=False)


def _place(storage: Any, location: str) -> Any:
    restore: Any = torch.serialization.default_restore_location
    return restore(storage, "cpu" if location == "cpu" else "cuda:0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of this process' torch decides how sums are rounded.

    Attributes:
        threads: that an operation uses.
        precision: of products of float32 matrices.
        deterministic: 0 where operations may be of any kind, 1 where others are told of, 2 where they are refused.
        cudnn: whether cuDNN may use TF32, choose by timing, and must be deterministic.
        attention: which kernels attention may use on a GPU: flash, memory-efficient, plain, cuDNN's.
    """

    threads: int
    precision: str
    deterministic: int
    cudnn: tuple[bool, bool, bool]
    attention: tuple[bool, bool, bool, bool]

    @classmethod
    def read(cls) -> "Settings":
        """Those of this process."""
        cudnn: Any = torch.backends.cudnn
        cuda: Any = torch.backends.cuda
        return cls(
            threads=torch.get_num_threads(),
            precision=torch.get_float32_matmul_precision(),
            deterministic=torch.get_deterministic_debug_mode(),
            cudnn=(cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic),
            attention=(
                cuda.flash_sdp_enabled(),
                cuda.mem_efficient_sdp_enabled(),
                cuda.math_sdp_enabled(),
                cuda.cudnn_sdp_enabled(),
            ),
        )

    def apply(self) -> None:
        """Make this process' the same."""
        cudnn: Any = torch.backends.cudnn
        cuda: Any = torch.backends.cuda
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.precision)
        torch.set_deterministic_debug_mode(self.deterministic)
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = self.cudnn
        flash, efficient, plain, of_cudnn = self.attention
        cuda.enable_flash_sdp(flash)
        cuda.enable_mem_efficient_sdp(efficient)
        cuda.enable_math_sdp(plain)
        cuda.enable_cudnn_sdp(of_cudnn)
