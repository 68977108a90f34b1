"""The codebook of VQModel (interface and state-dict keys: taming-transformers, taming/modules/vqvae/quantize.py)."""

import numpy as np
import torch
from torch import nn

from guided_diffusion.errors import UserFileError


class VectorQuantizer2(nn.Module):
    """The nearest of n_e learned entries in place of every vector (van den Oord et al. 2017).

    beta: of the two halves of the codebook's loss; on the entries' (`legacy`, as all released models), or on the
    encoder's. remap: .npy file with the indices of the entries in use, by whose places indices are then told;
    unknown_index: what others become: `random`, `extra` (one more) or a number. sane_index_shape: indices [B, h, w]
    instead of flat.
    """

    def __init__(
        self, n_e, e_dim, beta, remap=None, unknown_index="random", sane_index_shape=False, legacy=True
    ):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.remap, self.unknown_index, self.sane_index_shape = remap, unknown_index, sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.re_embed = n_e
        if remap is not None:
            self.register_buffer("used", torch.from_numpy(_indices(remap, n_e)))
            self.re_embed = len(self.used) + (unknown_index == "extra")
            if unknown_index == "extra":
                self.unknown_index = len(self.used)

    def forward(self, z: torch.Tensor, temp=None, rescale_logits=False, return_logits=False):
        """Latents [B, e_dim, h, w] -> (entries of that shape, loss, (None, None, indices)); the gradient passes the
        rounding by. The other arguments have no effect: a Gumbel quantiser has them."""
        rows = z.movedim(1, -1)
        flat, table = rows.flatten(0, -2), self.embedding.weight
        # |z - e|^2 without |z|^2, which is the same for every entry
        indices = (table.square().sum(1) - 2 * flat @ table.T).argmin(1)
        entries = self.embedding(indices).view_as(rows).movedim(-1, 1)
        of_encoder, of_entries = (
            (entries.detach() - z).square().mean(),
            (entries - z.detach()).square().mean(),
        )
        weights = (1, self.beta) if self.legacy else (self.beta, 1)
        loss = weights[0] * of_encoder + weights[1] * of_entries
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(len(z), *z.shape[2:])
        return (z + (entries - z).detach()).contiguous(), loss, (None, None, indices)

    def remap_to_used(self, inds: torch.Tensor) -> torch.Tensor:
        """Indices of entries -> places among those in use, of the same shape."""
        same = inds[..., None] == self.used.to(inds)
        places, unknown = same.long().argmax(-1), ~same.any(-1)
        if self.unknown_index != "random":
            return places.masked_fill(unknown, self.unknown_index)
        return torch.where(unknown, torch.randint_like(places, self.re_embed), places)

    def unmap_to_all(self, inds: torch.Tensor) -> torch.Tensor:
        """The inverse of `remap_to_used`; the extra place becomes the first."""
        known = inds.masked_fill(inds >= len(self.used), 0)
        return self.used.to(inds)[known]

    def get_codebook_entry(self, indices: torch.Tensor, shape: tuple[int, int, int, int] | None):
        """Indices [B h w] -> entries [B, e_dim, h, w], shape being (B, h, w, e_dim); None: [B h w, e_dim]."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        entries = self.embedding(indices)
        return entries if shape is None else entries.view(shape).movedim(-1, 1).contiguous()


def _indices(path, n_e):
    try:
        indices = np.load(path)
    except (OSError, ValueError) as error:
        raise UserFileError(f"remap: {path} cannot be read as .npy ({str(error).splitlines()[0]})") from None
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or not 0 <= indices.min() <= indices.max() < n_e:
        raise UserFileError(f"remap: {path} does not hold indices of the {n_e} entries")
    return indices.astype(np.int64)
