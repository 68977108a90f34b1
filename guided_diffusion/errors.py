"""Mistakes that the user can repair, and how a script reports them: one line, exit code 2, no traceback."""

import contextlib
import difflib
import errno
import re
import sys
from collections.abc import Callable, Iterable, Iterator

EXIT_CODE = 2

# What the machine lacks, which the user can mend too.
_MACHINE = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the limit of this shell (ulimit -f) or of the file system",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: "too few file handles: raise the limit (ulimit -n) or use fewer --num_workers",
    errno.ENOMEM: "too little memory: use a smaller batch, model or image",
    errno.ENFILE: "the machine has no file handle left: close other programs",
}

_PATHS = {
    getattr(errno, f"E{name}") for name in "NOENT NOTDIR ISDIR ACCES PERM EXIST LOOP NAMETOOLONG".split()
}

# How torch says so: on the CPU, and on a GPU.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory")


def _report(report: Callable[[], None], code: int) -> None:
    """Print, and end this process."""
    report()
    sys.exit(code)


# How a job ends after a mistake. Whoever knows of other ranks replaces it (dist_util): this module knows of none.
end_job = _report


class UserError(Exception):
    """What the user gave cannot be used. The message says what was wrong and what to do."""


class UserValueError(UserError, ValueError):
    """A value (flag, array, label) that cannot be used."""


class UserFileError(UserError, FileNotFoundError):
    """A file or folder that is missing."""


def closest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean X?" for the known name nearest to `name`; "" where none is near."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {found[0]}?" if found else ""


def one_line(error: BaseException) -> str:
    """The message of `error` on one line.

    A DataLoader worker hands its exception over with the whole traceback as text; only its last line, the
    message itself, is for the user.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines) or type(error).__name__


def machine_error(error: BaseException | None) -> str | None:
    """What the machine lacked, where `error` or one that led to it says so, else None."""
    while error is not None:
        if (
            isinstance(error, MemoryError)
            or _OUT_OF_MEMORY.search(str(error))
            and isinstance(error, RuntimeError)
        ):
            wanted = re.search(r"[0-9.]+ ?(bytes|[KMGT]iB)", str(error))
            least = f" (it takes {wanted[0]} more)" if wanted else ""
            return f"too little memory{least}: use a smaller batch, model or image"
        if isinstance(error, OSError) and error.errno in _MACHINE:
            return _MACHINE[error.errno] + (f" ({error.filename})" if error.filename else "")
        error = error.__cause__ or error.__context__
    return None


def _of_a_path(error: BaseException) -> str | None:
    """What is wrong with the file or folder that the system names, where it is the user's to mend."""
    if isinstance(error, OSError) and error.errno in _PATHS and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror}"
    return None


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into `error: <one line>` on stderr and exit code 2; also what the machine lacks (disk,
    file handles). Also usable as a decorator.

    When several ranks run, all of them end: those that wait for the failed one are not left hanging.
    """
    try:
        yield
    except Exception as error:
        line = one_line(error) if isinstance(error, UserError) else machine_error(error) or _of_a_path(error)
        if line is None:
            raise
        end_job(lambda: print(f"error: {line}", file=sys.stderr, flush=True), EXIT_CODE)
