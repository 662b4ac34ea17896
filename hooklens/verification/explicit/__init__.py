"""The network once more, slow and plain: every activation from its definition, in float64.

Nothing here calls the code under verification. What a hook point shows can be held against what its sources make of
it, and the logits of an edited call against a computation in which the edit stands where it was asked for.
"""

from hooklens.verification.explicit.batch import Batch
from hooklens.verification.explicit.block import Unknown
from hooklens.verification.explicit.network import ExplicitNetwork
from hooklens.verification.explicit.run import ExplicitRun

__all__ = ["Batch", "ExplicitNetwork", "ExplicitRun", "Unknown"]
