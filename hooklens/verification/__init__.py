"""Proof that a model is what it claims to be: `verify` checks a checkpoint or a model in memory.

The checks are HookLens' three promises (watching changes nothing, you pay for what you watch, every hook
point is alive) and equality with the checkpoint's reference implementation, in the form in which HookLens'
own tests run them. `conformance` makes a test suite of them, for families and parts of other packages.
"""

from hooklens.verification import conformance
from hooklens.verification.report import CheckResult, VerificationReport
from hooklens.verification.run import verify

__all__ = ["CheckResult", "VerificationReport", "conformance", "verify"]
