"""Models that are shared: a folder holds all that is needed, without a network."""

import json

import pytest
import torch as th
from huggingface_hub import ModelHubMixin

from guided_diffusion import checkpoint_util
from guided_diffusion.errors import UserFileError, UserValueError
from guided_diffusion.mt import conversion
from guided_diffusion.mt.model import JointModel
from guided_diffusion.seeding import PerSample
from tests.compare import agree
from tests.test_conversion import joint


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = joint("masked:X,label:U", class_names=["cat", "dog", "fox", "owl", "bee"])
    made.network.eval()
    made.training = {"iterations": 700, "lr": 1e-4}
    return made


@th.no_grad()
def test_a_folder_holds_the_model(tmp_path, model):
    assert isinstance(model, ModelHubMixin)
    model.save_pretrained(tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    again = JointModel.from_pretrained(str(tmp_path / "mine"))
    assert again.flags == model.flags and again.training == model.training and not again.network.training
    drawn, expected = (m.sample(PerSample([1, 2]), steps=3).images for m in (again, model))
    agree(drawn, expected, rtol=1e-5)
    # The folder is a model for every program, and a source of conversions.
    for loaded in (
        JointModel.load(str(tmp_path / "mine")),
        conversion.joint_model(conversion.read(str(tmp_path / "mine"))),
    ):
        own = model.network.state_dict()
        assert all(th.equal(value, own[name]) for name, value in loaded.network.state_dict().items())
    assert checkpoint_util.config_of(tmp_path / "mine")["num_channels"] == 32
    assert json.loads((tmp_path / "mine/config.json").read_text())["modalities"] == "masked:X,label:U"
    # And what is read can be shared again.
    again.save_pretrained(tmp_path / "again")
    third = JointModel.from_pretrained(str(tmp_path / "again"))
    assert third.flags == model.flags and third.training == model.training


def test_the_card_says_what_how_and_whom_to_cite(tmp_path, model):
    model.save_pretrained(tmp_path, model_card_kwargs={"repo": "me/mine"})
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: mt-diffusion" in card and "license: mit" in card
    for words in (
        "| masked | image | 3 x 8 x 8 | X |", "| label | label | 5 | U |", "cat, dog, fox, owl, bee", "- iterations: 700",
        'from_pretrained("me/mine")', "@inproceedings{chen2024", "arxiv.org/abs/2407.17571",
    ):  # fmt: skip
        assert words in card, words


def test_folders_that_are_no_models_are_named(tmp_path, model):
    with pytest.raises(UserFileError, match="holds no model.safetensors"):
        JointModel.from_pretrained(str(tmp_path))
    with pytest.raises(UserFileError, match="nobody/nothing is neither a folder nor a repository"):
        JointModel.from_pretrained("nobody/nothing", local_files_only=True)
    bare = JointModel(model.modalities, model.network)
    with pytest.raises(UserValueError, match="made of flags"):
        bare.save_pretrained(tmp_path / "bare")


def test_pushing_uploads_the_folder(model, monkeypatch):
    """What push_to_hub hands to the hub is what save_pretrained writes."""
    seen = {}

    class Api:
        def __init__(self, *args, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            seen[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model.push_to_hub("me/mine")
    assert seen == {"me/mine": ["README.md", "config.json", "model.safetensors"]}
