"""Mistakes that the user can repair, and how a script reports them: one line, exit code 2, no traceback."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from guided_diffusion.errors import EXIT_CODE
from guided_diffusion.errors import UserError as EvaluationError  # an input that cannot be evaluated
from guided_diffusion.errors import UserFileError as MissingFileError

__all__ = ["EXIT_CODE", "EvaluationError", "MissingFileError", "exit_on_error"]


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an `EvaluationError` into `error: <one line>` on standard error and exit code 2.

    Under torchrun every rank meets the same mistake: the others wait for rank 0 to report it and be ended with it.
    """
    try:
        yield
    except EvaluationError as error:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(5)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
