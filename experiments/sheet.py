"""Draw folders of images as the rows of one sheet, column by column the same file name.

    python experiments/sheet.py "photo=out/given/image" "truth=out/true/label_map" "joint model=out/label_map" \
        --columns 8 --out docs/results/sheet.png

Rows whose folders have the same names show the same scenes (every k-th, so that the columns span the set); a folder
with other names, such as samples from nothing, shows its own first ones.
"""

from guided_diffusion import flags
from guided_diffusion.errors import UserValueError, exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("rows", nargs="+", metavar="TITLE=FOLDER", help="rows of the sheet")
    own.add("--columns", default=8, low=1, high=1000, group="results", help="images in a row")
    own.add("--out", required=True, path="image", help="the image")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


from pathlib import Path

import numpy as np

from guided_diffusion.figures import Row, contact_sheet
from guided_diffusion.image_files import list_images, read_pixels


@exit_on_user_error()
def main():
    args = parser().parse_args()
    rows = [row.partition("=") for row in args.rows]
    if wrong := [title for title, equals, _ in rows if not equals]:
        raise UserValueError(f"{wrong[0]}: rows are given as TITLE=FOLDER")
    folders = {title: images_of(Path(folder)) for title, _, folder in rows}
    first = next(iter(folders.values()))
    shown = [sorted(first)[k * len(first) // args.columns] for k in range(min(args.columns, len(first)))]
    sheet = contact_sheet(
        [row(title, files, shown, args.columns) for title, files in folders.items()], tile=96
    )
    sheet.save(args.out)
    print(f"{len(rows)} rows in {args.out}")


def images_of(folder: Path) -> dict[str, Path]:
    """The images below a folder by name. UserFileError where there are none."""
    return {str(path.relative_to(folder)): path for path in map(Path, list_images(folder))}


def row(title: str, files: dict[str, Path], shown: list[str], columns: int) -> Row:
    """The images `shown` of a folder, or its first ones where it has others."""
    names = shown if set(shown) <= set(files) else sorted(files)[:columns]
    images = [np.asarray(read_pixels(files[name])) for name in names]
    return Row(title, np.stack(images))


if __name__ == "__main__":
    main()
