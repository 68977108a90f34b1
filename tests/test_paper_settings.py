"""The configurations of the paper's experiments against what the paper says of them (tests/paper_settings.yaml), and the
numbers that its tables print beside ours."""

import runpy
from pathlib import Path

import pytest
import yaml

from guided_diffusion.mt.modalities import parse_modalities
from guided_diffusion.mt.model import parse_flags, read_config
from tests.conftest import ROOT, script_path

CONFIGS = ROOT / "configs"
TABLE = yaml.safe_load((Path(__file__).parent / "paper_settings.yaml").read_text())
CASES = [
    (f"{part['folder']}/{name}", part["section"], part["values"])
    for part in TABLE
    for name in part["configs"]
]
MISSING = object()
FLAGS = runpy.run_path(str(script_path("mt_image_train")))["defaults"]()


def resolved(name):
    """A configuration with its defaults; its modalities as they are made."""
    path = CONFIGS / f"{name}.yaml"
    if name.startswith("table"):
        config = parse_flags(FLAGS, ["--config", str(path)])
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


# IS, FID, sFID, precision, recall as printed in the paper.
TABLE_2 = {
    "ADM-unconditional": (15.64, 23.22, 16.53, 0.57, 0.60),
    "ADM-class-conditional": (22.69, 16.35, 17.49, 0.59, 0.62),
    "MT-U": (23.77, 26.00, 25.22, 0.57, 0.55),
    "MT-X": (34.53, 9.85, 15.78, 0.68, 0.64),
    "M": (15.66, 33.92, 21.63, 0.54, 0.55),
    "M-star": (26.31, 13.48, 16.64, 0.66, 0.61),
    "E": (11.86, 41.00, 22.37, 0.48, 0.45),
    "E-star": (24.78, 11.28, 16.08, 0.74, 0.56),
}
TABLE_3 = {
    "ADM*": (79.95, 8.46, 4.92, 0.67, 0.66),
    "ADM*g": (151.10, 3.56, 4.63, 0.79, 0.57),
    "ADM": (74.04, 9.62, 5.61, 0.66, 0.64),
    "ADMg": (140.89, 4.27, 5.58, 0.79, 0.55),
    "MT": (78.26, 8.42, 5.89, 0.67, 0.65),
    "MTg": (81.06, 8.06, 5.83, 0.68, 0.65),
    "MTf": (84.22, 7.01, 5.99, 0.69, 0.64),
    "MTfg": (171.65, 3.51, 5.73, 0.83, 0.53),
    "MT*": (135.35, 2.15, 3.86, 0.72, 0.68),
    "MT*g": (138.21, 2.02, 3.84, 0.73, 0.69),
}


@pytest.mark.parametrize("name, row, numbers", [("table2", "id", TABLE_2), ("table3", "title", TABLE_3)])
def test_the_papers_numbers_are_printed(name, row, numbers):
    rows = read_config(CONFIGS / f"tables/{name}.yaml")["rows"]
    printed = {part[row]: part["paper"] for part in rows if "paper" in part}
    columns = ("is", "fid", "sfid", "precision", "recall")
    assert printed == {title: dict(zip(columns, values, strict=True)) for title, values in numbers.items()}


def test_the_scale_of_table_2_is_the_papers():
    table = read_config(CONFIGS / "tables/table2.yaml")["scales"]["paper"]
    assert table["folder"] == "configs/table2" and table["size"] == 64
    flags = table["sampling"].split()
    assert flags[flags.index("--num_samples") + 1] == "5000" and "--steps" not in flags  # all of 1000
