"""Images that show how training goes: what the data are, what the first stage keeps, what is sampled."""

from collections.abc import Mapping

import torch
from tqdm.auto import tqdm

from guided_diffusion.mt import sampling
from guided_diffusion.seeding import PerSample, derive_seed
from ldm.models.diffusion.conditioning import select
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.sampling import GuidedModel, gaussian_noise, randn
from ldm.util import isimage, log_txt_as_img


class ImageLogging:
    """`sample`, `sample_log` and `log_images`, for a LatentDiffusion."""

    def guided_model(self, cond, unconditional=None, scale=1.0, corrector=None, options=None) -> GuidedModel:
        """The network under conditioning as a sampler's model; arguments as GuidedModel's."""
        return GuidedModel(self, cond, unconditional, scale, corrector, options)

    @torch.no_grad()
    def sample(
        self,
        cond,
        batch_size: int = 16,
        x_T=None,
        verbose: bool = True,
        random: PerSample | None = None,
        **guidance,
    ) -> torch.Tensor:
        """Latents [batch_size, C, h, w] by ancestral sampling in all steps, from noise x_T if given.

        random: one generator per sample (the global one if None); guidance: unconditional_guidance_scale and
        unconditional_conditioning, see `Sampler.sample`.
        """
        scale = guidance.get("unconditional_guidance_scale", 1.0)
        free = guidance.get("unconditional_conditioning")
        guided = self.guided_model(
            self.as_conditioning(cond), None if free is None else self.as_conditioning(free), scale
        )
        z = randn((batch_size, *self.latent_shape), self.device, random) if x_T is None else x_T
        noise = gaussian_noise(random)
        steps = sampling.ddpm(self.diffusion, guided, z, noise, clip_denoised=self.clip_denoised)
        for out in tqdm(steps, total=self.num_timesteps, disable=not verbose, desc="ddpm"):
            z = out["sample"]
        return z

    @torch.no_grad()
    def sample_log(
        self,
        cond,
        batch_size: int,
        ddim: bool = True,
        ddim_steps: int = 50,
        random: PerSample | None = None,
        **options,
    ):
        """(latents, intermediates) by DDIM in ddim_steps steps, options being DDIMSampler.sample's; without
        `ddim` by `sample`, with the options of that."""
        if not ddim:
            return self.sample(cond, batch_size, verbose=False, random=random, **options), {}
        return DDIMSampler(self).sample(
            ddim_steps, batch_size, self.latent_shape, cond, verbose=False, random=random, **options
        )

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping,
        N: int = 8,
        sample: bool = True,
        ddim_steps: int = 50,
        ddim_eta: float = 0.0,
        unconditional_guidance_scale: float = 1.0,
        split: str = "train",
    ) -> dict[str, torch.Tensor]:
        """Images [n, 3, H, W], n = min(N, B), by name: `inputs` (images, where the batch has them),
        `reconstruction`, `conditioning` (where it can be drawn), and with `sample` `samples` and, if the
        scale is not 1, `samples_cfg` with guidance. The noise is always the same for the same `split` of the data, train or val."""
        batch = {name: select(value, slice(N)) for name, value in batch.items() if hasattr(value, "__len__")}
        z, cond = self.get_input(batch, self.first_stage_key)
        shown = self._inputs_and_conditioning(batch)
        shown["reconstruction"] = self.decode_first_stage(z)
        if sample:
            seed = derive_seed(self.seed, int(split == "val"))
            shown |= self.log_samples(
                batch, cond, len(z), ddim_steps, ddim_eta, unconditional_guidance_scale, seed
            )
        return {name: images.clamp(-1, 1) for name, images in shown.items()}

    def log_samples(self, batch, cond, n, steps, eta, scale, seed) -> dict[str, torch.Tensor]:
        """Samples for `log_images`, by the moving average."""
        shown, guided = {}, {}
        if scale != 1:
            uncond = self.get_unconditional_conditioning(n)
            guided = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond}
        with self.ema_scope():
            for name, options in (("samples", {}), ("samples_cfg", guided)):
                if name == "samples" or guided:
                    random = PerSample.derived(seed, range(n), self.device)
                    latents, _ = self.sample_log(cond, n, True, steps, random, eta=eta, **options)
                    shown[name] = self.decode_first_stage(latents)
        return shown

    def _inputs_and_conditioning(self, batch):
        shown = {}
        for name, key in (("inputs", self.first_stage_key), ("conditioning", self.cond_stage_key)):
            if name == "conditioning" and (self.model.conditioning_key is None or "inputs" not in shown):
                continue
            value = batch.get(key)
            if isinstance(value, torch.Tensor) and value.ndim == 4 and isimage(value.movedim(-1, 1)):
                shown[name] = value.movedim(-1, 1).float().expand(-1, 3, -1, -1)
            elif isinstance(value, (list, tuple)) and name == "conditioning":
                height, width = shown["inputs"].shape[2:]
                shown[name] = log_txt_as_img((width, height), list(value))
            elif isinstance(value, torch.Tensor) and value.ndim == 1 and name == "conditioning":
                height, width = shown["inputs"].shape[2:]
                labels = batch.get("human_label", [str(int(label)) for label in value])
                shown[name] = log_txt_as_img((width, height), labels)
        return shown
