"""Flags become the networks and processes that guided-diffusion makes of them, and impossible flags a message."""

import argparse
import inspect
import json
from pathlib import Path

import pytest
import torch as th

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import script_util
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_classifier_and_diffusion,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    default_channel_mult,
    diffusion_defaults,
    model_and_diffusion_defaults,
    sr_create_model,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
    str2bool,
)

RELEASED = json.loads((Path(__file__).parent / "parity" / "adm" / "index.json").read_text())["keys"]
SMALL = {"num_channels": 32, "num_res_blocks": 1, "num_heads": 1}


def small(**flags):
    """The image model of some flags, with meta tensors: fast, and without numbers."""
    with th.device("meta"):
        return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **SMALL, **flags})[0]


# ------------------------------------------------------------------------------------------------- as upstream has it


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_state_dicts(name):
    """Names, shapes and order, so that the released weights load."""
    case = RELEASED[name]
    with th.device("meta"):
        if case["kind"] == "classifier":
            model = create_classifier(**{**classifier_defaults(), **case["flags"]})
        elif case["kind"] == "superres":
            model, _ = sr_create_model_and_diffusion(**{**sr_model_and_diffusion_defaults(), **case["flags"]})
        else:
            model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **case["flags"]})
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(state.items()) == list(case["state"].items())
    assert sum(p.numel() for p in model.parameters()) == case["params"]


MODEL_FLAGS = (
    "image_size num_channels num_res_blocks num_heads num_heads_upsample num_head_channels attention_resolutions channel_mult "
    "dropout class_cond use_checkpoint use_scale_shift_norm resblock_updown use_fp16 use_new_attention_order"
).split()
DIFFUSION_FLAGS = (
    "learn_sigma diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart rescale_timesteps "
    "rescale_learned_sigmas"
).split()
CLASSIFIER_FLAGS = (
    "image_size classifier_use_fp16 classifier_width classifier_depth classifier_attention_resolutions "
    "classifier_use_scale_shift_norm classifier_resblock_updown classifier_pool"
).split()


def test_defaults_are_upstreams_in_its_order():
    """What is new comes last, so that reading the first entries finds upstream's."""
    image = model_and_diffusion_defaults()
    assert list(diffusion_defaults()) == DIFFUSION_FLAGS
    assert list(image)[:23] == MODEL_FLAGS + DIFFUSION_FLAGS
    assert list(image)[23:] == ["num_classes", "image_channels"]
    values = [64, 128, 2, 4, -1, -1, "16,8", "", 0.0, False, False, True, False, False, False]
    values += [False, 1000, "linear", "", False, False, False, False]
    assert list(image.values()) == [*values, 1000, 3]

    classifier = classifier_and_diffusion_defaults()
    assert list(classifier_defaults())[:8] == CLASSIFIER_FLAGS
    assert list(classifier)[:16] == CLASSIFIER_FLAGS + DIFFUSION_FLAGS
    assert list(classifier_defaults().values())[:8] == [64, False, 128, 2, "32,16,8", True, True, "attention"]

    sr = sr_model_and_diffusion_defaults()
    left_out = {"image_size", "channel_mult", "use_new_attention_order"}
    upstream = [flag for flag in MODEL_FLAGS + DIFFUSION_FLAGS if flag not in left_out] + [
        "large_size",
        "small_size",
    ]
    assert list(sr)[: len(upstream)] == upstream
    assert (sr["large_size"], sr["small_size"]) == (256, 64)


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        (
            create_model_and_diffusion,
            "image_size class_cond learn_sigma num_channels num_res_blocks channel_mult num_heads num_head_channels "
            "num_heads_upsample attention_resolutions dropout diffusion_steps noise_schedule timestep_respacing use_kl "
            "predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint use_scale_shift_norm resblock_updown "
            "use_fp16 use_new_attention_order",
        ),
        (
            create_model,
            "image_size num_channels num_res_blocks channel_mult learn_sigma class_cond use_checkpoint "
            "attention_resolutions num_heads num_head_channels num_heads_upsample use_scale_shift_norm dropout "
            "resblock_updown use_fp16 use_new_attention_order",
        ),
        (create_classifier, " ".join(CLASSIFIER_FLAGS)),
        (create_classifier_and_diffusion, " ".join(CLASSIFIER_FLAGS + DIFFUSION_FLAGS)),
        (
            sr_create_model,
            "large_size small_size num_channels num_res_blocks learn_sigma class_cond use_checkpoint attention_resolutions "
            "num_heads num_head_channels num_heads_upsample use_scale_shift_norm dropout resblock_updown use_fp16",
        ),
        (
            sr_create_model_and_diffusion,
            "large_size small_size class_cond learn_sigma num_channels num_res_blocks num_heads num_head_channels "
            "num_heads_upsample attention_resolutions dropout diffusion_steps noise_schedule timestep_respacing use_kl "
            "predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint use_scale_shift_norm resblock_updown use_fp16",
        ),
    ],
)
def test_factories_take_upstreams_arguments_in_order(factory, arguments):
    """Positional calls keep their meaning; new arguments follow and have defaults."""
    parameters = list(inspect.signature(factory).parameters.values())
    names = arguments.split()
    assert [p.name for p in parameters[: len(names)]] == names
    assert all(p.default is not inspect.Parameter.empty for p in parameters[len(names) :])


def test_positional_call_reaches_the_network():
    model = create_model(32, 32, 1, "1,2", True, True, False, "16", 2, -1, -1, True, 0.1, True, False, True)
    assert (model.model_channels, model.channel_mult, model.out_channels, model.num_classes) == (
        32,
        (1, 2),
        6,
        1000,
    )
    assert (model.attention_resolutions, model.num_heads, model.dropout) == ((2,), 2, 0.1)
    assert model.use_scale_shift_norm and model.resblock_updown and model.use_new_attention_order


@pytest.mark.parametrize(
    ("flags", "mean", "variance", "loss"),
    [
        ({}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"sigma_small": True, "predict_xstart": True}, "START_X", "FIXED_SMALL", "MSE"),
        ({"learn_sigma": True, "rescale_learned_sigmas": True}, "EPSILON", "LEARNED_RANGE", "RESCALED_MSE"),
        (
            {"learn_sigma": True, "use_kl": True, "rescale_learned_sigmas": True},
            "EPSILON",
            "LEARNED_RANGE",
            "RESCALED_KL",
        ),
    ],
)
def test_diffusion_flags_choose_prediction_variance_and_loss(flags, mean, variance, loss):
    diffusion = create_gaussian_diffusion(**flags)
    assert diffusion.model_mean_type == gd.ModelMeanType[mean]
    assert diffusion.model_var_type == gd.ModelVarType[variance]
    assert diffusion.loss_type == gd.LossType[loss]
    assert diffusion.num_timesteps == 1000


# ------------------------------------------------------------------------------------- upstream's constants as arguments


def test_classes_channels_and_fractional_widths_are_flags():
    model = small(
        channel_mult="1,1.5,2",
        num_channels=64,
        num_classes=10,
        class_cond=True,
        image_channels=1,
        learn_sigma=True,
    )
    assert model.label_emb.weight.shape[0] == 10
    assert (model.in_channels, model.out_channels) == (1, 2)
    assert model.input_blocks[1][0].out_channels == 64 and model.input_blocks[3][0].out_channels == 96
    assert small(channel_mult="0.5,1", num_channels=64).input_blocks[0][0].out_channels == 32

    with th.device("meta"):
        classifier = create_classifier(**{**classifier_defaults(), "num_classes": 10, "image_channels": 1})
        upscaler = sr_create_model_and_diffusion(
            **{**sr_model_and_diffusion_defaults(), **SMALL, "image_channels": 1, "large_size": 24, "channel_mult": "1,2",
               "small_size": 12, "attention_resolutions": "12"}
        )[0]  # fmt: skip
    assert (classifier.in_channels, classifier.out_channels) == (1, 10)
    assert (upscaler.in_channels, upscaler.out_channels) == (2, 1)


@pytest.mark.parametrize(
    ("size", "mult"),
    [
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (128, (1, 1, 2, 3, 4)),
        (64, (1, 2, 3, 4)),
        (32, (1, 2, 2, 2)),
        (28, (1, 2, 2)),
        (8, (1, 2)),
        (96, (1, 2, 3, 4)),
        (192, (1, 1, 2, 3, 4)),
    ],
)
def test_widths_by_size(size, mult):
    """Upstream's at its four sizes, and a sensible choice elsewhere that an image of that size passes through."""
    assert default_channel_mult(size) == mult
    model = small(image_size=size, attention_resolutions="", num_channels=64)
    assert model.channel_mult == mult
    assert model(th.zeros(1, 3, size, size, device="meta"), th.zeros(1, device="meta")).shape == (
        1,
        3,
        size,
        size,
    )


def test_super_resolution_to_512_has_its_own_widths():
    with th.device("meta"):
        model, _ = sr_create_model_and_diffusion(
            **{**sr_model_and_diffusion_defaults(), **SMALL, "large_size": 512, "small_size": 128}
        )
    assert model.channel_mult == (1, 1, 2, 2, 4, 4)


# ------------------------------------------------------------------------------------------------- impossible values


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": 63}, "no default channel multipliers for images of 63 pixels: give --channel_mult"),
        ({"image_size": 1024}, "no default channel multipliers for images of 1024 pixels"),
        ({"image_size": 20, "channel_mult": "1,2,3,4"}, "image_size 20 is not divisible by 8"),
        ({"channel_mult": "1,two"}, "channel_mult '1,two' must be positive numbers separated by commas"),
        ({"channel_mult": "1,-2"}, "channel_mult '1,-2' must be positive"),
        ({"channel_mult": "1,nan"}, "channel_mult '1,nan' must be positive"),
        (
            {"attention_resolutions": "12"},
            "are never 12 pixels large inside the network; choose from 64, 32, 16",
        ),
        ({"attention_resolutions": "0"}, "are never 0 pixels large"),
        ({"attention_resolutions": "16,x"}, "attention_resolutions '16,x' must be whole numbers"),
        ({"num_channels": 48}, "num_channels 48 times multiplier 1 is 48 channels"),
        ({"num_channels": 32, "channel_mult": "0.5,1"}, "is 16 channels"),
        ({"num_heads": 3}, "num_heads 3 does not divide"),
        ({"num_head_channels": 48}, "num_head_channels 48 does not divide"),
        ({"dropout": 1.5}, "dropout must be at least 0 and below 1, not 1.5"),
        ({"num_classes": 0, "class_cond": True}, "num_classes must be at least 1"),
        ({"image_channels": 0}, "image_channels must be at least 1"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1"),
        ({"noise_schedule": "quadratic"}, "unknown noise_schedule 'quadratic': choose one of linear, cosine"),
        ({"timestep_respacing": "ddim7x"}, "timestep_respacing"),
        ({"timestep_respacing": "2000"}, "timestep_respacing: cannot take 2000 steps"),
        ({"diffusion_steps": 0}, "diffusion_steps must be at least 1"),
    ],
)
def test_impossible_flags_are_named(flags, message):
    with pytest.raises(UserError) as caught:
        small(**flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)  # as upstream raises


def test_impossible_classifiers_and_sizes_are_named():
    defaults = classifier_defaults()
    with pytest.raises(UserError, match="unknown classifier_pool 'mean': choose one of adaptive, attention"):
        create_classifier(**{**defaults, "classifier_pool": "mean"})
    with pytest.raises(
        UserError, match="classifier_width: the head width 64 does not divide the 32 channels"
    ):
        create_classifier(**{**defaults, "classifier_width": 32, "classifier_attention_resolutions": "64"})
    with pytest.raises(UserError, match="small_size 512 must be between 1 and large_size 256"):
        sr_create_model_and_diffusion(**{**sr_model_and_diffusion_defaults(), "small_size": 512})


def test_resolutions_above_the_image_have_no_attention():
    """As upstream: its default "16,8" at 8 pixels means the first level only."""
    assert small(image_size=8).attention_resolutions == (1,)


# ------------------------------------------------------------------------------------------------------------ argparse


def test_flags_are_typed_by_their_defaults():
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {"size": 64, "rate": 0.1, "name": "a", "flag": False, "free": None})
    args = parser.parse_args(["--size", "32", "--rate", "1e-3", "--flag", "yes", "--free", "7"])
    assert args_to_dict(args, ["size", "rate", "name", "flag", "free"]) == {
        "size": 32, "rate": 1e-3, "name": "a", "flag": True, "free": "7",
    }  # fmt: skip
    with pytest.raises(SystemExit):
        parser.parse_args(["--flag", "perhaps"])


@pytest.mark.parametrize("text", ["yes", "True", "t", "Y", "1", True])
def test_words_for_true(text):
    assert str2bool(text) is True


@pytest.mark.parametrize("text", ["no", "False", "f", "N", "0", False])
def test_words_for_false(text):
    assert str2bool(text) is False


def test_other_words_are_no_booleans():
    with pytest.raises(argparse.ArgumentTypeError, match="boolean value expected"):
        str2bool("maybe")


def test_upstreams_public_names_exist():
    assert script_util.NUM_CLASSES == 1000
