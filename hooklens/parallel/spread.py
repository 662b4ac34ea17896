"""The parts of a tensor that the processes of a group hold, by torch's own DTensor."""

from typing import Any

from torch import Tensor, distributed
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


def sum_gradients(parameter: Any, mesh: DeviceMesh) -> None:
    """Have a parameter's gradient, of which each process has what its own rows, heads or neurons make, summed."""
    group = mesh.get_group()

    def add_up(gradient: Any) -> Any:
        total = gradient.clone()
        distributed.all_reduce(total.to_local() if hasattr(total, "to_local") else total, group=group)
        return total

    parameter.register_hook(add_up)
