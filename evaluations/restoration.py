"""Table 1 of the paper: LPIPS between clean images and masked, SDEdit-restored and MT-Diffusion-restored ones.

    python evaluations/restoration.py mask photos/ table1 --image_size 64 --num_images 1000
    python evaluations/restoration.py sdedit table1 --model_path single_task.pt --num_channels 128 ...
    python scripts/mt_image_sample.py --model_path runs/mine --given masked=table1/holes_5.npz --log_dir table1/mt_5
    python evaluations/restoration.py table table1 --json table1/table.json

`mask` writes holes_M.npz for every number M of masks: arr_0 the masked images, mask the pixels that are left, clean the
images themselves. Masks are training's: grey squares that may overlap and end at the image's edge. Image k has the
same masks whatever else is in the set. `table` also takes other methods' results: --row "Name=folder/name_{m}.npz".
"""

from evaluations.arguments import NETS, STRENGTH, add_json_option, add_size_option, write_json
from guided_diffusion.errors import UserFileError, UserValueError, exit_on_user_error
from guided_diffusion.flags import Parser, answer_early, args_to_dict, model_and_diffusion_defaults

MASKS = (5, 10, 15, 20)
MASK_SIZE = 16  # pixels


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    commands = own.add_subparsers(dest="command", required=True)

    mask = commands.add_parser("mask", help="cut holes into clean images")
    mask.add("source", path="source", help="folder of images, or .npz with arr_0")
    mask.add("folder", path="folder", help="where to write holes_M.npz")
    mask.add(
        "--masks",
        kind=int,
        low=0,
        high=100_000,
        nargs="+",
        default=list(MASKS),
        group="data",
        help="numbers of masks",
    )
    mask.add(
        "--mask_size", default=MASK_SIZE, low=1, high=4096, group="data", help="pixels of an edge of a mask"
    )
    add_size_option(mask)
    mask.add("--num_images", kind=int, low=1, group="data", unset="all", help="how many, drawn by --seed")
    mask.add("--seed", default=0)

    edit = commands.add_parser("sdedit", help="restore the holes by SDEdit with a single-task model")
    edit.add("folder", path="source", help="with holes_M.npz; sdedit_M.npz are written beside them")
    edit.add("--model_path", required=True, help="weights of the model; its flags are those of training")
    edit.add(
        "--strength", default=STRENGTH, low=0, high=1, help="share of the steps that are noised and denoised"
    )
    edit.add(
        "--keep_known", action="store_true", group="sampling", help="put the known pixels back at the end"
    )
    edit.add("--use_ddim", action="store_true")
    edit.add("--batch_size", default=64, help="images of a step of the network")
    edit.add("--seed", default=0)
    edit.add("--device")
    edit.add_flags(model_and_diffusion_defaults())

    table = commands.add_parser("table", help="print Table 1")
    table.add("folder", path="source", help="with holes_M.npz and the restored images")
    table.add(
        "--row",
        action="append",
        default=[],
        metavar="NAME=PATTERN",
        group="results",
        help="a further method; {m}: masks",
    )
    table.add("--net", choices=NETS, default="alex", group="model", help="network of LPIPS")
    table.add(
        "--lpips_weights",
        nargs="+",
        metavar="FILE",
        path="source",
        group="model",
        unset="downloaded",
        help="local weights",
    )
    add_json_option(table)
    table.add("--device")
    return own


if __name__ == "__main__":
    answer_early(parser)  # before the slow imports


import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluations import distributed
from evaluations.images import class_names, load_array, npz_keys
from evaluations.lpips import LPIPS, load_lpips, lpips_distances
from evaluations.make_reference import pick, select
from evaluations.sdedit import labels_of_model, load_single_task, restore
from guided_diffusion import dist_util
from guided_diffusion.mt.masks import RandomPatches
from guided_diffusion.seeding import PerSample, derive_seed

MASK_COLOR = 128  # of 255: the middle of the range, as the model is trained with
MASKED_ROW, SDEDIT_ROW, MT_ROW = "clean-masked", "SDEdit", "MT-Diffusion-X"
SDEDIT_FILE, MT_FILE = "sdedit_{m}.npz", "mt_{m}"  # in the folder of the holes


@dataclass(frozen=True)
class Cell:
    """Mean LPIPS of one method at one number of masks; `error` is the standard error of the mean."""

    method: str
    masks: int
    lpips: float
    error: float
    n: int


@dataclass(frozen=True)
class Table:
    """Table 1, and everything needed to compute it again."""

    cells: list[Cell]
    net: str
    weights_sha256: dict[str, str]  # by file name
    mask_size: int
    seeds: dict[int, int]  # of the masks, by their number


def draw_masks(
    count: int, height: int, width: int, masks: int, size: int = MASK_SIZE, seed: int = 0
) -> np.ndarray:
    """Which pixels are left, bool [count, height, width], under `masks` squares of `size` pixels per image, as in
    training (RandomPatches)."""
    if size < 1 or size > min(height, width) or masks < 0:
        raise UserValueError(f"{masks} masks of {size} pixels do not fit images of {width}x{height}")
    random = PerSample.derived(derive_seed(seed, masks), range(count))
    return RandomPatches(size=size).keep(height, width, random, masks)[:, 0].numpy()


def apply_masks(images: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W, 3] with all but the pixels that are `left` [N, H, W] grey."""
    return np.where(left[..., None], images, np.uint8(MASK_COLOR))


def write_holes(
    source: str | Path,
    folder: str | Path,
    masks: tuple[int, ...] = MASKS,
    size: int = MASK_SIZE,
    image_size: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write holes_M.npz into `folder` for every number of masks; `num_images` of the source are drawn by `seed`."""
    selection = select(source, image_size)
    count = selection.images.shape[0]
    if num_images and num_images > count:
        raise UserValueError(f"{source} has {count} images, {num_images} were asked for")
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:num_images])
    clean = pick(selection.images, chosen)
    extra = {} if selection.labels is None else {"labels": selection.labels[chosen]}
    if extra and selection.class_names:
        extra["class_names"] = np.array(selection.class_names)
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for m in masks:
        left = draw_masks(*clean.shape[:3], m, size, seed)
        path = Path(folder) / f"holes_{m}.npz"
        np.savez_compressed(
            path, arr_0=apply_masks(clean, left), mask=left, clean=clean, seed=seed, mask_size=size, **extra
        )
        written.append(path)
    return written


def find_holes(folder: str | Path) -> dict[int, Path]:
    """The holes_M.npz of a folder by their number of masks. Raises UserError where there are none."""
    files = {path.stem.removeprefix("holes_"): path for path in Path(folder).glob("holes_*.npz")}
    holes = {
        int(number): files[number] for number in sorted(files, key=lambda n: (len(n), n)) if number.isdigit()
    }
    if not holes:
        raise UserFileError(f"{folder} holds no holes_M.npz: write them with `restoration.py mask`")
    return holes


def find_result(pattern: str, masks: int) -> Path | None:
    """The .npz of a method: `pattern` with {m} filled in, or the only samples_*.npz in the folder of that name."""
    path = Path(pattern.replace("{m}", str(masks)))
    if path.is_dir():
        found = sorted(path.glob("samples_*.npz"))
        if len(found) > 1:
            raise UserValueError(f"{path} holds {len(found)} samples_*.npz: leave one, or name it with --row")
        return found[0] if found else None
    return path if path.is_file() else None


def restoration_table(folder: str | Path, rows: dict[str, str], model: LPIPS) -> Table:
    """LPIPS to the clean images of the masked ones in `folder`, and of every method in `rows` (name: pattern).

    Numbers of masks for which a method has no result are left out of its row.
    """
    cells, seeds, sizes = [], {}, set()
    for m, path in find_holes(folder).items():
        clean = load_array(path, "clean")
        seeds[m] = int(load_array(path, "seed"))
        sizes.add(int(load_array(path, "mask_size")))
        results = {MASKED_ROW: path} | {name: find_result(pattern, m) for name, pattern in rows.items()}
        for name, result in results.items():
            if result is None:
                continue
            images = load_array(result, "arr_0")
            if images.shape != clean.shape:
                raise UserValueError(
                    f"{result} has {list(images.shape)}, the clean images are {list(clean.shape)}: restore all of {path}"
                )
            distances = lpips_distances(model, clean, images)
            error = distances.std(ddof=1) / len(distances) ** 0.5 if len(distances) > 1 else 0.0
            cells.append(Cell(name, m, float(distances.mean()), float(error), len(distances)))
    if len(sizes) > 1:
        raise UserValueError(
            f"the holes in {folder} are of different sizes {sorted(sizes)}: they make no table"
        )
    return Table(cells, model.net_name, model.sha256, sizes.pop(), seeds)


def format_table(table: Table) -> list[str]:
    """The lines to print: a row per method, a column per number of masks."""
    masks = sorted({cell.masks for cell in table.cells})
    methods = list(dict.fromkeys(cell.method for cell in table.cells))
    values = {(cell.method, cell.masks): f"{cell.lpips:.4f} ± {cell.error:.4f}" for cell in table.cells}
    width = max(len(method) for method in methods)
    lines = [" ".join([" " * width, *(f"{f'm = {m}':>16}" for m in masks)])]
    for method in methods:
        lines.append(
            " ".join([f"{method:<{width}}", *(f"{values.get((method, m), '-'):>16}" for m in masks)])
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    with exit_on_user_error():
        args = parser().parse_args(arguments)
        dist_util.setup_dist()
        {"mask": run_mask, "sdedit": run_sdedit, "table": run_table}[args.command](args)


def run_mask(args: argparse.Namespace) -> None:
    paths = write_holes(
        args.source,
        args.folder,
        tuple(args.masks),
        args.mask_size,
        args.image_size,
        args.num_images,
        args.seed,
    )
    for path in paths:
        print(path)


def run_sdedit(args: argparse.Namespace) -> None:
    holes = find_holes(args.folder)
    device = distributed.choose_device(args.device)
    model, diffusion = load_single_task(
        args.model_path, args_to_dict(args, model_and_diffusion_defaults()), device
    )
    for m, path in holes.items():
        masked = load_array(path, "arr_0")
        if masked.shape[1:3] != (args.image_size,) * 2:
            raise UserValueError(
                f"{path} has images of {masked.shape[2]}x{masked.shape[1]}, the model makes {args.image_size}"
            )
        labels = None
        if args.class_cond:
            if "labels" not in npz_keys(path):
                raise UserValueError(f"{path} has no labels, and the model is class-conditional")
            labels = labels_of_model(
                load_array(path, "labels"),
                class_names(path),
                args.model_path,
                args.num_classes,
                len(masked),
                path,
            )
        restored = restore(
            masked, diffusion, model, device, args.seed, args.strength, args.use_ddim, args.batch_size, labels
        )
        if restored is None:  # another rank has them
            continue
        if args.keep_known:
            restored = np.where(load_array(path, "mask")[..., None], masked, restored)
        output = Path(args.folder) / SDEDIT_FILE.format(m=m)
        np.savez_compressed(output, arr_0=restored, seed=args.seed, strength=args.strength)
        print(output)


def run_table(args: argparse.Namespace) -> None:
    find_holes(args.folder)  # before weights are downloaded for nothing
    rows = {SDEDIT_ROW: str(Path(args.folder) / SDEDIT_FILE), MT_ROW: str(Path(args.folder) / MT_FILE)}
    for row in args.row:
        name, found, pattern = row.partition("=")
        if not found or not name or not pattern:
            raise UserValueError(f"--row {row}: expected NAME=PATTERN")
        rows[name] = pattern
    model = load_lpips(args.net, args.lpips_weights, distributed.choose_device(args.device))
    table = restoration_table(args.folder, rows, model)
    print(f"LPIPS ({table.net}, v0.1) to the clean images, mean ± standard error; lower is better")
    for line in format_table(table):
        print(line)
    write_json(args.json, table)


if __name__ == "__main__":
    main()
