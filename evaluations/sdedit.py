"""Restoration by SDEdit (Meng et al. 2022) with a single-task model: the paper's baseline in Table 1.

The masked image is noised to an intermediate step and denoised again by the unconditional model. How far is the
`strength`: at 1 nothing of the image is left, at 0 it comes back as it was. This is the one module of the evaluation that
runs a diffusion model; it takes any with guided-diffusion's interface.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluations import distributed
from evaluations.arguments import STRENGTH
from guided_diffusion import dist_util, image_files
from guided_diffusion.errors import UserValueError
from guided_diffusion.image_files import to_uint8
from guided_diffusion.progress import tqdm


@torch.no_grad()
def sdedit(
    diffusion,
    model: torch.nn.Module,
    images: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    strength: float = STRENGTH,
    use_ddim: bool = False,
    model_kwargs: dict | None = None,
) -> Tensor:
    """Noise `images` [B, C, H, W] in [-1, 1] to `strength` (0 to 1] of the diffusion's steps, and denoise them.

    `randn_like(x)` makes all the noise. Raises UserError for a strength that leaves no step.
    """
    start = round(strength * diffusion.num_timesteps) - 1
    if not 0 < strength <= 1 or start < 0:
        raise UserValueError(
            f"strength {strength} leaves no step of {diffusion.num_timesteps}: choose from (0, 1]"
        )
    step = diffusion.ddim_sample if use_ddim else diffusion.p_sample
    times = torch.arange(start, -1, -1, device=images.device)[:, None].expand(-1, len(images))
    z = diffusion.q_sample(images, times[0], randn_like(images))
    for t in times:
        z = step(model, z, t, clip_denoised=True, model_kwargs=model_kwargs or {}, randn_like=randn_like)[
            "sample"
        ]
    return z.clamp(-1, 1)


def restore(
    masked: np.ndarray,
    diffusion,
    model: torch.nn.Module,
    device: torch.device,
    seed: int = 0,
    strength: float = STRENGTH,
    use_ddim: bool = False,
    batch_size: int = 64,
    labels: np.ndarray | None = None,
) -> np.ndarray | None:
    """SDEdit of `masked` images, uint8 [N, H, W, 3], `labels` [N] for a class-conditional model.

    Image k is the same whatever the batch size and the number of ranks. None on ranks other than 0.
    """
    from guided_diffusion.seeding import PerSample  # here: nothing else of the evaluation needs the models

    start, stop = distributed.share(len(masked))
    parts = [torch.empty(0, *masked.shape[1:], dtype=torch.uint8)]
    with tqdm(total=stop - start, unit="image", disable=dist_util.get_rank() > 0) as bar:
        for first in range(start, stop, batch_size):
            indices = range(first, min(first + batch_size, stop))
            x = torch.from_numpy(masked[indices.start : indices.stop]).to(device)
            x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
            random = PerSample.derived(seed, indices, device)
            kwargs = {}
            if labels is not None:
                kwargs["y"] = torch.from_numpy(labels[indices.start : indices.stop]).long().to(device)
            x = sdedit(diffusion, model, x, random.randn_like, strength, use_ddim, kwargs)
            parts.append(to_uint8(x).cpu())
            bar.update(len(indices))
    gathered = distributed.gather_rows(torch.cat(parts), len(masked))
    return None if gathered is None else gathered.numpy()


def load_single_task(path: str | Path, flags: dict, device: torch.device):
    """(model, diffusion) of guided-diffusion from weights and the flags of training. Raises UserError."""
    from guided_diffusion import checkpoint_util
    from guided_diffusion.script_util import create_model_and_diffusion

    model, diffusion = create_model_and_diffusion(**flags)
    checkpoint_util.load_weights(model, checkpoint_util.read_weights(path), path)
    model.to(device)
    if flags["use_fp16"]:
        model.convert_to_fp16()
    return model.eval(), diffusion


def labels_of_model(
    labels: np.ndarray,
    names: list[str] | None,
    model: str | Path,
    classes: int,
    count: int,
    source: str | Path,
) -> np.ndarray:
    """Labels [count] of `source`, whose classes are called `names` there, as the numbers 0..classes-1 that the model's
    checkpoint gives them. UserError for one that the model does not have."""
    from guided_diffusion import checkpoint_util

    labels = image_files.check_labels(labels, count, f"labels of {source}")
    own = checkpoint_util.config_of(model).get("class_names")
    labels = image_files.renumber(labels, names, own, source) if own else labels
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserValueError(
            f"{source} has label {wrong}: the model's classes are 0 to {classes - 1} (--num_classes)"
        )
    return labels
