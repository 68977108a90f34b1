"""Mistakes that the user can repair, and how a script reports them: one line, exit code 2, no traceback."""

import contextlib
import sys
from collections.abc import Iterator

EXIT_CODE = 2


class UserError(Exception):
    """What the user gave cannot be used. The message says what was wrong and what to do."""


class UserValueError(UserError, ValueError):
    """A value (flag, array, label) that cannot be used."""


class UserFileError(UserError, FileNotFoundError):
    """A file or folder that is missing."""


def one_line(error: BaseException) -> str:
    """The message of `error` on one line.

    A DataLoader worker hands its exception over with the whole traceback as text; only its last line, the
    message itself, is for the user.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines) or type(error).__name__


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into `error: <one line>` on stderr and exit code 2. Also usable as a decorator.

    When several ranks run, all of them end: those that wait for the failed one are not left hanging.
    """
    try:
        yield
    except UserError as error:
        from . import dist_util  # here, since dist_util raises the errors of this module

        dist_util.wait_for_rank_zero_to_fail()
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        dist_util.end_all_ranks(EXIT_CODE)
        sys.exit(EXIT_CODE)
