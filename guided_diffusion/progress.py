"""Progress bars: on a terminal one line that is drawn again and again, in a file a plain line every `INTERVAL` seconds."""

import sys
from typing import Any, TextIO

from tqdm import std

INTERVAL = 30  # seconds between two lines of a file
_UP = "\x1b[A"  # by which tqdm goes to the bar above


class tqdm(std.tqdm):
    """tqdm's bar, of plain lines where its output (standard error, unless `file` says otherwise) is no terminal."""

    def __init__(self, *args: Any, **options: Any):
        file = options.get("file") or sys.stderr
        if not (hasattr(file, "isatty") and file.isatty()):
            options |= {"file": _Lines(file), "mininterval": INTERVAL, "maxinterval": 2 * INTERVAL}
            options |= {"dynamic_ncols": False, "ncols": 80, "leave": True}
        super().__init__(*args, **options)


class _Lines:
    """A file to which tqdm's redrawn text goes line by line."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        if line := text.replace(_UP, "").strip():
            self.file.write(f"{line}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
