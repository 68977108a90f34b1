"""The full-size Stable Diffusion 2 joint model, on the meta device, and the paper calculation of its cost."""

import json
from pathlib import Path

import pytest
import torch as th
import yaml
from torch import nn

from guided_diffusion.mt.modalities import VectorModality
from guided_diffusion.mt.modality_set import ModalitySet
from guided_diffusion.mt.model import read_config
from guided_diffusion.nn import checkpoint
from ldm.models.diffusion.joint import JointLatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config
from tests.conftest import ROOT
from tests.ldm_models import IDENTITY

pytest.importorskip("transformers")

from benchmarks.scale import Cost, page, seconds
from benchmarks.step_cost import FULL, HALF, Kept, Step, Work, count_step, inference

PRESENCE = {"presence.vectors.representation": [1280]}
PARITY = Path(__file__).parent / "parity"
RELEASED = json.loads((PARITY / "ldm_sd2/index.json").read_text())["keys"]
FIRST_STAGE = json.loads((PARITY / "ldm/index.json").read_text())["keys"]["kl_f8"]
HEAD = {
    "heads.representation.variance": [32],
    "heads.representation.share": [32],
    "heads.representation.correlation": [32, 1],
    "heads.representation.0.weight": [1024, 1280],
    "heads.representation.0.bias": [1024],
    "heads.representation.2.weight": [1024, 1024],
    "heads.representation.2.bias": [1024],
}


def shapes(module):
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("encoder", ["unet", lambda value: value[:, :4, None, None].expand(-1, -1, 64, 64)])
def test_the_joint_model_is_the_released_one_and_a_head(encoder):
    """Every released tensor by name, shape and order, and nothing more than the head."""
    config = ROOT / "configs/stable-diffusion/v2-inference.yaml"
    params = yaml.safe_load(config.read_text())["model"]["params"]
    member = VectorModality("representation", (1024,), encoder=encoder, head="middle", hidden=1024)
    with th.device("meta"):
        heads = ModalitySet([member], 4, context_dim=1024).make_heads(1280, 320)
        unet = UNetModel(**params["unet_config"]["params"], heads=heads)
        first_stage = instantiate_from_config(params["first_stage_config"])
    own = shapes(unet)
    new = {name: shape for name, shape in own.items() if name.startswith("heads.")}
    assert new == HEAD
    released = {name: shape for name, shape in own.items() if name not in new}
    assert list(RELEASED) == ["sd2_unet"] and released == RELEASED["sd2_unet"]["state"]
    assert list(released) == list(RELEASED["sd2_unet"]["state"])
    assert {name for name, _ in unet.named_buffers()} == {
        name for name in HEAD if not name.endswith(("weight", "bias"))
    }
    parameters = sum(p.numel() for name, p in unet.named_parameters() if name not in new)
    assert parameters == RELEASED["sd2_unet"]["n_params"]
    assert shapes(first_stage) == FIRST_STAGE["state"]


@pytest.mark.parametrize(
    "recipe, released, size", [("sd2", "v2-inference-v", 768), ("sd2-base", "v2-inference", 512)]
)
def test_the_recipe_finetunes_that_model(recipe, released, size):
    """It is Stable Diffusion 2 but for the modality, and makes the same network."""
    recipe, released = (
        read_config(ROOT / "configs" / name)["model"]["params"]
        for name in (f"representation/{recipe}.yaml", f"stable-diffusion/{released}.yaml")
    )
    same = [name for name in released if name not in ("monitor", "use_ema", "image_size")]
    assert 8 * recipe["image_size"] == size
    assert {name: recipe[name] for name in same} == {name: released[name] for name in same}
    own = {
        "extractors": {},
        "first_stage_config": IDENTITY,
        "cond_stage_config": {"target": "torch.nn.Identity"},
    }
    with th.device("meta"):
        model = JointLatentDiffusion(**{**recipe, **own, "ckpt_path": None, "use_ema": False})
    assert shapes(model.model.diffusion_model) == RELEASED["sd2_unet"]["state"] | HEAD | PRESENCE
    assert model.standards["representation"].mean.shape == (1024,)


# --------------------------------------------------------------------------------------------------- its cost


class Small(nn.Module):
    """4 -> 8 -> 2 numbers, with or without checkpointing."""

    def __init__(self, saves=False):
        super().__init__()
        self.saves = saves
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return checkpoint(self.layers, (x,), self.parameters(), self.saves)


class Attending(nn.Module):
    """Self-attention of one head to 16 tokens of 8 numbers, without layers around it."""

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def small(saves, dtype, kinds=()):
    def make():
        with th.device("meta"):
            return Small(saves)

    return count_step(make, lambda n: [th.empty(n, 4, device="meta")], dtype, kinds)


def test_what_is_kept_and_computed_by_hand():
    """The input, 4 numbers, and the hidden units after ReLU, 8, which ReLU and the last layer share."""
    step = small(False, FULL)
    assert step.kept == Kept(4 * (4 + 8), 0)
    assert step.forward == Work(0, 2 * (4 * 8 + 8 * 2))
    # Gradients of both weights, and of the hidden units: the input needs none.
    assert step.backward == Work(0, 2 * (4 * 8 + 8 * 2) + 2 * 8 * 2)


def test_autocast_by_hand():
    """Half of the bytes, and a copy of the last layer's weight, for the hidden units' gradient."""
    step = small(False, HALF)
    assert step.kept == Kept(2 * (4 + 8), 2 * 8 * 2)
    assert (step.forward, step.backward) == (small(False, FULL).forward, small(False, FULL).backward)


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_checkpointing_by_hand(dtype):
    """Only the float32 input is kept; the backward pass computes the hidden units again."""
    step = small(True, dtype)
    assert step.kept == Kept(4 * 4, 0)
    assert step.backward.total - small(False, dtype).backward.total == 2 * 4 * 8


def test_shares_of_blocks_by_hand():
    """The first layer keeps its input, ReLU its result, and the last layer nothing of its own."""
    assert small(False, FULL, (nn.Linear,)).blocks == [Kept(16, 0), Kept(0, 0)]
    assert small(False, FULL, (nn.ReLU,)).blocks == [Kept(32, 0)]
    step = Step(Kept(0, 0), [Kept(10, 0), Kept(1, 50)], Work(), Work())
    assert (step.largest_block(1), step.largest_block(8)) == (51, 80)


def test_normalisations_stay_in_full_precision():
    def make():
        with th.device("meta"):
            return nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8))

    step = count_step(make, lambda n: [th.empty(n, 4, device="meta")], HALF)
    # The input in bf16, what is normalised in float32, and its mean and deviation.
    assert step.kept == Kept(2 * 4 + 4 * 8 + 2 * 4, 0)


@pytest.mark.parametrize("dtype, size", [(FULL, 4), (HALF, 2)])
def test_attention_keeps_no_weights(dtype, size):
    """The tokens, the result, and a float32 normaliser for every query; two products, and five back."""

    def inputs(n):
        return [th.empty(n, 1, 16, 8, device="meta", requires_grad=True)]

    step = count_step(Attending, inputs, dtype)
    tokens = {FULL: 16 * 8 * 4, HALF: 3 * 16 * 8 * 2}[dtype]  # cast once for each of the three arguments
    normaliser = {FULL: 4 * 32, HALF: 4 * 16}[dtype]  # padded to 32 queries
    assert step.kept.per_sample == tokens + 16 * 8 * size + normaliser
    assert step.forward.total == 2 * 2 * 16 * 16 * 8
    assert step.backward.total == 5 * 2 * 16 * 16 * 8


def test_convolutions_are_told_apart():
    with th.device("meta"):
        layers = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 16, 2))
    work = inference(layers, th.empty(1, 3, 4, 4, device="meta"))
    assert work == Work(2 * 16 * 5 * 3 * 9, 2 * 80 * 2)
    assert work * 2 + work == Work(3 * work.convolution, 3 * work.matrix)


def test_memory_by_strategy_by_hand():
    """1000 trained and 100 frozen parameters on two GPUs, 3 samples at once, and two blocks."""
    step = Step(Kept(10, 7), [], Work(), Work())
    whole = Step(Kept(99, 0), [Kept(2, 0), Kept(1, 2)], Work(), Work())
    cost = Cost(1000, step, whole, Work(), frozen=100)
    activations = 3 * 10 + 7 + 3 * 2
    assert cost.memory(1, 3, shared=False) == 20_000 + 400 + activations
    assert cost.memory(2, 3, shared=False) == 20_000 + 4_000 + 400 + activations
    assert cost.memory(2, 3, shared=True) == 10_000 + 2_000 + 400 + activations


def test_seconds_by_hand():
    work = Work(494.5e12, 134e12)
    assert seconds(work, FULL, 0.5) == pytest.approx(2 * (1 + 2))
    assert seconds(work, HALF, 1) == pytest.approx(628.5 / 989)


@pytest.mark.slow
def test_the_document_is_this_page():
    """If this fails: python benchmarks/scale.py > docs/scale.md."""
    assert (ROOT / "docs/scale.md").read_text() == page()
