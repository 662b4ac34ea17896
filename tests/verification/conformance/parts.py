"""Parts at the MLP's place: a sound one, and ones with a fault each."""

from itertools import count

from hooklens import PartConfig
from hooklens.model.parts.declared import point, weight
from hooklens.model.parts.part import Part, apply_linear
from hooklens.verification import conformance

_MADE = count()


class Squares(Part, place="blocks.{i}.mlp", kind="squares for tests"):
    W_in = weight("d_model d_mlp", "d_mlp d_model", module="in_proj", reads=True)
    W_out = weight("d_mlp d_model", "d_model d_mlp", module="out_proj", writes=True)
    hook_post = point("batch pos d_mlp", "squared neurons")

    def forward(self, x, call):
        return apply_linear(self.out_proj, self.hook_post(self.activate(apply_linear(self.in_proj, x)), call))

    def activate(self, pre):
        return pre**2


class Mute(Squares, kind="mute"):
    """Its point never fires."""

    def forward(self, x, call):
        return apply_linear(self.out_proj, self.activate(apply_linear(self.in_proj, x)))


class Spare(Squares, kind="spare"):
    """It has a weight that it does not use."""

    W_spare = weight("d_mlp")


class Endless(Squares, kind="endless"):
    """The gradient of its neurons is infinite where they are 0."""

    def activate(self, pre):
        return (pre - pre.detach()).abs().sqrt()


class Secret(Squares, kind="secret"):
    """What it computes depends on a number that is no weight, and is another one in every part."""

    def __init__(self, block):
        super().__init__(block)
        self.factor = 1.0 + next(_MADE)

    def activate(self, pre):
        return self.factor * pre**2


class Broken(Squares, kind="broken"):
    """It cannot run."""

    def activate(self, pre):
        raise ZeroDivisionError("no way")


def only(kind, layout="alone"):
    """One of the networks around a part."""
    name = f"{kind} {layout}"
    return {name: conformance.of_part(PartConfig(kind=kind))[name]}
