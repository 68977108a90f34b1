"""Sampling in every direction, and the bound, from the command line: a checkpoint is all that is needed."""

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.figures import MARKS
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.mt.model import JointModel
from guided_diffusion.mt.run import true_values
from guided_diffusion.mt.sampling import SAMPLERS
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.seeding import PerSample
from tests.compare import BITS, agree
from tests.conftest import script_path
from tests.mt_driver import MODEL, digits, in_process, refusal, run, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits(tmp_path_factory.mktemp("data") / "digits.npz")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a model with both modalities in variant U, after a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    train(data, folder, "--iterations", 40, "--save_interval", 100, "--batch_size", 16)
    return folder


@pytest.fixture(scope="module")
def trained_x(data, tmp_path_factory):
    """The same in variant X."""
    folder = tmp_path_factory.mktemp("trained_x")
    train(data, folder, "--iterations", 5, "--modalities", "masked:X,label:X")
    return folder


def arrays(folder):
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as loaded:
        return path.name, dict(loaded)


def sample(model, folder, *flags):
    in_process("mt_image_sample", "--model_path", model, "--log_dir", folder, "--steps", 5, *flags)
    return arrays(folder)[1]


def apart(a, b):
    """The largest difference of two images, in 1/255."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def holes(count=3, size=8):
    """(uint8 [N, H, W, 1] digits, bool [N, H, W] where they are known)"""
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[-count:] / 16 * 255).round().astype(np.uint8)[..., None]
    mask = np.ones(pixels.shape[:3], bool)
    mask[:, 2:6, 3:7] = False
    return pixels, mask


# ------------------------------------------------------------------------------------------------- what comes
# out of it


def test_checkpoint_alone_says_everything(trained, tmp_path):
    """The run's folder, the checkpoint elsewhere, and ADM's average beside the configuration give the same
    samples."""
    moved = tmp_path / "moved.pt"
    moved.write_bytes((trained / "checkpoint000040.pt").read_bytes())
    results = [
        sample(path, tmp_path / str(k), "--num_samples", 2)
        for k, path in enumerate((trained, moved, trained / "ema_0.9_000040.pt"))
    ]
    for result in results[1:]:
        assert all((result[name] == results[0][name]).all() for name in results[0])
    other = sample(trained, tmp_path / "model", "--num_samples", 2, "--weights", "model")
    assert (other["arr_0"] != results[0]["arr_0"]).any()


def test_files_hold_every_modality_under_its_name(trained, tmp_path):
    result = sample(trained, tmp_path, "--num_samples", 5)
    assert arrays(tmp_path)[0] == "samples_5x8x8x1.npz"
    assert list(result) == ["arr_0", "masked", "label"]
    for name in ("arr_0", "masked"):
        assert result[name].shape == (5, 8, 8, 1) and result[name].dtype == np.uint8
    assert result["label"].shape == (5, 10) and result["label"].dtype == np.float32
    assert np.allclose(result["label"].sum(axis=1), 1, atol=1e-5)
    with Image.open(tmp_path / "samples.png") as sheet:
        # Two rows: a title (18), images (64), labels (17); margins of 6.
        assert sheet.size == (5 * 70 + 6, 2 * (18 + 64 + 17 + 6) + 6)
    # Images of the sheet are the samples, eight times as large.
    pixels = np.asarray(Image.open(tmp_path / "samples.png"))[6 + 18 : 6 + 18 + 64, 6 : 6 + 64, 0]
    assert (pixels[::8, ::8] == result["arr_0"][0, ..., 0]).all()


def test_sample_is_the_same_for_any_batch_size_and_number_of_ranks(trained, tmp_path):
    flags = ("--num_samples", 8, "--seed", 7)
    first = sample(trained, tmp_path / "b8", *flags, "--batch_size", 8)
    others = {"b3": sample(trained, tmp_path / "b3", *flags, "--batch_size", 3)}
    run(
        2, "mt_image_sample", "--model_path", trained, "--log_dir", tmp_path / "two", "--steps", 5, *flags,
        "--batch_size", 3,
    )  # fmt: skip
    others["two"] = arrays(tmp_path / "two")[1]
    others["fewer"] = sample(trained, tmp_path / "fewer", "--num_samples", 5, "--seed", 7)
    for other in others.values():
        count = len(other["arr_0"])
        for name in ("arr_0", "masked"):
            assert apart(first[name][:count], other[name]) <= 1
        assert np.allclose(first["label"][:count], other["label"], atol=1e-4)
    assert apart(first["arr_0"], sample(trained, tmp_path / "seed", *flags[:3], 8)["arr_0"]) > 20
    assert apart(first["arr_0"][0], first["arr_0"][1]) > 20  # samples of one run differ


def test_more_ranks_than_samples(trained, tmp_path):
    run(
        2, "mt_image_sample", "--model_path", trained, "--log_dir", tmp_path, "--num_samples", 1, "--steps", 3
    )
    assert arrays(tmp_path)[1]["arr_0"].shape == (1, 8, 8, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_at_images(trained, tmp_path, sampler):
    few = sample(trained, tmp_path / "few", "--num_samples", 2, "--sampler", sampler)
    every = sample(trained, tmp_path / "all", "--num_samples", 2, "--sampler", sampler, "--steps", "")
    for result in (few, every):
        spread = result["arr_0"].std()
        assert 10 < spread < 125 and np.isfinite(result["label"]).all()
    assert apart(few["arr_0"], every["arr_0"]) > 1  # the steps asked for were taken
    assert (
        apart(
            few["arr_0"],
            sample(trained, tmp_path / "again", "--num_samples", 2, "--sampler", sampler)["arr_0"],
        )
        == 0
    )


# -------------------------------------------------------------------------------------------------
# conditional sampling


@pytest.mark.parametrize("variant", ["U", "X"])
def test_given_label_is_kept_and_steers_the_images(trained, trained_x, tmp_path, variant):
    model = trained if variant == "U" else trained_x
    results = {
        label: sample(model, tmp_path / label, "--given", f"label={label}", "--num_samples", 2, "--seed", 1)
        for label in ("3", "8")
    }
    for label, result in results.items():
        assert (
            result["label"].shape == (2, 10) and result["label"].argmax(axis=1).tolist() == [int(label)] * 2
        )
    assert apart(results["3"]["arr_0"], results["8"]["arr_0"]) > 0
    if variant == "U":
        held = sample(
            model, tmp_path / "held", "--given", "label=3", "--num_samples", 2, "--seed", 1, "--strength", 0
        )
        assert apart(held["arr_0"], results["3"]["arr_0"]) > 0


def test_given_labels_decide_the_number_of_samples(trained, tmp_path):
    result = sample(trained, tmp_path / "one", "--given", "label=0,5,9", "--batch_size", 2)
    assert result["label"].argmax(axis=1).tolist() == [0, 5, 9] and len(result["arr_0"]) == 3
    result = sample(trained, tmp_path / "more", "--given", "label=0,5,9", "--num_samples", 5)
    assert result["label"].argmax(axis=1).tolist() == [0, 5, 9, 0, 5]


@pytest.mark.parametrize("variant", ["U", "X"])
@pytest.mark.parametrize("name", ["masked", "image"])
def test_restoration_leaves_known_pixels_alone(trained, trained_x, tmp_path, variant, name):
    """From a PNG with alpha and from an .npz with a mask: they come back exactly, and the holes are filled."""
    model = trained if variant == "U" else trained_x
    pixels, mask = holes()
    np.savez(tmp_path / "holes.npz", arr_0=pixels, mask=mask)
    rgba = np.concatenate([pixels.repeat(3, axis=-1), mask[..., None] * np.uint8(255)], axis=-1)
    (tmp_path / "holes").mkdir()
    for k in range(3):
        Image.fromarray(rgba[k]).save(tmp_path / "holes" / f"{k}.png")
    results = [
        sample(model, tmp_path / str(k), "--given", f"{name}={source}", "--seed", 2, *flags)
        for k, (source, flags) in enumerate(
            (
                (tmp_path / "holes.npz", ("--batch_size", 2)),
                (tmp_path / "holes", ()),
                (tmp_path / "holes.npz", ("--replace_known", "--resample", 2)),
            )
        )
    ]
    for result in results:
        assert result["arr_0"].shape == (3, 8, 8, 1)
        assert apart(result["arr_0"][mask], pixels[mask]) == 0
        assert (result[f"{name}_known"] == mask).all()
        unknown = result["arr_0"][~mask].reshape(3, -1)
        assert (unknown.std(axis=1) > 5).all() and apart(unknown[0], unknown[1]) > 5  # drawn, not left grey
    assert apart(results[0]["arr_0"], results[1]["arr_0"]) <= 1
    assert apart(results[0]["arr_0"], results[2]["arr_0"]) > 1
    more = sample(model, tmp_path / "more", "--given", f"{name}={tmp_path / 'holes.npz'}", "--num_samples", 5)
    assert apart(more["arr_0"][3:][mask[:2]], pixels[:2][mask[:2]]) == 0  # what is given is taken in turn
    if name == "masked":
        assert apart(results[0]["masked"][mask], pixels[mask]) <= 1


def test_given_masked_images_condition_and_are_not_only_pasted(trained, tmp_path):
    """With the same seed, other known pixels give other pixels in the holes."""
    pixels, mask = holes(1)
    drawn = []
    for k, shown in enumerate((pixels, 255 - pixels)):
        np.savez(tmp_path / f"{k}.npz", arr_0=shown, mask=mask)
        drawn.append(
            sample(trained, tmp_path / str(k), "--given", f"masked={tmp_path}/{k}.npz")["arr_0"][~mask]
        )
    assert apart(*drawn) > 1


def test_given_images_are_labelled_and_kept(trained, data, tmp_path):
    result = sample(
        trained, tmp_path / "a", "--given", f"image={data}", "--want", "label", "--batch_size", 40
    )
    with np.load(data) as given:
        assert (result["arr_0"] == given["arr_0"]).all()
        right = (result["label"].argmax(axis=1) == given["labels"]).mean()
    assert list(result) == ["arr_0", "label"]  # what was wanted
    assert right > 0.3  # after 40 steps; chance is a tenth
    shown = sample(
        trained, tmp_path / "b", "--given", f"image={data}", "--given", "label=3", "--want", "masked",
        "--num_samples", 2,
    )  # fmt: skip
    assert shown["label"].argmax(axis=1).tolist() == [3, 3] and shown["masked"].shape == (2, 8, 8, 1)


def test_model_without_modalities_samples_and_restores(data, tmp_path):
    train(data, tmp_path / "model", "--modalities", "", "--iterations", 2)
    assert list(sample(tmp_path / "model", tmp_path / "a", "--num_samples", 2)) == ["arr_0"]
    pixels, mask = holes()
    np.savez(tmp_path / "holes.npz", arr_0=pixels, mask=mask)
    result = sample(tmp_path / "model", tmp_path / "b", "--given", f"image={tmp_path}/holes.npz")
    assert apart(result["arr_0"][mask], pixels[mask]) <= 1


def test_bad_input_is_refused_in_one_line(trained, data, tmp_path, capsys):
    digit = np.zeros((1, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "nan.npz", arr_0=np.full((1, 8, 8, 1), np.nan, np.float32))
    np.savez(tmp_path / "size.npz", arr_0=np.zeros((1, 9, 9, 1), np.uint8))
    np.savez(tmp_path / "hole.npz", arr_0=digit, mask=np.zeros((1, 8, 8), bool))
    np.save(tmp_path / "nan.npy", np.full((1, 10), np.nan))
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64), np.uint8)).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:1500])
    image = f"image={data}"
    for flags, message in (
        (("--model_path", tmp_path / "absent"), "--model_path not found"),
        (("--model_path", tmp_path), "no complete checkpoint"),
        (("--weights", "0.5"), "no EMA '0.5'"),
        (("--given", "depth=a.png"), "the model has no 'depth', but image, masked, label"),
        (("--given", "label"), "expected NAME=FILE"),
        (("--given", "label=10"), "class numbers must be 0..9"),
        (("--given", f"label={tmp_path}/nan.npy"), "NaN or infinity"),
        (("--given", f"masked={tmp_path}/nan.npz"), "must be uint8"),
        (("--given", f"masked={tmp_path}/size.npz"), "the images are 9x9x1, the model's 8x8x1"),
        (("--given", f"masked={tmp_path}/torn.png"), "cannot be read as an image"),
        (("--given", f"image={tmp_path}/absent.png"), "no such file or folder"),
        (("--given", "label=3", "--want", "label"), "--want label: that is given already"),
        (("--want", "depth"), "--want depth: the model has no 'depth', but image, masked, label"),
        (("--given", image, "--given", image), "given twice"),
        (("--given", image, "--given", "label=3", "--given", f"masked={data}"), "nothing is left to sample"),
        (("--given", image, "--times", "0,50"), "--times must be below 40, not 50"),
        (
            ("--given", image, "--times", "soon"),
            "--times must be whole numbers separated by commas, not 'soon'",
        ),
        (("--given", image, "--want", "image"), "--want image: that is given already"),
        (("--given", f"masked={tmp_path}/hole.npz", "--resample", 2), "goes over known pixels again"),
        (
            ("--given", f"image={tmp_path}/hole.npz", "--resample", 2, "--sampler", "ddim"),
            "works with ddpm, not ddim",
        ),
        (
            ("--sampler", "euler"),
            "--sampler must be one of ddpm, ddim, plms, heun, dpm++, dpm++sde, dpm++3m, unipc, not 'euler'",
        ),
        (("--steps", "many"), "many"),
        (("--steps", 41), "41"),
        (("--num_samples", -1), "--num_samples must be at least 1, not -1"),
        (("--num_samples", 0), "--num_samples must be at least 1, not 0"),
        (("--strength", "nan"), "--strength must be from 0"),
        (("--without", "masks"), "did you mean masked?"),
        (("--batch_size", 0), "--batch_size must be from 1"),
    ):
        base = ("--model_path", trained) if "--model_path" not in flags else ()
        line = refusal(capsys, "mt_image_sample", *base, "--log_dir", tmp_path / "out", "--steps", 2, *flags)
        assert message in line, (flags, line)
    assert not list((tmp_path / "out").glob("samples*"))


def test_mistake_ends_every_rank(trained, tmp_path, launch):
    done = launch(
        "mpiexec", script_path("mt_image_sample"), "--model_path", trained, "--given", "label=99",
        "--log_dir", tmp_path, timeout=120, OMP_NUM_THREADS=1,
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error: label=99" in line]) == 1


# -----------------------------------------------------------------------------------------------------------
# the bound


def bound(model, data, folder, capsys, *flags):
    """(the printed terms by name, the terms by image)"""
    capsys.readouterr()
    in_process("mt_image_nll", "--model_path", model, "--data_dir", data, "--log_dir", folder, *flags)
    printed = {}
    for line in capsys.readouterr().out.splitlines():
        if line.endswith("bits per dimension"):
            name, value = line.removesuffix(" bits per dimension").split(": ")
            printed[name] = float(value)
    with np.load(folder / "nll.npz") as terms:
        return printed, dict(terms)


def test_every_term_of_the_bound_is_printed_and_they_add_up(trained, data, tmp_path, capsys):
    printed, terms = bound(trained, data, tmp_path, capsys, "--num_samples", 6, "--batch_size", 4)
    assert list(printed) == list(terms)
    assert set(terms) == {"L0", "L1", "L2_masked", "L2_label", "L3", "total"}
    assert terms["L0"].shape == terms["total"].shape == (6,) and terms["L1"].shape == terms[
        "L2_label"
    ].shape == (6, 40)
    total = (
        terms["L0"]
        + terms["L1"].sum(1)
        + terms["L2_masked"].mean(1)
        + terms["L2_label"].mean(1)
        + terms["L3"]
    )
    agree(total, terms["total"], rtol=1e-5)
    for name in ("L0", "L3", "total", "L2_masked", "L2_label"):
        agree(printed[name], terms[name].mean(), rtol=1e-5, floor=1e-5)  # five decimals are printed
    agree(printed["L1"], terms["L1"].sum(1).mean(), rtol=1e-5, floor=1e-5)
    # A label of ten classes costs log2(10) bits where nothing is known, over 64 dimensions.
    assert 0 < printed["L2_label"] < 1.5 * np.log2(10) / 64


def test_bound_does_not_depend_on_batches_and_fewer_steps_are_possible(trained, data, tmp_path, capsys):
    _, one = bound(trained, data, tmp_path / "a", capsys, "--num_samples", 3, "--batch_size", 3, "--steps", 5)
    _, two = bound(trained, data, tmp_path / "b", capsys, "--num_samples", 3, "--batch_size", 2, "--steps", 5)
    assert one["L1"].shape == (3, 5)
    for name in one:
        agree(one[name], two[name], name)


def test_bound_of_a_single_task_model_is_that_of_image_nll(data, tmp_path, capsys):
    """calc_bpd_loop of ADM's own model and diffusion, with the same noise."""
    train(data, tmp_path / "model", "--modalities", "", "--iterations", 2)
    printed, terms = bound(
        tmp_path / "model", data, tmp_path / "nll", capsys, "--num_samples", 4, "--batch_size", 4
    )
    assert list(printed) == ["L0", "L1", "L3", "total"]
    flags = {name.removeprefix("--"): value for name, value in zip(MODEL[::2], MODEL[1::2], strict=True)}
    defaults = model_and_diffusion_defaults()
    flags = {name: type(defaults[name])(value) for name, value in flags.items()}
    model, diffusion = create_model_and_diffusion(**{**defaults, **flags})
    model.load_state_dict(JointModel.load(str(tmp_path / "model")).network.state_dict())
    model.eval()
    dataset = open_dataset(str(data), 8, image_channels=1, random_flip=False)
    images = th.stack([th.from_numpy(dataset[k][0]) for k in range(4)])
    # ADM goes from the last step to the first, the bound from the first to the last.
    random = PerSample.derived(0, range(4))
    noises = [random.randn_like(images) for _ in range(40)]
    draws = iter(reversed(noises))
    with pytest.MonkeyPatch.context() as patch, th.no_grad():
        patch.setattr(th, "randn_like", lambda x: next(draws))
        expected = diffusion.calc_bpd_loop(model, images, clip_denoised=True)
    agree(terms["total"], expected["total_bpd"], rtol=1e-5)
    agree(terms["L0"], expected["prior_bpd"], floor=BITS)
    vb = expected["vb"].numpy()[:, ::-1]
    agree(terms["L3"], vb[:, 0], rtol=1e-5)
    for term, theirs in zip(terms["L1"][:, 1:].T, vb[:, 1:].T, strict=True):
        agree(term, theirs, floor=BITS)


def test_bound_of_bad_input_is_refused_in_one_line(trained, tmp_path, capsys):
    digits(tmp_path / "unlabelled.npz", labelled=False)
    digits(tmp_path / "grey.npz")
    for flags, message in (
        (("--data_dir", tmp_path / "absent"), "absent"),
        (("--data_dir", tmp_path / "unlabelled.npz"), "has no labels"),
        (("--data_dir", tmp_path / "grey.npz", "--num_samples", 0), "at least 1"),
        (("--data_dir", tmp_path / "grey.npz", "--steps", "99"), "99"),
    ):
        line = refusal(capsys, "mt_image_nll", "--model_path", trained, "--log_dir", tmp_path / "out", *flags)
        assert message in line, (flags, line)


def test_the_denoising_is_filmed(trained, data, tmp_path, capsys):
    film = tmp_path / "film.gif"
    sample(trained, tmp_path / "out", "--num_samples", 2, "--film", film)
    with Image.open(film) as frames:
        assert frames.n_frames == 5  # one for each step
        first = np.asarray(frames.convert("RGB"))
        frames.seek(4)
        last = np.asarray(frames.convert("RGB"))
    assert first.shape == last.shape and (first != last).any()
    assert last.shape[0] > 2 * 96 and last.shape[1] > 2 * 96  # two samples across, the masked image below
    given = (
        "--model_path",
        trained,
        "--log_dir",
        tmp_path / "no",
        "--given",
        f"image={data}",
        "--film",
        film,
    )
    assert "nothing is denoised" in refusal(capsys, "mt_image_sample", *given)


def test_the_sheet_shows_the_truth_where_the_given_file_has_it(trained, tmp_path):
    """An .npz of images with labels, a folder of classes, and images without either."""
    source, model = digits(tmp_path / "held.npz", 4), JointModel.load(str(trained))
    with np.load(source) as data:
        images, labels = data["arr_0"], data["labels"]
    np.savez(tmp_path / "bare.npz", arr_0=images)
    for k, image in enumerate(images):
        path = tmp_path / "classes" / str(k % 2) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    sample(trained, tmp_path / "reads", "--given", f"image={source}", "--want", "label")
    with Image.open(tmp_path / "reads" / "samples.png") as sheet:
        assert (
            sheet.height == 2 * (18 + 64 + 17 + 6) + 6
        )  # the images with what is read, and with what is true
        assert (np.abs(np.asarray(sheet, int) - MARKS["true"]).max(axis=-1) < 40).any()
    found = {
        name: true_values([f"image={tmp_path / name}"], model, ["label"])
        for name in ("held.npz", "bare.npz", "classes")
    }
    assert found["held.npz"]["label"].argmax(dim=1).tolist() == labels.tolist() and found["bare.npz"] == {}
    assert found["classes"]["label"].argmax(dim=1).tolist() == [0, 0, 1, 1]
