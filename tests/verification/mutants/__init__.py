"""The faults that `verify` has to notice, and changes that are none."""

from tests.verification.mutants.attention import ATTENTION
from tests.verification.mutants.blocks import BLOCKS
from tests.verification.mutants.caches import CACHES
from tests.verification.mutants.listening import LISTENING
from tests.verification.mutants.mixtures import MIXTURES
from tests.verification.mutants.options import OPTIONS
from tests.verification.mutants.positions import POSITIONS
from tests.verification.mutation import Mutant

MUTANTS = (*ATTENTION, *BLOCKS, *POSITIONS, *OPTIONS, *LISTENING, *CACHES, *MIXTURES)

EQUIVALENT = (
    (
        Mutant(
            "linear biases count keys from 1",
            "model.attention.alibi:_exact_entries",
            (("numbers = (key_positions >> (bits * digit))", "numbers = ((key_positions + 1) >> (bits * digit))"),),
            "alibi",
        ),
        "a slope added to all of a query's scores does not change their softmax",
    ),
)
