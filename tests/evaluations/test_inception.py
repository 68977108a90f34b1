"""The Inception network: preprocessing by hand, the two file formats against each other, TensorFlow's numbers."""

import io
import tarfile

import numpy as np
import pytest
import torch

from evaluations.inception import load_inception, preprocess, resize_bilinear, seeded_inception
from evaluations.inception_weights import seeded_weights
from guided_diffusion.errors import UserError
from tests.compare import agree

from ..conftest import dev_data
from .conftest import sample_images
from .seeded_files import port_state, write_port

GOLDEN_POOL = [0.0, 1.0279, 4.747169, 1.824762, 4.039016, 3.427187, 1.521476, 0.747001, 0.090113, 0.23209]
GOLDEN_SPATIAL = [4.040376, 3.849388, 5.65073, 0.0, 0.0, 0.0, 0.0]


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))


def test_resize_samples_at_i_times_in_over_out():
    row = torch.tensor([0.0, 10.0]).view(1, 1, 2, 1)
    # Positions 0, 0.5, 1, 1.5: no half-pixel centres, and the last pixel is repeated beyond the edge.
    assert resize_bilinear(row, 4)[0, 0, :, 0].tolist() == [0, 5, 10, 10]


def test_resize_shrinks_without_antialiasing():
    row = torch.tensor([0.0, 100.0, 1.0, 100.0]).view(1, 1, 4, 1)
    assert resize_bilinear(row, 2)[0, 0, :, 0].tolist() == [0, 1]


def test_resize_treats_height_and_width_alike():
    image = torch.rand(1, 5, 5, 3)
    agree(resize_bilinear(image, 7).transpose(1, 2), resize_bilinear(image.transpose(1, 2), 7), rtol=1e-5)


def test_preprocess_scales_by_128():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).expand(1, 4, 4, 3)
    x = preprocess(image)
    assert x.shape == (1, 3, 299, 299)
    assert x[0, :, 0, 0].tolist() == [-1, 0, 127 / 128]


def test_features_have_the_documented_layout(network):
    output = network(torch.from_numpy(sample_images(2)))
    assert output.pool.shape == (2, 128)  # 2048 / 16
    assert output.spatial.shape == (2, 7 * 17 * 17)
    # [height, width, channel]: the same as the activation of mixed_6/conv itself
    seen = []
    handle = network.convolutions["mixed_6/conv"].register_forward_hook(lambda *a: seen.append(a[2]))
    network(torch.from_numpy(sample_images(2)))
    handle.remove()
    assert torch.equal(output.spatial.view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))


def test_features_are_what_they_were_when_they_agreed_with_tensorflow(network):
    # Recorded from the code that agreed with TensorFlow to 2e-6; any change of pooling, padding or order moves them.
    ramp = np.arange(2 * 20 * 20 * 3).reshape(2, 20, 20, 3) * 7 % 256
    output = network(torch.from_numpy(ramp.astype(np.uint8)))
    agree(output.pool[1, ::13], GOLDEN_POOL)
    agree(output.spatial[1, 1000:1007], GOLDEN_SPATIAL)


def test_features_of_a_image_do_not_depend_on_its_batch(network):
    images = torch.from_numpy(sample_images(11))
    whole = network(images)
    alone = torch.cat([network(image[None]).pool for image in images])
    assert relative(alone, whole.pool) < 1e-5


def test_probabilities_leave_the_bias_out(network):
    pool = torch.rand(3, 128)
    expected = torch.softmax(pool.double() @ torch.from_numpy(seeded_weights().softmax).double(), 1)
    assert torch.allclose(network.probabilities(pool), expected, atol=1e-12)


def test_graph_file_port_and_archive_give_the_same_features(network, graph_file, tmp_path):
    images = torch.from_numpy(sample_images(3))
    expected = network(images)
    archive = tmp_path / "inception-2015-12-05.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(graph_file, "classify_image_graph_def.pb")
    for file in (graph_file, archive, write_port(tmp_path / "pt_inception.pth")):
        loaded = load_inception(file, "cpu")
        output = loaded(images)
        assert relative(output.pool, expected.pool) < 1e-6, file
        assert relative(output.spatial, expected.spatial) < 1e-6, file
        assert relative(loaded.probabilities(output.pool), network.probabilities(expected.pool)) < 1e-6, file
        assert len(loaded.sha256) == 64


def test_torchvisions_own_network_is_refused(tmp_path):
    state = port_state()
    state["fc.weight"] = torch.zeros(1000, 128)
    with pytest.raises(UserError, match="1000 classes for 128 features"):
        load_inception(write_port(tmp_path / "inception_v3_google.pth", state), "cpu")


def test_other_files_are_refused_by_name(tmp_path, graph_file):
    state = port_state()
    del state["Mixed_7c.branch_pool.conv.weight"]
    cut = tmp_path / "cut.pb"
    cut.write_bytes(graph_file.read_bytes()[:-1000])
    text = tmp_path / "notes.pth"
    text.write_text("not weights")
    empty = tmp_path / "empty.tgz"
    with tarfile.open(empty, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    for file, message in (
        (write_port(tmp_path / "partial.pth", state), "has no Mixed_7c.branch_pool.conv.weight"),
        (cut, "graph|constant"),
        (text, "is not a checkpoint that torch can read"),
        (empty, "holds no classify_image_graph_def.pb"),
        (tmp_path / "missing.pb", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load_inception(file, "cpu")
    onnx = tmp_path / "inception.onnx"
    onnx.touch()
    with pytest.raises(UserError, match=r"expected a \.pb, \.tgz or \.pth file"):
        load_inception(onnx, "cpu")


def test_seeded_network_is_the_same_each_time():
    images = torch.from_numpy(sample_images(1))
    assert torch.equal(seeded_inception(3)(images).pool, seeded_inception(3)(images).pool)
    assert not torch.equal(seeded_inception(3)(images).pool, seeded_inception(4)(images).pool)


def test_features_agree_with_tensorflow():
    network = load_inception(dev_data("evaluator/classify_image_graph_def.pb"), "cpu")
    expected = np.load(dev_data("evaluator/features.npz"))
    images = np.load(dev_data("evaluator/ref.npz"))["arr_0"][:16]
    output = network(torch.from_numpy(images))
    assert relative(output.pool, expected["pool_3"]) < 1e-5
    assert relative(output.spatial, expected["spatial"]) < 1e-5
    assert relative(network.probabilities(output.pool), expected["softmax"]) < 1e-5
