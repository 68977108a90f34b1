"""Masked images: square patches, and halves (paper section 4.1, appendix E.2, Figures 5 and 10)."""

from dataclasses import dataclass

import torch as th

from ..errors import UserValueError
from ..seeding import PerSample

HALVES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class RandomPatches:
    """Masks an image with square patches: the paper's masked-image data (appendix E.2).

    Each image gets m ~ U{0..max_patches} patches. The corner of each lies anywhere in the image and the patch
    spans from it `size` pixels down and to the right, clipped at the edges; patches may overlap. With probability
    `complete` everything is masked. half: masks that half of every image instead (`left`, ...). Masked pixels are
    0, the middle of the range.
    """

    max_patches: int = 10
    size: int = 16
    complete: float = 0.0
    half: str | None = None

    def __post_init__(self):
        if self.max_patches < 0 or self.size < 1 or not 0 <= self.complete <= 1:
            raise UserValueError(
                f"masks need max_patches of at least 0, size of at least 1 and complete a probability, got {self}"
            )
        if self.half is not None and self.half not in HALVES:
            raise UserValueError(f"unknown half {self.half!r}: choose one of {', '.join(HALVES)}")

    def keep(self, height: int, width: int, random: PerSample, patches: int | None = None) -> th.Tensor:
        """Which pixels stay: bool [B, 1, H, W]. `patches` fixes their number."""
        if self.size > min(height, width):
            raise UserValueError(f"patches of {self.size} pixels do not fit an image of {height} x {width}")
        rows, columns = (th.arange(edge, device=random.device) for edge in (height, width))
        if self.half is not None:
            return self._half(rows, columns).expand(len(random), 1, height, width)
        most = max(self.max_patches if patches is None else patches, 1)
        count = random.randint(self.max_patches + 1) if patches is None else patches
        top, left = (random.randint(edge, most)[..., None] for edge in (height, width))  # [B, most, 1]
        inside_rows = (rows >= top) & (rows < top + self.size)  # [B, most, H]
        inside_columns = (columns >= left) & (columns < left + self.size)
        used = th.arange(most, device=random.device) < th.as_tensor(count, device=random.device).reshape(
            -1, 1
        )
        covered = inside_rows[..., :, None] & inside_columns[..., None, :] & used[..., None, None]
        everything = (random.rand() < self.complete).reshape(-1, 1, 1)
        return ~(covered.any(dim=1) | everything)[:, None]

    def _half(self, rows, columns):
        across = self.half in ("left", "right")
        places = columns if across else rows[:, None]
        second = places >= len(columns if across else rows) // 2
        return second if self.half in ("left", "top") else ~second

    def __call__(self, images: th.Tensor, random: PerSample) -> th.Tensor:
        """Masked copies of images [B, C, H, W]."""
        return images * self.keep(*images.shape[2:], random).to(images)
