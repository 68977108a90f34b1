"""Vector modalities of a latent diffusion, such as CLIP representations: where they come from, and the
standard form in which they are modelled (MT-Diffusion, appendix E.4).
"""

import copy
import logging
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError, UserValueError
from ldm.models.diffusion.first_stage import channels_first, from_batch, frozen
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


class VectorModalities:
    """`extractors` and `standards`, for a LatentDiffusion with `modalities`.

    An extractor is a frozen module images [B, 3, H, W] in [-1, 1] -> vectors [B, D]; it reads a vector off
    the image where the data do not bring it under the modality's name.
    """

    def make_vectors(self, extractors: Mapping[str, Mapping]) -> None:
        """Make both. UserValueError for an extractor of no vector modality, or of another width."""
        widths = {m.name: m.shape[0] for m in self.modalities if m.kind == "vector"}
        if unknown := sorted(set(extractors) - set(widths)):
            raise UserValueError(
                f"extractors.{unknown[0]}: the vector modalities are {', '.join(widths) or 'none'}"
            )
        made = {
            name: frozen(instantiate_from_config(config, nn.Module, f"extractors.{name}"))
            for name, config in extractors.items()
        }
        for name, extractor in made.items():
            if extractor.width != widths[name]:
                raise UserValueError(
                    f"extractors.{name} gives {extractor.width} numbers, modality {name} has {widths[name]}: set its shape"
                )
        self.extractors = nn.ModuleDict(made)
        self.standards = nn.ModuleDict({name: Standard(width) for name, width in widths.items()})

    @torch.no_grad()
    def vectors(self, batch: Mapping, name: str) -> torch.Tensor:
        """A batch's vectors [B, D] as they are: its own, or those of its images."""
        if name in batch:
            return batch[name].to(self.device).float()
        if name not in self.extractors:
            raise UserValueError(
                f"the batch has no {name!r}, and the model no extractors.{name} to read it off"
            )
        images = channels_first(from_batch(batch, self.first_stage_key, f"for extractors.{name}"))
        return self.extractors[name](images.to(self.device)).float()

    def measure_standards(self, batches: Iterable[Mapping], count: int) -> None:
        """Measure the standards that are not known on the first `count` samples of all ranks together; those
        that have no vector (`<name>_present`) do not count."""
        unknown = [name for name, standard in self.standards.items() if not standard.known]
        if not unknown:
            return
        seen, found = 0, {name: [] for name in unknown}
        for batch in batches:
            for name in unknown:
                vectors = self.vectors(batch, name)
                present = batch.get(f"{name}_present")
                found[name].append(vectors if present is None else vectors[present.to(vectors.device)])
            seen += len(found[unknown[0]][-1]) * dist_util.get_world_size()
            if seen >= count:
                break
        for name in unknown:
            self.standards[name].measure(torch.cat(found[name]))
            _logger.info(
                "%s: standard form by %d samples, scale %.4g", name, seen, float(self.standards[name].scale)
            )
