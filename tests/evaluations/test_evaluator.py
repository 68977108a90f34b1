"""The evaluator as a user runs it, with the small seeded network in place of the weights."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from evaluations.evaluator import activations, bias_warning, evaluate, main
from evaluations.features import extract_features
from evaluations.frechet import frechet_distance
from evaluations.images import ArrayImages, open_images
from evaluations.precision_recall import precision_recall
from evaluations.scores import inception_score

from ..conftest import dev_data
from .conftest import ROOT, one_error_line, sample_images

ADM_LINES = [
    "warming up PyTorch...",
    "computing reference batch activations...",
    "computing/reading reference batch statistics...",
    "computing sample batch activations...",
    "computing/reading sample batch statistics...",
    "Computing evaluations...",
]
SCORES = {
    "Inception Score": "inception_score",
    "FID": "fid",
    "sFID": "sfid",
    "Precision": "precision",
    "Recall": "recall",
}


def printed_scores(stdout):
    lines = stdout.splitlines()
    assert lines[: len(ADM_LINES)] == ADM_LINES
    pairs = [line.split(": ") for line in lines[len(ADM_LINES) :]]
    assert [name for name, _ in pairs] == list(SCORES)
    return {name: float(value) for name, value in pairs}


def test_prints_what_adm_prints_and_writes_json(script, batches, graph_file, network, tmp_path):
    done = script("evaluator.py", *batches, "--inception", graph_file, "--json", tmp_path / "out.json")
    printed = printed_scores(done.stdout)
    result = json.loads((tmp_path / "out.json").read_text())
    for name, key in SCORES.items():
        assert printed[name] == result[key]

    # The same from the parts.
    reference, samples = (extract_features(open_images(path), network, progress=False) for path in batches)
    assert printed["FID"] == pytest.approx(frechet_distance(reference.pool, samples.pool), rel=1e-5)
    assert printed["sFID"] == pytest.approx(frechet_distance(reference.spatial, samples.spatial), rel=1e-5)
    assert printed["Inception Score"] == pytest.approx(
        inception_score(network.probabilities(samples.pool)), rel=1e-5
    )
    expected = precision_recall(reference.pool, samples.pool)
    assert (printed["Precision"], printed["Recall"]) == (expected.precision, expected.recall)

    # Everything that the scores depend on stands beside them.
    assert (result["n_reference"], result["n_samples"], result["seed"]) == (24, 20, 0)
    assert result["resize"] == "tensorflow1-bilinear-299"
    assert result["weights"] == graph_file.name and len(result["weights_sha256"]) == 64
    assert "biased upwards" in done.stderr and "20 images" in done.stderr


def test_folders_give_the_same_as_their_npz(capsys, batches, graph_file, tmp_path):
    for path in batches:
        folder = tmp_path / path.stem
        folder.mkdir()
        for index, image in enumerate(np.load(path)["arr_0"]):
            Image.fromarray(image).save(folder / f"{index:03}.png")
    main([*map(str, batches), "--inception", str(graph_file)])
    from_npz = printed_scores(capsys.readouterr().out)
    main([str(tmp_path / "ref"), str(tmp_path / "samples"), "--inception", str(graph_file)])
    assert printed_scores(capsys.readouterr().out) == from_npz


def test_statistics_in_either_file_are_used(capsys, batches, graph_file, network, tmp_path):
    reference, samples = (activations(open_images(path), network, progress=False) for path in batches)
    plain = evaluate(reference, samples, network)
    for path, features, others in ((batches[0], reference, samples), (batches[1], samples, reference)):
        pool, spatial = features.pool.double().numpy(), features.spatial.double().numpy()
        # Shifted by 10 in one dimension, so that it shows which statistics were taken.
        mu = pool.mean(0)
        direction = 1 if mu[0] >= others.pool.double().mean(0)[0] else -1
        gap = abs(float(mu[0] - others.pool.double().mean(0)[0]))
        mu[0] += 10 * direction
        given = {"mu": mu, "sigma": np.cov(pool, rowvar=False)}
        given |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
        with_statistics = tmp_path / f"with_{path.name}"
        np.savez(with_statistics, arr_0=np.load(path)["arr_0"], **given)
        files = [with_statistics if p == path else p for p in batches]
        main([*map(str, files), "--inception", str(graph_file)])
        printed = printed_scores(capsys.readouterr().out)
        assert printed["FID"] == pytest.approx(plain.fid + (gap + 10) ** 2 - gap**2, rel=1e-5)
        assert printed["sFID"] == pytest.approx(plain.sfid, rel=1e-4)
        assert (printed["Precision"], printed["Recall"]) == (plain.precision, plain.recall)
        assert printed["Inception Score"] == pytest.approx(plain.inception_score, rel=1e-5)


def test_bootstrap_interval_on_request(batches, network):
    reference, samples = (activations(open_images(path), network, progress=False) for path in batches)
    result = evaluate(reference, samples, network, bootstrap=20, seed=7)
    low, high = result.fid_detail.interval
    assert low < result.fid < high
    assert evaluate(reference, samples, network).fid_detail.interval is None
    assert evaluate(reference, samples, network, bootstrap=20, seed=7) == result


def test_bias_is_told_only_where_images_are_few(network, monkeypatch):
    monkeypatch.setattr("evaluations.evaluator.FEW", 20)
    few, many = (
        activations(ArrayImages(sample_images(n, seed=n)), network, progress=False) for n in (12, 20)
    )
    assert bias_warning(evaluate(many, many, network)) is None
    warning = bias_warning(evaluate(many, few, network))
    assert "12 images" in warning
    assert evaluate(many, few, network).fid_detail.bias > 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((8, 16, 16, 3), np.float32)}, "must be uint8"),
        ({"arr_0": np.zeros((8, 16, 16), np.uint8)}, "grey"),
        (
            {"arr_0": np.zeros((8, 24, 24, 3), np.uint8)},
            "24x24 pixels, .* 16x16: take a reference of the samples' size",
        ),
        ({"arr_0": np.zeros((3, 16, 16, 3), np.uint8)}, "more than 3 images"),
        ({"arr_0": sample_images(8), "mu": np.zeros(2048)}, "has no array sigma"),
        (
            {
                "arr_0": sample_images(8),
                "mu": np.zeros(9),
                "sigma": np.eye(9),
                "mu_s": np.zeros(9),
                "sigma_s": np.eye(9),
            },
            "of 9 and 9 features, this network has 128 and 2023",
        ),
        (
            {
                "arr_0": sample_images(8),
                "mu": np.zeros(9),
                "sigma": np.eye(8),
                "mu_s": np.zeros(9),
                "sigma_s": np.eye(9),
            },
            "do not fit together",
        ),
    ],
)
def test_mistakes_in_the_samples_are_one_clear_line(capsys, batches, graph_file, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SystemExit) as stopped:
        main([str(batches[0]), str(tmp_path / "bad.npz"), "--inception", str(graph_file)])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_mistake_ends_the_script_with_one_line(script, batches, tmp_path):
    done = script("evaluator.py", batches[0], tmp_path / "no.npz", rc=2)
    assert one_error_line(done) == f"error: sample_batch not found: '{tmp_path / 'no.npz'}' does not exist"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--inception", "no.pb", "--inception not found: 'no.pb' does not exist"),
        ("--device", "gpu", "--device must be cpu, mps, cuda or cuda:N, not 'gpu'"),
        ("--json", __file__ + "/out.json", "is a file, not a folder"),
        ("--bootstrap", "-1", "--bootstrap must be from 1"),
    ],
)
def test_options_that_cannot_work_are_found_before_the_work(
    capsys, batches, graph_file, option, value, message
):
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, batches), "--inception", str(graph_file), option, value])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_two_ranks_print_what_one_prints(capsys, launch, batches, graph_file):
    main([*map(str, batches), "--inception", str(graph_file)])
    alone = printed_scores(capsys.readouterr().out)
    job = launch(
        "torchrun", ROOT / "evaluations/evaluator.py", *batches, "--inception", graph_file, timeout=120
    )
    assert job.returncode == 0, job.stderr
    together = printed_scores(job.stdout)
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_agrees_with_adms_evaluator(capsys, tmp_path):
    graph = dev_data("evaluator/classify_image_graph_def.pb")
    expected = json.loads(dev_data("evaluator/expected.json").read_text())
    files = [str(dev_data(f"evaluator/{name}.npz")) for name in ("ref", "samples")]
    main([*files, "--inception", str(graph), "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    for name in ("inception_score", "fid", "sfid"):
        assert result[name] == pytest.approx(expected[name], rel=1e-5)
    assert result["precision"] == pytest.approx(expected["precision"], abs=1e-3)
    assert result["recall"] == pytest.approx(expected["float64"]["recall"], abs=1e-3)
