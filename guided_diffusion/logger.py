"""Log lines and key-value tables to the terminal and to files (interface: OpenAI baselines, logger.py).

    logger.configure(dir="runs/a", format_strs=["stdout", "log", "csv", "tensorboard"])
    logger.logkv("step", 10); logger.logkv_mean("loss", 0.3); logger.dumpkvs()

Formats: stdout; log = log.txt; csv = progress.csv; json = progress.json, one object per
line; tensorboard = tb/.
OPENAI_LOGDIR gives the folder, OPENAI_LOG_FORMAT the formats of rank 0 (default stdout,log,csv), and
OPENAI_LOG_FORMAT_MPI those of the other ranks (default log).
A folder that already holds a log is continued, so that a resumed run keeps what came before.
"""

import contextlib
import csv
import functools
import glob
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import IO, Any, TextIO, TypeVar

from tqdm import tqdm

from .errors import UserError, UserFileError, machine_error

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50

# Set by torchrun, MPICH and Intel MPI, Open MPI, MVAPICH, PMIx.
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK")

WIDTH = 30  # of a key or a value in the table for people

Call = TypeVar("Call", bound=Callable[..., Any])


class KVWriter:
    """Takes the key-value pairs of one dump."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def drop_from(self, step: int) -> None:
        """Take back what was written for "step" `step` and later ones, by an earlier run."""


class SeqWriter:
    """Takes a line of text, as a sequence of words."""

    def writeseq(self, seq: Sequence[Any]) -> None:
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Text and framed tables for people, to an open file or appended to the file of that name."""

    def __init__(self, filename_or_file: str | TextIO):
        self.own_file = isinstance(filename_or_file, str | os.PathLike)
        if self.own_file:
            _end_last_line(filename_or_file)
        elif not hasattr(filename_or_file, "write"):
            raise TypeError(f"expected a file or its name, got {filename_or_file!r}")
        self.file = open(filename_or_file, "a") if self.own_file else filename_or_file

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        if not kvs:
            self.writeseq(["WARNING: tried to write empty key-value dict"])
            return
        rows = [(_shorten(key), _shorten(_readable(kvs[key]))) for key in sorted(kvs, key=str.lower)]
        key_width, value_width = (max(map(len, column)) for column in zip(*rows, strict=True))
        frame = "-" * (key_width + value_width + 7)
        lines = [frame, *(f"| {key:<{key_width}} | {value:<{value_width}} |" for key, value in rows), frame]
        self._write("\n".join(lines))

    def writeseq(self, seq: Sequence[Any]) -> None:
        self._write(" ".join(str(word) for word in seq))

    def _write(self, text: str) -> None:
        # A terminal that was closed must not end a run that saves and stops for it.
        with contextlib.nullcontext() if self.own_file else contextlib.suppress(OSError):
            # A progress bar on the same terminal steps aside.
            with contextlib.nullcontext() if self.own_file else tqdm.external_write_mode(file=self.file):
                self.file.write(f"{text}\n")
                self.file.flush()

    def close(self) -> None:
        if self.own_file:
            self.file.close()


class JSONOutputFormat(KVWriter):
    """One JSON object per dump and line, appended to the file."""

    def __init__(self, filename: str):
        _drop_torn_line(filename)
        self.filename = filename
        self.file = open(filename, "a")

    def drop_from(self, step: int) -> None:
        self.file.close()
        try:
            with open(self.filename) as file:
                lines = [line for line in file if not _is_step_from(json.loads(line).get("step"), step)]
        except (ValueError, AttributeError) as error:
            raise UserError(f"{self.filename} does not hold one JSON object per line: {error}") from None
        with _replacing(self.filename) as file:
            file.writelines(lines)
        self.file = open(self.filename, "a")

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.file.write(json.dumps({key: _plain(value) for key, value in kvs.items()}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class CSVOutputFormat(KVWriter):
    """A table with one column per key, appended to the file. A new key adds a column to all rows."""

    def __init__(self, filename: str):
        _drop_torn_line(filename)
        self.filename = filename
        self.file = open(filename, "a+", newline="")
        self.file.seek(0)
        self.keys = next(csv.reader(self.file), [])
        self.file.seek(0, os.SEEK_END)

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        new_keys = sorted(set(kvs) - set(self.keys))
        if new_keys:
            self._add_columns(new_keys)
        _csv_writer(self.file).writerow(
            ["" if kvs.get(key) is None else _plain(kvs[key]) for key in self.keys]
        )
        self.file.flush()

    def drop_from(self, step: int) -> None:
        if "step" in self.keys:
            place = self.keys.index("step")
            self._rewrite(lambda row: not _is_step_from(row[place], step))

    def _add_columns(self, new_keys: list[str]) -> None:
        self.keys = self.keys + new_keys
        self._rewrite()

    def _rewrite(self, keep: Callable[[list[str]], bool] = lambda row: True) -> None:
        """Rewrite the table beside the old one and put it in its place at once."""
        self.file.seek(0)
        rows = list(csv.reader(self.file))[1:]
        self.file.close()
        with _replacing(self.filename) as file:
            writer = _csv_writer(file)
            writer.writerow(self.keys)
            writer.writerows(row + [""] * (len(self.keys) - len(row)) for row in rows if keep(row))
        self.file = open(self.filename, "a+", newline="")

    def close(self) -> None:
        self.file.close()


class TensorBoardOutputFormat(KVWriter):
    """Scalars for TensorBoard, at the logged "step" where there is one, else at the number of the dump."""

    def __init__(self, dir: str):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        os.makedirs(dir, exist_ok=True)
        self.dir = dir
        self.step = 1
        self._open = SummaryWriter

    @functools.cached_property
    def writer(self):
        """Opened at the first value: a command that finds a finished run leaves no file."""
        return self._open(self.dir)

    def drop_from(self, step: int) -> None:
        self.writer.flush()
        drop_events_from(self.dir, step)

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        step = int(kvs.get("step", self.step))
        for key, value in kvs.items():
            if hasattr(value, "__float__"):
                self.writer.add_scalar(grouped(key), float(value), step)
        self.writer.flush()
        self.step = step + 1

    def write_config(self, config: Mapping[str, Any]) -> None:
        """The flags of the run, beside its loss, among the hparams."""
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in config.items()}
        for summary in hparams(plain, {"loss/loss": 0.0}):
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()

    def close(self) -> None:
        if "writer" in vars(self):
            self.writer.close()


def grouped(key: str) -> str:
    """The name of a value in TensorBoard and Weights & Biases: under loss/, head/ (losses of modalities), eval/ or run/."""
    if "/" in key:
        return key
    name = re.sub(r"_q\d$", "", key)
    return f"{'head' if name.startswith('KL_') else 'loss' if name in _LOSSES else 'run'}/{key}"


_LOSSES = ("loss", "mse", "vb", "train_loss", "val_loss")


class WandbOutputFormat(KVWriter):
    """Values for Weights & Biases, in project `project`. UserError where the package is missing."""

    def __init__(self, project: str, dir: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb: Weights & Biases is not installed: pip install wandb") from None
        self.run = wandb.init(project=project, dir=dir, config=dict(config), name=os.path.basename(dir))

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        numbers = {grouped(key): float(value) for key, value in kvs.items() if hasattr(value, "__float__")}
        self.run.log(numbers, step=int(kvs["step"]) if "step" in kvs else None)

    def close(self) -> None:
        self.run.finish()


def log_config(config: Mapping[str, Any], wandb: str = "") -> None:
    """Show the run's flags in TensorBoard (hparams), where it is written; with `wandb`, the name of a project, log to
    Weights & Biases from now on. UserError where that is not installed."""
    logger = get_current()
    if wandb and get_rank_without_mpi_import() == 0:
        logger.output_formats = [*logger.output_formats, WandbOutputFormat(wandb, logger.dir, config)]
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat):
            output.write_config(config)


def drop_events_from(folder: str | os.PathLike, step: int) -> None:
    """Take what was logged at `step` and later out of TensorBoard's files in `folder`, and what a killed process left half
    written at their ends. A file that holds no such step, as that of an open writer, stays untouched."""
    from tensorboard.compat.proto.event_pb2 import Event

    for path in glob.glob(os.path.join(glob.escape(os.fspath(folder)), "events.out.tfevents.*")):
        with open(path, "rb") as file:
            data = file.read()
        kept, place = [], 0
        while place + 12 <= len(
            data
        ):  # a record: its length in 8 bytes, their checksum in 4, itself, its checksum in 4
            end = place + 16 + int.from_bytes(data[place : place + 8], "little")
            if end > len(data):
                break
            event = Event.FromString(data[place + 12 : end - 4])
            values = event.summary.value
            before = all(
                value.HasField("image") for value in values
            )  # drawn by the weights that stepped so often
            if not values or event.step < step + before:
                kept.append(data[place:end])
            place = end
        if (cut := b"".join(kept)) != data:
            with _replacing(path, "wb") as file:
                file.write(cut)


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> KVWriter:
    """The writer of that name (stdout, log, json, csv, tensorboard) in folder `ev_dir`, which is made."""
    os.makedirs(ev_dir, exist_ok=True)
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    if format == "log":
        return HumanOutputFormat(os.path.join(ev_dir, f"log{log_suffix}.txt"))
    if format == "json":
        return JSONOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.json"))
    if format == "csv":
        return CSVOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.csv"))
    if format == "tensorboard":
        return TensorBoardOutputFormat(os.path.join(ev_dir, f"tb{log_suffix}"))
    raise ValueError(f"Unknown format specified: {format} (known: stdout, log, json, csv, tensorboard)")


def logkv(key: str, val: Any) -> None:
    """Set the value of `key` for the next dump; the last one counts."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: float) -> None:
    """Add a value to the mean that the next dump shows for `key`."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """`logkv` for every pair."""
    for key, value in d.items():
        logkv(key, value)


def dumpkvs() -> dict[str, Any]:
    """Write all pairs, forget them, and return them."""
    return get_current().dumpkvs()


def drop_from(step: int) -> None:
    """Take back what an earlier run logged for "step" `step` and later ones: this run logs them again."""
    for writer in get_current().output_formats:
        if isinstance(writer, KVWriter):
            writer.drop_from(step)


def getkvs() -> dict[str, Any]:
    """The pairs since the last dump."""
    return get_current().name2val


def log(*args: Any, level: int = INFO) -> None:
    """Write the arguments, separated by spaces, as a line, where `level` is at least the logger's."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    """`log` at level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """`log` at level INFO."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """`log` at level WARN."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """`log` at level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Drop lines below this level from now on."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Average the pairs over the ranks of this MPI communicator at every dump."""
    get_current().set_comm(comm)


def get_dir() -> str:
    """The folder of the log."""
    return get_current().get_dir()


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the time (s) that the block takes to "wait_" + scopename."""
    start = time.time()
    try:
        yield
    finally:
        get_current().name2val["wait_" + scopename] += time.time() - start


def profile(n: str) -> Callable[[Call], Call]:
    """Decorator: `profile_kv(n)` around every call."""

    def decorate(function: Call) -> Call:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate


class Logger:
    """The pairs since the last dump, and the writers that they go to."""

    DEFAULT: "Logger | None" = None  # made where something is logged before configure()
    CURRENT: "Logger | None" = None  # the one that the functions of this module use

    def __init__(self, dir: str, output_formats: Sequence[KVWriter | SeqWriter], comm: Any = None):
        self.name2val: dict[str, Any] = defaultdict(float)
        self.name2cnt: dict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key: str, val: Any) -> None:
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: float) -> None:
        count = self.name2cnt[key]
        self.name2val[key] = self.name2val[key] * count / (count + 1) + val / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        kvs = dict(self.name2val)
        if self.comm is not None:
            counted = {key: (value, self.name2cnt.get(key, 1)) for key, value in kvs.items()}
            kvs = mpi_weighted_mean(self.comm, counted)
            if self.comm.rank != 0:
                kvs["dummy"] = 1  # the mean is on rank 0; an empty table would be warned of here
        for writer in self.output_formats:
            if isinstance(writer, KVWriter):
                writer.writekvs(kvs)
        self.name2val.clear()
        self.name2cnt.clear()
        return kvs

    def log(self, *args: Any, level: int = INFO) -> None:
        if self.level <= level:
            self._do_log(args)

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Any) -> None:
        self.comm = comm

    def get_dir(self) -> str:
        return self.dir

    def close(self) -> None:
        for writer in self.output_formats:
            writer.close()

    def _do_log(self, args: Sequence[Any]) -> None:
        for writer in self.output_formats:
            if isinstance(writer, SeqWriter):
                writer.writeseq(list(map(str, args)))


def get_current() -> Logger:
    """The logger in use; the first call without `configure` configures the default one."""
    if Logger.CURRENT is None:
        configure()
        Logger.DEFAULT = Logger.CURRENT
    return Logger.CURRENT


def get_rank_without_mpi_import() -> int:
    """This process's rank as its launcher wrote it into the environment, else 0."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def mpi_weighted_mean(comm: Any, local_name2valcount: Mapping[str, tuple[Any, float]]) -> dict[str, float]:
    """Mean of every key over the ranks of an MPI communicator, weighted by counts.

    `local_name2valcount`: key -> (value, count). Returns key -> mean on rank 0 and {} on the others. A value
    that is not a number is left out, with a warning on rank 0.
    """
    gathered = comm.gather(local_name2valcount)
    if comm.rank != 0:
        return {}
    total: dict[str, float] = defaultdict(float)
    weight: dict[str, float] = defaultdict(float)
    for rank, name2valcount in enumerate(gathered):
        for name, (value, count) in name2valcount.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                print(
                    f"WARNING: tried to average {name}={value!r} of rank {rank}, not a number",
                    file=sys.stderr,
                )
                continue
            total[name] += number * count
            weight[name] += count
    return {name: total[name] / weight[name] for name in total}


def configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None, log_suffix: str = ""
) -> None:
    """Log to folder `dir` from now on; by default $OPENAI_LOGDIR or else a new temporary folder.

    `format_strs`: see the head of this module. `comm`: an MPI communicator to average over. `log_suffix` goes
    into the file names; ranks but the first add theirs.
    """
    dir = dir or os.getenv("OPENAI_LOGDIR")
    if dir is None:
        dir = os.path.join(tempfile.gettempdir(), datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f"))
    dir = os.path.expanduser(dir)
    try:
        os.makedirs(dir, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserFileError(
            f"the log folder {dir} is a file, or lies in one: give another --log_dir"
        ) from None
    except OSError as error:
        if machine_error(error):
            raise
        raise UserFileError(f"the log folder {dir} cannot be made: {error.strerror}") from None
    if not os.access(dir, os.W_OK | os.X_OK):
        raise UserFileError(f"the log folder {dir} is not writable: give another --log_dir")

    rank = get_rank_without_mpi_import()
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None:
        variable, default = (
            ("OPENAI_LOG_FORMAT", "stdout,log,csv") if rank == 0 else ("OPENAI_LOG_FORMAT_MPI", "log")
        )
        format_strs = os.getenv(variable, default).split(",")
    try:
        writers = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    except (IsADirectoryError, PermissionError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the log in {dir} cannot be continued ({error}): give another --log_dir") from None
    Logger.CURRENT = Logger(dir=dir, output_formats=writers, comm=comm)
    if writers:
        log(f"Logging to {dir}")


def reset() -> None:
    """Close the configured logger and return to the default one."""
    if Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT
        log("Reset logger")


@contextlib.contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """`configure` for the block; afterwards the logger before it is in use again."""
    before = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        Logger.CURRENT.close()
        Logger.CURRENT = before


def _readable(value: Any) -> str:
    if not hasattr(value, "__float__"):
        return str(value)
    number = float(value)
    if number.is_integer() and abs(number) < 1e15:
        return f"{number:<8,.0f}"  # counts: 2,450
    return f"{number:<8.3g}"


def _shorten(text: str) -> str:
    return text[: WIDTH - 3] + "..." if len(text) > WIDTH else text


def _plain(value: Any) -> Any:
    """NumPy and torch numbers as Python's."""
    return value.item() if hasattr(value, "dtype") else value


def _csv_writer(file: TextIO) -> Any:
    return csv.writer(file, lineterminator="\n")


def _is_step_from(found: Any, step: int) -> bool:
    """Whether a logged "step", which may be missing or text, is `step` or a later one."""
    try:
        return float(found) >= step
    except (TypeError, ValueError):
        return False


@contextlib.contextmanager
def _replacing(filename: str, mode: str = "w") -> Iterator[IO]:
    """A file that takes the place of `filename` at once when it is written."""
    beside = os.path.join(os.path.dirname(filename), f".{os.path.basename(filename)}.tmp")
    with open(beside, mode, newline="" if mode == "w" else None) as file:
        yield file
    os.replace(beside, filename)


def _last_line(filename: str) -> tuple[int, bool]:
    """Where a file's last line begins (bytes), and whether its end is missing: somebody died writing it."""
    with contextlib.suppress(FileNotFoundError), open(filename, "rb") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            return data.rfind(b"\n") + 1, True
    return 0, False


def _end_last_line(filename: str) -> None:
    if _last_line(filename)[1]:
        with open(filename, "a") as file:
            file.write("\n")


def _drop_torn_line(filename: str) -> None:
    start, torn = _last_line(filename)
    if torn:
        os.truncate(filename, start)
