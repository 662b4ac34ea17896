"""The harness' command line, in a process in which HookLens' models are registered.

The harness (0.4.13) looks up the models of other packages nowhere: its own list is the only one that `lm_eval` reads,
and `--include_path` adds tasks. Whoever registers a model starts its command line.
"""

import sys

from hooklens.errors import HookLensError
from hooklens.harness.language_model import HookLensLM
from hooklens.optional import import_package

EXIT_ERROR = 2
"""As that of the command `hooklens`."""


def main() -> None:
    """Run the harness' command line on this process' arguments.

    Raises:
        SystemExit: with 2, after an error's message on stderr.
    """
    try:
        command = import_package("lm_eval.__main__")
        HookLensLM.register()
        command.cli_evaluate()
    except HookLensError as error:
        sys.stderr.write(f"hooklens: {error}\n")
        raise SystemExit(EXIT_ERROR) from None
