"""The image encoder gives what transformers' CLIP gives for the same images, and says what it cannot read."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.errors import UserFileError
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPImageEmbedder
from ldm.util import instantiate_from_config
from tests.compare import agree

transformers = pytest.importorskip("transformers")
WIDTH, SIZE, D = 32, 12, 8
PROCESSING = dict(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
OTHER = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])


@pytest.fixture(scope="module")
def clip():
    """A tiny CLIP with random weights. As in released ones, only the whole says how wide its embeddings are."""
    both = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = both | dict(vocab_size=30, max_position_embeddings=8, bos_token_id=28, eos_token_id=29)
    vision = both | dict(image_size=SIZE, patch_size=4)
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=D)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def whole(clip, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("whole")
    clip.save_pretrained(folder)
    return folder


def vision_part(clip):
    """Its vision model alone."""
    config = transformers.CLIPVisionConfig(**clip.config.vision_config.to_dict() | {"projection_dim": D})
    model = transformers.CLIPVisionModelWithProjection(config)
    model.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith("vis")})
    return model


def sample_images(height, width, count=3):
    """uint8 [B, H, W, 3]: edges, so that a resampling overshoots, and noise."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 2, (count, -(-height // 6), -(-width // 6), 3)) * 255
    blocks = blocks.repeat(6, 1).repeat(6, 2)[:, :height, :width]
    blocks[0] = rng.integers(0, 256, (height, width, 3))
    return blocks.astype(np.uint8)


def as_input(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def expected(clip, images, **normalisation):
    """transformers' own preprocessing by Pillow, and its own projection."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:  # of the first releases of transformers 5
        from transformers import CLIPImageProcessor as Processor
    processor = Processor(**PROCESSING, **normalisation)
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    return clip.get_image_features(pixel_values=pixels).pooler_output


@pytest.mark.parametrize("size", [(SIZE, SIZE), (48, 48), (8, 8), (30, 45), (50, 29)])
@pytest.mark.parametrize("normalisation", [{}, OTHER])
def test_representations_are_those_of_transformers(clip, whole, tmp_path, size, normalisation):
    folder = shutil.copytree(whole, tmp_path / "model")
    if normalisation:
        (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    encoder = FrozenOpenCLIPImageEmbedder(version=str(folder))
    images = sample_images(*size)
    given = encoder.encode(as_input(images))
    wanted = expected(clip, images, **normalisation)
    assert given.shape == (3, D) and encoder.width == D
    # Pillow rounds the resized pixels to whole numbers.
    agree(given, wanted, rtol=1e-5 if size == (SIZE, SIZE) else 2e-2)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert not given.requires_grad and given.norm(dim=1).sub(1).abs().max() > 0.1  # not normalised


def test_folders_of_every_form(clip, tmp_path):
    images = sample_images(SIZE, SIZE)
    wanted = expected(clip, images)
    vision = vision_part(clip)
    vision.save_pretrained(tmp_path / "vision")
    vision.save_pretrained(tmp_path / "pipeline/image_encoder")
    config = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder"}
    for name in ("vision", "pipeline"):
        encoder = instantiate_from_config(config | {"params": {"version": str(tmp_path / name)}})
        agree(encoder(as_input(images)), wanted, rtol=1e-5)
    (tmp_path / "pipeline/feature_extractor").mkdir()
    (tmp_path / "pipeline/feature_extractor/preprocessor_config.json").write_text(json.dumps(OTHER))
    encoder = FrozenOpenCLIPImageEmbedder(version=str(tmp_path / "pipeline"), freeze=False)
    agree(encoder(as_input(images)), expected(clip, images, **OTHER), rtol=1e-5)
    assert all(p.requires_grad for p in encoder.parameters())
    assert all(
        name.startswith("model.vi") for name in encoder.state_dict()
    )  # the normalisation is the folder's


def test_what_cannot_be_read_is_named(clip, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserFileError, match="no image encoder .*nothing"):
        FrozenOpenCLIPImageEmbedder(version=str(tmp_path / "nothing"))
    with pytest.raises(UserFileError, match="no image encoder laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        FrozenOpenCLIPImageEmbedder()
    transformers.CLIPTextModel.from_pretrained(whole).save_pretrained(tmp_path / "text")
    with pytest.raises(UserFileError, match=r"no image encoder in .*text: 40 of its tensors are missing"):
        FrozenOpenCLIPImageEmbedder(version=str(tmp_path / "text"))
    vision_part(clip).save_pretrained(tmp_path / "vision")
    with pytest.raises(UserFileError, match=r"no text encoder in .*vision: 36 of its tensors are missing"):
        FrozenCLIPEmbedder(str(tmp_path / "vision"))
    with pytest.raises(UserFileError, match=r"text encoder .* has no tokenizer"):
        FrozenCLIPEmbedder(str(whole))


@pytest.mark.parametrize("content", ["{", "{}", '{"image_mean": [1, 2, 3], "image_std": [1, 0, 1]}'])
def test_a_wrong_normalisation_is_named(whole, tmp_path, content):
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserFileError, match=r"preprocessor_config\.json does not say image_mean"):
        FrozenOpenCLIPImageEmbedder(version=str(folder))


def test_damaged_weights_are_named(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserFileError, match="the image encoder .*model cannot be read: "):
        FrozenOpenCLIPImageEmbedder(version=str(folder))
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UserFileError, match="cannot be read: .*unheard-of"):
        FrozenOpenCLIPImageEmbedder(version=str(folder))
