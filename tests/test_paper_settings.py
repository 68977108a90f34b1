"""The configurations of the paper's experiments against what the paper says of them (tests/paper_settings.yaml), and the
numbers that its tables print beside ours."""

import runpy
from pathlib import Path

import pytest
import yaml

from guided_diffusion.flags import parse_flags, read_config
from guided_diffusion.mt.modalities import parse_modalities
from tests.conftest import ROOT, script_path

CONFIGS = ROOT / "configs"
TABLE, NUMBERS = yaml.safe_load_all((Path(__file__).parent / "paper_settings.yaml").read_text())
CASES = [
    (f"{part['folder']}/{name}", part["section"], part["values"])
    for part in TABLE
    for name in part["configs"]
]
MISSING = object()
PARSER = runpy.run_path(str(script_path("mt_image_train")))["parser"]


def resolved(name):
    """A configuration with its defaults; its modalities as they are made."""
    path = CONFIGS / f"{name}.yaml"
    if name.startswith("table"):
        config = parse_flags(PARSER(), ["--config", str(path)])
        side, spec = config["image_size"], config["modalities"]
        made = parse_modalities(spec, (3, side, side), 1000) if spec else ()
    else:
        config = read_config(path)
        params, data = config["model"]["params"], config["data"]["params"]
        made = parse_modalities(params["modalities"], (4, 32, 32)) if "modalities" in params else ()
        passes = config["lightning"]["trainer"].get("accumulate_grad_batches", 1)
        config["batch"] = data["batch_size"] * passes * (8 if passes > 1 else 1)  # on 8 processes
        config["learning_rate"] = config["model"]["base_learning_rate"] * config["batch"]
        unet = params["unet_config"]["params"]
        config["made"] = {
            "learn_sigma": unet["out_channels"] != params["channels"],
            "resblock_updown": unet.get("resblock_updown", False),
        }
    return {**config, "modalities": {member.name: member for member in made} or ""}


def at(value, path):
    for part in path.split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else getattr(value, part, MISSING)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name, section, values", CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_the_configuration_is_the_papers(name, section, values):
    config = resolved(name)
    wrong = {
        path: at(config, path) for path, value in values.items() if at(config, path) != pytest.approx(value)
    }
    assert not wrong, f"{name} ({section})"


@pytest.mark.parametrize("name", NUMBERS)
def test_the_papers_numbers_are_printed(name):
    rows = read_config(CONFIGS / f"tables/{name}.yaml")["rows"]
    printed = {row["id"]: row["paper"] for row in rows if "paper" in row}
    columns = NUMBERS[name].pop("columns")
    assert printed == {
        row: {column: value for column, value in zip(columns, values, strict=True) if value is not None}
        for row, values in NUMBERS[name].items()
    }


def test_the_scale_of_table_2_is_the_papers():
    table = read_config(CONFIGS / "tables/table2.yaml")["scales"]["paper"]
    assert table["folder"] == "configs/table2" and table["size"] == 64
    flags = table["sampling"].split()
    assert flags[flags.index("--num_samples") + 1] == "5000" and "--steps" not in flags  # all of 1000
