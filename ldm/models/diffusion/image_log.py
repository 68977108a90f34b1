"""Images that show how the training of a diffusion goes: what the data are, what the first stage keeps, what is
sampled."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from guided_diffusion.seeding import PerSample, derive_seed
from ldm.models.diffusion.conditioning import select
from ldm.models.diffusion.sampling import ancestral
from ldm.util import isimage, log_txt_as_img

Images = dict[str, torch.Tensor]


@torch.no_grad()
def log_images(
    model,
    batch: Mapping,
    N: int,
    n_row: int,
    sample: bool,
    ddim_steps: int | None,
    ddim_eta: float,
    return_keys: Sequence[str] | None,
    quantize_denoised: bool,
    inpaint: bool,
    plot_denoise_rows: bool,
    plot_progressive_rows: bool,
    plot_diffusion_rows: bool,
    unconditional_guidance_scale: float = 1.0,
    unconditional_guidance_label=None,
    use_ema_scope: bool = True,
    split: str = "train",
) -> Images:
    """Images [n, C, H, W] in [-1, 1] by name, n = min(N, B): `inputs` (where the batch has them),
    `reconstruction`, `conditioning` (where it can be drawn), and with `sample` those of the model's
    `log_samples` (ddim_steps None: ancestral).

    plot_diffusion_rows: `diffusion_row`, n_row of them noised further and further; plot_denoise_rows:
    `denoise_row`, the samples on their way; plot_progressive_rows: `progressive_row`, the predicted images of
    ancestral sampling; quantize_denoised: `samples_x0_quantized`, where the first stage has a codebook;
    inpaint: `samples_inpainting`, `samples_outpainting` and their `mask`, 1 where the input is kept. A row is
    [n, C, H, k W], k images side by side. return_keys: only these, if any is there. unconditional_guidance_scale: of `samples_cfg`,
    away from the null input or unconditional_guidance_label; use_ema_scope: by the average. The noise is always the same for
    the same `split` of the data, train or val.
    """
    batch = {name: select(value, slice(N)) for name, value in batch.items() if hasattr(value, "__len__")}
    z, cond = model.get_input(batch, model.first_stage_key, force_c_encode=True)
    n, seed = len(z), derive_seed(model.seed, int(split == "val"))

    def random():
        return PerSample.derived(seed, range(n), model.device)

    def row(latents):
        return torch.cat([model.decode_first_stage(part) for part in latents], dim=3)

    shown = inputs_and_conditioning(model, batch)
    shown["reconstruction"] = model.decode_first_stage(z)
    if plot_diffusion_rows:
        shown["diffusion_row"] = row(noised(model, z[:n_row], random()))
    steps = None if ddim_steps is None else min(ddim_steps, model.num_timesteps)
    with model.ema_scope("images for the log") if use_ema_scope else model.whole():
        if sample:
            guidance = (unconditional_guidance_scale, unconditional_guidance_label)
            shown |= model.log_samples(batch, cond, n, steps, ddim_eta, *guidance, seed)
            ddim = steps is not None

            def sampled(**options):
                if ddim:
                    options["eta"] = ddim_eta
                return model.sample_log(cond, n, ddim, steps, random=random(), **options)

            if plot_denoise_rows:
                _, way = sampled()
                shown["denoise_row"] = row(way["x_inter"] if ddim else way)
            if quantize_denoised and hasattr(model.first_stage_model, "quantize"):
                latents, _ = sampled(**{"quantize_x0" if ddim else "quantize_denoised": True})
                shown["samples_x0_quantized"] = model.decode_first_stage(latents)
            if inpaint:
                height, width = z.shape[2:]
                mask = z.new_ones(n, 1, height, width)
                mask[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0
                shown["mask"] = mask
                for name, kept in (("samples_inpainting", mask), ("samples_outpainting", 1 - mask)):
                    latents, _ = sampled(x0=z, mask=kept)
                    shown[name] = model.decode_first_stage(latents)
        if plot_progressive_rows:
            _, way = model.progressive_denoising(cond, z.shape, verbose=False, random=random())
            shown["progressive_row"] = row(way)
    return _clipped(shown, return_keys)


def log_samples(
    model, cond, n: int, steps: int | None, eta: float, scale: float, null_label, seed: int
) -> Images:
    """`samples` of a LatentDiffusion by the weights in use, and where the scale is not 1 `samples_cfg` with guidance;
    steps None: ancestral."""
    options = {} if steps is None else {"eta": eta}
    shown, guided = {}, {}
    if scale != 1:
        free = model.get_unconditional_conditioning(n, null_label)
        guided = {"unconditional_guidance_scale": scale, "unconditional_conditioning": free}
    for name, extra in (("samples", {}), ("samples_cfg", guided)):
        if name == "samples" or extra:
            random = PerSample.derived(seed, range(n), model.device)
            latents, _ = model.sample_log(
                cond, n, steps is not None, steps, random=random, **options, **extra
            )
            shown[name] = model.decode_first_stage(latents)
    return shown


@torch.no_grad()
def log_pixel_images(model, batch: Mapping, N, n_row, sample, return_keys=None, split="train") -> Images:
    """The same of a DDPM of images: `inputs`, `diffusion_row`, and with `sample` `samples` and `denoise_row`."""
    x = model.get_input(batch, model.first_stage_key)[:N].to(model.device)
    seed, places = derive_seed(model.seed, int(split == "val")), range(len(x))
    noise = PerSample.derived(seed, places, model.device)
    shown = {"inputs": x, "diffusion_row": torch.cat(list(noised(model, x[:n_row], noise)), dim=3)}
    if sample:
        with model.ema_scope("images for the log"):
            random = PerSample.derived(seed, places, model.device)
            shown["samples"], way = ancestral(model, None, x.shape, random=random)
        shown["denoise_row"] = torch.cat(way, dim=3)
    return _clipped(shown, return_keys)


def noised(model, x: torch.Tensor, random: PerSample) -> Iterator[torch.Tensor]:
    """x, noised to every log_every_t-th timestep and the last."""
    noise = random.randn(x.shape[1:]).to(x)[: len(x)]
    for t in (*range(0, model.num_timesteps - 1, model.log_every_t), model.num_timesteps - 1):
        yield model.q_sample(x, torch.full((len(x),), t, device=x.device), noise)


def _clipped(shown, return_keys):
    shown = {name: images.clamp(-1, 1) for name, images in shown.items()}
    return {name: shown[name] for name in return_keys or () if name in shown} or shown


def inputs_and_conditioning(model, batch: Mapping) -> Images:
    """`inputs`, and `conditioning` where it can be drawn."""
    shown: Images = {}
    for name, key in (("inputs", model.first_stage_key), ("conditioning", model.cond_stage_key)):
        if name == "conditioning" and (model.model.conditioning_key is None or "inputs" not in shown):
            continue
        value = batch.get(key)
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            images = value.movedim(-1, 1).float()
            if isimage(images):
                shown[name] = images.expand(-1, 3, -1, -1)
        elif name == "conditioning" and isinstance(value, (list, tuple)):
            shown[name] = log_txt_as_img(_size(shown), list(value))
        elif name == "conditioning" and isinstance(value, torch.Tensor) and value.ndim == 1:
            labels = batch.get("human_label", [str(int(label)) for label in value])
            shown[name] = log_txt_as_img(_size(shown), labels)
    return shown


def _size(shown):
    """(width, height) of the inputs."""
    return tuple(shown["inputs"].shape[:1:-1])
