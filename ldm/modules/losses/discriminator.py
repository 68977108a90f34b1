"""PatchGAN's discriminator (Isola et al. 2017; state-dict keys: taming-transformers,
taming/modules/discriminator/model.py)."""

import torch
from torch import nn


class ActNorm(nn.Module):
    """scale * (x + loc) per channel, which the first batch of training sets to mean 0 and deviation 1 (Kingma &
    Dhariwal 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x):
        if self.training and not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (x.std((0, 2, 3), keepdim=True) + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (x + self.loc)


class NLayerDiscriminator(nn.Module):
    """Images [B, input_nc, H, W] -> logits [B, 1, h, w], one for each of overlapping patches.

    ndf: channels of the first of n_layers + 1 convolutions, which double up to eightfold; use_actnorm: ActNorm in
    place of batch normalisation.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False):
        super().__init__()
        widths = [ndf * min(2**level, 8) for level in range(n_layers + 1)]
        layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, n_layers + 1):
            stride = 2 if level < n_layers else 1
            layers.append(
                nn.Conv2d(
                    widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=use_actnorm
                )  # batch normalisation has a bias of its own
            )
            layers.append(ActNorm(widths[level]) if use_actnorm else nn.BatchNorm2d(widths[level]))
            layers.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x)
