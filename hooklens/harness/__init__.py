"""HookLens models in lm-evaluation-harness (Gao et al. 2021, "A framework for few-shot language model evaluation").

`HookLensLM` evaluates a model, as it is, edited or steered, on the harness' tasks. Importing this package registers it
there under the name `hooklens`; `python -m hooklens.harness` is the harness' command line with that name known. The
harness is the extra `harness`.
"""

from hooklens.harness.language_model import HookLensLM

__all__ = ["HookLensLM"]
