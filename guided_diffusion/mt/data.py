"""The data of joint training: rows of an image and its modalities' values, whatever they are stored in.

A source is a folder of folders (image/, depth/, ... with equal stems), a table (.csv, .jsonl) whose columns hold files,
numbers and classes, an .npz with several arrays [N, ...], tar files, or a folder that Hugging Face's `datasets` saved.
docs/recipes.md shows each. `JointImages` cuts and flips all images of a row alike.
"""

import contextlib
import csv
import glob
import io
import json
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import dist_util
from ..errors import UserError, UserFileError, UserValueError, closest
from ..image_datasets import MAX_BAD, SquareImages
from ..image_files import (
    BadImageError,
    draw_cut,
    is_image,
    list_images,
    number_names,
    open_arrays,
    stored_class_names,
    tell,
    to_channels,
)
from .cells import Cell, as_palette, cut_out, palette_mapping, pixels_of
from .modalities import DERIVED, KINDS, PRESETS, Modality, kind_of

IMAGE = (
    "image",
    "images",
    "file_name",
    "file",
    "path",
)  # names of the image's folder or column, the first one found
TABLES = ("metadata.csv", "metadata.jsonl", "table.csv", "table.jsonl")  # beside the folders of a source


class Source:
    """Rows of cells. names: of the columns that there are; the image's is `image`."""

    names: Sequence[str] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def cell(self, name: str, row: int) -> Cell:
        """The value of a column; one without content where it is missing."""
        raise NotImplementedError

    def class_names(self, name: str) -> list[str] | None:
        """Of a column that knows them."""
        return None


class Column:
    """One column of a source, as a kind of modality completes its options by it."""

    def __init__(self, source: Source, name: str):
        self.source, self.name = source, name

    def values(self) -> Iterator[Cell]:
        """All that are there."""
        cells = (self.source.cell(self.name, row) for row in range(len(self.source)))
        return (cell for cell in cells if not cell.missing)

    def first(self) -> Cell:
        """The first value that is there. UserValueError where none is."""
        found = next(self.values(), None)
        if found is None:
            raise UserValueError(f"modality {self.name}: the data have not one value of it")
        return found

    def classes(self) -> list[str]:
        """The names of the classes of a label's values, in the order of their numbers."""
        if (known := self.source.class_names(self.name)) is not None:
            return known
        found = {_text(cell) for cell in self.values()} - {"-1"}
        if not found:
            raise UserValueError(f"modality {self.name}: the data have not one value of it")
        return number_names(found, 1 + max((int(name) for name in found if name.isdigit()), default=0))

    def kind(self) -> str:
        """The preset of modalities.PRESETS that its first value looks like."""
        cell = self.first()
        if cell.is_image:
            return "image"
        if isinstance(cell.content, str | bytes | int | np.integer) and not cell.is_array:
            with contextlib.suppress(UserError):
                return "representation" if cell.numbers().size > 1 or "." in _text(cell) else "label"
            return "label"
        return "representation"


def _text(cell: Cell) -> str:
    content = cell.content
    if isinstance(content, Path):
        content = content.read_bytes()
    if isinstance(content, bytes):
        return content.decode("utf-8", "replace").strip()
    if isinstance(content, np.ndarray):
        content = content[()] if content.ndim == 0 else content
    if isinstance(content, float | np.floating) and float(content).is_integer():
        content = int(content)
    return str(content).strip()


# ----------------------------------------------------------------------------------------------------------- sources


class Folders(Source):
    """A folder for the image and one for each modality, with files of equal names but for the suffix; what has no
    folder is a column of a table beside them, which names the images. UserError where partners are missing, unless they
    may be."""

    def __init__(self, root: Path, names: Sequence[str], missing: str):
        self.images = next(root / name for name in IMAGE if (root / name).is_dir())
        stems = _by_stem(self.images, images=True)
        self.files = {name: _by_stem(root / name) for name in names if (root / name).is_dir()}
        table = next((root / name for name in TABLES if (root / name).is_file()), None)
        self.table = Table(table) if table else None
        self.rows = {}
        if self.table is not None:
            self.rows = {_stem(self.table.cell("image", k).content): k for k in range(len(self.table))}
        for name, files in self.files.items():
            _compare(stems, files, self.images, root / name, missing)
        self.stems = list(stems)
        self.paths = stems
        self.names = [*self.files, *(self.table.names if self.table is not None else ())]

    def __len__(self):
        return len(self.stems)

    def cell(self, name, row):
        stem = self.stems[row]
        path = self.paths[stem] if name == "image" else self.files.get(name, {}).get(stem)
        if path is not None:
            return Cell(path, str(path))
        if name not in self.files and stem in self.rows:
            return self.table.cell(name, self.rows[stem])
        return Cell(None, str(self.paths[stem]))


def _by_stem(folder: Path, images: bool = False) -> dict[str, Path]:
    if images:
        paths = [Path(path) for path in list_images(folder)]
    else:
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    found: dict[str, Path] = {}
    for path in paths:
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise UserError(f"{found[stem]} and {path} have one name: which of them belongs to the image?")
        found[stem] = path
    return found


def _stem(name) -> str:
    path = Path(str(name))
    return (
        Path(*path.parts[1:] if path.parts[0] in IMAGE and len(path.parts) > 1 else path.parts)
        .with_suffix("")
        .as_posix()
    )


def _compare(images, files, image_folder, folder, missing):
    for here, there, where in ((images, files, folder), (files, images, image_folder)):
        lonely = sorted(here.keys() - there.keys())
        if not lonely:
            continue
        if missing == "error":
            raise UserFileError(
                f"{here[lonely[0]]} has no partner in {where} ({len(lonely)} of {len(here)} have none); "
                "--missing value trains without those"
            )
        tell(f"{len(lonely)} of {len(here)} files like {here[lonely[0]]} have no partner in {where}")


class Table(Source):
    """A .csv with a head, or .jsonl: one row a line; paths begin at the table's folder."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        read = self._csv if path.suffix.lower() == ".csv" else self._json
        self.rows = list(read(text))
        columns = dict.fromkeys(name for _, row in self.rows for name in row)
        self.image = next((name for name in IMAGE if name in columns), None)
        if self.image is None:
            raise UserValueError(
                f"{path} has no column of images ({', '.join(IMAGE)}), only {', '.join(columns) or 'none'}"
            )
        self.names = [name for name in columns if name != self.image]

    def _csv(self, text):
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserValueError(
                        f"{self.path} line {reader.line_num} has not as many entries as the head"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{self.path} cannot be read after line {reader.line_num}: {error}") from None

    def _json(self, text):
        for line, content in enumerate(text.split("\n"), 1):
            if content.strip():
                try:
                    row = json.loads(content)
                except ValueError as error:
                    raise UserError(f"{self.path} line {line} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{self.path} line {line} is no object with columns")
                yield line, row

    def __len__(self):
        return len(self.rows)

    def cell(self, name, row):
        line, found = self.rows[row]
        column = self.image if name == "image" else name
        return Cell(found.get(column), f"{self.path} line {line}, {column}", folder=self.path.parent)


class Arrays(Source):
    """Arrays [N, ...] of an .npz: the image under arr_0 or `image`, others under their names; bool NAME_present [N]
    where values are missing, and NAME_class_names. label: stands under labels or arr_1 too, and class_names are its."""

    def __init__(self, path: Path, names: Sequence[str], label: str | None):
        self.path = path
        with open_arrays(path) as arrays:
            keys = list(arrays)
            image = next((key for key in ("arr_0", *IMAGE) if key in keys), None)
            if image is None:
                raise UserValueError(f"{path} has no array arr_0 or image, only {', '.join(keys)}")
            known = {"image": image, **{name: name for name in names if name in keys}}
            if label is not None:
                known[label] = next((key for key in (label, "labels", "arr_1") if key in keys), label)
            self.arrays = {name: arrays[key] for name, key in known.items() if key in keys}
            self.present = {n: arrays[f"{n}_present"] for n in self.arrays if f"{n}_present" in keys}
            self._names = {
                n: arrays[f"{n}_class_names"].tolist() for n in names if f"{n}_class_names" in keys
            }
            if "class_names" in keys and label is not None:
                self._names[label] = stored_class_names(arrays, path)
            ignored = {*known.values(), "arr_1", "class_names"}
            others = [
                key for key in keys if key not in ignored and not key.endswith(("_present", "_class_names"))
            ]
        self.keys = known
        self.names = [*(name for name in self.arrays if name != "image"), *others]
        count = len(self.arrays["image"])
        for name, array in [*self.arrays.items(), *self.present.items()]:
            if array.ndim == 0 or len(array) != count:
                rows = array.shape[0] if array.ndim else "no"
                raise UserValueError(f"{path}: {name} has {rows} rows, {image} {count}")

    def __len__(self):
        return len(self.arrays["image"])

    def cell(self, name, row):
        where = f"{self.path} row {row} of {self.keys.get(name, name)}"
        there = name in self.arrays and (name not in self.present or bool(self.present[name][row]))
        content = self.arrays[name][row] if there else None
        return Cell(content.item() if isinstance(content, np.generic) else content, where)

    def class_names(self, name):
        return self._names.get(name)


class Tar(Source):
    """Tar files, not compressed: KEY.image.png, KEY.depth.png, KEY.sound.npy, KEY.weather.txt, KEY.json (columns) make
    one row; KEY.png alone is the image, KEY.cls the label."""

    def __init__(self, paths: Sequence[Path]):
        rows: dict[str, dict[str, tuple]] = {}
        for path in paths:
            try:
                with tarfile.open(path, "r:") as file:
                    for member in file:
                        if member.isfile() and not Path(member.name).name.startswith("."):
                            folder, _, base = member.name.rpartition("/")
                            stem, _, end = base.partition(".")
                            place = (path, member.offset_data, member.size, member.name)
                            rows.setdefault(f"{path}/{folder}/{stem}", {})[end] = place
            except (tarfile.TarError, OSError, EOFError) as error:
                raise UserError(
                    f"{path} cannot be read as a tar file that is not compressed: {error}"
                ) from None
        self.rows = [self._row(key, ends) for key, ends in rows.items()]
        self.keys = list(rows)
        self.names = [n for n in dict.fromkeys(name for row in self.rows for name in row) if n != "image"]

    def _row(self, key, ends):
        row: dict[str, Any] = {}
        for end, place in ends.items():
            name, _, suffix = end.rpartition(".")
            if end == "json":
                try:
                    row |= dict(json.loads(self._bytes(place)))
                except (ValueError, TypeError):
                    raise UserError(f"{place[0]}/{place[3]} is no JSON object with columns") from None
            elif not name and is_image(f"x.{end}"):
                row["image"] = (*place, f".{end}")
            else:
                name = "label" if end == "cls" else name
                row[name or end] = (*place, f".{suffix}")
        return row

    @staticmethod
    def _bytes(place):
        with open(place[0], "rb") as file:
            file.seek(place[1])
            return file.read(place[2])

    def __len__(self):
        return len(self.rows)

    def cell(self, name, row):
        found = self.rows[row].get(name)
        if not isinstance(found, tuple):
            return Cell(found, f"{self.keys[row]}, {name}")
        content, where = self._bytes(found), f"{found[0]}/{found[3]}"
        if found[4] in (".txt", ".cls", f".{name}"):
            return Cell(content.decode("utf-8", "replace").strip(), where)
        return Cell(content, where, found[4].lower())


class HuggingFace(Source):
    """A folder that `datasets` saved (save_to_disk); of several splits the one called train."""

    def __init__(self, path: Path):
        try:
            from datasets import DatasetDict, load_from_disk
        except ImportError:
            raise UserError(f"{path} is a data set of Hugging Face: pip install datasets") from None
        data = load_from_disk(str(path))
        if isinstance(data, DatasetDict):
            if "train" not in data and len(data) > 1:
                raise UserValueError(f"{path} has the splits {', '.join(data)}: name the folder of one")
            data = data["train"] if "train" in data else next(iter(data.values()))
        self.path, self.data = path, data
        self.image = next((name for name in IMAGE if name in data.column_names), None)
        if self.image is None:
            raise UserValueError(
                f"{path} has no column of images ({', '.join(IMAGE)}), only {', '.join(data.column_names)}"
            )
        self.names = [name for name in data.column_names if name != self.image]

    def __len__(self):
        return len(self.data)

    def cell(self, name, row):
        column = self.image if name == "image" else name
        content = (
            self.data.select_columns([column])[row][column] if column in self.data.column_names else None
        )
        return Cell(content, f"{self.path} row {row}, {column}", folder=self.path)

    def class_names(self, name):
        names = getattr(self.data.features.get(name), "names", None)
        return list(names) if names else None


def find_source(
    path: str, names: Sequence[str], missing: str = "error", label: str | None = None
) -> Source | None:
    """The source at `path` for the modalities `names`, of which `label` may also be the class of files and folders;
    None where only that is asked for, and the path is a plain folder of images or .npz. UserError where columns are
    missing."""
    where, wanted = Path(path), [name for name in names if name != label]
    source: Source | None = None
    tars = [Path(p) for p in sorted(glob.glob(str(where / "*.tar") if where.is_dir() else str(where)))]
    if where.suffix.lower() in (".csv", ".jsonl"):
        if not where.exists():
            raise UserFileError(f"data not found: {path!r} does not exist")
        source = Table(where)
    elif where.suffix.lower() == ".npz" and wanted and where.exists():
        source = Arrays(where, names, label)
    elif where.is_dir() and any((where / name).is_file() for name in ("state.json", "dataset_dict.json")):
        source = HuggingFace(where)
    elif (
        where.is_dir()
        and any((where / name).is_dir() for name in IMAGE[:2])
        and (any((where / name).exists() for name in [*wanted, *TABLES]))
    ):
        source = dist_util.from_rank_zero(lambda: Folders(where, names, missing))
    elif where.is_dir() and (table := next((where / t for t in TABLES if (where / t).is_file()), None)):
        source = Table(table)
        if not wanted and label not in source.names:
            return None  # the names of files and folders have the classes
    elif tars and all(tar.suffix == ".tar" for tar in tars):
        source = dist_util.from_rank_zero(lambda: Tar(tars))
    if source is None:
        if wanted and where.exists():
            raise UserValueError(
                f"modality {wanted[0]}: {path} has images and labels only: give folders image/ and {wanted[0]}/, "
                "a table, an .npz with that array, or tar files"
            )
        return None
    if len(source) == 0:
        raise UserValueError(f"{path} has no rows")
    for name in names:
        if name not in source.names:
            has = ", ".join(source.names) or "nothing beside images"
            raise UserValueError(
                f"modality {name}: {path} has no {name}, but {has}{closest(name, [*source.names, *PRESETS])}"
            )
    return source


# ---------------------------------------------------------------------------------------------------------- data set


class JointImages(SquareImages):
    """Rows of a source: (image uint8 [C, H, W], {name: value}), for `image_datasets.load_stream`.

    modalities: those that the data bring; the label that is `y` is numbered by class_names. missing: what a value is
    that is not there, `error` or `value`: then it counts as missing, NAME_present being false. UserError names the
    file or row.
    """

    def __init__(
        self,
        source: Source,
        modalities: Sequence[Modality],
        resolution: int,
        *,
        image_channels: int = 3,
        random_crop: bool = False,
        random_flip: bool = True,
        max_bad: int = MAX_BAD,
        missing: str = "error",
        class_names: Sequence[str] = (),
    ):
        rows = np.arange(len(source))
        super().__init__(
            resolution, rows, None, class_names, random_crop, random_flip, image_channels, max_bad
        )
        self.source, self.missing = source, missing
        self.modalities = [
            replace(m, shape=(len(class_names),), class_names=tuple(class_names)) if m.data_key == "y" else m
            for m in modalities
        ]

    def load(self, idx, rng: Any = random) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See SquareImages; the values beside the image under their modality's data_key."""
        row = int(self.local_images[idx])
        cell = self.source.cell("image", row)
        image = self._image(cell)
        found = {m.name: self._value(m, row) for m in self.modalities}
        size = image.shape[1::-1]
        for m in self.modalities:
            self._same_size(cell, size, m, row, found[m.name])
        shape = (self.resolution, self.resolution)
        cut = draw_cut(size, shape, self.random_crop, self.random_flip, rng)
        pixels = cut_out(cut, image)
        if pixels.dtype != np.uint8:  # resized with a number of channels that Pillow does not know
            pixels = pixels.round().clip(0, 255).astype(np.uint8)
        arr = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        values = {}
        for m in self.modalities:
            value, there = found[m.name], found[m.name] is not None
            if there:
                value = m.finish(cut_out(cut, value, m.nearest) if m.rank == 3 and value.ndim > 1 else value)
            values[m.data_key] = value if there else m.empty()
            if self.missing == "value" or hasattr(self.source, "present"):
                values[f"{m.name}_present"] = np.array(there)
        return arr, values

    def _image(self, cell):
        if cell.missing:
            raise cell.refuse("there is no image")
        if cell.is_array:
            found = pixels_of(cell, self.image_channels)
            if found.dtype != np.uint8:
                raise cell.refuse(
                    f"images must be uint8, not {found.dtype}; another modality may have other types"
                )
            return found
        with _as_bad_image(cell):
            found = np.asarray(to_channels(cell.image(), self.image_channels))
        return found[..., None] if found.ndim == 2 else found

    def _value(self, m: Modality, row: int):
        cell = self.source.cell(m.name, row)
        if cell.missing:
            told = isinstance(self.source, Arrays)  # by NAME_present
            if self.missing == "error" and not told:
                raise cell.refuse(f"there is no {m.name}; --missing value trains without it")
            return None
        return m.from_cell(cell)

    @staticmethod
    def _same_size(cell, size, m, row, value):
        if m.rank == 3 and value is not None and value.ndim > 1 and value.shape[1::-1] != size:
            told = f"{m.name} {value.shape[1]}x{value.shape[0]}"
            raise cell.refuse(f"its {told} is not of the image's size, {size[0]}x{size[1]}")

    def check(self, rows: Iterable[int], workers: int = 8) -> None:
        """Read every value but the images' pixels of these rows once: UserError of the first that cannot be used.
        Images that cannot be decoded are left to training, which skips and counts them."""

        def look(row):
            with contextlib.suppress(BadImageError):
                cell = self.source.cell("image", row)
                if cell.missing:
                    raise cell.refuse("there is no image")
                size = cell.size() if any(m.rank == 3 for m in self.modalities) else None
                for m in self.modalities:
                    self._same_size(cell, size, m, row, self._value(m, row))

        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(look, rows):
                pass


@contextlib.contextmanager
def _as_bad_image(cell):
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise BadImageError(f"{cell.where} cannot be read as an image: {error}") from None


# ------------------------------------------------------------------------------------------------- what is asked for


def borne(spec: dict[str, dict]) -> list[str]:
    """The names of a specification (modalities.as_mapping) whose values the data bring."""
    kinds = {name: kind_of(name, options) for name, options in spec.items()}
    made = [name for name, options in spec.items() if options.get("preset", name) in DERIVED]
    return [n for n, cls in kinds.items() if n not in made and getattr(cls, "derive", None) is None]


def completed(spec: dict[str, dict], source: Source, label: str | None) -> dict[str, dict]:
    """The specification with what the source says of it: kinds, channels, ranges, classes, widths."""
    found = {}
    for name, options in spec.items():
        if name in source.names and name != label:
            column = Column(source, name)
            if kind_of(name, options) is None and "preset" not in options:
                options = {"preset": column.kind(), **options}
            cls = kind_of(name, options) or KINDS[PRESETS[options["preset"]]]
            options = cls.completed(name, dict(options), column)
        found[name] = options
    return found


def covers(before: dict[str, dict], spec: dict[str, dict]) -> bool:
    """Whether a completed specification is one of `spec`: the same names, and all that was asked of each."""

    def plain(options):
        palette = options.get("palette")
        return (
            {**options, "palette": palette_mapping(as_palette(palette))} if palette is not None else options
        )

    return list(before) == list(spec) and all(
        before[name].get(key, "U" if key == "variant" else None) == value
        for name, options in spec.items()
        for key, value in plain(options).items()
    )


def label_names(source: Source, label: str, options: Mapping) -> list[str]:
    """The class names of the label that is `y`: as the specification has them, or those of its values."""
    if "class_names" in options or "classes" in options:
        return [str(name) for name in options.get("class_names") or range(options["classes"])]
    return Column(source, label).classes()
