"""Checkpoints: the one reader and the one writer of all files of weights, and what an exact resume needs.

A complete checkpoint, `checkpoint{step:06d}.pt`, is one dict of plain values and tensors (it loads with
weights_only=True): see `TrainLoop.state_dict`. Local files are written beside their place and moved there once they are on
disk, so a process killed at any moment leaves the old file or the new one, never a part of one. A checksum at the end of
the file (the zip archive's comment) tells a single flipped bit.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import blobfile as bf
import numpy as np
import torch as th
import torch.distributed as dist
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse_safetensors
from safetensors.torch import load_file, save_file

from . import logger
from .errors import UserError, UserFileError, machine_error

FORMAT = "mt-diffusion-checkpoint"
METADATA = "mt_diffusion"  # of a safetensors file, under which it describes its model
HUB_WEIGHTS = "model.safetensors"  # in a folder that is shared
VERSION = 1
_COMPLETE = re.compile(r"checkpoint(\d{6,})\.pt")
_AVERAGE = re.compile(r"ema_([\d.]+)_(\d{6,})\.pt")
_TEMPORARY = ".pt.tmp"
_SEAL = re.compile(rb"crc32 ([0-9a-f]{8})")
_SEAL_BYTES = len(b"crc32 00000000")

# What a complete checkpoint holds, and of which type.
_PARTS = {
    "version": int,
    "config": dict,
    "step": int,
    "batch_size": int,
    "world_size": int,
    "seed": int | None,
    "model": dict,
    "ema": dict,
    "optimizer": dict,
    "lg_loss_scale": int | float,
    "schedule_sampler": dict,
    "nonfinite_steps": int,
    "rng": list,
    "extra": dict,
}

# Flags of a model that each run chooses for itself.
_NOT_SHAPE = {"timestep_respacing", "use_fp16", "classifier_use_fp16", "use_checkpoint", "dropout", "use_kl"}

STEM = "input_blocks.0.0.weight"  # [out, in, 3, 3]: the convolution that reads the network's input

# ---------------------------------------------------------------------------------------------------------- reading


def _named(path: str, made: Any) -> Any:
    """`made` as what a pickle calls `path`, whatever its own name is."""
    made.__module__, _, made.__qualname__ = path.rpartition(".")
    made.__name__ = made.__qualname__
    return made


def _number_of(dtype: np.dtype, data: bytes) -> np.generic:
    if dtype.kind not in "biufc":
        raise pickle.UnpicklingError(f"a NumPy scalar of type {dtype}")
    return np.frombuffer(data, dtype)[0]


# What the released Stable Diffusion 1 checkpoints name beside tensors: NumPy scalars (the callbacks' best scores), under
# the names of NumPy 1 and 2, and the class of Lightning that keys them, of which nothing runs.
_RELEASED = [
    *(_named(f"numpy.{core}.multiarray.scalar", lambda d, b: _number_of(d, b)) for core in ("core", "_core")),
    _named("numpy.dtype", lambda *args: np.dtype(*args)),
    *(getattr(np.dtypes, f"{kind}DType") for kind in ("Float64", "Float32", "Float16", "Int64", "Int32")),
    _named("_codecs.encode", lambda text, encoding="utf-8": text.encode(encoding)),
    *(
        _named(f"{package}.callbacks.model_checkpoint.ModelCheckpoint", type("ModelCheckpoint", (), {}))
        for package in ("pytorch_lightning", "lightning.pytorch")
    ),
]


def read(path: str | os.PathLike, *, weights_only: bool = True, **options: Any) -> Any:
    """What is in a checkpoint: torch.save's object, or the tensors of a safetensors file by name (told by its content).

    path: local, or any other that blobfile knows. options: of torch.load; map_location is the CPU by default. The file's
    checksums are compared. `UserFileError` where there is no such file; `UserError` for a damaged one, for something
    else, and for one that names any global but those of released Stable Diffusion 1 checkpoints: it could run code.
    """
    path = os.fspath(path)
    options = {"map_location": "cpu", **options}
    with _opened(path) as file:
        head = file.read(512)
        file.seek(0)
        if path.endswith(".safetensors") or _is_safetensors(head):
            with _as_safetensors(path):
                return parse_safetensors(file.read()) if is_remote(path) else load_file(path)
        _refuse_other_files(path, head)
        sound = _check_sums(path, file)
        file.seek(0)
        try:
            with _released_globals(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, on files that it refuses
                return th.load(file, weights_only=weights_only, **options)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if sound or named:
                what = f"names {named[1]}" if named else "holds other Python objects"
                raise UserError(
                    f"{path!r} {what}, which could run code: only tensors and plain values are read. Convert the file where "
                    "it was made, torch.save(model.state_dict(), FILE) or safetensors' save_file, and give that one"
                ) from error
            raise _not_a_checkpoint(path, error) from error
        except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
            if sound:  # the arguments are not (map_location, ...)
                raise
            raise _not_a_checkpoint(path, error) from error


def read_metadata(path: str | os.PathLike, name: str) -> dict:
    """The mapping that `save_safetensors` kept under `name` in a local file, {} where there is none."""
    with _opened(os.fspath(path)), _as_safetensors(path), safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(name, "{}")
    with contextlib.suppress(ValueError):
        if isinstance(about := json.loads(text), dict):
            return about
    raise UserError(f"{str(path)!r} is not a file of this program: its metadata {name!r} is no JSON mapping")


def read_weights(path: str | os.PathLike, choose: str = "ema") -> dict[str, th.Tensor]:
    """`weights_of` what `read` finds in `path`; a moving average that is too young is warned of."""
    content = read(path)
    warn_of_young_average(content, str(path), choose)
    return weights_of(content, str(path), choose)


def weights_of(content: Any, source: str, choose: str = "ema") -> dict[str, th.Tensor]:
    """The tensors by name in what `read` returned from `source`: alone, or under `state_dict`, `ema` or `model`.

    choose: of a complete checkpoint `ema` (the first average, else the weights), a rate such as `0.9999`, or `model`.
    The prefixes of DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) go. UserError if there are none.
    """
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        check_complete(content, source)
        rates = list(content["ema"])
        rate = rates[0] if choose == "ema" and rates else choose
        if choose == "model" or (choose == "ema" and not rates):
            content = content["model"]
        elif rate in rates:
            content = content["ema"][rate]
        else:
            raise UserError(
                f"{source} has no EMA {choose!r}; it has {', '.join(rates) or 'none'}, and `model`"
            )
    while isinstance(content, Mapping):
        inner = (content.get(key) for key in ("state_dict", "ema", "model"))
        if (found := next((value for value in inner if isinstance(value, Mapping)), None)) is None:
            break
        content = found
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(name, str) and isinstance(value, th.Tensor) for name, value in content.items())
    ):
        has = f"; it has {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) else ""
        raise UserError(
            f"{source} holds no weights (a dict of tensors by name, alone or under state_dict){has}"
        )
    state = {name.replace("_orig_mod.", ""): value for name, value in content.items()}
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def warn_of_young_average(content: Any, source: str, choose: str = "ema") -> None:
    """Log a warning where what `weights_of` chooses is a moving average, made without warm-up, over fewer steps than its
    horizon 1 / (1 - rate): the untrained start is much of it."""
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        check_complete(content, source)
        rate = next(iter(content["ema"]), None) if choose == "ema" else choose
        steps, warm = content["step"], content.get("ema_warmup")
    elif match := _AVERAGE.fullmatch(os.path.basename(source)):
        rate, steps, warm = match[1], int(match[2]), config_of(source).get("ema_warmup")
    else:
        return
    with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):  # None, "model"
        if steps < (horizon := 1 / (1 - float(rate))) and not warm:
            logger.warn(
                f"warning: the average {rate} of {source} reaches over {horizon:.0f} steps, the run has made {steps}: "
                f"{100 * float(rate) ** steps:.0f} % of it is the untrained start. Take the weights themselves (model), or "
                "train with ema_warmup"
            )


def config_of(path: str | os.PathLike) -> dict:
    """The flags of training that are known of the weights in a local `path`, {} where none are.

    They are in the file, in the run's newest complete checkpoint, or beside it: NAME.yaml (an exported classifier),
    NAME.flags (words for ADM's scripts), config.yaml (a joint model). path: also a run folder.
    """
    path = Path(path)
    if is_remote(path) or not path.exists():
        return {}
    folder = path if path.is_dir() else path.parent
    beside = (path.with_suffix(".flags"), path.with_suffix(".yaml"), folder / "config.yaml")
    beside = (*beside, *([folder / HUB_WEIGHTS] if path.is_dir() else []))
    for source in (path, *beside, *map(Path, reversed(complete_checkpoints(folder)))):
        with contextlib.suppress(OSError, UserError, yaml.YAMLError, RuntimeError, pickle.UnpicklingError):
            if found := _flags_in(source):
                return found
    return {}


def _flags_in(source: Path) -> dict:
    if source.is_dir() or not source.exists():
        return {}
    if source.suffix == ".flags":
        words = (word.removeprefix("--").partition("=") for word in source.read_text().split())
        return {name: yaml.safe_load(value) for name, _, value in words}
    if source.suffix == ".yaml":
        found = yaml.safe_load(source.read_text())
    elif source.suffix == ".safetensors":
        found = read_metadata(source, METADATA).get("flags")
    elif not zipfile.is_zipfile(source):
        return {}
    else:
        content = _mapped(source)
        found = content.get("config") if content.get("format") == FORMAT else None
    return found if isinstance(found, dict) else {}


def _mapped(path: str | os.PathLike) -> dict:
    """The dict in a local file of torch.save's, {} where there is something else; its tensors are not read."""
    with _released_globals():
        content = th.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    return content if isinstance(content, dict) else {}


def is_complete(path: str | os.PathLike) -> bool:
    """Whether a local file says that it is a complete checkpoint, whatever its name; `load_complete` checks it."""
    with contextlib.suppress(OSError, RuntimeError, ValueError, pickle.UnpicklingError):
        return zipfile.is_zipfile(path) and _mapped(path).get("format") == FORMAT
    return False


def with_flags_of(
    path: str | os.PathLike,
    flags: Mapping,
    defaults: Mapping,
    typed: Iterable[str] = (),
    strict: bool = False,
) -> dict:
    """`flags` in which those that describe the network, among `defaults`, are as in training (see `config_of`) where they
    were left at their default. What is changed is logged.

    typed: names that the user gave, which hold; strict: UserError where they contradict the training.
    """
    known, taken, wrong = config_of(path), {}, []
    for name, default in defaults.items():
        if name not in flags or name not in known or name in _NOT_SHAPE:
            continue
        value = str(known[name]) if isinstance(default, str) else known[name]
        if isinstance(value, bool) != isinstance(default, bool):
            continue
        if name in typed:
            if value not in ("", flags[name]):  # "": what follows from the others
                wrong.append(f"{name} {value}, not {flags[name]}")
        elif flags[name] == default and value != default:
            taken[name] = value
    if wrong and strict:
        raise UserError(
            f"{path} does not fit these flags: it was trained with {'; '.join(wrong)}. Leave them out, the checkpoint "
            "says them"
        )
    if taken:
        logger.log(f"as in {path}: " + ", ".join(f"{name} {value}" for name, value in taken.items()))
    return {**flags, **taken}


def load_complete(path: str) -> dict:
    """Read a complete checkpoint to the CPU; `UserError` if it is missing, damaged, or something else."""
    state = read(path)
    check_complete(state, path)
    return state


def check_complete(state: Any, source: str) -> None:
    """UserError that names the first part which a complete checkpoint has and `state` lacks, or has of another type."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{source} is not a complete checkpoint of this program (a checkpoint*.pt file)")
    for name, kind in _PARTS.items():
        if name not in state:
            raise UserError(f"{source} is not a complete checkpoint: it lacks {name!r}")
        if not isinstance(state[name], kind):
            found = type(state[name]).__name__
            raise UserError(f"{source} is not a complete checkpoint: {name!r} is of type {found}")
    if state["version"] > VERSION:
        raise UserError(
            f"{source} was written by a newer version of this program (format {state['version']})"
        )


def load_weights(
    module: th.nn.Module,
    weights: Mapping[str, th.Tensor],
    source: str | os.PathLike,
    ignore: Iterable[str] = (),
    optional: Iterable[str] = (),
    strict: bool = True,
) -> list[str]:
    """module.load_state_dict, in the module's precision, with one line where `weights` (from `source`) do not fit.

    ignore: prefixes of names in the file to leave out; optional: prefixes of names in the module that the file may lack;
    strict: refuse what the module does not know, otherwise return those names. Raises `UserError` that counts what is
    missing, unknown, of another shape or not finite, and names the first of each; the module is then as before.
    """
    weights = weights_of(weights, str(source))
    younger = (
        f"{prefix}.{name}"
        for prefix, part in module.named_modules()
        for name in getattr(part, "may_lack", ())
    )
    ignore, optional = tuple(ignore), (*optional, *younger)
    own = module.state_dict()
    given = {name: value for name, value in weights.items() if not name.startswith(ignore)}
    unknown = [name for name in given if name not in own]
    both = [name for name in own if name in given]
    problems = []
    for what, names in (
        ("are missing", [n for n in own if n not in given and not n.startswith((*ignore, *optional))]),
        ("are unknown", unknown if strict else []),
        ("have another shape", [n for n in both if own[n].shape != given[n].shape]),
    ):
        if names:
            first = names[0]
            shapes = (
                f": {tuple(given[first].shape)} in the file, {tuple(own[first].shape)} in the model"
                if "shape" in what
                else ""
            )
            problems.append(f"{len(names)} of {len(own)} tensors {what} (first: {first}{shapes})")
    if problems:
        raise UserError(
            f"{source} does not fit the model that the flags describe, {type(module).__name__}: {'; '.join(problems)}. "
            "Give the flags or the configuration that the weights were trained with"
        )
    # A model may hold infinity by design, as in a mask.
    broken = next((n for n in both if not _finite(given[n]) and _finite(own[n])), None)
    if broken:
        raise UserError(
            f"the weights of {source} are not finite (first: {broken}): the run that wrote them failed; take earlier ones"
        )
    module.load_state_dict({name: given[name] for name in both}, strict=False)
    return unknown


def _finite(tensor: th.Tensor) -> bool:
    return bool(th.isfinite(tensor).all())


def fit_channels(
    weights: Mapping[str, th.Tensor], own: Mapping[str, th.Tensor], name: str = STEM, at: int | None = None
) -> dict[str, th.Tensor]:
    """`weights` whose convolution `name` [out, in, ...] reads as many channels as in the state dict `own`.

    The channels before `at` (default: all that both have) stay in front and those behind stay at the end; between them
    there come channels of zeros, without influence, or some are left out.
    """
    given = weights.get(name)
    if given is None or name not in own or given.shape[1] == own[name].shape[1]:
        return dict(weights)
    wanted = own[name].shape[1]
    front = min(given.shape[1], wanted) if at is None else at
    behind = min(given.shape[1], wanted) - front
    fitted = given.new_zeros(len(given), wanted, *given.shape[2:])
    fitted[:, :front] = given[:, :front]
    if behind > 0:
        fitted[:, -behind:] = given[:, -behind:]
    return {**weights, name: fitted}


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if not bf.exists(path):
        many = dist.is_initialized() and dist.get_world_size() > 1
        where = f" (looked for by rank {dist.get_rank()} on {socket.gethostname()})" if many else ""
        raise UserFileError(f"checkpoint not found: {path!r}{where}; check the path")
    if bf.isdir(path):
        raise UserError(f"{path!r} is a folder; give the checkpoint file in it")
    try:
        file = io.BytesIO(bf.BlobFile(path, "rb").read()) if is_remote(path) else open(path, "rb")
    except PermissionError as error:
        raise UserFileError(f"{path!r} cannot be read: permission denied") from error
    with file:
        yield file


@contextlib.contextmanager
def _released_globals() -> Iterator[None]:
    allowed = th.serialization
    before = allowed.get_safe_globals()
    allowed.add_safe_globals(_RELEASED)
    try:
        yield
    finally:
        allowed.clear_safe_globals()
        allowed.add_safe_globals(before)


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


@contextlib.contextmanager
def _as_safetensors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error})") from error


def _refuse_other_files(path: str, head: bytes) -> None:
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(
            f"{path!r} is not a checkpoint but a web page: the download went wrong (a login, another address); fetch it again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path!r} is not a checkpoint but a pointer of Git LFS: fetch the file itself with `git lfs pull`"
        )


def _check_sums(path: str, file: BinaryIO) -> bool:
    """Whether this is a sound file of torch.save's in its zip form; False for its older form. UserError if damaged."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        if file.read(2) == b"PK":
            raise _damaged(path, "it is truncated")
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            records, comment = archive.infolist(), archive.comment
            # torch can be told to write no checksums: all are zero then.
            if not comment and any(record.CRC for record in records) and (bad := archive.testzip()):
                raise _damaged(path, f"the checksum of {bad} differs")
            if not any(record.filename.endswith("data.pkl") for record in records):
                raise UserError(f"{path!r} is not a checkpoint but another zip archive")
    except UserError:
        raise
    except Exception as error:  # zipfile and zlib raise many types
        raise _damaged(path, str(error)) from error
    if comment:
        seal = _SEAL.fullmatch(comment)
        if not seal or int(seal[1], 16) != _checksum(file, file.seek(0, os.SEEK_END) - _SEAL_BYTES):
            raise _damaged(path, "its checksum differs")
    return True


def _checksum(file: BinaryIO, size: int) -> int:
    file.seek(0)
    total = 0
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        total, size = zlib.crc32(block, total), size - len(block)
    return total


def _damaged(path: str, why: str) -> UserError:
    """Names the checkpoint to go on with: the newest sound one of the same folder that is older."""
    match = _COMPLETE.fullmatch(os.path.basename(path))
    others = [] if is_remote(path) else complete_checkpoints(os.path.dirname(path) or ".")
    if match:
        others = [o for o in others if int(_COMPLETE.fullmatch(os.path.basename(o))[1]) < int(match[1])]
    elif path.endswith(".ckpt"):
        same = (other for other in Path(path).parent.glob("*.ckpt") if other.name != os.path.basename(path))
        others = sorted((str(o) for o in same if zipfile.is_zipfile(o)), key=os.path.getmtime)
    advice = f"delete it and go on from {others[-1]}" if others else "get it from its source again"
    return UserError(f"{path!r} is not a checkpoint that can be read, it is damaged ({why}): {advice}")


def _not_a_checkpoint(path: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if reason.startswith("Weights only load failed"):
        reason = "another program's pickle could run code, and is not read"
    return UserError(f"{path!r} is not a checkpoint that torch can read, or it is truncated ({reason})")


# ---------------------------------------------------------------------------------------------------------- writing


def is_remote(path: str) -> bool:
    """Whether `path` names an object store (gs://, az://, https://) and not a local file."""
    return "://" in str(path)


def save_atomic(value: Any, path: str | os.PathLike) -> None:
    """torch.save `value` to `path`, completely or not at all. UserError where the disk is full."""
    path = os.fspath(path)
    if is_remote(path):  # an object store shows a file only once it is closed
        with bf.BlobFile(path, "wb") as file:
            th.save(value, file)
        return
    with replacing(path, lambda: _bytes_in(value)) as temporary, open(temporary, "w+b") as file:
        write(value, file)
        _seal(file)


def save_safetensors(
    weights: Mapping[str, th.Tensor], path: str | os.PathLike, metadata: Mapping | None = None
) -> None:
    """Write tensors by name as safetensors, completely or not at all; metadata: plain values, kept as JSON."""
    # Tensors that share memory, or are views, cannot be stored.
    state = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    about = {name: json.dumps(value) for name, value in (metadata or {}).items()}
    with replacing(os.fspath(path), lambda: _bytes_in(state)) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **about})


def write(value: Any, file: BinaryIO) -> None:
    """The bytes of one file; apart so that a test can make it slow."""
    th.save(value, file)


def _seal(file: BinaryIO) -> None:
    """Append the checksum of the whole file as the zip archive's comment, which every reader of zip files skips."""
    file.seek(-2, os.SEEK_END)  # the length of the comment
    file.write(_SEAL_BYTES.to_bytes(2, "little"))
    total = _checksum(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(b"crc32 %08x" % total)


@contextlib.contextmanager
def replacing(path: str, size) -> Iterator[str]:
    """The name of a temporary file, which takes the place of `path` once it is written and on disk. size: () -> its
    bytes, for the message where there is no space."""
    temporary = os.path.splitext(path)[0] + _TEMPORARY
    folder = os.path.dirname(os.path.abspath(path))
    try:
        yield temporary
        for name in (temporary, None):
            if name is None:
                os.replace(temporary, path)
            # The new name is safe against a power cut only once the folder is on disk too.
            handle = os.open(name or folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except Exception as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        lacking = machine_error(error)
        if lacking is None:
            raise
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"{os.path.basename(path)} cannot be written to {folder}: {lacking}; it needs {size() / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB are free. The files written before are whole"
        ) from error


def _bytes_in(value: Any) -> int:
    if isinstance(value, th.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes_in, parts))


# --------------------------------------------------------------------------------------------------------- run folders


def complete_checkpoints(folder: str) -> list[str]:
    """The complete checkpoints in a local `folder`, by step, newest last; truncated copies do not count."""
    return [path for path, whole in _checkpoints(folder) if whole]


def _checkpoints(folder: str) -> list[tuple[str, bool]]:
    """(path, whether its end is there) of every checkpoint*.pt, by step."""
    found = {}
    for path in Path(folder).iterdir() if os.path.isdir(folder) else ():
        if match := _COMPLETE.fullmatch(path.name):
            found[int(match[1])] = (
                str(path),
                zipfile.is_zipfile(path),
            )  # reads the directory at the file's end
    return [found[step] for step in sorted(found)]


def find_complete_checkpoint(logdir: str) -> str | None:
    """The newest complete checkpoint in the run folder `logdir`, or None where there was never one.

    UserError where there are checkpoints and all are truncated.
    """
    found = _checkpoints(logdir)
    whole = [path for path, is_whole in found if is_whole]
    if found and not whole:
        raise UserError(
            f"{found[-1][0]} is truncated, and {logdir} has no other complete checkpoint: delete it to begin anew, or "
            "give another --log_dir"
        )
    if found and not found[-1][1]:
        logger.log(f"{found[-1][0]} is truncated: {whole[-1]} is taken")
    return whole[-1] if whole else None


def prune_checkpoints(folder: str, keep: int, newest: str, adm_files: bool = False) -> None:
    """Delete all but the last `keep` complete checkpoints of a local folder; `newest` stays in any case. adm_files: with
    the model, ema and opt files of the same step."""
    for path in complete_checkpoints(folder)[: -max(keep, 1)]:
        if os.path.basename(path) != os.path.basename(newest):
            number = _COMPLETE.fullmatch(os.path.basename(path))[1]
            # The checkpoint first: its presence says that the others are complete.
            for gone in (path, *(_adm_files(folder, number) if adm_files else ())):
                os.remove(gone)


def _adm_files(folder: str, number: str) -> list[str]:
    return [
        str(path)
        for path in Path(folder).glob(f"*{number}.pt")
        if re.fullmatch(rf"(model|opt|ema_[\d.]+_){number}\.pt", path.name)
    ]


def remove_stray_files(folder: str) -> None:
    """Delete what a killed process left half written in a local folder."""
    for path in Path(folder).glob(f"*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


_locks: dict[str, Any] = {}


def lock_folder(folder: str) -> None:
    """Keep the run folder `folder` for this process until it ends, however it ends.

    UserError where another training has it. A file system without locks is used without one.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(os.path.realpath(folder), ".lock")
    if path in _locks:
        return
    # A lock of this kind belongs to the process: data workers do not inherit it and cannot outlive it.
    file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        file.seek(0)
        raise UserError(
            f"{folder} is in use by another training ({file.read().strip()}): wait for it, or give another --log_dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[path] = file


# ---------------------------------------------------------------------------------------------------- random numbers


def seed_everything(seed: int) -> None:
    """Seed torch (every device), NumPy and random."""
    th.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict:
    """The state of every generator of this process, in plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else [],
        "numpy": (name, th.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_rng_state(state: dict) -> None:
    """Continue from `rng_state()`; generators of devices that this machine lacks are left out."""
    th.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
