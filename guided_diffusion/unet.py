"""The ADM U-Net and its halves (upstream: guided_diffusion/unet.py).

Tensors are [B, C, H, W] (or [B, C, L], [B, C, D, H, W] with dims = 1, 3). Module and parameter names are
those of the released checkpoints.
"""

from abc import abstractmethod

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import avg_pool_nd, checkpoint, conv_nd, linear, normalization, timestep_embedding, zero_module


class TimestepBlock(nn.Module):
    """A module whose forward takes the timestep embedding as its second argument."""

    @abstractmethod
    def forward(self, x, emb):
        """x [B, C, ...], emb [B, E] -> [B, C', ...]."""


class ContextBlock(nn.Module):
    """A module whose forward takes the context as its second argument (latent diffusion's transformers)."""

    @abstractmethod
    def forward(self, x, context=None):
        """x [B, C, ...], context [B, T, D] -> [B, C, ...]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the timestep embedding, or the context, to those of its layers that take it."""

    def forward(self, x, emb, context=None):
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, ContextBlock):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class AttentionPool2d(nn.Module):
    """Attention pooling as in CLIP: [B, embed_dim, S, S] -> [B, output_dim], read off a token of the mean.

    spacial_dim: S; num_heads_channels: channels per head; output_dim: embed_dim unless given.
    """

    def __init__(self, spacial_dim, embed_dim, num_heads_channels, output_dim=None):
        super().__init__()
        tokens = spacial_dim**2 + 1
        self.positional_embedding = nn.Parameter(th.randn(embed_dim, tokens) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x):
        tokens = x.flatten(2)  # [B, C, S*S]
        tokens = th.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        return self.c_proj(self.attention(self.qkv_proj(tokens)))[:, :, 0]


class Upsample(nn.Module):
    """Double the size by nearest neighbour (the two inner axes only where dims = 3), then convolve if
    `use_conv`."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, self.channels, self.out_channels, 3, padding=1)

    def forward(self, x):
        _expect_channels(x, self.channels)
        factor = (1, 2, 2) if self.dims == 3 else 2
        x = F.interpolate(x, scale_factor=factor, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve the size (the two inner axes only where dims = 3) by a strided convolution if `use_conv`, else by
    averaging."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, self.channels, self.out_channels, 3, stride=stride, padding=1)
        else:
            if self.channels != self.out_channels:
                raise ValueError(f"averaging cannot change {self.channels} channels into {self.out_channels}")
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x):
        _expect_channels(x, self.channels)
        return self.op(x)


def _expect_channels(x, channels):
    if x.shape[1] != channels:
        raise ValueError(f"expected {channels} channels, got a tensor of shape {tuple(x.shape)}")


class ResBlock(TimestepBlock):
    """A residual block steered by the timestep embedding; may halve or double the size.

    channels, emb_channels: widths of input and embedding; dropout: rate in [0, 1); out_channels: `channels`
    unless given; use_conv: 3x3 instead of 1x1 where the shortcut changes width; use_scale_shift_norm: the
    embedding scales and shifts the second normalisation instead of being added; use_checkpoint: save memory
    for time; up, down: double or halve the size.
    """

    def __init__(
        self,
        channels,
        emb_channels,
        dropout,
        out_channels=None,
        use_conv=False,
        use_scale_shift_norm=False,
        dims=2,
        use_checkpoint=False,
        up=False,
        down=False,
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down

        def conv3(width_in):
            return conv_nd(dims, width_in, self.out_channels, 3, padding=1)

        def resample():
            if up:
                return Upsample(channels, False, dims)
            return Downsample(channels, False, dims) if down else nn.Identity()

        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv3(channels))
        self.h_upd, self.x_upd = resample(), resample()
        emb_width = 2 * self.out_channels if use_scale_shift_norm else self.out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv3(self.out_channels)),
        )
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv3(channels)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x, emb):
        """x [B, channels, ...], emb [B, emb_channels] -> [B, out_channels, ...]."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        norm, activation, conv = self.in_layers
        h = conv(self.h_upd(activation(norm(x))))
        steer = self.emb_layers(emb).type(h.dtype)
        steer = steer.reshape(*steer.shape, *[1] * (h.dim() - 2))
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = steer.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + steer)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.x_upd(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual connection.

    num_head_channels, unless -1, gives the width of a head and overrides num_heads. use_new_attention_order:
    how the released weights lay out queries, keys and values (see QKVAttention).
    """

    def __init__(
        self,
        channels,
        num_heads=1,
        num_head_channels=-1,
        use_checkpoint=False,
        use_new_attention_order=False,
    ):
        super().__init__()
        self.channels = channels
        self.num_heads = num_heads
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(
                    f"{channels} channels cannot be split into heads of {num_head_channels} channels"
                )
            self.num_heads = channels // num_head_channels
        if channels % self.num_heads:
            raise ValueError(f"{channels} channels cannot be split into {self.num_heads} attention heads")
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x):
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x):
        tokens = x.flatten(2)
        mixed = self.proj_out(self.attention(self.qkv(self.norm(tokens))))
        return (tokens + mixed).reshape(x.shape)


def count_flops_attn(model, _x, y):
    """Operation counter of an attention layer for the `thop` package (its custom_ops)."""
    batch, channels, *spatial = y[0].shape
    positions = int(th.tensor(spatial).prod())
    # Two products of the same cost: queries with keys, weights with values.
    model.total_ops += th.DoubleTensor([2 * batch * positions**2 * channels])


def _attend(q, k, v):
    """Scaled dot-product attention on [B, heads, C, T] -> [B, heads * C, T]."""
    # Contiguous: no fused kernel takes views whose last stride is T.
    out = F.scaled_dot_product_attention(*(a.transpose(-1, -2).contiguous() for a in (q, k, v)))
    return out.transpose(-1, -2).flatten(1, 2)


class QKVAttentionLegacy(nn.Module):
    """Attention on [B, heads * 3 * C, T]: each head's queries, keys and values lie together."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        """[B, 3 * heads * C, T] -> [B, heads * C, T]."""
        return _attend(*qkv.unflatten(1, (self.n_heads, 3, -1)).unbind(2))

    count_flops = staticmethod(count_flops_attn)


class QKVAttention(nn.Module):
    """Attention on [B, 3 * heads * C, T]: all queries come first, then all keys, then all values."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        """[B, 3 * heads * C, T] -> [B, heads * C, T]."""
        return _attend(*qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1))

    count_flops = staticmethod(count_flops_attn)


class _Encoder(nn.Module):
    """The half that U-Net and classifier share: time embedding, input blocks, middle block.

    A constructor calls `_configure`, then `_build_encoder`, so that parameters keep the order of the released
    checkpoints.
    """

    def _configure(self, **options):
        for name, value in options.items():
            setattr(self, name, value)
        self.dtype = th.float16 if self.use_fp16 else th.float32
        if self.num_heads_upsample == -1:
            self.num_heads_upsample = self.num_heads
        width = self.model_channels
        self.time_embed_dim = 4 * width
        self.time_embed = nn.Sequential(
            linear(width, self.time_embed_dim), nn.SiLU(), linear(self.time_embed_dim, self.time_embed_dim)
        )

    def _res_block(self, channels, out_channels=None, **options):
        return ResBlock(
            channels,
            self.time_embed_dim,
            self.dropout,
            out_channels=out_channels,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            **options,
        )

    def _attention(self, channels, num_heads):
        return AttentionBlock(
            channels,
            num_heads=num_heads,
            num_head_channels=self.num_head_channels,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def _build_encoder(self):
        """Make input_blocks and middle_block; sets `_skip_channels`, `_stride` and `_feature_size` for what
        follows."""
        ch = int(self.channel_mult[0] * self.model_channels)
        stem = conv_nd(self.dims, self.in_channels, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(stem)])
        skips, stride = [ch], 1
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                width = int(mult * self.model_channels)
                layers = [self._res_block(ch, width)]
                ch = width
                if stride in self.attention_resolutions:
                    layers.append(self._attention(ch, self.num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level != len(self.channel_mult) - 1:
                shrink = self._res_block(ch, ch, down=True) if self.resblock_updown else self._downsample(ch)
                self.input_blocks.append(TimestepEmbedSequential(shrink))
                skips.append(ch)
                stride *= 2
        self.middle_block = TimestepEmbedSequential(
            self._res_block(ch), self._attention(ch, self.num_heads), self._res_block(ch)
        )
        self._skip_channels, self._stride = skips, stride
        self._feature_size = sum(skips) + ch

    def _downsample(self, channels):
        return Downsample(channels, self.conv_resample, dims=self.dims, out_channels=channels)

    def _torso(self):
        """The blocks that half precision applies to."""
        return [self.input_blocks, self.middle_block]

    def convert_to_fp16(self):
        """Run the blocks in float16; embeddings and the output layer stay in float32."""
        for blocks in self._torso():
            blocks.apply(convert_module_to_f16)
        self.dtype = th.float16

    def convert_to_fp32(self):
        """Undo `convert_to_fp16`."""
        for blocks in self._torso():
            blocks.apply(convert_module_to_f32)
        self.dtype = th.float32

    def _embed_time(self, timesteps):
        return self.time_embed(timestep_embedding(timesteps, self.model_channels))

    def _encode(self, x, *conditioning):
        """x [B, C, ...] -> the outputs of all input blocks in order, and the middle block's."""
        h, skips = x.type(self.dtype), []
        for block in self.input_blocks:
            h = block(h, *conditioning)
            skips.append(h)
        return skips, self.middle_block(h, *conditioning)


class UNetModel(_Encoder):
    """The full U-Net: residual blocks and attention at the given strides, steered by timestep and optionally
    by class.

    attention_resolutions: the downsampling factors at which attention is used; channel_mult: width of each
    level as a multiple of model_channels (fractions allowed); num_classes: makes `y` a required input; the
    remaining arguments are passed to the blocks. image_size is kept for callers, the network works at any size
    divisible by its stride.
    heads: a module (middle block's output, last features) -> predictions by name, returned beside the output;
    presence: a module of `present` -> what is added to the timestep embedding (both: mt/heads.py).
    """

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
        heads=None,
        presence=None,
    ):
        super().__init__()
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        del options["heads"], options["presence"]  # registered last, so that the others keep their order
        self._configure(**options)
        if num_classes is not None:
            self.label_emb = self._class_embedding(num_classes)
        self._build_encoder()
        ch = self._build_decoder()
        self.out = nn.Sequential(
            normalization(ch), nn.SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1))
        )
        self.heads = heads
        self.presence = presence

    def _class_embedding(self, num_classes):
        return nn.Embedding(num_classes, self.time_embed_dim)

    def _build_decoder(self):
        """Make output_blocks, the encoder's mirror image; returns the width of the features they give."""
        skips, stride = list(self._skip_channels), self._stride
        ch = skips[-1]
        self.output_blocks = nn.ModuleList([])
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                width = int(self.model_channels * mult)
                layers = [self._res_block(ch + skips.pop(), width)]
                ch = width
                if stride in self.attention_resolutions:
                    layers.append(self._attention(ch, self.num_heads_upsample))
                if level and i == self.num_res_blocks:
                    grow = self._res_block(ch, ch, up=True) if self.resblock_updown else self._upsample(ch)
                    layers.append(grow)
                    stride //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        return ch

    def _upsample(self, channels):
        return Upsample(channels, self.conv_resample, dims=self.dims, out_channels=channels)

    def _torso(self):
        return [*super()._torso(), self.output_blocks]

    def forward(
        self,
        x,
        timesteps,
        y=None,
        present=None,
    ):
        """x [B, in_channels, ...], timesteps [B], y exactly if class-conditional -> [B, out_channels, ...].

        y: class indices int64 [B].
        Or class probabilities float [B, classes], zeros for no class; present: what `presence` takes. With heads
        the result is (that output, their predictions by name).
        """
        emb = self._embed(timesteps, y)
        if present is not None:
            emb = emb + self.presence(present)
        return self._predict(x, emb)

    def _predict(self, x, *conditioning):
        skips, middle = self._encode(x, *conditioning)
        last = self._decode(middle, skips, *conditioning).type(x.dtype)
        if self.heads is not None:
            return self._read_out(last), self.heads(middle.type(x.dtype), last)
        return self._read_out(last)

    def _read_out(self, last):
        return self.out(last)

    def _embed(self, timesteps, y):
        emb = self._embed_time(timesteps)
        if (y is None) != (self.num_classes is None):
            raise ValueError("labels y must be given exactly when the model is class-conditional")
        if y is None:
            return emb
        if y.is_floating_point():
            return emb + y @ self.label_emb.weight
        return emb + self.label_emb(y)

    def _decode(self, h, skips, *conditioning):
        for block in self.output_blocks:
            h = block(th.cat([h, skips.pop()], dim=1), *conditioning)
        return h


class SuperResModel(UNetModel):
    """A U-Net that also sees a low-resolution image, enlarged bilinearly and concatenated on channels.

    in_channels counts one image's channels; the network's own input has twice as many.
    """

    def __init__(self, image_size, in_channels, *args, **kwargs):
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        """x [B, C, H, W], low_res [B, C, h, w] -> [B, out_channels, H, W]."""
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(th.cat([x, enlarged], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_Encoder):
    """The encoder half with a pooled output: ADM's noisy classifier.

    pool: `adaptive` (mean over positions), `attention` (AttentionPool2d), `spatial` or `spatial_v2` (a
    perceptron on the means of every block's output). Arguments as in UNetModel.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
        pool="adaptive",
    ):
        super().__init__()
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self._configure(**options)
        self._build_encoder()
        self.out = self._make_pool()

    def _make_pool(self):
        ch, classes = self._skip_channels[-1], self.out_channels
        if self.pool == "adaptive":
            project = zero_module(conv_nd(self.dims, ch, classes, 1))
            return nn.Sequential(
                normalization(ch), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), project, nn.Flatten()
            )
        if self.pool == "attention":
            if self.num_head_channels == -1:
                raise ValueError("attention pooling needs num_head_channels")
            pool = AttentionPool2d(self.image_size // self._stride, ch, self.num_head_channels, classes)
            return nn.Sequential(normalization(ch), nn.SiLU(), pool)
        if self.pool == "spatial":
            return nn.Sequential(nn.Linear(self._feature_size, 2048), nn.ReLU(), nn.Linear(2048, classes))
        if self.pool == "spatial_v2":
            first = nn.Linear(self._feature_size, 2048)
            return nn.Sequential(first, normalization(2048), nn.SiLU(), nn.Linear(2048, classes))
        raise NotImplementedError(
            f"unknown pool {self.pool!r}: choose adaptive, attention, spatial or spatial_v2"
        )

    def forward(self, x, timesteps):
        """x [B, in_channels, H, W], timesteps [B] -> [B, out_channels]."""
        outputs, middle = self._encode(x, self._embed_time(timesteps))
        if not self.pool.startswith("spatial"):
            return self.out(middle.type(x.dtype))
        means = [h.type(x.dtype).mean(dim=(2, 3)) for h in (*outputs, middle)]
        return self.out(th.cat(means, dim=-1))
