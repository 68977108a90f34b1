"""What the scripts that sample latent diffusion models share: loading a model, its samplers, images as files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from guided_diffusion import dist_util
from guided_diffusion.config_file import load_with_bases
from guided_diffusion.errors import UserError, UserFileError, UserValueError
from guided_diffusion.execution import Execution
from guided_diffusion.figures import to_uint8
from guided_diffusion.mt import directions
from guided_diffusion.mt.files import read_labels, read_vectors
from guided_diffusion.sample_shards import fingerprint
from guided_diffusion.seeding import PerSample
from ldm.checkpoint import load_state_dict
from ldm.data.folders import read_images as read_sources
from ldm.data.images import Reading, reading_of
from ldm.models.diffusion.conditioning import select
from ldm.models.diffusion.ddpm import SAMPLERS, LatentDiffusion
from ldm.models.diffusion.joint import JointLatentDiffusion, with_former_defaults
from ldm.util import instantiate_from_config


def load_model(config: Mapping, checkpoint: str | Path) -> LatentDiffusion:
    """The model of a configuration (`model` with target and params) with a checkpoint's weights, for sampling
    on this process's device."""
    if not Path(checkpoint).exists():
        raise UserFileError(f"there is no checkpoint {checkpoint}")
    if not isinstance(config.get("model"), Mapping) or "params" not in config["model"]:
        raise UserError("the configuration has no section `model` with target and params")
    config = _as_trained(config, checkpoint)
    params = dict(config["model"]["params"])
    # The checkpoint holds every part: their own files are not needed.
    for part in ("first_stage_config", "cond_stage_config"):
        if isinstance(params.get(part), Mapping) and "ckpt_path" in (params[part].get("params") or {}):
            inner = {key: value for key, value in params[part]["params"].items() if key != "ckpt_path"}
            params[part] = {**params[part], "params": inner}
    params.pop("ckpt_path", None)
    model = instantiate_from_config({**config["model"], "params": params}, LatentDiffusion, "model")
    model.init_from_ckpt(checkpoint)
    return model.to(dist_util.dev()).eval()


def _as_trained(config, checkpoint):
    """The configuration with what joint models had before there was presence, where the checkpoint has none."""
    former = with_former_defaults(config)
    if former == config or any(".presence." in name for name in load_state_dict(checkpoint)):
        return config
    return former


def locate(resume: str) -> tuple[Path, Path]:
    """(the run's folder, the checkpoint) of -r: a folder with checkpoints/last.ckpt or model.ckpt, or a
    checkpoint in one."""
    path = Path(resume)
    if path.is_dir():
        for name in ("checkpoints/last.ckpt", "model.ckpt"):
            if (path / name).is_file():
                return path, path / name
        raise UserFileError(f"--resume: {path} has no checkpoints/last.ckpt")
    if not path.is_file():
        raise UserFileError(f"--resume: there is no folder or checkpoint {path}")
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent, path


def configurations(run: Path) -> list[Path]:
    """The run's model configuration: the newest configs/*-project.yaml, or config.yaml."""
    found = sorted((run / "configs").glob("*-project.yaml"))[-1:] or sorted(run.glob("config.yaml"))
    if not found:
        raise UserFileError(f"--resume: {run} has neither configs/*-project.yaml nor config.yaml")
    return found


def merged_config(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> dict:
    """YAML files merged from left to right, then `overrides` (a.b.c=value), as plain values."""
    wrong = [text for text in overrides if "=" not in text or text.startswith("-")]
    if wrong:
        raise UserValueError(f"unknown argument {wrong[0]!r}: overrides are written key.key=value")
    parts = [load_with_bases(path) for path in paths]
    return OmegaConf.to_container(
        OmegaConf.merge(*parts, OmegaConf.from_dotlist(list(overrides))), resolve=True
    )


def prepare(args, *models: LatentDiffusion) -> Execution:
    """How the U-Nets of `models` run, by the flags of `flags.add_sampling_flags`; they are made ready for it."""
    execution = Execution.from_flags(vars(args), dist_util.dev())
    for model in models:
        execution.prepare(model.model.diffusion_model)
    return execution


def samples_depend_on(args, without: Sequence[str], execution: Execution, *made_of) -> dict:
    """What makes samples what they are, in plain values, for `Shards`. without: flags that do not; made_of: models and
    values by name."""
    kept = {name: value for name, value in vars(args).items() if name not in without}
    return {**kept, "execution": vars(execution), "from": [fingerprint(values) for values in made_of]}


def names_of(model: LatentDiffusion) -> list[str]:
    """What the model generates."""
    return model.names if isinstance(model, JointLatentDiffusion) else [model.first_stage_key]


def aliases(model: LatentDiffusion) -> dict[str, str]:
    """Names of the command line as the model knows them: `image` is the image, whatever its key."""
    return {"image": model.first_stage_key}


def names_wanted(want: str, given: Mapping, model: LatentDiffusion, without: Sequence[str] = ()) -> list[str]:
    """The names of --want, by default all that are neither given nor left out."""
    names = [name for name in names_of(model) if name not in without]
    return directions.names_wanted(want, names, given, alias=aliases(model))


def read_given(
    specs: Sequence[str],
    model: LatentDiffusion,
    readers: Mapping[str, Callable] | None = None,
    size: tuple[int, int] | None = None,
    config: Mapping | None = None,
) -> dict:
    """What --given NAME=SOURCE says: images [N, C, H, W] of `size` (default: the model's), labels [N, classes],
    vectors [N, D], or images to read these off. NAME `image` is the image. readers: (source, model) -> value, for
    other names. config: the run's: images are read as its data sets read them, labels by its `class_names`."""
    readers = readers or {}
    takes = [*(names_of(model) if isinstance(model, JointLatentDiffusion) else []), *readers]
    sources = directions.sources_given(specs, takes, aliases(model))
    return {
        name: readers[name](source, model)
        if name in readers
        else _read_value(name, source, model, size, config or {})
        for name, source in sources.items()
    }


def _read_value(name, source, model, size, config):
    if isinstance(model, JointLatentDiffusion) and name not in model.image_names:
        if name not in model.standards:
            return read_labels(source, model.modalities[name], config.get("class_names") or ())
        if Path(source).suffix in (".npy", ".npz"):
            return read_vectors(source, model.modalities[name])
    return read_model_images(source, model, size, reading_of(name, config.get("data")))


def read_model_images(
    source: str,
    model: LatentDiffusion,
    size: tuple[int, int] | None = None,
    reading: Reading = Reading(),  # noqa: B008 - it is frozen
) -> torch.Tensor:
    """Images [N, C, H, W] in [-1, 1] of `size`, or of the model's."""
    return read_sources(source, size or image_size(model), reading)


def image_size(model: LatentDiffusion) -> tuple[int, int]:
    """(height, width) of the images that the model draws."""
    latent = torch.zeros(1, *model.latent_shape, device=model.device)
    return tuple(model.decode_first_stage(latent).shape[2:])


def draw(
    model: LatentDiffusion,
    n: int,
    given: Mapping[str, torch.Tensor],
    wanted: Sequence[str],
    *,
    sampler: str,
    steps: int | None,
    seed: int,
    indices: Sequence[int],
    eta: float = 0.0,
    conditioning=None,
    unconditional=None,
    guidance: float = 1.0,
    shape: tuple[int, int, int] | None = None,
    progress: bool = False,
    watch: Callable | None = None,
    **directions,
) -> dict[str, torch.Tensor]:
    """What is wanted of n samples, by name, as every script draws it: images [n, C, H, W], probabilities, vectors.

    directions: strength and absent, of a joint model; others, such as watch, as in JointLatentDiffusion.sample_joint. The weights are
    those in use.
    """
    if isinstance(model, JointLatentDiffusion):
        own = dict(
            sampler=sampler,
            steps=steps,
            eta=eta,
            seed=seed,
            indices=indices,
            progress=progress,
            shape=shape,
            watch=watch,
        )
        guide = dict(conditioning=conditioning, unconditional=unconditional, guidance=guidance, use_ema=False)
        return model.sample_joint(n, given, wanted, **own, **guide, **directions)
    latents, _ = SAMPLERS[sampler](model).sample(
        steps,
        n,
        shape or model.latent_shape,
        conditioning,
        eta=eta,
        verbose=progress,
        unconditional_guidance_scale=guidance,
        unconditional_conditioning=unconditional,
        random=PerSample.derived(seed, indices, model.device),
        watch=watch,
    )
    return {model.first_stage_key: model.decode_first_stage(latents)}


def take(values, numbers: Sequence[int]):
    """The values of these samples, repeated in turn."""
    return select(values, torch.tensor(numbers) % len(values))


def save_images(images: torch.Tensor, folder: Path, numbers: Sequence[int], digits: int = 6) -> None:
    """PNG files NUMBER.png of images [B, 1 or 3, H, W] in [-1, 1]. UserError if they are not finite."""
    if not bool(images.isfinite().all()):
        raise UserError("the samples are not finite: the model or the sampler diverged")
    folder.mkdir(parents=True, exist_ok=True)
    for pixels, number in zip(to_uint8(images.clamp(-1, 1).float()), numbers, strict=True):
        Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(
            folder / f"{number:0{digits}}.png"
        )


def read_images(folder: Path, numbers: Iterable[int], digits: int = 6) -> np.ndarray:
    """What `save_images` wrote, uint8 [N, H, W, C]."""
    images = [np.asarray(Image.open(folder / f"{number:0{digits}}.png")) for number in numbers]
    stacked = np.stack(images)
    return stacked if stacked.ndim == 4 else stacked[..., None]
