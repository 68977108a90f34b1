"""Published weight files: the cache, the checksum, and what is said when there is no network."""

import hashlib

import pytest

from evaluations.inception_weights import GRAPH, PORT
from evaluations.lpips import BACKBONES
from evaluations.weights import PublishedFile, cache_folder, fetch, sha256_of
from guided_diffusion.errors import UserError


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A weight file on a server, here the file system, and an empty cache."""
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights.pth").write_bytes(b"weights" * 1000)
    digest = hashlib.sha256(b"weights" * 1000).hexdigest()
    return PublishedFile(f"file://{tmp_path}/weights.pth", digest)


def test_a_download_is_checked_and_kept(published, tmp_path):
    path = fetch([published], "--weights FILE")
    assert path == tmp_path / "cache" / "weights.pth"
    assert sha256_of(path) == published.sha256
    (tmp_path / "weights.pth").unlink()  # the server is gone
    assert fetch([published], "--weights FILE") == path


def test_a_download_with_another_checksum_is_not_kept(published, tmp_path):
    wrong = PublishedFile(published.url, "0" * 64)
    with pytest.raises(UserError, match="hash.*--weights FILE"):
        fetch([wrong], "--weights FILE")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_network_the_address_and_the_option_are_named(published, tmp_path):
    missing = PublishedFile(f"file://{tmp_path}/elsewhere.pb", "0" * 64)
    with pytest.raises(UserError, match="elsewhere.pb .*pass it with --inception FILE"):
        fetch([missing], "--inception FILE")
    assert (
        fetch([missing, published], "--inception FILE").name == "weights.pth"
    )  # the other address serves as well


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MT_DIFFUSION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mt-diffusion"


def test_published_checksums_agree_with_the_names_that_carry_them():
    files = [PORT, *(backbone.network for backbone in BACKBONES.values())]
    for file in files:
        assert file.sha256.startswith(file.name.removesuffix(".pth").rsplit("-", 1)[1])
    assert len(GRAPH.sha256) == 64
