"""Small models of the kinds that people write themselves."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

# A YOLOv8-style detector: C2f blocks, SPPF, a path network, a decoupled head with DFL ------------


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, c1, c2, kernel=1, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two convolutions, and the input again."""

    def __init__(self, c, shortcut):
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c, 3), Conv(c, c, 3)
        self.add = shortcut

    def forward(self, x):
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C2f(nn.Module):
    """Splits its channels, and joins the halves with all that bottlenecks made of one."""

    def __init__(self, c1, c2, n=1, shortcut=False):
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Conv(c1, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c, shortcut) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Pools of growing size, joined."""

    def __init__(self, c1, c2):
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(c1 // 2 * 4, c2)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class DFL(nn.Module):
    """The mean of a distribution over distances."""

    def __init__(self, c1):
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)
        self.c1 = c1

    def forward(self, x):
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class Detect(nn.Module):
    """Boxes and classes of every place of three maps."""

    def __init__(self, channels, num_classes=3, reg_max=4):
        super().__init__()
        self.nc, self.reg_max = num_classes, reg_max
        self.no = num_classes + 4 * reg_max
        self.stride = (8, 16, 32)
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, 16, 3), Conv(16, 16, 3), nn.Conv2d(16, 4 * reg_max, 1))
            for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(c, 16, 3), Conv(16, 16, 3), nn.Conv2d(16, num_classes, 1))
            for c in channels
        )
        self.dfl = DFL(reg_max)

    def forward(self, maps):
        maps = [
            torch.cat([box(x), cls(x)], 1)
            for x, box, cls in zip(maps, self.cv2, self.cv3, strict=True)
        ]
        if self.training:
            return maps
        joined = torch.cat([x.view(x.shape[0], self.no, -1) for x in maps], 2)
        box, cls = joined.split((self.reg_max * 4, self.nc), 1)
        anchors, strides = self.anchors(maps)
        left, right = self.dfl(box).chunk(2, 1)
        x1y1, x2y2 = anchors - left, anchors + right
        boxes = torch.cat([(x1y1 + x2y2) / 2, x2y2 - x1y1], 1) * strides
        return torch.cat([boxes, cls.sigmoid()], 1), maps

    def anchors(self, maps):
        points, strides = [], []
        for x, stride in zip(maps, self.stride, strict=True):
            h, w = x.shape[2:]
            ys, xs = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            points.append(torch.stack([xs, ys]).view(2, -1))
            strides.append(torch.full((1, h * w), float(stride)))
        return torch.cat(points, 1).to(x), torch.cat(strides, 1).to(x)


class Yolo(nn.Module):
    """Backbone, path network, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 8, 3, 2), Conv(8, 16, 3, 2), C2f(16, 16, 1, True))
        self.p3 = nn.Sequential(Conv(16, 16, 3, 2), C2f(16, 16, 2, True))
        self.p4 = nn.Sequential(Conv(16, 32, 3, 2), C2f(32, 32, 1, True))
        self.p5 = nn.Sequential(Conv(32, 32, 3, 2), C2f(32, 32, 1, True), SPPF(32, 32))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.n4, self.n3 = C2f(64, 32), C2f(48, 16)
        self.d3, self.m4 = Conv(16, 16, 3, 2), C2f(48, 32)
        self.d4, self.m5 = Conv(32, 32, 3, 2), C2f(64, 32)
        self.detect = Detect((16, 32, 32))

    def forward(self, images):
        p3 = self.p3(self.stem(images))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        m4 = self.m4(torch.cat([self.d3(n3), n4], 1))
        m5 = self.m5(torch.cat([self.d4(m4), p5], 1))
        return self.detect([n3, m4, m5])


# A U-Net -----------------------------------------------------------------------------------------


def double(c1, c2):
    """Two convolutions with batch norm."""
    return nn.Sequential(
        nn.Conv2d(c1, c2, 3, padding=1, bias=False), nn.BatchNorm2d(c2), nn.ReLU(inplace=True),
        nn.Conv2d(c2, c2, 3, padding=1, bias=False), nn.BatchNorm2d(c2), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Down, up by transposed convolutions, and what was there on the way down."""

    def __init__(self, num_classes=3, width=8):
        super().__init__()
        self.down = nn.ModuleList([double(3, width), double(width, 2 * width)])
        self.middle = double(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * width, 2 * width, 2, 2),
                nn.ConvTranspose2d(2 * width, width, 2, 2),
            ]
        )
        self.join = nn.ModuleList([double(4 * width, 2 * width), double(2 * width, width)])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        kept = []
        x = images
        for down in self.down:
            x = down(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], 1))
        return OrderedDict(out=self.head(x), aux=x.mean((2, 3)))


# What denoises in diffusers: ResNet blocks, a time embedding, cross attention, skips -------------


def timestep_embedding(steps, width):
    """Sines and cosines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=steps.device) / half)
    angles = steps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ResnetBlock(nn.Module):
    """Two convolutions; the time is added between them."""

    def __init__(self, c1, c2, time, groups=4):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c1), nn.Conv2d(c1, c2, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, c2)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c2), nn.Conv2d(c2, c2, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c1, c2, 1) if c1 != c2 else None

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Of a sequence on itself, or on another."""

    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x, context=None):
        context = x if context is None else context
        b, inner = x.shape[0], self.to_k(context).shape[-1]
        head_dim = inner // self.heads
        q, k, v = (
            y.view(b, -1, self.heads, head_dim).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(b, -1, self.heads * head_dim)
        return self.to_out[1](self.to_out[0](y))


class GEGLU(nn.Module):
    """A gated projection."""

    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Transformer2D(nn.Module):
    """Self attention, cross attention and a feed-forward over the places of a map."""

    def __init__(self, width, context, heads=2, groups=4):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = nn.Sequential(GEGLU(width, 2 * width), nn.Linear(2 * width, width))

    def forward(self, x, context):
        b, c, h, w = x.shape
        y = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c))
        y = y + self.attn1(self.norm1(y))
        y = y + self.attn2(self.norm2(y), context)
        y = self.proj_out(y + self.ff(self.norm3(y)))
        return y.reshape(b, h, w, c).permute(0, 3, 1, 2) + x


class Denoiser(nn.Module):
    """A conditional U-Net."""

    def __init__(self, width=16, context=12):
        super().__init__()
        time = 4 * width
        self.width = width
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.time_embedding = nn.Sequential(
            nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time)
        )
        self.down1 = ResnetBlock(width, width, time)
        self.sample1 = nn.Conv2d(width, width, 3, 2, 1)
        self.down2 = ResnetBlock(width, 2 * width, time)
        self.attn2 = Transformer2D(2 * width, context)
        self.mid = ResnetBlock(2 * width, 2 * width, time)
        self.up2 = ResnetBlock(4 * width, 2 * width, time)
        self.attn_up = Transformer2D(2 * width, context)
        self.sample2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up1 = ResnetBlock(3 * width, width, time)
        self.norm_out, self.conv_out = nn.GroupNorm(4, width), nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states):
        time = self.time_embedding(timestep_embedding(timestep, self.width).to(sample))
        first = self.down1(self.conv_in(sample), time)
        second = self.attn2(self.down2(self.sample1(first), time), encoder_hidden_states)
        x = self.mid(second, time)
        x = self.attn_up(self.up2(torch.cat([x, second], 1), time), encoder_hidden_states)
        x = self.sample2(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.up1(torch.cat([x, first], 1), time)
        return self.conv_out(F.silu(self.norm_out(x)))


# Two towers --------------------------------------------------------------------------------------


class TwoTowers(nn.Module):
    """Embeds images and texts in one space."""

    def __init__(self, width=16):
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(12, width),
        )  # fmt: skip
        self.table = nn.Embedding(40, 12)
        self.text = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True), 2
        )
        self.project = nn.Linear(12, width)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, tokens):
        one = F.normalize(self.image(images), dim=-1)
        other = F.normalize(self.project(self.text(self.table(tokens)).mean(1)), dim=-1)
        return one, other, self.scale.exp() * one @ other.T
