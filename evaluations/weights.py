"""Published weight files: official address, checksum, cache folder."""

import hashlib
import os
import sys
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch

from guided_diffusion.errors import UserFileError, UserValueError


@dataclass(frozen=True)
class PublishedFile:
    """A weight file as its authors publish it."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def cache_folder() -> Path:
    """Where downloads are kept: `$MT_DIFFUSION_CACHE`, or `mt-diffusion` in the user's cache folder."""
    if folder := os.environ.get("MT_DIFFUSION_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mt-diffusion"


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def existing_file(path: str | Path, what: str) -> Path:
    """`path` if it is a file. Raises UserFileError that names `what` it should have been."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserFileError(f"{what} {path} does not exist or is not a file")
    return path


def fetch(files: list[PublishedFile], option: str) -> Path:
    """The first of the interchangeable `files` that is cached or can be downloaded.

    A download counts only if its SHA-256 is the published one. Raises UserError that names the addresses and
    the command-line `option` that takes a local file.
    """
    folder = cache_folder()
    for file in files:
        if (folder / file.name).is_file():
            return folder / file.name
    failures = []
    for file in files:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            print(f"downloading {file.url}", file=sys.stderr)
            # Writes beside the target, compares the checksum, then renames: an interrupted download leaves nothing.
            torch.hub.download_url_to_file(file.url, str(folder / file.name), hash_prefix=file.sha256)
            return folder / file.name
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: the checksum differs
            failures.append(f"{file.url} ({error})")
    raise UserValueError(
        f"could not download {'; '.join(failures)}: fetch it by hand and pass it with {option}"
    )
