"""Text that people write: captions, prompts, lists. The one reader of it."""

import os
from pathlib import Path

from .errors import UserError, UserFileError


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file without its byte order mark; its lines end in a line feed, however the file ends them.

    UserFileError where there is no such file; UserError, of one line, for another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8: {error.reason} at byte {error.start}; convert it, for example by "
            f"iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise UserFileError(f"{path} cannot be read: {error.strerror}") from None


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    """(number from 1 on, text without space around it) of every line of a file that is not blank; raises as `read_text`."""
    lines = enumerate(read_text(path).split("\n"), 1)  # no other separator: a caption may hold one
    return [(number, line.strip()) for number, line in lines if line.strip()]
