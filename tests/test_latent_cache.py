"""The cache of latents: what it holds is what the first stage gives, whatever interrupted its making."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from guided_diffusion.errors import UserError, UserValueError
from ldm.data.base import Concatenated
from ldm.data.captions import CaptionFolder
from ldm.data.folders import ImageFolder
from ldm.data.latent_cache import fill_cache
from ldm.data.latents import CachedLatents, check_caches
from ldm.data.paired import ParallelFolders
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.training.cli import main
from ldm.training.data import WrappedDataset
from tests.ldm_models import unet_config
from tests.test_ldm_data import saved

DD = dict(double_z=True, z_channels=2, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1])
DD |= dict(num_res_blocks=1, attn_resolutions=[])
CONFIG = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"ddconfig": DD, "lossconfig": {"target": "torch.nn.Identity"}, "embed_dim": 2},
}
COUNT, SHARD = 7, 3


def autoencoder(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(DD, {"target": "torch.nn.Identity"}, 2).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Seven pairs of images, 16x20."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        for name in ("a", "b"):
            saved(rng.integers(0, 256, (16, 20, 3)).astype(np.uint8), root / name / f"{i}.png")
    return root


@pytest.fixture
def pairs(folders):
    return ParallelFolders(folders / "a", folders / "b", [16, 20])


def fill(pairs, root, model=None, **how):
    return fill_cache(pairs, model or autoencoder(), root, **{"shard_size": SHARD, "batch_size": 2, **how})


def contents(root):
    return {path.name: path.read_bytes() for path in Path(root).iterdir()}


def test_cached_latents_are_those_of_a_fresh_encoding(pairs, tmp_path):
    index = fill(pairs, tmp_path / "c", flips=True)
    model, cached = autoencoder(), CachedLatents(tmp_path / "c", random_flip=True)
    random.seed(0)
    flips = 0
    for i in range(COUNT):
        item, pair = cached[i], pairs[i]
        x = torch.from_numpy(np.stack([pair["image"], pair["label_map"]])).permute(0, 3, 1, 2)
        with torch.no_grad():
            plain, flipped = model.encode(x), model.encode(x.flip(-1))
        close = torch.allclose(item["image_latent"], plain.mean[0], atol=1e-5)
        flips += not close
        posterior = plain if close else flipped  # both of the pair alike
        for k, key in enumerate(("image", "label_map")):
            assert torch.allclose(item[f"{key}_latent"], posterior.mean[k], atol=1e-5)
            assert torch.allclose(item[f"{key}_latent_std"], posterior.std[k], atol=1e-5)
        assert item["file_path_"] == pair["file_path_"]
    assert 0 < flips < COUNT
    assert index.shards == 3 and len(list((tmp_path / "c").glob("shard-*"))) == 3


def test_the_scale_makes_draws_of_unit_deviation(pairs, tmp_path):
    index = fill(pairs, tmp_path / "c")
    items = [CachedLatents(tmp_path / "c")[i] for i in range(COUNT)]
    mean = torch.stack([item["label_map_latent"] for item in items])
    std = torch.stack([item["label_map_latent_std"] for item in items])
    torch.manual_seed(0)
    draws = torch.cat([mean + std * torch.randn_like(mean) for _ in range(200)])
    assert index.scale_factor["label_map"] * draws.std().item() == pytest.approx(1, abs=5e-3)


def test_a_killed_pass_continues_to_the_same_files(pairs, tmp_path):
    whole = fill(pairs, tmp_path / "whole", flips=True)

    class Killed(BaseException):
        pass

    class Dying(AutoencoderKL):
        calls = 0

        def encode(self, x):
            Dying.calls += 1
            if Dying.calls > 10:  # in the middle of the second shard
                raise Killed
            return super().encode(x)

    dying = Dying(DD, {"target": "torch.nn.Identity"}, 2).eval()
    dying.load_state_dict(autoencoder().state_dict())
    with pytest.raises(Killed):
        fill(pairs, tmp_path / "killed", dying, flips=True)
    assert [p.name for p in sorted((tmp_path / "killed").glob("shard-*"))] == ["shard-00000.safetensors"]
    with pytest.raises(UserError, match="is not finished"):
        CachedLatents(tmp_path / "killed")
    kept = (tmp_path / "killed/shard-00000.safetensors").stat().st_mtime_ns
    assert fill(pairs, tmp_path / "killed", flips=True) == whole
    assert (tmp_path / "killed/shard-00000.safetensors").stat().st_mtime_ns == kept
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_cache_of_something_else_is_refused(pairs, folders, tmp_path):
    fill(pairs, tmp_path / "c")
    with pytest.raises(UserError, match="was made with another first stage"):
        fill(pairs, tmp_path / "c", autoencoder(seed=1))
    smaller = ParallelFolders(folders / "a", folders / "b", 16)
    with pytest.raises(UserError, match=r"another size \(16x20 instead of 16x16\)"):
        fill(smaller, tmp_path / "c")
    torch.save({"state_dict": autoencoder().state_dict()}, tmp_path / "same.ckpt")
    torch.save({"state_dict": autoencoder(1).state_dict()}, tmp_path / "other.ckpt")
    CachedLatents(tmp_path / "c", images=pairs, first_stage=tmp_path / "same.ckpt")
    with pytest.raises(UserError, match=r"another first stage than .*other\.ckpt"):
        CachedLatents(tmp_path / "c", first_stage=tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="another size"):
        CachedLatents(tmp_path / "c", images=smaller)
    with pytest.raises(UserError, match="other images"):
        CachedLatents(tmp_path / "c", images=ParallelFolders(folders / "b", folders / "a", [16, 20]))
    with pytest.raises(UserValueError, match="no flipped images"):
        CachedLatents(tmp_path / "c", random_flip=True)
    pairs.random_flip = True
    with pytest.raises(UserValueError, match="flipped at random"):
        fill(pairs, tmp_path / "d")


def test_only_some_keys_half_precision_and_data_workers(pairs, tmp_path):
    fill(pairs, tmp_path / "c", dtype="float16")
    fill(pairs, tmp_path / "full")
    cached = CachedLatents(tmp_path / "c", keys=["label_map"])
    batch = next(iter(DataLoader(cached, batch_size=COUNT, num_workers=1)))
    assert set(batch) == {"label_map_latent", "label_map_latent_std", "file_path_"}
    full = torch.stack([CachedLatents(tmp_path / "full")[i]["label_map_latent"] for i in range(COUNT)])
    assert batch["label_map_latent"].dtype == torch.float32
    assert 0 < (batch["label_map_latent"] - full).abs().max() < 2e-3 * full.abs().max()
    with pytest.raises(UserValueError, match="no 'depth', only image, label_map"):
        CachedLatents(tmp_path / "c", keys=["depth"])


def test_a_first_stage_without_a_posterior(folders, tmp_path):
    images = ImageFolder(folders / "a", 8)
    fill(images, tmp_path / "c", IdentityFirstStage())
    item = CachedLatents(tmp_path / "c", images=images)[COUNT - 1]
    assert set(item) == {"image_latent", "file_path_"}
    assert np.array_equal(item["image_latent"].permute(1, 2, 0).numpy(), images[COUNT - 1]["image"])


def test_a_damaged_shard_is_named(pairs, tmp_path):
    fill(pairs, tmp_path / "c")
    shard = tmp_path / "c/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:99])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged"):
        CachedLatents(tmp_path / "c")[SHARD]


def command(tmp_path):
    """The words of cache_latents.py for config.yaml in this folder."""
    folders = ("--config", tmp_path / "config.yaml", "--out", tmp_path / "c")
    return ["cache_latents", *folders, "--device", "cpu"]


def test_the_command(folders, tmp_path, run_script):
    data = {
        "image_root": str(folders / "a"),
        "other_root": str(folders / "b"),
        "size": [16, 20],
        "random_flip": True,
    }
    train = {"target": "ldm.data.paired.ParallelFolders", "params": data}
    cached = {"root": str(tmp_path / "c"), "images": train, "first_stage": str(tmp_path / "ae.ckpt")}
    config = {
        "model": {"target": "any", "base_learning_rate": 1, "params": {"first_stage_config": CONFIG}},
        "data": {
            "target": "any",
            "params": {"train": {"target": "ldm.data.latents.CachedLatents", "params": cached}},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # As it stands in a latent diffusion's checkpoint; the first stage's own is read by the other tests.
    inside = {f"first_stage_model.{k}": v for k, v in autoencoder().state_dict().items()}
    torch.save({"state_dict": inside}, tmp_path / "ae.ckpt")

    words = command(tmp_path)
    job = run_script(*words)
    assert job.returncode == 2 and job.stderr.endswith("have? Give --ckpt\n")
    job = run_script(*words, "--ckpt", tmp_path / "ae.ckpt", "--flips")
    dataset = CachedLatents(**cached, random_flip=True)
    assert f"image {dataset.scale_factor['image']:.6g}" in job.stdout
    assert dataset[0]["image_latent"].shape == (2, 8, 10)


class Colours(torch.nn.Module):
    """A representation that can be written down: the mean colour of the left half of [B, 3, H, W], times `scale`."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def forward(self, images):
        return self.scale * images[..., : images.shape[3] // 2].mean((2, 3)) + self.shift


@pytest.fixture
def captioned(folders):
    """The images of the first folder, with two captions each."""
    for path in (folders / "a").glob("*.png"):
        path.with_suffix(".txt").write_text(f"{path.stem} one\n{path.stem} two\n")
    return CaptionFolder(folders / "a", [16, 20])


def test_representations_and_captions_beside_the_latents(captioned, tmp_path):
    fill(captioned, tmp_path / "c", flips=True, extractors={"colours": Colours()})
    cached = CachedLatents(
        tmp_path / "c", images=captioned, random_flip=True, extractors={"colours": Colours()}
    )
    model, captions, flips = autoencoder(), set(), 0
    random.seed(0)
    for i in [*range(COUNT)] * 3:
        item, pixels = cached[i], captioned[i]["jpg"]
        with torch.no_grad():
            plain = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).mean[0]
        flipped = not torch.allclose(item["jpg_latent"], plain, atol=1e-5)
        flips += flipped
        half = pixels[:, 10:] if flipped else pixels[:, :10]  # turned as the latent is
        assert item["colours"].dtype == torch.float32
        assert np.allclose(item["colours"], 2 * half.mean((0, 1)), atol=1e-5)
        assert item["txt"].startswith(f"{Path(item['file_path_']).stem} ")
        captions.add(item["txt"])
    assert 0 < flips < 3 * COUNT and len(captions) > COUNT
    captioned.caption = "first"
    assert {cached[3]["txt"] for _ in range(9)} == {"3 one"}
    batch = next(iter(DataLoader(cached, batch_size=COUNT, num_workers=1)))
    assert batch["colours"].shape == (COUNT, 3) and batch["txt"][2] == "2 one"


def test_representations_of_another_encoder_are_refused(captioned, pairs, tmp_path):
    fill(captioned, tmp_path / "c", extractors={"colours": Colours()})
    shifted = Colours()
    shifted.shift += 1  # a buffer: how it looks at images
    for other in (Colours(3.0), shifted):
        for attempt in (
            lambda: fill(captioned, tmp_path / "c", extractors={"colours": other}),  # noqa: B023
            lambda: CachedLatents(tmp_path / "c", extractors={"colours": other}),  # noqa: B023
        ):
            with pytest.raises(UserError, match=r"colours instead of colours, or another encoder"):
                attempt()
    with pytest.raises(UserError, match="other representations .colours instead of none"):
        fill(captioned, tmp_path / "c")
    fill(captioned, tmp_path / "plain")
    with pytest.raises(UserError, match="other representations .none instead of colours"):
        CachedLatents(tmp_path / "plain", extractors={"colours": Colours()})
    with pytest.raises(UserValueError, match="'image' is an image of the data"):
        fill(pairs, tmp_path / "d", extractors={"image": Colours()})
    with pytest.raises(UserError, match="colours has values that are not finite"):
        fill(captioned, tmp_path / "d", extractors={"colours": Colours(float("nan"))})


def test_a_cache_without_representations_is_as_before(pairs, tmp_path):
    index = fill(pairs, tmp_path / "c", flips=True)
    names = (
        "format first_stage size keys flips dtype shard_size batch_size items scale_factor options sources"
    )
    assert list(json.loads((tmp_path / "c/index.json").read_text())) == names.split()
    assert index.representations is None
    assert set(CachedLatents(tmp_path / "c")[0]) == {
        f"{key}_latent{std}" for key in ("image", "label_map") for std in ("", "_std")
    } | {"file_path_"}


def test_the_command_stores_representations(captioned, folders, tmp_path, run_script):
    params = {"root": str(folders / "a"), "size": [16, 20]}
    config = {
        "model": {"params": {"first_stage_config": CONFIG}},
        "data": {"params": {"train": {"target": "ldm.data.captions.CaptionFolder", "params": params}}},
    }
    torch.save({"state_dict": autoencoder().state_dict()}, tmp_path / "ae.ckpt")
    words = command(tmp_path)
    words += ["--ckpt", tmp_path / "ae.ckpt", "--representations"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    job = run_script(*words)
    assert job.returncode == 2 and "no model.params.extractors" in job.stderr
    extractors = {"colours": {"target": f"{__name__}.Colours", "params": {"scale": 3.0}}}
    config["model"]["params"]["extractors"] = extractors
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "7 items with colours in" in run_script(*words).stdout
    cached = CachedLatents(tmp_path / "c", images=captioned, extractors=extractors)
    assert np.allclose(cached[4]["colours"], 3 * captioned[4]["jpg"][:, :10].mean((0, 1)), atol=1e-5)


def edited(folders):
    saved(np.zeros((16, 20, 3), np.uint8), folders / "a/2.png")
    return ParallelFolders(folders / "a", folders / "b", [16, 20])


def another_partner(folders):
    saved(np.zeros((16, 20, 3), np.uint8), folders / "b/2.png")
    return ParallelFolders(folders / "a", folders / "b", [16, 20])


CHANGES = {
    "an edited image": (edited, r"other contents of .*a/2\.png or its pair \(1 of 7 items changed\)"),
    "an edited partner": (another_partner, r"other contents of .*a/2\.png or its pair \(1 of 7"),
    "another interpolation": (
        lambda root: ParallelFolders(root / "a", root / "b", [16, 20], interpolation="nearest"),
        r"another interpolation \(bicubic instead of nearest\)",
    ),
    "another annotation": (
        lambda root: ParallelFolders(root / "a", root / "b", [16, 20], palette="cityscapes"),
        "another way of reading label_map",
    ),
    "maps as photographs": (
        lambda root: ParallelFolders(root / "a", root / "b", [16, 20], maps=()),
        "another way of reading label_map",
    ),
}


@pytest.mark.parametrize("change, said", CHANGES.values(), ids=CHANGES)
def test_a_cache_of_changed_images_is_refused(folders, tmp_path, change, said):
    root = shutil.copytree(folders, tmp_path / "images")
    fill(ParallelFolders(root / "a", root / "b", [16, 20]), tmp_path / "c")
    other = change(root)
    with pytest.raises(UserError, match=said):
        CachedLatents(tmp_path / "c", images=other)
    (tmp_path / "c/shard-00001.safetensors").unlink()  # it was interrupted
    there = contents(tmp_path / "c")
    with pytest.raises(UserError, match=said) as caught:
        fill(other, tmp_path / "c")
    assert "\n" not in str(caught.value) and contents(tmp_path / "c") == there


def test_a_cache_of_other_captions_is_refused(folders, tmp_path):
    root = shutil.copytree(folders / "a", tmp_path / "images")
    for path in root.glob("*.png"):
        path.with_suffix(".txt").write_text(f"{path.stem} one\n")
    fill(CaptionFolder(root, [16, 20]), tmp_path / "c")
    assert CachedLatents(tmp_path / "c", images=CaptionFolder(root, [16, 20]))[2]["txt"] == "2 one"
    (root / "2.txt").write_text("another\n")
    with pytest.raises(UserError, match="was made with other captions"):
        CachedLatents(tmp_path / "c", images=CaptionFolder(root, [16, 20]))
    with pytest.raises(UserError, match="was made with other captions"):
        fill(CaptionFolder(root, [16, 20]), tmp_path / "c")


def test_a_cache_from_before_images_were_turned_upright_is_refused_where_one_is_turned(folders, tmp_path):
    root = shutil.copytree(folders / "a", tmp_path / "images")
    images = ImageFolder(root, [16, 20])
    fill(images, tmp_path / "straight")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    with Image.open(root / "2.png") as image:
        image.save(root / "2.png", exif=exif)
    fill(images, tmp_path / "turned")
    for name in ("straight", "turned"):
        path = tmp_path / name / "index.json"
        index = json.loads(path.read_text())
        assert index["options"].pop("orientation") == "upright"
        path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"former version, which may have read .*2\.png as it is stored"):
        CachedLatents(tmp_path / "turned", images=images)
    shutil.copy(folders / "a/2.png", root / "2.png")
    shutil.copystat(folders / "a/2.png", root / "2.png")
    assert len(CachedLatents(tmp_path / "straight", images=images)) == COUNT


def test_a_cache_that_does_not_say_what_it_is_of_is_read_with_a_warning(pairs, tmp_path, caplog):
    fill(pairs, tmp_path / "c")
    path = tmp_path / "c/index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in index.items() if k not in ("options", "sources")}))
    assert len(CachedLatents(tmp_path / "c", images=pairs)) == COUNT
    assert "made by an earlier version" in caplog.text
    with pytest.raises(UserError, match="an earlier version, which did not note"):
        fill(pairs, tmp_path / "c")


def test_training_compares_the_first_stage_and_extractors_in_any_case(captioned, tmp_path):
    """Wherever the cache stands in the data, and whether or not its configuration names what to compare."""
    fill(captioned, tmp_path / "c", extractors={"colours": Colours()})
    model = torch.nn.Module()
    model.first_stage_model, model.extractors = autoencoder(), torch.nn.ModuleDict({"colours": Colours()})
    data = WrappedDataset(Concatenated([CachedLatents(tmp_path / "c")]))
    check_caches(model, data)
    model.first_stage_model = autoencoder(seed=1)
    with pytest.raises(UserError, match="was made with another first stage"):
        check_caches(model, data)
    model.first_stage_model, model.extractors["colours"] = autoencoder(), Colours(3.0)
    with pytest.raises(UserError, match="colours instead of colours, or another encoder"):
        check_caches(model, data)


def test_main_refuses_a_cache_of_another_first_stage(captioned, folders, tmp_path):
    fill(captioned, tmp_path / "c", autoencoder(seed=1))
    train = {"target": "ldm.data.latents.CachedLatents", "params": {"root": str(tmp_path / "c")}}
    torch.save({"state_dict": autoencoder().state_dict()}, tmp_path / "ae.ckpt")
    first_stage = {**CONFIG, "params": {**CONFIG["params"], "ckpt_path": str(tmp_path / "ae.ckpt")}}
    params = {"first_stage_config": first_stage, "cond_stage_config": "__is_unconditional__"}
    params |= {"unet_config": unet_config(), "image_size": 8, "channels": 2, "timesteps": 10}
    config = {
        "model": {"base_learning_rate": 1, "target": "ldm.models.diffusion.ddpm.LatentDiffusion"},
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": train}},
        "lightning": {"trainer": {"accelerator": "cpu", "max_steps": 1}},
    }
    config["model"]["params"] = params
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="was made with another first stage"):
        main(["-b", str(tmp_path / "c.yaml"), "-t", "-l", str(tmp_path / "logs")])
