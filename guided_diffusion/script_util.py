"""From command-line flags to networks and diffusions (upstream: guided_diffusion/script_util.py).

The flags are parsed once, into `ModelConfig`, `ClassifierConfig` and `DiffusionConfig`; the `create_*` functions with
upstream's names and argument order are thin faces on them. Upstream's constants are arguments here (number of classes,
image channels, channel multipliers at any size), last in every signature and with upstream's value as default.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from . import gaussian_diffusion as gd
from .errors import UserValueError
from .flags import (  # noqa: F401 (upstream's names, which need no torch)
    NOISE_SCHEDULES,
    NUM_CLASSES,
    POOLS,
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    diffusion_defaults,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
    str2bool,
)
from .respace import SpacedDiffusion, space_timesteps
from .unet import EncoderUNetModel, SuperResModel, UNetModel

NORM_GROUPS = 32  # groups of every GroupNorm: all widths are multiples of it


# ------------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An image U-Net, in real types: what `UNetModel` and `SuperResModel` are built from."""

    image_size: int
    channel_mult: tuple[float, ...]  # width of each level, in units of num_channels
    attention_strides: tuple[int, ...]  # downsampling factors at which attention is used
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 1
    num_head_channels: int = -1  # -1: num_heads decides
    num_heads_upsample: int = -1  # -1: as num_heads
    dropout: float = 0.0
    num_classes: int | None = None  # None: not class-conditional
    learn_sigma: bool = False  # twice the output channels, for the variance
    image_channels: int = 3
    use_checkpoint: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_fp16: bool = False
    use_new_attention_order: bool = False

    @classmethod
    def from_flags(
        cls,
        *,
        image_size: int,
        channel_mult: str | Iterable[float],
        attention_resolutions: str | Iterable[int],
        class_cond: bool,
        num_classes: int,
        default_mult: dict[int, tuple[float, ...]] | None = None,
        size_flag: str = "image_size",
        **flags,
    ) -> "ModelConfig":
        """Parse flags as typed on a command line; raises `UserValueError` for values no network can have.

        default_mult: image size -> multipliers where `channel_mult` is empty, before the general rule.
        """
        mult = _parse_channel_mult(channel_mult, image_size, default_mult or {}, "channel_mult")
        _check_size(size_flag, image_size, "channel_mult", mult)
        config = cls(
            image_size=image_size,
            channel_mult=mult,
            attention_strides=_parse_attention(attention_resolutions, image_size, "attention_resolutions"),
            num_classes=num_classes if class_cond else None,
            **flags,
        )
        _check_width("num_channels", config.num_channels, mult)
        _check_positive(
            num_classes=num_classes if class_cond else NUM_CLASSES,
            image_channels=config.image_channels,
            num_res_blocks=config.num_res_blocks,
        )
        heads = {"num_head_channels": config.num_head_channels}
        if config.num_head_channels == -1:
            heads = {"num_heads": config.num_heads, "num_heads_upsample": config.num_heads_upsample}
        for flag, value in heads.items():
            if value != -1:
                _check_heads(flag, value, config.num_channels, mult, config.attention_strides)
        if not 0 <= config.dropout < 1:
            raise UserValueError(f"dropout must be at least 0 and below 1, not {config.dropout}")
        return config

    def build(self, network: type[UNetModel] = UNetModel) -> UNetModel:
        """The network with fresh weights; `network` may be a subclass that takes the same arguments."""
        return network(
            image_size=self.image_size,
            in_channels=self.image_channels,
            model_channels=self.num_channels,
            out_channels=self.image_channels * (2 if self.learn_sigma else 1),
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=self.attention_strides,
            dropout=self.dropout,
            channel_mult=self.channel_mult,
            num_classes=self.num_classes,
            use_checkpoint=self.use_checkpoint,
            use_fp16=self.use_fp16,
            num_heads=self.num_heads,
            num_head_channels=self.num_head_channels,
            num_heads_upsample=self.num_heads_upsample,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resblock_updown=self.resblock_updown,
            use_new_attention_order=self.use_new_attention_order,
        )


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A noisy classifier, in real types: what `EncoderUNetModel` is built from."""

    image_size: int
    channel_mult: tuple[float, ...]
    attention_strides: tuple[int, ...]
    width: int = 128
    depth: int = 2
    pool: str = "attention"
    head_channels: int = 64
    num_classes: int = NUM_CLASSES
    image_channels: int = 3
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    use_fp16: bool = False

    @classmethod
    def from_flags(
        cls,
        *,
        image_size: int,
        classifier_use_fp16: bool,
        classifier_width: int,
        classifier_depth: int,
        classifier_attention_resolutions: str | Iterable[int],
        classifier_use_scale_shift_norm: bool,
        classifier_resblock_updown: bool,
        classifier_pool: str,
        classifier_channel_mult: str | Iterable[float] = "",
        num_classes: int = NUM_CLASSES,
        image_channels: int = 3,
    ) -> "ClassifierConfig":
        """Parse flags as typed on a command line; raises `UserValueError` for values no network can have."""
        if classifier_pool not in POOLS:
            raise UserValueError(
                f"unknown classifier_pool {classifier_pool!r}: choose one of {', '.join(POOLS)}"
            )
        mult = _parse_channel_mult(classifier_channel_mult, image_size, {}, "classifier_channel_mult")
        _check_size("image_size", image_size, "classifier_channel_mult", mult)
        strides = _parse_attention(
            classifier_attention_resolutions, image_size, "classifier_attention_resolutions"
        )
        _check_width("classifier_width", classifier_width, mult)
        _check_positive(
            num_classes=num_classes, image_channels=image_channels, classifier_depth=classifier_depth
        )
        _check_heads("classifier_width: the head width", cls.head_channels, classifier_width, mult, strides)
        return cls(
            image_size=image_size,
            channel_mult=mult,
            attention_strides=strides,
            width=classifier_width,
            depth=classifier_depth,
            pool=classifier_pool,
            num_classes=num_classes,
            image_channels=image_channels,
            use_scale_shift_norm=classifier_use_scale_shift_norm,
            resblock_updown=classifier_resblock_updown,
            use_fp16=classifier_use_fp16,
        )

    def build(self) -> EncoderUNetModel:
        """The classifier with fresh weights: ([B, C, H, W], timesteps [B]) -> logits [B, num_classes]."""
        return EncoderUNetModel(
            image_size=self.image_size,
            in_channels=self.image_channels,
            model_channels=self.width,
            out_channels=self.num_classes,
            num_res_blocks=self.depth,
            attention_resolutions=self.attention_strides,
            channel_mult=self.channel_mult,
            use_fp16=self.use_fp16,
            num_head_channels=self.head_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resblock_updown=self.resblock_updown,
            pool=self.pool,
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """A diffusion process: schedule, what the network predicts, and the loss."""

    steps: int = 1000
    noise_schedule: str = "linear"
    timestep_respacing: str | tuple[int, ...] = ""  # "": all steps; "250", "10,15,20", "ddim50"
    learn_sigma: bool = False
    sigma_small: bool = False  # the posterior's variance instead of beta, where it is not learned
    use_kl: bool = False
    predict_xstart: bool = False  # the network predicts the image, not the noise
    rescale_timesteps: bool = False
    rescale_learned_sigmas: bool = False

    def __post_init__(self):
        if self.noise_schedule not in NOISE_SCHEDULES:
            names = ", ".join(NOISE_SCHEDULES)
            raise UserValueError(f"unknown noise_schedule {self.noise_schedule!r}: choose one of {names}")
        if self.steps < 1:
            raise UserValueError(f"diffusion_steps must be at least 1, not {self.steps}")
        if self.noise_schedule == "linear" and self.steps < 20:  # its largest beta is 20 / steps
            raise UserValueError(
                f"noise_schedule linear needs at least 20 diffusion_steps, not {self.steps}: take cosine"
            )

    @property
    def mean_type(self) -> gd.ModelMeanType:
        return gd.ModelMeanType.START_X if self.predict_xstart else gd.ModelMeanType.EPSILON

    @property
    def var_type(self) -> gd.ModelVarType:
        if self.learn_sigma:
            return gd.ModelVarType.LEARNED_RANGE
        return gd.ModelVarType.FIXED_SMALL if self.sigma_small else gd.ModelVarType.FIXED_LARGE

    @property
    def loss_type(self) -> gd.LossType:
        if self.use_kl:
            return gd.LossType.RESCALED_KL
        return gd.LossType.RESCALED_MSE if self.rescale_learned_sigmas else gd.LossType.MSE

    def build(
        self,
        diffusion: type[SpacedDiffusion] = SpacedDiffusion,
        use_timesteps: Iterable[int] | None = None,
        **extra,
    ) -> SpacedDiffusion:
        """The process; `diffusion` may be a subclass, and `extra` are its further arguments. use_timesteps: in place
        of those that timestep_respacing says."""
        try:
            if use_timesteps is None:
                use_timesteps = space_timesteps(self.steps, self.timestep_respacing or [self.steps])
        except ValueError as error:
            raise UserValueError(f"timestep_respacing: {error}") from error
        return diffusion(
            use_timesteps=use_timesteps,
            betas=gd.get_named_beta_schedule(self.noise_schedule, self.steps),
            model_mean_type=self.mean_type,
            model_var_type=self.var_type,
            loss_type=self.loss_type,
            rescale_timesteps=self.rescale_timesteps,
            **extra,
        )


# ------------------------------------------------------------------------------------------------ parsing and checking

# Multipliers by number of levels, as ADM has them at 64, 128, 256 and 512 pixels (8 pixels at the lowest level).
_MULT_BY_LEVELS = {
    2: (1, 2),
    3: (1, 2, 3),
    4: (1, 2, 3, 4),
    5: (1, 1, 2, 3, 4),
    6: (1, 1, 2, 2, 4, 4),
    7: (0.5, 1, 1, 2, 2, 4, 4),
}


def default_channel_mult(image_size: int, flag: str = "channel_mult") -> tuple[float, ...]:
    """Channel multipliers for images of `image_size` pixels: ADM's at its four sizes, and the same rule elsewhere.

    From 64 pixels on the image is halved while it stays even and 8 pixels or more; below, to 4 pixels or more, with
    constant width after the first level (improved-diffusion's choice at 32). Raises `UserValueError` where that gives no
    network: the message names `flag`.
    """
    smallest = 8 if image_size >= 64 else 4
    levels, size = 1, image_size
    while size % 2 == 0 and size // 2 >= smallest:
        levels, size = levels + 1, size // 2
    if image_size < 64 and levels > 1:
        return (1,) + (2,) * (levels - 1)
    if levels not in _MULT_BY_LEVELS:
        raise UserValueError(
            f"no default channel multipliers for images of {image_size} pixels: give --{flag}, for example "
            f"--{flag} 1,2,3,4 (each comma halves the image once; the size must be divisible by that)"
        )
    return _MULT_BY_LEVELS[levels]


def _parse_channel_mult(value, image_size, default_mult, flag) -> tuple[float, ...]:
    if value == "" or value is None:
        return default_mult.get(image_size) or default_channel_mult(image_size, flag)
    parts = value.split(",") if isinstance(value, str) else value
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise UserValueError(
            f"{flag} {value!r} must be positive numbers separated by commas, such as 1,2,3,4 or 0.5,1,1.5"
        )
    return tuple(int(number) if number.is_integer() else number for number in numbers)


def _parse_attention(value, image_size, flag) -> tuple[int, ...]:
    """Resolutions in pixels -> downsampling factors; a resolution above the image's size has no level and is left out."""
    if isinstance(value, int):
        value = (value,)
    parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    try:
        resolutions = [int(part) for part in parts]
    except ValueError:
        raise UserValueError(
            f"{flag} {value!r} must be whole numbers separated by commas, such as 32,16,8"
        ) from None
    levels = [image_size >> k for k in range(image_size.bit_length()) if image_size % (1 << k) == 0]
    for resolution in resolutions:
        if resolution <= image_size and resolution not in levels:
            raise UserValueError(
                f"{flag}: images of {image_size} pixels are never {resolution} pixels large inside the network; "
                f"choose from {', '.join(map(str, levels))}"
            )
    return tuple(image_size // resolution for resolution in resolutions if resolution <= image_size)


def _check_size(size_flag, image_size, mult_flag, mult):
    stride = 2 ** (len(mult) - 1)
    if image_size < 1 or image_size % stride:
        raise UserValueError(
            f"{size_flag} {image_size} is not divisible by {stride}, which {len(mult)} levels "
            f"({mult_flag} {','.join(map(str, mult))}) need; change the size or give fewer multipliers"
        )


def _check_width(flag, width, mult):
    for factor in mult:
        channels = int(width * factor)
        if channels < NORM_GROUPS or channels % NORM_GROUPS:
            raise UserValueError(
                f"{flag} {width} times multiplier {factor} is {channels} channels, which the normalisation cannot "
                f"split into {NORM_GROUPS} groups: choose {flag} so that it is a multiple of {NORM_GROUPS}"
            )


def _check_positive(**flags):
    for flag, value in flags.items():
        if value < 1:
            raise UserValueError(f"{flag} must be at least 1, not {value}")


def _check_heads(flag: str, value: int, width: int, mult: tuple[float, ...], strides: tuple[int, ...]):
    """`value` must divide the channels of every level with attention; the lowest level always has some."""
    for level, factor in enumerate(mult):
        channels = int(width * factor)
        attends = 2**level in strides or level == len(mult) - 1
        if attends and (value < 1 or channels % value):
            raise UserValueError(
                f"{flag} {value} does not divide the {channels} channels of an attention level"
            )


# ------------------------------------------------------------------------------------------ upstream's public functions


def split_flags(flags: dict) -> tuple[dict, dict]:
    """Flags of model and diffusion -> (the model's, `DiffusionConfig`'s); learn_sigma belongs to both."""
    names = diffusion_defaults().keys()
    diffusion = {name: flags[name] for name in names}
    diffusion["steps"] = diffusion.pop("diffusion_steps")
    return {
        name: value for name, value in flags.items() if name == "learn_sigma" or name not in names
    }, diffusion


def create_model_and_diffusion(
    image_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    channel_mult,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
    use_new_attention_order,
    num_classes=NUM_CLASSES,
    image_channels=3,
):
    """(UNetModel, SpacedDiffusion) from the flags of `model_and_diffusion_defaults`; raises `UserValueError`."""
    model, diffusion = split_flags(locals())
    return ModelConfig.from_flags(**model).build(), DiffusionConfig(**diffusion).build()


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    channel_mult="",
    learn_sigma=False,
    class_cond=False,
    use_checkpoint=False,
    attention_resolutions="16",
    num_heads=1,
    num_head_channels=-1,
    num_heads_upsample=-1,
    use_scale_shift_norm=False,
    dropout=0,
    resblock_updown=False,
    use_fp16=False,
    use_new_attention_order=False,
    num_classes=NUM_CLASSES,
    image_channels=3,
):
    """A `UNetModel`; channel_mult "" means `default_channel_mult(image_size)`. Raises `UserValueError`."""
    return ModelConfig.from_flags(**locals()).build()


def create_classifier_and_diffusion(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    learn_sigma,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    classifier_channel_mult="",
    num_classes=NUM_CLASSES,
    image_channels=3,
):
    """(EncoderUNetModel, SpacedDiffusion) from the flags of `classifier_and_diffusion_defaults`; raises `UserValueError`."""
    classifier, diffusion = split_flags(locals())
    del classifier["learn_sigma"]
    return ClassifierConfig.from_flags(**classifier).build(), DiffusionConfig(**diffusion).build()


def create_classifier(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    classifier_channel_mult="",
    num_classes=NUM_CLASSES,
    image_channels=3,
):
    """An `EncoderUNetModel` from the flags of `classifier_defaults`; raises `UserValueError`."""
    return ClassifierConfig.from_flags(**locals()).build()


# Upstream's super-resolution model is narrower at 512 pixels than its image model.
_SR_MULT = {512: (1, 1, 2, 2, 4, 4)}


def _super_resolution(large_size, small_size, **flags) -> SuperResModel:
    if not 1 <= small_size <= large_size:
        raise UserValueError(f"small_size {small_size} must be between 1 and large_size {large_size}")
    config = ModelConfig.from_flags(
        image_size=large_size, default_mult=_SR_MULT, size_flag="large_size", **flags
    )
    return config.build(SuperResModel)


def sr_create_model_and_diffusion(
    large_size,
    small_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
    channel_mult="",
    use_new_attention_order=False,
    num_classes=NUM_CLASSES,
    image_channels=3,
):
    """(SuperResModel, SpacedDiffusion) from the flags of `sr_model_and_diffusion_defaults`; raises `UserValueError`."""
    model, diffusion = split_flags(locals())
    return _super_resolution(**model), DiffusionConfig(**diffusion).build()


def sr_create_model(
    large_size,
    small_size,
    num_channels,
    num_res_blocks,
    learn_sigma,
    class_cond,
    use_checkpoint,
    attention_resolutions,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
    resblock_updown,
    use_fp16,
    channel_mult="",
    use_new_attention_order=False,
    num_classes=NUM_CLASSES,
    image_channels=3,
):
    """A `SuperResModel` from small_size to large_size pixels. Raises `UserValueError`."""
    return _super_resolution(**locals())


def create_gaussian_diffusion(
    *,
    steps=1000,
    learn_sigma=False,
    sigma_small=False,
    noise_schedule="linear",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
    timestep_respacing="",
):
    """A `SpacedDiffusion` over `steps` steps, of which `timestep_respacing` says which are used. Raises `UserValueError`."""
    return DiffusionConfig(**locals()).build()
