"""The parts of a tensor that the processes of a group hold, by torch's own DTensor."""

from typing import Any

from torch import Tensor, distributed, zeros_like
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from hooklens.hooks.spread import Spread


class MeshSpread(Spread):
    """A tensor of equal parts along one axis, one for each process of a mesh of one dimension."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    @property
    def n_parts(self) -> int:
        """How many processes there are."""
        return self.mesh.size()

    @property
    def part(self) -> int:
        """Which part this process holds."""
        return self.mesh.get_local_rank()

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The whole tensor, of the parts; its gradient, which all processes have, goes to each part."""
        placed = [Shard(dim % part.ndim)]
        whole = DTensor.from_local(part.contiguous(), self.mesh, placed, run_check=False).full_tensor()
        # What a function of autograd's gives as a view cannot be edited in place.
        return whole.clone() if whole.requires_grad else whole

    def scatter(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor that all have; its gradient is put together of those of the parts."""
        replicated = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return replicated.redistribute(placements=[Shard(dim % whole.ndim)]).to_local()

    def use(self, whole: Tensor) -> Tensor:
        """A tensor that all have, of which each process uses what it needs; their gradients are summed."""
        replicated = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return replicated.to_local(grad_placements=[Partial()])


class GradientSums:
    """Parameters whose gradients each process has of its own rows, heads or neurons only, and who sums them.

    In a pipeline the gradients of a stage are made by a backward pass inside of another: hooks on parameters would act
    in both.

    Args:
        in_stages: the sums are taken where a stage's gradients are made.
    """

    def __init__(self, *, in_stages: bool) -> None:
        self._in_stages = in_stages
        self._meshes: dict[int, list[DeviceMesh]] = {}

    def add(self, parameter: Any, mesh: DeviceMesh) -> None:
        """Have the gradients of a parameter summed over the processes of a mesh."""
        if self._in_stages:
            self._meshes.setdefault(id(parameter), []).append(mesh)
        else:
            parameter.register_hook(lambda gradient: _sum(gradient, mesh))

    def take(self, parameter: Any, gradient: Any) -> Any:
        """The sum of the gradients that the processes have in a stage; None is nothing."""
        for mesh in self._meshes.get(id(parameter), ()):
            gradient = _sum(zeros_like(parameter) if gradient is None else gradient, mesh)
        return gradient


def _sum(gradient: Any, mesh: DeviceMesh) -> Any:
    total = gradient.clone()
    held = total.to_local() if hasattr(total, "to_local") else total
    distributed.all_reduce(held, group=mesh.get_group())
    return total
