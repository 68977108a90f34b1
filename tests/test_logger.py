"""What the logger writes, and that a resumed run loses nothing of it."""

import csv
import io
import json
import time

import numpy as np
import pytest
import torch as th

from guided_diffusion import logger


@pytest.fixture(autouse=True)
def own_logger(monkeypatch):
    """Leave the process's logger as it was."""
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    monkeypatch.setattr(logger.Logger, "DEFAULT", None)
    for name in (*logger.RANK_VARIABLES, "OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(name, raising=False)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_default_formats_are_terminal_text_and_table(tmp_path, capsys):
    logger.configure(dir=str(tmp_path))
    logger.logkv("step", 3)
    logger.log("hello", 1)
    logger.dumpkvs()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "progress.csv"]
    text = (tmp_path / "log.txt").read_text()
    assert (
        text
        == f"Logging to {tmp_path}\nhello 1\n-------------------\n| step | 3        |\n-------------------\n"
    )
    assert capsys.readouterr().out == text
    assert (tmp_path / "progress.csv").read_text() == "step\n3\n"
    assert logger.get_dir() == str(tmp_path)


def test_environment_gives_folder_and_formats(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "new" / "run"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json")
    logger.configure()
    logger.logkvs({"loss": np.float32(0.5), "grad": th.tensor(2.0), "name": "a"})
    logger.dumpkvs()
    lines = (tmp_path / "new" / "run" / "progress.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"loss": 0.5, "grad": 2.0, "name": "a"}]


@pytest.mark.parametrize("variable", ["PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK"])
def test_other_ranks_write_files_of_their_own(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    assert logger.get_rank_without_mpi_import() == 2
    logger.configure(dir=str(tmp_path))
    logger.dumpkvs()
    assert [path.name for path in tmp_path.iterdir()] == ["log-rank002.txt"]


def test_means_are_means_since_the_last_dump():
    logger.configure(format_strs=[])
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", value)
    logger.logkv("step", 1)
    logger.logkv("step", 2)
    assert logger.getkvs()["loss"] == pytest.approx(3.0)
    assert logger.dumpkvs() == {"loss": pytest.approx(3.0), "step": 2}
    assert logger.dumpkvs() == {}
    logger.logkv_mean("loss", 5.0)
    assert logger.dumpkvs() == {"loss": 5.0}


def test_a_new_column_joins_the_rows_before(tmp_path):
    table = logger.CSVOutputFormat(str(tmp_path / "progress.csv"))
    table.writekvs({"step": 0, "loss": 1.5})
    table.writekvs({"step": 1, "loss": 1.25, "note": 'a, "b"'})
    table.writekvs({"loss": None, "step": 2})
    table.close()
    assert rows(tmp_path / "progress.csv") == [
        {"loss": "1.5", "step": "0", "note": ""},
        {"loss": "1.25", "step": "1", "note": 'a, "b"'},
        {"loss": "", "step": "2", "note": ""},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["progress.csv"]


def test_a_resumed_run_appends_to_every_file(tmp_path):
    for step, values in ((0, {"loss": 1.0}), (1, {"loss": 0.5, "extra": 7})):
        logger.configure(dir=str(tmp_path), format_strs=["log", "csv", "json"])
        logger.log(f"run {step}")
        logger.logkvs({"step": step, **values})
        logger.dumpkvs()
        logger.get_current().close()
    assert [(row["step"], row["loss"], row["extra"]) for row in rows(tmp_path / "progress.csv")] == [
        ("0", "1.0", ""),
        ("1", "0.5", "7"),
    ]
    assert [json.loads(line)["step"] for line in open(tmp_path / "progress.json")] == [0, 1]
    text = (tmp_path / "log.txt").read_text()
    assert "run 0\n" in text and "run 1\n" in text


def test_a_line_torn_by_a_kill_harms_no_other(tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss\n0,1.0\n1,0.")
    (tmp_path / "progress.json").write_text('{"step": 0}\n{"st')
    (tmp_path / "log.txt").write_text("first\nsec")
    logger.configure(dir=str(tmp_path), format_strs=["log", "csv", "json"])
    logger.logkvs({"step": 2, "loss": 0.25})
    logger.dumpkvs()
    assert [row["step"] for row in rows(tmp_path / "progress.csv")] == ["0", "2"]
    assert [json.loads(line)["step"] for line in open(tmp_path / "progress.json")] == [0, 2]
    assert (tmp_path / "log.txt").read_text().startswith("first\nsec\nLogging to")


def test_tensorboard_has_scalars_at_the_logged_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.configure(dir=str(tmp_path), format_strs=["tensorboard"])
    for step in (10, 20):
        logger.logkvs({"step": step, "loss": step / 100, "name": "text"})
        logger.dumpkvs()
    logger.logkv("loss", 0.5)
    logger.dumpkvs()
    logger.get_current().close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/loss")] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.2)),
        (21, pytest.approx(0.5)),
    ]


def test_the_table_for_people_is_aligned_and_cut(tmp_path):
    file = io.StringIO()
    table = logger.HumanOutputFormat(file)
    table.writekvs({"b": 0.000123456, "a" * 40: "x" * 50, "Cc": 12})
    lines = file.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[1:-1]] == ["a" * 27 + "...", "b", "Cc"]
    assert "| 0.000123 " in lines[2]
    assert "| " + "x" * 27 + "... |" in lines[1]


def test_levels_drop_what_is_below(tmp_path, capsys):
    logger.configure(dir=str(tmp_path), format_strs=["stdout"])
    logger.debug("d")
    logger.warn("w")
    logger.set_level(logger.ERROR)
    logger.info("i")
    logger.error("e")
    logger.set_level(logger.DISABLED)
    logger.error("never")
    assert capsys.readouterr().out.splitlines()[1:] == ["w", "e"]


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown format specified: cvs"):
        logger.configure(dir=str(tmp_path), format_strs=["cvs"])


def test_scoped_configure_returns_to_the_logger_before(tmp_path):
    logger.configure(dir=str(tmp_path / "a"), format_strs=["log"])
    with logger.scoped_configure(dir=str(tmp_path / "b"), format_strs=["log"]):
        logger.log("inner")
    logger.log("outer")
    assert "inner" in (tmp_path / "b" / "log.txt").read_text()
    assert (tmp_path / "a" / "log.txt").read_text().endswith("outer\n")


def test_profiling_adds_up_waiting_times():
    logger.configure(format_strs=[])

    @logger.profile("sleep")
    def wait():
        """Docstring."""
        time.sleep(0.02)
        return 5

    assert wait() == 5 and wait() == 5
    assert wait.__doc__ == "Docstring."
    assert 0.04 <= logger.dumpkvs()["wait_sleep"] < 1


class TwoRanks:
    """What an MPI communicator of two ranks does for `mpi_weighted_mean`, seen from one of them."""

    def __init__(self, rank, gathered):
        self.rank, self.gathered = rank, gathered

    def gather(self, value):
        return self.gathered if self.rank == 0 else None


def test_a_communicator_averages_over_ranks_by_count(capsys):
    gathered = [{"loss": (1.0, 3), "only": (2.0, 1)}, {"loss": (5.0, 1), "text": ("x", 1)}]
    assert logger.mpi_weighted_mean(TwoRanks(0, gathered), gathered[0]) == {"loss": 2.0, "only": 2.0}
    assert "text='x'" in capsys.readouterr().err
    assert logger.mpi_weighted_mean(TwoRanks(1, gathered), gathered[1]) == {}

    logger.configure(format_strs=[], comm=TwoRanks(0, gathered))
    logger.logkv("loss", 1.0)
    assert logger.dumpkvs() == {"loss": 2.0, "only": 2.0}
    logger.set_comm(TwoRanks(1, gathered))
    assert logger.dumpkvs() == {"dummy": 1}


def test_a_progress_bar_in_a_file_is_plain_lines(monkeypatch):
    from guided_diffusion.progress import tqdm

    monkeypatch.setattr("guided_diffusion.progress.INTERVAL", 0)
    plain, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for file in (plain, terminal):
        for _ in tqdm(range(3), file=file, unit="step", miniters=1, mininterval=0):
            pass
    lines = plain.getvalue().splitlines()
    assert "\r" not in plain.getvalue() and plain.getvalue().endswith("\n") and len(lines) >= 2
    assert lines[0].startswith("0%") and lines[-1].startswith("100%") and "3/3" in lines[-1]
    assert terminal.getvalue().count("\r") >= 2


def test_later_steps_are_cut_out_of_tensorboards_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (0, 3):  # the second run began again at step 3
        logger.configure(dir=str(tmp_path), format_strs=["tensorboard"])
        logger.drop_from(first)
        for step in range(first, 6):
            logger.logkv("step", step)
            logger.logkv("loss", 10 * first + step)
            logger.dumpkvs()
        logger.reset()
    older = min(tmp_path.glob("tb/events*"), key=lambda file: file.stat().st_size)
    older.write_bytes(older.read_bytes() + b"\x20\0\0")  # a record that a killed process left half written
    logger.drop_events_from(tmp_path / "tb", 6)
    events = EventAccumulator(str(tmp_path / "tb"), purge_orphaned_data=False).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/loss")]
    assert sorted(found) == [(0, 0), (1, 1), (2, 2), (3, 33), (4, 34), (5, 35)]
