"""Encoder and decoder of the autoencoders (interface and state-dict keys: latent-diffusion,
ldm/modules/diffusionmodules/model.py). Tensors are [B, C, H, W]."""

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.errors import UserValueError
from ldm.modules.attention import LinearAttention, Normalize
from ldm.util import parameters, refuse_unknown

__all__ = [
    "AttnBlock",
    "Decoder",
    "Downsample",
    "Encoder",
    "LinAttnBlock",
    "Normalize",
    "ResnetBlock",
    "Upsample",
    "make_attn",
    "nonlinearity",
]


def nonlinearity(x: torch.Tensor) -> torch.Tensor:
    """SiLU, x * sigmoid(x)."""
    return F.silu(x)


class Upsample(nn.Module):
    """Double the size by nearest neighbour, then a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halve the size by a strided 3x3 convolution if `with_conv`, else by averaging."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x):
        if not self.with_conv:
            return F.avg_pool2d(x, 2)
        # The released weights expect the border at the right and below only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """A residual block, steered by an embedding [B, temb_channels] where that is not 0.

    conv_shortcut: 3x3 instead of 1x1 where the shortcut changes the width; dropout: rate in [0, 1).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = width = out_channels or in_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, width)
        self.norm2 = Normalize(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width != in_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, width, 3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, width, 1)

    def forward(self, x, temb=None):
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        return self._shortcut(x) + h

    def _shortcut(self, x):
        if self.in_channels == self.out_channels:
            return x
        return self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)


class LinAttnBlock(LinearAttention):
    """Linear attention with one head as wide as the feature map."""

    def __init__(self, in_channels: int):
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


class AttnBlock(nn.Module):
    """Self-attention over all positions with one head, and a residual."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x):
        h = self.norm(x)
        # Contiguous [B, 1, H * W, C]: no fused kernel takes views whose last stride is H * W.
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2).contiguous()[:, None] for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H * W, C]
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


# torch chooses the fast kernel itself: xformers is not needed.
_ATTENTION = {
    "vanilla": AttnBlock,
    "vanilla-xformers": AttnBlock,
    "linear": LinAttnBlock,
    "none": nn.Identity,
}


def make_attn(in_channels: int, attn_type: str = "vanilla") -> nn.Module:
    """The attention layer `vanilla` (`vanilla-xformers`), `linear` or `none`; `UserValueError` for another name."""
    if attn_type not in _ATTENTION:
        raise UserValueError(f"unknown attn_type {attn_type!r}: choose {', '.join(_ATTENTION)}")
    return _ATTENTION[attn_type](in_channels)


class _Half(nn.Module):
    """What encoder and decoder share: how their blocks are made, and the middle of the network."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, dropout, attn_type):
        super().__init__()
        self.ch = ch
        self.ch_mult = tuple(ch_mult)
        self.num_resolutions = len(self.ch_mult)
        self.num_res_blocks = num_res_blocks
        self.attn_resolutions = attn_resolutions
        self.dropout = dropout
        self.attn_type = attn_type

    def _res_block(self, width_in, width_out):
        return ResnetBlock(
            in_channels=width_in, out_channels=width_out, temb_channels=0, dropout=self.dropout
        )

    def _level(self, width_in, width_out, blocks, resolution):
        """One resolution: `block`, and `attn`, empty where there is no attention."""
        level = nn.Module()
        widths = [width_in] + [width_out] * (blocks - 1)
        level.block = nn.ModuleList(self._res_block(width, width_out) for width in widths)
        attends = blocks if resolution in self.attn_resolutions else 0
        level.attn = nn.ModuleList(make_attn(width_out, self.attn_type) for _ in range(attends))
        return level

    @staticmethod
    def _run_level(level, h):
        for i, block in enumerate(level.block):
            h = block(h)
            if level.attn:
                h = level.attn[i](h)
        return h

    def _make_middle(self, width):
        middle = nn.Module()
        middle.block_1 = self._res_block(width, width)
        middle.attn_1 = make_attn(width, self.attn_type)
        middle.block_2 = self._res_block(width, width)
        return middle

    def _run_middle(self, h):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))


class Encoder(_Half):
    """Images [B, in_channels, H, W] -> [B, z_channels, H / f, W / f], f = 2 ** (levels - 1).

    double_z: twice the channels, for means and log variances; ch: channels of the first level, which ch_mult
    multiplies level by level; resolution: the size that it is made for, from which the sizes in
    attn_resolutions are counted; dropout: rate in [0, 1); resamp_with_conv: convolve when resizing;
    attn_type: `vanilla`, `linear` (also by use_linear_attn) or `none`. The decoder's arguments, of which one
    configuration serves both, are accepted and ignored.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult=(1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignore_kwargs,
    ):
        refuse_unknown("Encoder", ignore_kwargs, parameters(Decoder))
        attn_type = "linear" if use_linear_attn else attn_type
        super().__init__(ch, ch_mult, num_res_blocks, attn_resolutions, dropout, attn_type)
        self.in_channels = in_channels
        self.resolution = resolution
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(self.ch_mult):
            level = self._level(width, ch * mult, num_res_blocks, resolution // 2**i)
            width = ch * mult
            if i < self.num_resolutions - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = self._make_middle(width)
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    @property
    def downsampling(self) -> int:
        """f, by which the latent is smaller than the image."""
        return 2 ** (self.num_resolutions - 1)

    def forward(self, x):
        """`UserValueError` for another number of channels, or sides that f does not divide."""
        f = self.downsampling
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % f or x.shape[3] % f:
            raise UserValueError(
                f"the encoder takes images [B, {self.in_channels}, H, W] with H and W multiples of {f}, "
                f"got {tuple(x.shape)}"
            )
        h = self.conv_in(x)
        for level in self.down:
            h = self._run_level(level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(nonlinearity(self.norm_out(self._run_middle(h))))


class Decoder(_Half):
    """Latents [B, z_channels, h, w] -> images [B, out_ch, f h, f w]; arguments as in Encoder.

    give_pre_end: return the last features instead; tanh_out: bound the image to (-1, 1).
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult=(1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignorekwargs,
    ):
        refuse_unknown("Decoder", ignorekwargs, parameters(Encoder))
        attn_type = "linear" if use_linear_attn else attn_type
        super().__init__(ch, ch_mult, num_res_blocks, attn_resolutions, dropout, attn_type)
        self.z_channels = z_channels
        self.resolution = resolution
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        width = ch * self.ch_mult[-1]
        smallest = resolution // 2 ** (self.num_resolutions - 1)
        self.z_shape = (1, z_channels, smallest, smallest)
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = self._make_middle(width)
        levels = []  # coarsest first, as they run
        for i in reversed(range(self.num_resolutions)):
            level = self._level(width, ch * self.ch_mult[i], num_res_blocks + 1, resolution // 2**i)
            width = ch * self.ch_mult[i]
            if i:
                level.upsample = Upsample(width, resamp_with_conv)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # finest first, as in the checkpoints
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight on which a discriminator's strength is balanced."""
        return self.conv_out.weight

    def forward(self, z):
        """`UserValueError` for another number of channels."""
        if z.ndim != 4 or z.shape[1] != self.z_channels:
            raise UserValueError(
                f"the decoder takes latents [B, {self.z_channels}, h, w], got {tuple(z.shape)}"
            )
        h = self._run_middle(self.conv_in(z))
        for level in reversed(self.up):
            h = self._run_level(level, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)))
        return h.tanh() if self.tanh_out else h
