"""Vector modalities of a latent diffusion, such as CLIP representations: what reads them off images, and the
standard form in which they are modelled (MT-Diffusion, appendix E.4).
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError, UserValueError
from guided_diffusion.mt.modalities import Modality, VectorModality
from ldm.modules.encoders.base import frozen
from ldm.util import instantiate_from_config

_logger = logging.getLogger(__name__)


class Standard(nn.Module):
    """Vectors [B, D] in standard form, (v - mean) / scale: of mean 0 and RMS 1 over the data, so that 0, the
    null input, is the mean. Until it is `known`, as they are."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Into standard form."""
        return (vectors.float() - self.mean) / self.scale

    def restore(self, standard: torch.Tensor) -> torch.Tensor:
        """Back out of it."""
        return self.mean + self.scale * standard

    @torch.no_grad()
    def measure(self, vectors: torch.Tensor) -> None:
        """Take mean and scale from vectors [N, D] of this rank and all others. UserError if they are all the
        same."""
        moments = torch.cat(
            [
                vectors.double().sum(dim=0),
                vectors.double().square().sum()[None],
                vectors.new_tensor([len(vectors)]),
            ]
        )
        if dist_util.get_world_size() > 1:
            dist.all_reduce(moments)
        count = moments[-1]
        mean = moments[:-2] / count
        variance = (moments[-2] / count - mean.square().sum()) / len(mean)
        if not variance > 0:
            raise UserError(f"{int(count)} vectors of the data are all the same: there is nothing to learn")
        self.mean.copy_(mean)
        self.scale.copy_(variance.sqrt())
        self.known.fill_(True)


def make_standards(modalities: Iterable[Modality]) -> nn.ModuleDict:
    """A Standard for every vector, by name."""
    return nn.ModuleDict({m.name: Standard(*m.shape) for m in modalities if isinstance(m, VectorModality)})


def make_extractors(configs: Mapping[str, Mapping], standards: Mapping[str, Standard]) -> nn.ModuleDict:
    """Frozen modules images [B, 3, H, W] in [-1, 1] -> vectors [B, D], by the modality's name.

    UserValueError for an extractor of no vector modality, or of another width.
    """
    made = nn.ModuleDict()
    for name, config in configs.items():
        if name not in standards:
            raise UserValueError(
                f"extractors.{name}: the vector modalities are {', '.join(standards) or 'none'}"
            )
        made[name] = frozen(instantiate_from_config(config, nn.Module, f"extractors.{name}"))
        width = len(standards[name].mean)
        if made[name].width != width:
            raise UserValueError(
                f"extractors.{name} gives {made[name].width} numbers, modality {name} has {width}: set its shape"
            )
    return made


def measure_standards(
    standards: Mapping[str, Standard], vectors: Callable, batches: Iterable[Mapping], count: int
) -> None:
    """Measure the standards that are not known on the first `count` samples of all ranks together; those that
    have no vector (`<name>_present`) do not count. vectors: (batch, name) -> [B, D]."""
    unknown = [name for name, standard in standards.items() if not standard.known]
    if not unknown:
        return
    seen, found = 0, {name: [] for name in unknown}
    for batch in batches:
        for name in unknown:
            rows, present = vectors(batch, name), batch.get(f"{name}_present")
            found[name].append(rows if present is None else rows[present.to(rows.device)])
        seen += len(found[unknown[0]][-1]) * dist_util.get_world_size()
        if seen >= count:
            break
    for name in unknown:
        standards[name].measure(torch.cat(found[name]))
        scale = float(standards[name].scale)
        _logger.info("%s: standard form by %d samples, scale %.4g", name, seen, scale)


def read_again(loader: Iterable) -> Iterable:
    """The batches of a loader from where it begins, read beside it: a DataLoader that is being iterated, whose
    workers are its iterators' own, stays where it is."""
    if not isinstance(loader, DataLoader):
        return loader
    return DataLoader(
        copy.copy(loader.dataset),  # a stream's place is its own
        loader.batch_size,
        sampler=loader.sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
    )
