"""Joint training and sampling in a grafted checkout: what its `create_model_and_diffusion` makes, with modalities.

The script's own training loop calls `training_losses`, its sampling script `p_sample_loop` or `ddim_sample_loop`;
`joint_sample` gives the modalities too.
"""

import torch as th

from ..errors import UserValueError
from ..gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from ..seeding import PerSample
from ..unet import EncoderUNetModel
from .aggregation import Aggregation
from .losses import multitask_losses
from .modalities import parse_modalities
from .modality_set import ModalitySet, batch_of, derive_values, peaks, with_peaks
from .sampling import JointSample, joint_sample

# Widths of the classifier's levels by the image's size, where no channel_mult is given.
_MULT = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def join(
    model,
    diffusion,
    spec: str,
    noise_schedule: str,
    diffusion_steps: int,
    *,
    aggregation: str = "bump",
    detectability: float = 4.0,
    presence: bool = True,
    unshifted_probability: float = 0.33,
    code_interval: int = 500,
) -> "JointDiffusion":
    """`model`, a UNetModel, gets heads and input channels for the modalities `spec` (parse_modalities), and
    `diffusion` their shifts: the process to train and sample with. UserValueError for what does not fit.

    The flags of the same names are described in this project's `mt_defaults`.
    """
    channels = model.in_channels
    shape = (channels, model.image_size, model.image_size)
    betas = get_named_beta_schedule(noise_schedule, diffusion_steps)
    parsed = parse_modalities(spec, shape, model.num_classes)
    parsed = with_peaks(parsed, aggregation, betas, shape, detectability)
    shifts = Aggregation.named(aggregation, betas, peaks(parsed))
    process = GaussianDiffusion(
        betas=betas,
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        rescale_timesteps=diffusion.rescale_timesteps,
        aggregation=shifts,
    )
    diffusion.aggregation = shifts.respaced(diffusion.timestep_map, 1.0 - diffusion.betas)
    modalities = ModalitySet(parsed, channels, process, num_classes=model.num_classes, presence=presence)
    _widen(model, modalities.input_channels)
    width = model.model_channels
    last, middle = (int(model.channel_mult[k] * width) for k in (0, -1))
    model.heads = modalities.make_heads(middle, last)
    model.presence = modalities.make_presence(4 * width)
    codes = modalities.make_codes(shape)
    if codes is not None:
        model.codes = codes
    return JointDiffusion(diffusion, modalities, model, unshifted_probability, code_interval)


def make_classifier(
    num_classes: int,
    *,
    image_size: int,
    image_channels: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    classifier_channel_mult: str = "",
) -> EncoderUNetModel:
    """The classifier of a label's head, by the flags classifier_*. UserValueError where they do not say its widths."""
    mult = [float(part) for part in classifier_channel_mult.split(",") if part] or _MULT.get(image_size)
    if mult is None:
        raise UserValueError(
            f"a classifier of {image_size} pixels needs channel_mult, such as 1,2,3,4 (each comma halves the image)"
        )
    sizes = [int(part) for part in classifier_attention_resolutions.split(",")]
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=image_channels,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=tuple(image_size // size for size in sizes if size <= image_size),
        channel_mult=mult,
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def _widen(model, channels):
    """More input channels, which begin without influence."""
    stem = model.input_blocks[0][0]
    if channels == stem.in_channels:
        return
    wide = type(stem)(channels, stem.out_channels, 3, padding=1)
    with th.no_grad():
        wide.weight.zero_()
        wide.weight[:, : stem.in_channels] = stem.weight
        wide.bias.copy_(stem.bias)
    model.input_blocks[0][0] = wide


class JointDiffusion:
    """A diffusion of images and modalities with upstream's interface; everything else is the diffusion's own.

    diffusion: respaced or not, with an aggregation; network: with heads. The codes of labels are refreshed in
    training, at the calls 0, 1, 2, 4, ... and every `code_interval`.
    """

    def __init__(
        self,
        diffusion,
        modalities: ModalitySet,
        network,
        unshifted_probability: float = 0.0,
        code_interval: int = 1,
    ):
        self.diffusion, self.modalities, self.network = diffusion, modalities, network
        self.unshifted_probability, self.code_interval = unshifted_probability, code_interval
        self._calls = 0

    def __getattr__(self, name):
        return getattr(self.diffusion, name)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Equation 6: tensors [B] by name, `loss` their sum. model_kwargs: the labels under `y`, values of
        modalities that are not made from the image under their names, and conditioning."""
        if self._calls % self.code_interval == 0 or not self._calls & (self._calls - 1):
            self.modalities.refresh_codes(self.network, x_start)
        self._calls += 1
        random = PerSample(th.randint(2**62, (len(x_start),)).tolist())
        cond = dict(model_kwargs or {})
        batch = derive_values(self.modalities, x_start, batch_of(self.modalities, cond, x_start), random)
        own = {m.data_key for m in self.modalities}
        terms = multitask_losses(
            self.modalities,
            model,
            batch,
            t,
            diffusion=self.diffusion,
            noise=noise,
            random=random,
            encoder=self.network,
            conditioning={name: value for name, value in cond.items() if name not in own},
            unshifted_probability=self.unshifted_probability,
        ).terms
        self._note_variance(batch, terms, t)
        return terms

    @th.no_grad()
    def _note_variance(self, batch, terms, t):
        """A running mean of the Gaussian heads' squared error by timestep: how far a given value is trusted."""
        index = th.tensor(self.diffusion.timestep_map, device=t.device)[t]
        for m in self.modalities:
            if m.likelihood == "gaussian" and f"KL_{m.name}" in terms and m.name not in batch.present:
                table, error = self.network.heads[m.name].variance, terms[f"KL_{m.name}"]
                places = index * m.variance_bins // self.modalities.steps
                for place, value in zip(places.tolist(), error.float(), strict=True):
                    table[place] = table[place].lerp(value.clamp(min=1e-6), 0.02)

    def joint_sample(self, shape, random: PerSample | None = None, **options) -> JointSample:
        """Images of `shape` and their modalities; options: of `mt.sampling.joint_sample`, such as given."""
        random = random or PerSample(th.randint(2**62, (shape[0],)).tolist())
        return joint_sample(self.diffusion, self.modalities, self.network, shape, random, **options)

    def p_sample_loop(self, model, shape, noise=None, clip_denoised=True, model_kwargs=None, **options):
        """Images alone, as upstream's scripts ask for them; labels `y` in model_kwargs are given."""
        return self._images(
            shape, noise, model_kwargs, sampler="ddpm", clip_denoised=clip_denoised, **options
        )

    def ddim_sample_loop(self, model, shape, noise=None, clip_denoised=True, model_kwargs=None, **options):
        """See `p_sample_loop`."""
        return self._images(
            shape, noise, model_kwargs, sampler="ddim", clip_denoised=clip_denoised, **options
        )

    def _images(self, shape, noise, model_kwargs, denoised_fn=None, device=None, eta=0.0, **options):
        if noise is not None or denoised_fn is not None or eta:
            raise UserValueError(
                "with modalities, samplers take no noise, denoised_fn or eta: use joint_sample"
            )
        cond = dict(model_kwargs or {})
        given = batch_of(self.modalities, cond).values
        own = {m.data_key for m in self.modalities}
        rest = {name: value for name, value in cond.items() if name not in own}
        return self.joint_sample(shape, given=given, model_kwargs=rest, **options).images
