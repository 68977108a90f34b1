"""Table 1: masks, the SDEdit baseline, and the table from the files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.lpips import lpips_distances
from evaluations.restoration import apply_masks, draw_masks, main, write_holes
from evaluations.sdedit import sdedit
from guided_diffusion.errors import UserError

from .conftest import ROOT, sample_images
from .test_lpips import filled

guided_diffusion = pytest.importorskip("guided_diffusion.script_util")


def test_masks_are_squares_clipped_at_the_lower_and_right_edge():
    left = draw_masks(50, 64, 48, masks=1, size=16)
    assert left.shape == (50, 64, 48) and left.dtype == bool
    for one in ~left:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert len(rows) == min(16, 64 - rows[0]) and len(columns) == min(16, 48 - columns[0])
        assert one.sum() == len(rows) * len(columns)
    starts = {int(np.flatnonzero(one.any(1))[0]) for one in ~left}
    assert min(starts) < 8 and max(starts) > 50  # everywhere, up to the edge


def test_a_images_masks_depend_on_the_seed_alone():
    few, many = draw_masks(3, 64, 64, 5, seed=1), draw_masks(10, 64, 64, 5, seed=1)
    assert np.array_equal(few, many[:3])
    assert not np.array_equal(few, draw_masks(3, 64, 64, 5, seed=2))
    assert not np.array_equal(few[0], few[1])
    assert draw_masks(1, 64, 64, 0).all()
    assert 0 < (~draw_masks(20, 64, 64, 20)).mean() < 20 * 256 / 64**2  # they overlap


def test_masked_pixels_are_grey_and_the_others_untouched():
    array = sample_images(2, size=32)
    left = draw_masks(2, 32, 32, 2, size=8)
    masked = apply_masks(array, left)
    assert masked.dtype == np.uint8
    assert (masked[~left] == 128).all()
    assert np.array_equal(masked[left], array[left])


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="masks of 16 pixels do not fit images of 8x32"):
        draw_masks(1, 32, 8, 3)


class Oracle(torch.nn.Module):
    """Knows that every image is constant 0.5: predicts the noise that is left."""

    def __init__(self, diffusion):
        super().__init__()
        self.abar = torch.from_numpy(diffusion.alphas_cumprod).float()

    def forward(self, x, t):
        abar = self.abar[t.long()][:, None, None, None]
        return (x - abar.sqrt() * 0.5) / (1 - abar).sqrt()


@pytest.fixture
def diffusion():
    return guided_diffusion.create_gaussian_diffusion(steps=50)


def generator_noise(seed):
    random = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=random)


@pytest.mark.parametrize("use_ddim", [False, True])
def test_sdedit_ends_where_the_model_leads(diffusion, use_ddim):
    x = torch.full((2, 3, 8, 8), -0.5)
    result = sdedit(diffusion, Oracle(diffusion), x, generator_noise(0), strength=0.8, use_ddim=use_ddim)
    assert (result - 0.5).abs().max() < 1e-3


def test_sdedit_changes_less_with_less_strength(diffusion):
    class Nothing(torch.nn.Module):
        """Predicts no noise at all: what is left is how far the image was noised."""

        def forward(self, x, t):
            return torch.zeros_like(x)

    x = torch.linspace(-0.5, 0.5, 3 * 64).view(1, 3, 8, 8)
    errors = [
        (sdedit(diffusion, Nothing(), x, generator_noise(0), strength=s, use_ddim=True) - x)
        .square()
        .mean()
        .item()
        for s in (0.02, 0.2, 0.6)
    ]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.01


def test_sdedit_starts_at_its_strength(diffusion):
    seen = []

    class Watch(Oracle):
        def forward(self, x, t):
            seen.append(int(t[0]))
            return super().forward(x, t)

    sdedit(diffusion, Watch(diffusion), torch.zeros(1, 3, 8, 8), generator_noise(0), strength=0.3)
    assert seen == list(range(14, -1, -1))  # 15 of 50 steps
    for strength in (0, 0.001, 1.5):
        with pytest.raises(UserError, match="leaves no step of 50"):
            sdedit(
                diffusion, Oracle(diffusion), torch.zeros(1, 3, 8, 8), generator_noise(0), strength=strength
            )


FLAGS = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "16",
}
FLAGS |= {"num_heads": 1, "diffusion_steps": 100, "timestep_respacing": "5"}


@pytest.fixture
def single_task(tmp_path):
    """Weights of a small unconditional model, and its flags on the command line."""
    torch.manual_seed(0)
    flags = guided_diffusion.model_and_diffusion_defaults() | FLAGS
    model, _ = guided_diffusion.create_model_and_diffusion(**flags)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return [
        "--model_path",
        str(tmp_path / "model.pt"),
        *(f"--{name}={value}" for name, value in FLAGS.items()),
    ]


def run(*arguments):
    main([str(argument) for argument in arguments])


def test_the_whole_table(capsys, script, single_task, tmp_path):
    photos, folder = tmp_path / "photos", tmp_path / "table"
    photos.mkdir()
    for index, image in enumerate(sample_images(6, size=40)):
        Image.fromarray(image).save(photos / f"{index}.png")
    options = ["--masks", 2, 4, "--mask_size", 8, "--image_size", 32, "--num_images", 4]
    run("mask", photos, folder, *options)
    script("restoration.py", "sdedit", folder, *single_task, "--device", "cpu", "--keep_known")
    for m in (2, 4):
        holes, restored = np.load(folder / f"holes_{m}.npz"), np.load(folder / f"sdedit_{m}.npz")["arr_0"]
        assert restored.shape == holes["clean"].shape == (4, 32, 32, 3)
        assert np.array_equal(restored[holes["mask"]], holes["clean"][holes["mask"]])
        assert not np.array_equal(restored, holes["arr_0"])
        # A perfect restoration, in the place and form in which mt_image_sample.py leaves it.
        (folder / f"mt_{m}").mkdir()
        np.savez(folder / f"mt_{m}" / "samples_4x32x32x3.npz", arr_0=holes["clean"])

    torch.save(filled("squeeze").state_dict(), tmp_path / "lpips.pt")
    options = ["--net", "squeeze", "--lpips_weights", tmp_path / "lpips.pt", "--json", tmp_path / "t.json"]
    capsys.readouterr()
    run("table", folder, *options, "--row", f"Masked again={folder}/holes_{{m}}.npz")
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("  ")[0].strip() for line in lines] == [
        "clean-masked",
        "SDEdit",
        "MT-Diffusion-X",
        "Masked again",
    ]
    table = json.loads((tmp_path / "t.json").read_text())
    values = {(cell["method"], cell["masks"]): cell["lpips"] for cell in table["cells"]}
    assert values["MT-Diffusion-X", 2] == values["MT-Diffusion-X", 4] == 0
    assert values["clean-masked", 4] > values["clean-masked", 2] > 0
    assert values["Masked again", 2] == values["clean-masked", 2]
    holes = np.load(folder / "holes_2.npz")
    expected = lpips_distances(filled("squeeze"), holes["clean"], np.load(folder / "sdedit_2.npz")["arr_0"])
    assert values["SDEdit", 2] == pytest.approx(expected.mean(), rel=1e-5)
    assert list(table["weights_sha256"]) == ["lpips.pt"] and table["net"] == "squeeze"


def test_sdedit_is_the_same_for_any_batch_size_and_number_of_ranks(launch, single_task, tmp_path):
    np.savez(tmp_path / "clean.npz", arr_0=sample_images(5, size=32))
    results = []
    for name, options in (("a", []), ("b", ["--batch_size", "2"]), ("c", [])):
        write_holes(tmp_path / "clean.npz", tmp_path / name, masks=(3,), size=8)
        command = ["sdedit", tmp_path / name, *single_task, "--device", "cpu", *options]
        if name == "c":
            job = launch("torchrun", ROOT / "evaluations/restoration.py", *command, timeout=120)
            assert job.returncode == 0, job.stderr
        else:
            run(*command)
        results.append(np.load(tmp_path / name / "sdedit_3.npz")["arr_0"].astype(int))
    assert abs(results[0] - results[1]).max() <= 1
    assert abs(results[0] - results[2]).max() <= 1


def test_sdedit_gives_the_model_its_own_numbers_of_the_classes(capsys, tmp_path):
    torch.manual_seed(0)
    flags = FLAGS | {"class_cond": True, "num_classes": 3, "timestep_respacing": "2"}
    model, _ = guided_diffusion.create_model_and_diffusion(
        **guided_diffusion.model_and_diffusion_defaults() | flags
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.yaml").write_text("class_names: [cat, dog, owl]\n")
    images, mask = sample_images(2, size=32), np.zeros((2, 32, 32), bool)

    def restored(labels, names):
        folder = tmp_path / f"{labels}{bool(names)}"
        folder.mkdir()
        named = {"class_names": names} if names else {}
        np.savez(
            folder / "holes_2.npz", arr_0=images, clean=images, mask=mask, labels=np.array(labels), **named
        )
        run(
            "sdedit", folder, "--model_path", tmp_path / "model.pt", "--device", "cpu",
            *(f"--{name}={value}" for name, value in flags.items()),
        )  # fmt: skip
        return np.load(folder / "sdedit_2.npz")["arr_0"]

    by_name = restored([0, 1], ["dog", "owl"])
    assert np.array_equal(by_name, restored([1, 2], [])) and not np.array_equal(by_name, restored([0, 1], []))
    with pytest.raises(SystemExit):
        restored([0, 0], ["cow"])
    assert "classes that are not known: cow; known are cat, dog, owl" in capsys.readouterr().err


def test_mistakes_are_one_clear_line(capsys, single_task, tmp_path):
    def fails(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    np.savez(tmp_path / "clean.npz", arr_0=sample_images(3, size=40))
    assert "holds no holes_M.npz" in fails("table", tmp_path)
    assert "3 images, 9 were asked for" in fails(
        "mask", tmp_path / "clean.npz", tmp_path / "t", "--num_images", 9
    )
    write_holes(tmp_path / "clean.npz", tmp_path / "t", masks=(1,), size=8)
    assert "images of 40x40, the model makes 32" in fails("sdedit", tmp_path / "t", *single_task)
    other = [*single_task, "--num_channels=64"]
    assert "does not fit the model" in fails("sdedit", tmp_path / "t", *other)
    missing = ["--model_path", tmp_path / "no.pt"]
    assert "--model_path not found" in fails("sdedit", tmp_path / "t", *missing)
    torch.save(filled("squeeze").state_dict(), tmp_path / "lpips.pt")
    table = ["table", tmp_path / "t", "--net", "squeeze", "--lpips_weights", tmp_path / "lpips.pt"]
    assert "expected NAME=PATTERN" in fails(*table, "--row", "x")
    np.savez(tmp_path / "t" / "sdedit_1.npz", arr_0=sample_images(2, size=40))
    assert "restore all of" in fails(*table)


def test_unknown_flags_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run("table", tmp_path, "--nonsense")
    assert "--nonsense: unknown flag" in capsys.readouterr().err
