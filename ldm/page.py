"""Latent diffusion models on the page of scripts/demo.py."""

from types import SimpleNamespace

import torch

from guided_diffusion.errors import UserError
from guided_diffusion.figures import Row, contact_sheet, is_frame, to_uint8
from guided_diffusion.mt.page import Drawn, Part, Studio
from guided_diffusion.mt.run import FILM_TILE, FILMED
from ldm import inference, sample_diffusion
from ldm.modules.encoders.modules import ClassEmbedder, TextEncoder


class LatentStudio(Studio):
    """A run of main.py, or its checkpoint, as sample_diffusion.py takes it."""

    samplers = ("ddim", "plms", "heun", "dpm++", "dpm++sde", "dpm++3m", "unipc", "ddpm")
    steps = 50

    def __init__(self, path: str):
        run, checkpoint = inference.locate(path)
        self.config = inference.merged_config(inference.configurations(run))
        self.model = model = inference.load_model(self.config, checkpoint)
        self.title, self.timesteps = run.name, model.num_timesteps
        height, width = inference.image_size(model)
        size = dict(height=height, width=width, channels=3)
        classes = tuple(self.config.get("class_names") or ())
        joint = isinstance(model, inference.JointLatentDiffusion)
        self.parts = [Part(model.first_stage_key, "image", giveable=joint, **size)]
        for m in model.modalities if joint else ():
            if m.name in model.image_names:
                self.parts.append(Part(m.name, "image", **size))
            else:
                self.parts.append(Part(m.name, m.kind, **m.control(classes)))
        if model.model.conditioning_key is not None:
            key, stage = model.cond_stage_key, model.cond_stage_model
            if isinstance(stage, TextEncoder):
                self.parts.append(Part(key, "text", drawable=False))
            elif isinstance(stage, ClassEmbedder):
                names = classes or tuple(map(str, range(stage.n_classes)))
                self.parts.append(Part(key, "label", drawable=False, classes=names))
            else:
                self.parts.append(Part(key, "image", drawable=False, **size))

    @torch.no_grad()
    def draw(self, wish, watch):
        """See Studio: as sample_diffusion.py does with the same flags."""
        model = self.model
        given = sample_diffusion.read_given(list(wish.given), model, self.config)
        wanted = inference.names_wanted(",".join(wish.want), given, model)
        numbers = list(range(wish.count))
        whole = wish.sampler == "ddpm"
        args = SimpleNamespace(
            vanilla_sample=whole,
            sampler=wish.sampler,
            custom_steps=wish.steps,
            eta=None,
            seed=wish.seed,
            scale=wish.guidance,
            strength=wish.strength,
            null_label=None,
        )

        def seen(done, total, latents, values):
            watch(done, total, self.frame(latents, values, done, total) if is_frame(done, total) else None)

        part = {name: inference.take(value, numbers) for name, value in given.items()}
        with model.ema_scope():
            made = sample_diffusion.sample(args, model, part, wanted, numbers, seen)
        shown = {
            name: value
            for name, value in part.items()
            if isinstance(value, torch.Tensor) and value.ndim in (2, 4)
        }
        images, labels, vectors = {}, {}, {}
        for name, value in {**shown, **made}.items():
            value = value.float().cpu()
            if not bool(value.isfinite().all()):
                raise UserError("the samples are not finite: the model or the sampler diverged")
            if value.ndim == 4:
                known = torch.full((1, 1, 1, 1), name in part)  # what was given comes back exactly
                images[name] = to_uint8(value.clamp(-1, 1), known)
            elif name in model.standards:
                vectors[name] = value.numpy()
            else:
                labels[name] = value.numpy()
        return Drawn(images, labels, vectors)

    def frame(self, latents, values, done, total):
        """One image of the film: the predicted image above the modalities that are images, decoded."""
        model, told = self.model, f"step {done} of {total}"
        names = getattr(model, "image_names", [model.first_stage_key])[1:]
        rows = [Row(f"{model.first_stage_key}, {told}", self.decoded(latents), mark="generated")]
        rows += [Row(name, self.decoded(values[name])) for name in names if name in values]
        return contact_sheet(rows, tile=FILM_TILE)

    def decoded(self, latents: torch.Tensor):
        """The first latents as images uint8 [N, H, W, 3]."""
        return to_uint8(self.model.decode_first_stage(latents[:FILMED]).float().clamp(-1, 1))
