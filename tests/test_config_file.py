"""Configuration files that state what differs from their base."""

import pytest
from omegaconf import OmegaConf

from guided_diffusion.config_file import load_with_bases
from guided_diffusion.errors import UserError, UserFileError
from guided_diffusion.mt.model import read_config


@pytest.fixture
def write(tmp_path):
    def file(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return file


def test_a_file_wins_over_its_bases_and_later_bases_over_earlier_ones(write):
    write("sizes.yaml", "size: 64\nlr: 1\nblocks: [1, 2]\nlabel: {head: middle, peak: 0.5}\n")
    write("small/base.yaml", "size: 16\nepochs: 3\nblocks: [1]\n")
    path = write("small/row.yaml", "base: [../sizes.yaml, base.yaml]\nlr: ${size}\nlabel: {peak: 0.25}\n")
    label = {"head": "middle", "peak": 0.25}
    assert read_config(path) == {"size": 16, "lr": 16, "blocks": [1], "label": label, "epochs": 3}
    # A base has a base, and a mapping gives way to a text.
    path = write("top.yaml", "base: small/row.yaml\nlabel: ''\nsize: 8\n")
    assert read_config(path) == {"size": 8, "lr": 8, "blocks": [1], "label": "", "epochs": 3}


def test_references_may_lead_into_what_is_merged_later(write):
    config = load_with_bases(write("part.yaml", "a: ${model.b}\n"))
    assert OmegaConf.merge(config, {"model": {"b": 3}}).a == 3


@pytest.mark.parametrize(
    "text, kind, message",
    [
        (
            "base: absent.yaml",
            UserFileError,
            r"no configuration file .*absent.yaml \(the base of .*row.yaml\)",
        ),
        ("base: row.yaml", UserError, "row.yaml: its base .*row.yaml is made of .*row.yaml itself"),
        ("base: circle.yaml", UserError, "circle.yaml: its base .*row.yaml is made of"),
        ("base: 3", UserError, "`base` is the name of a file or a list of them, not 3"),
        ("base: [3]", UserError, "`base` is the name of a file or a list of them"),
    ],
)
def test_bases_that_cannot_be(write, text, kind, message):
    write("circle.yaml", "base: row.yaml\n")
    path = write("row.yaml", text + "\n")
    with pytest.raises(kind, match=message) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)
