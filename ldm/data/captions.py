"""Captioned images: a folder of photos, each with one caption or several."""

import contextlib
import csv
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from guided_diffusion.errors import UserError, UserFileError, UserValueError
from guided_diffusion.image_files import list_images
from guided_diffusion.text_files import read_lines, read_text
from ldm.data.base import Images, Item
from ldm.data.images import Reading, Source

TABLES = ("captions.csv", "metadata.jsonl")
COLUMNS = (("image", "caption"), ("file_name", "text"))  # of captions.csv
TEXT_SUFFIXES = (".txt", ".text", ".csv", ".tsv", ".json", ".jsonl", ".md")
PARTS = ("all", "train", "held_out")
DRAWS = ("random", "first")


class CaptionFolder(Images):
    """Items {image_key: float32 [H, W, 3] in [-1, 1], caption_key: str, "file_path_": str}.

    The images lie anywhere below `root`. Their captions stand in root/captions.csv (columns image,caption or
    file_name,text), in root/metadata.jsonl (file_name, text), or in a .txt file beside each image, one on a line.
    A table names an image by its path below root, or by its file name where that is the only one.

    size, random_crop, random_flip, interpolation: see Images. UserError for a table that cannot be read, a caption
    of an image that is not there, an image without a caption.
    """

    def __init__(
        self,
        root: str | Path,
        size: int | Sequence[int] = 256,
        random_crop: bool = False,
        random_flip: bool = False,
        interpolation: str = "bicubic",
        part: str = "all",  # all; held_out: every held_out_every-th image by name; train: the others
        held_out_every: int = 10,
        caption: str = "random",  # one of the image's captions by Python's `random`, or always the first
        image_key: str = "jpg",
        caption_key: str = "txt",
    ):
        if caption not in DRAWS:
            raise UserValueError(f"caption must be one of {', '.join(DRAWS)}, not {caption!r}")
        found = read_captions(root)
        paths = _part(sorted(found), part, held_out_every)
        entries = [{image_key: Source(path)} for path in paths]
        super().__init__(entries, size, random_crop, random_flip, interpolation)
        self.captions = [found[path] for path in paths]
        self.caption = caption
        self.caption_key = caption_key

    @classmethod
    def readings(
        cls, image_key: str = "jpg", interpolation: str = "bicubic", **_params
    ) -> dict[str, Reading]:
        return {image_key: Reading(interpolation=interpolation)}

    def __getitem__(self, index: int) -> Item:
        return {**super().__getitem__(index), self.caption_key: self.draw_caption(index)}

    def draw_caption(self, index: int) -> str:
        """A caption of image `index`, as its item has one."""
        some = self.captions[index]
        return some[0] if self.caption == "first" else random.choice(some)


def read_captions(root: str | Path) -> dict[Path, tuple[str, ...]]:
    """The captions of every image below a folder, in the order of their table or file. UserError: see
    CaptionFolder."""
    paths = [Path(path) for path in list_images(root)]
    tables = [Path(root) / name for name in TABLES if (Path(root) / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{root} has both {' and '.join(TABLES)}: keep the one that holds")
    found = _from_table(tables[0], paths) if tables else {path: _beside(path) for path in paths}
    if bare := [path for path in paths if not found.get(path)]:
        raise UserError(f"{bare[0]} has no caption ({len(bare)} of {len(paths)} images have none)")
    return found


def _part(paths: list[Path], part: str, every: int) -> list[Path]:
    if part not in PARTS:
        raise UserValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
    if part == "all":
        return paths
    if not isinstance(every, int) or every < 2:
        raise UserValueError(f"held_out_every must be a whole number from 2 on, not {every!r}")
    chosen = [path for i, path in enumerate(paths) if (i % every == 0) == (part == "held_out")]
    if not chosen:
        raise UserValueError(f"of {len(paths)} images none are left for the part {part}")
    return chosen


def _from_table(table: Path, paths: Iterable[Path]) -> dict[Path, tuple[str, ...]]:
    """The captions of a table by image."""
    by_name = defaultdict(list)
    for path in paths:
        by_name[path.name].append(path)
    known = set(paths)
    found: dict[Path, list[str]] = defaultdict(list)
    read = _csv_rows if table.suffix == ".csv" else _json_rows
    for line, name, caption in read(table):
        whole = table.parent / name
        matches = [whole] if whole in known else by_name[name]
        if len(matches) != 1:
            why = "several images have that name" if matches else "there is no such image"
            raise UserFileError(f"{table} line {line} is a caption of {name!r}, but {why}")
        found[matches[0]].append(caption)
    return {path: tuple(some) for path, some in found.items()}


def _csv_rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """(line, image's name, caption) of a captions.csv."""
    reader = csv.reader(io.StringIO(read_text(table), newline=""), strict=True)
    rows = ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
    line = 0
    try:
        line, header = next(rows, (0, []))
        header = [name.strip() for name in header]
        columns = next((pair for pair in COLUMNS if set(pair) <= set(header)), None)
        if columns is None:
            told = " or ".join(",".join(pair) for pair in COLUMNS)
            raise UserError(f"{table} has no columns {told}, only {','.join(header)!r}")
        for line, row in rows:
            if len(row) > len(header):
                raise UserError(
                    f"{table} line {line} has {len(row)} columns, its header {len(header)}: put a caption with a "
                    f"comma in double quotes ({_short(','.join(row))!r})"
                )
            values = dict(zip(header, row, strict=False))
            yield line, *_checked(table, line, [values.get(name) for name in columns])
    except csv.Error as error:
        raise UserError(f"{table} cannot be read after line {line}: {error}") from None


def _json_rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """(line, image's name, caption) of a metadata.jsonl."""
    for line, content in read_lines(table):
        try:
            row = json.loads(content)
        except ValueError as error:
            raise UserError(f"{table} line {line} is not JSON: {error}") from None
        values = [row.get(name) for name in COLUMNS[1]] if isinstance(row, dict) else [None]
        yield line, *_checked(table, line, values)


def _checked(table: Path, line: int, values: Sequence) -> list[str]:
    """An image's name and its caption. UserError where one of the two is missing or empty."""
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise UserError(f"{table} line {line} does not name an image and its caption")
    return [value.strip() for value in values]


def _beside(image: Path) -> tuple[str, ...]:
    """The captions in the .txt file beside an image, one on a line; none where there is no file."""
    path = image.with_suffix(".txt")
    return tuple(line for _, line in read_lines(path)) if path.is_file() else ()


def read_prompts(source: str) -> list[str]:
    """The prompts of a text file, one on a line; `source` itself where it is a prompt and not the name of a file.

    UserFileError where it can only be the name of a file (a word that ends in .txt, or begins as a path) and there is
    none; UserError for a file without prompts.
    """
    if not _names_file(source):
        return [source]
    prompts = [line for _, line in read_lines(source)]
    if not prompts:
        raise UserError(f"{source} holds no prompt")
    return prompts


def _names_file(source: str) -> bool:
    """Is `source` a file, or can it be nothing else? A prompt may be longer than the name of a file can be."""
    alone = len(source.split()) == 1 and source == source.strip()
    if alone and (source.startswith(("/", "./", "../")) or Path(source).suffix.lower() in TEXT_SUFFIXES):
        return True
    with contextlib.suppress(OSError, ValueError):  # too long, a null character
        return Path(source).is_file()
    return False


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
