"""One-operation models, as data: a layer that makes channels, an operation, a layer that reads.

Each says which groups must be found (their sizes) and whether the operation keeps zeros.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchvision.ops import deform_conv2d, roi_align, roi_pool


class Op(nn.Module):
    """A function of the module and the activations; numbers are attributes, as in real models."""

    def __init__(self, function: Callable[..., Tensor], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class Sandwich(nn.Module):
    """``last(op(first(x), second(x), ...))``."""

    def __init__(self, makers: list[nn.Module], op: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.makers = nn.ModuleList(makers)
        self.op = op
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(*(make(x) for make in self.makers)))


@dataclass(frozen=True)
class RuleCase:
    """A model around one operation.

    Attributes:
        name: What is tried.
        build: Makes the model.
        example: Makes its input.
        sizes: Sizes of the groups that must be found, exact ones.
        inexact: Sizes of the groups that must be found and flagged.
        keeps_zero: The operation gives zero where its input is zero.
        multiple: The operation runs for multiples of this only.
    """

    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    example: Callable[[], Tensor] = field(repr=False)
    sizes: tuple[int, ...] = ()
    inexact: tuple[int, ...] = ()
    keeps_zero: bool = True
    multiple: int = 1

    def __str__(self) -> str:
        return self.name


def tokens(
    name: str,
    function: Callable[..., Tensor],
    widths: int | tuple[int, ...],
    after: int,
    sizes: tuple[int, ...] = (),
    inexact: tuple[int, ...] = (),
    keeps_zero: bool = True,
    **attributes: Any,
) -> RuleCase:
    """Linear layers around an operation on (2, 4, width)."""
    makers = (widths,) if isinstance(widths, int) else widths
    return RuleCase(
        name,
        lambda: Sandwich(
            [nn.Linear(5, width) for width in makers],
            Op(function, **{k: v() if callable(v) else v for k, v in attributes.items()}),
            nn.Linear(after, 3),
        ),
        lambda: torch.randn(2, 4, 5),
        sizes,
        inexact,
        keeps_zero,
    )


def pictures(
    name: str,
    op: Callable[[], nn.Module] | Callable[..., Tensor],
    width: int,
    after: int,
    sizes: tuple[int, ...] = (),
    inexact: tuple[int, ...] = (),
    keeps_zero: bool = True,
    dims: int = 2,
    **attributes: Any,
) -> RuleCase:
    """Convolutions around an operation on (2, width, 8, 8)."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return RuleCase(
        name,
        lambda: Sandwich(
            [conv(2, width, 3, padding=1)],
            op() if isinstance(op, type | Built) else Op(op, **attributes),
            conv(after, 3, 1),
        ),
        lambda: torch.randn(2, 2, *[8] * dims),
        sizes,
        inexact,
        keeps_zero,
    )


class Built:
    """Makes a module when the case is built."""

    def __init__(self, module: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> None:
        self.make = lambda: module(*args, **kwargs)

    def __call__(self) -> nn.Module:
        return self.make()


class Experts(nn.Module):
    """Rows sorted by expert, each block multiplied with its expert's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.up = nn.Parameter(torch.randn(2, 8, 8))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([2, 6], dtype=torch.int32)
        return self.last(torch._grouped_mm(self.first(x), self.up, ends))


class Routed(nn.Module):
    """A router gives each row one of four experts, which are counted and multiplied in order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.gate = nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 8))
        self.last = nn.Linear(8, 3)
        self.experts = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        scores, chosen = self.gate(x).topk(1, -1)
        chosen, order = chosen.flatten().sort()
        counts = torch.histc(chosen.float(), self.experts, 0, self.experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        return self.last(torch._grouped_mm(x[order], self.up, ends) * scores[order])


HEADS = {"heads": 3, "dim": 4}

SHAPES = (
    tokens(
        "view", lambda m, x: x.view(2, 4, m.heads, m.dim).transpose(-1, -2).reshape(2, 4, -1),
        12, 12, (3, 4), **HEADS,
    ),
    tokens(
        "unflatten", lambda m, x: x.unflatten(-1, (m.heads, m.dim)).mT.flatten(-2),
        12, 12, (3, 4), **HEADS,
    ),
    tokens(
        "two views without a common refinement", lambda m, x: (
            x.view(2, 4, m.heads, -1).transpose(-1, -2).flatten(-2)
            + x.view(2, 4, m.dim, -1).transpose(-1, -2).flatten(-2)
        ), 12, 12, **HEADS,
    ),
    tokens("permute", lambda m, x: x.permute(2, 0, 1).permute(1, 2, 0), 6, 6, (6,)),
    tokens("squeeze", lambda m, x: x.unsqueeze(-1).unsqueeze(1).squeeze(-1).squeeze(1), 6, 6, (6,)),
    tokens("swapaxes", lambda m, x: x.swapaxes(0, 2).swapaxes(0, 2), 6, 6, (6,)),
    tokens("t", lambda m, x: x.reshape(8, -1).t().t().view(2, 4, -1), 6, 6, (6,)),
    tokens(
        "expand", lambda m, x: x.unsqueeze(-1).expand(-1, -1, -1, m.times).flatten(-2),
        6, 12, (2, 6), keeps_zero=False, times=2,  # a copy may go as well; nothing makes it
    ),
    tokens("repeat", lambda m, x: x.repeat(1, 1, 2), 6, 12, (6,)),
    tokens("repeat_interleave", lambda m, x: x.repeat_interleave(2, -1), 6, 12, (6,)),
    tokens(
        "repeat_interleave by an attribute", lambda m, x: x.repeat_interleave(m.times, dim=-1),
        6, 12, (2, 6), keeps_zero=False, times=2,
    ),
    tokens(
        "repeat_interleave of all elements",
        lambda m, x: x.repeat_interleave(m.times).view(2, 4, -1), 6, 12, (2, 6), keeps_zero=False,
        times=2,
    ),
    tokens(
        "a constant repeated for pairs",
        lambda m, x: x * torch.arange(3.0).repeat_interleave(2), 6, 6,
    ),
    tokens(
        "shared heads repeated",
        lambda m, x, y: (
            x * y.unflatten(-1, (m.shared, -1)).repeat_interleave(m.times, 2).flatten(2)
        ), (12, 6), 12, (2, 2, 3), keeps_zero=False, shared=2, times=2,
    ),
    tokens("cat", lambda m, x, y: torch.cat([x, y], -1), (6, 8), 14, (6, 8)),
    tokens("cat twice", lambda m, x, y: torch.cat([x, y, x], -1), (6, 8), 20, (6, 8)),
    tokens("cat along tokens", lambda m, x, y: torch.cat([x, y], 1), (6, 6), 6, (6,)),
    tokens("stack", lambda m, x, y: torch.stack([x, y], -1).flatten(-2), (6, 6), 12, (6,)),
    tokens("stack first", lambda m, x, y: torch.stack([x, y]).sum(0), (6, 6), 6, (6,)),
    tokens("chunk", lambda m, x: torch.mul(*x.chunk(2, -1)), 12, 6, (6,)),
    tokens("tensor_split", lambda m, x: torch.mul(*x.tensor_split(2, -1)), 12, 6, (6,)),
    tokens("unsafe_chunk", lambda m, x: torch.mul(*x.unsafe_chunk(2, -1)), 12, 6, (6,)),
    tokens("split", lambda m, x: torch.mul(*x.split(m.half, -1)), 12, 6, (6,), half=6),
    tokens(
        "unsafe_split", lambda m, x: torch.mul(*torch.unsafe_split(x, m.half, -1)),
        12, 6, (6,), half=6,
    ),
    tokens("split_copy", lambda m, x: torch.mul(*torch.split_copy(x, 6, -1)), 12, 6),
    tokens(
        "split into sizes", lambda m, x: torch.cat([p.relu() for p in x.split(m.parts, -1)], -1),
        12, 12, (2, 4, 6), parts=[2, 4, 6],
    ),
    tokens("slice", lambda m, x: x[..., : m.k], 12, 8, (4, 8), k=8),
    tokens("slice from", lambda m, x: x[..., m.k :] * x[..., : m.k], 12, 6, (6,), k=6),
    tokens("narrow", lambda m, x: x.narrow(-1, 0, m.k), 12, 8, (4, 8), k=8),
    tokens("slice from the end", lambda m, x: x[..., -m.k :], 12, 8, (4, 8), k=8),
    tokens("strided slice", lambda m, x: x[..., ::2] * x[..., 1::2], 12, 6, (6,)),
    tokens("every third token", lambda m, x: x[:, ::3].repeat(1, 2, 1), 6, 6, (6,)),
    tokens("every fourth channel", lambda m, x: x[..., ::4], 6, 2),
    tokens(
        "rows split inside a sample",
        lambda m, x: torch.cat(x.flatten(0, 1).split([3, 5])[::-1]).view(2, 4, -1), 6, 6, (6,),
    ),
    tokens(
        "channels split inside a block", lambda m, x: torch.cat(
            x.view(2, 4, m.heads, m.dim).mT.flatten(2).split(m.parts, -1)[::-1], -1
        ), 12, 12, parts=[5, 7], **HEADS,
    ),
    tokens(
        "rows regrouped across samples",
        lambda m, x: F.pad(x, (0, 0, 0, 2)).reshape(3, 4, -1).reshape(2, 6, -1)[:, :4], 6, 6, (6,),
    ),
    pictures(
        "padded windows", lambda m, x: F.pad(x, (0, 1, 0, 1)).permute(0, 2, 3, 1).reshape(
            2, 3, 3, 3, 3, -1
        ).mean((2, 4)).permute(0, 3, 1, 2), 6, 6, (6,),
    ),
    tokens("literal slice", lambda m, x: x[..., :8], 12, 8),
    tokens("literal view", lambda m, x: x.view(2, 4, 3, 4).mT.flatten(-2), 12, 12),
    tokens(
        "select", lambda m, x: x.view(2, 4, m.heads, m.dim)[:, :, 0], 12, 4, (4,), **HEADS
    ),
    tokens(
        "unbind", lambda m, x: torch.mul(*x.unflatten(-1, (m.two, -1)).unbind(-2)),
        12, 6, (6,), two=2,
    ),
    tokens("pad", lambda m, x: F.pad(x, (1, 2)), 6, 9, (6,)),
    tokens("pad tokens", lambda m, x: F.pad(x, (0, 0, 1, 0)), 6, 6, (6,)),
    tokens("traced pad", lambda m, x: F.pad(x, (m.left, m.right)), 6, 9, (6,), left=1, right=2),
    tokens("negative pad", lambda m, x: F.pad(x, (0, -2)), 6, 4),
    tokens("roll", lambda m, x: x.roll(1, -1), 6, 6),
    tokens("roll tokens", lambda m, x: x.roll((1,), (1,)), 6, 6, (6,)),
    tokens("flip", lambda m, x: x.flip(-1), 6, 6),
    tokens("flip tokens", lambda m, x: x.flip(1), 6, 6, (6,)),
    tokens("as_strided", lambda m, x: x.as_strided((2, 4, 6), (24, 6, 1)), 6, 6),
    tokens(
        "einops style shuffle",
        lambda m, x: x.view(2, 4, m.groups, -1).transpose(2, 3).reshape(2, 4, -1),
        12, 12, (3, 4), groups=3,
    ),
)  # fmt: skip

LOOKUPS = (
    tokens(
        "zeros beside", lambda m, x: torch.cat([x, torch.zeros(2, 4, m.extra)], -1),
        6, 9, (3, 6), extra=3,
    ),
    tokens("zeros of its size", lambda m, x: x + torch.zeros(x.shape), 6, 6, (6,)),
    tokens("ones of its size", lambda m, x: x * x.new_ones(x.size(-1)), 6, 6, (6,)),
    tokens("full of its size", lambda m, x: x * torch.full((x.size(-1),), 2.0), 6, 6, (6,)),
    tokens("new_full", lambda m, x: x * x.new_full((x.size(-1),), 2.0), 6, 6, (6,)),
    tokens("new_zeros", lambda m, x: x + x.new_zeros(x.shape), 6, 6, (6,)),
    tokens("empty", lambda m, x: x + torch.empty(x.shape).zero_(), 6, 6, (6,)),
    tokens("new_empty", lambda m, x: x + x.new_empty(x.shape).fill_(0), 6, 6, (6,)),
    tokens("random numbers", lambda m, x: x * (torch.rand(x.shape) > -1), 6, 6, (6,)),
    tokens("normal numbers", lambda m, x: x * (torch.randn(6) < 99), 6, 6),
    tokens("zeros_like", lambda m, x: torch.cat([x, torch.zeros_like(x)], -1), 6, 12, (6,)),
    tokens("a constant of fixed size", lambda m, x: x * torch.ones(6), 6, 6),
    tokens("arange", lambda m, x: x * torch.arange(x.shape[-1]), 6, 6),
    tokens("arange tokens", lambda m, x: x * torch.arange(x.shape[1])[:, None], 6, 6, (6,)),
    tokens("linspace", lambda m, x: x * torch.linspace(0, 1, x.shape[-1]), 6, 6),
    tokens("eye", lambda m, x: x @ torch.eye(x.shape[-1]), 6, 6),
    tokens("scalar", lambda m, x: x * torch.tensor(2.0) * torch.scalar_tensor(3.0), 6, 6, (6,)),
    tokens(
        "rows by number", lambda m, x: F.embedding(torch.tensor([0, 2]), x.flatten(0, 1)),
        6, 6, (6,),
    ),
    tokens("index tokens", lambda m, x: x[:, torch.tensor([0, 2, 1])], 6, 6, (6,)),
    tokens("index channels", lambda m, x: x[..., torch.tensor([1, 0, 3, 2])], 6, 4),
    tokens("mask tokens", lambda m, x: x[torch.ones(2, 4, dtype=torch.bool)], 6, 6, (6,)),
    tokens("index_select", lambda m, x: x.index_select(1, torch.tensor([0, 2])), 6, 6, (6,)),
    tokens(
        "gather", lambda m, x: x.gather(1, torch.zeros(2, 1, 1).long().expand(-1, -1, x.shape[-1])),
        6, 6, (6,),
    ),
    tokens("take_along_dim", lambda m, x: x.take_along_dim(torch.zeros(2, 4, 1).long(), 2), 6, 1),
    tokens(
        "scatter", lambda m, x: torch.zeros_like(x).scatter(1, torch.zeros_like(x).long(), x),
        6, 6, (6,),
    ),
    tokens(
        "scatter_add",
        lambda m, x: torch.zeros_like(x).scatter_add(1, torch.zeros_like(x).long(), x), 6, 6, (6,),
    ),
    tokens(
        "index_add", lambda m, x: torch.zeros_like(x).index_add(1, torch.tensor([0, 0, 1, 1]), x),
        6, 6, (6,),
    ),
    tokens(
        "index_add of another", lambda m, x, y: x.index_add(1, torch.tensor([0, 0, 1, 1]), y),
        (6, 6), 6, (6,),
    ),
    tokens(
        "scatter_add of another", lambda m, x, y: x.scatter_add(1, torch.zeros_like(y).long(), y),
        (6, 6), 6, (6,),
    ),
    tokens(
        "index_copy", lambda m, x: torch.zeros_like(x).index_copy(1, torch.arange(4).flip(0), x),
        6, 6, (6,),
    ),
    tokens("index_fill", lambda m, x: x.index_fill(1, torch.tensor([1]), 0.0), 6, 6, (6,)),
    tokens(
        "index_put", lambda m, x, y: _put(x.clone(), torch.tensor([0, 2]), y[:, :2]),
        (6, 6), 6, (6,),
    ),
    tokens("in place", lambda m, x, y: x.clone().add_(y).mul_(2).relu_(), (6, 6), 6, (6,)),
    tokens(
        "written slice", lambda m, x, y: _write(torch.zeros(2, 8, x.shape[-1]), x, y),
        (6, 6), 6, (6,),
    ),
    tokens("whole random numbers", lambda m, x: x * torch.randint(1, 2, (4, 1)), 6, 6, (6,)),
    tokens("permuted tokens", lambda m, x: x[:, torch.randperm(1)], 6, 6, (6,)),
    tokens(
        "empty_strided", lambda m, x: torch.empty_strided((2, 4, 6), (24, 6, 1)).zero_() + x, 6, 6
    ),
    tokens("random", lambda m, x: x * torch.rand(4, 1).mul(0).add(1), 6, 6, (6,)),
)  # fmt: skip


def _put(tensor: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    tensor[:, rows] = values
    return tensor


def _write(tensor: Tensor, one: Tensor, two: Tensor) -> Tensor:
    tensor[:, :4] = one
    tensor[:, 4:] = two
    return tensor


REDUCTIONS = (
    *(
        tokens(f"{name} of tokens", lambda m, x, name=name: getattr(x, name)(1), 6, 6, (6,))
        for name in ("mean", "sum", "amax", "amin", "prod", "cumsum")
    ),
    *(
        tokens(
            f"{name} of channels", lambda m, x, name=name: x * getattr(x, name)(-1, True), 6, 6, (),
            (6,),
        )
        for name in ("mean", "sum", "amax", "amin")
    ),
    tokens("max of tokens", lambda m, x: x.max(1).values, 6, 6, (6,)),
    tokens(
        "largest of whole numbers",
        lambda m, x: x * torch.tensor([40, 30]).max() * torch.tensor([[40, 30]]).max(1).values,
        6, 6, (6,),
    ),
    tokens("min of tokens", lambda m, x: x.min(1).values, 6, 6, (6,)),
    tokens("larger of two", lambda m, x, y: torch.max(x, y), (6, 6), 6, (6,)),
    tokens("median of tokens", lambda m, x: x.median(1).values, 6, 6, (6,)),
    tokens(
        "all and any", lambda m, x: x * (x > 9).any(1, True) + x * (x < 9).all(1, True), 6, 6, (6,)
    ),
    tokens(
        "places in a longer table", lambda m, x: m.table[x.argmax(-1)], 6, 5, (5,),
        table=lambda: nn.Parameter(torch.randn(10, 5)),
    ),
    tokens("argmax", lambda m, x: x * x.argmax(1, True).clamp(1, 1), 6, 6, (6,)),
    tokens("argmin", lambda m, x: x * x.argmin(1, True).clamp(1, 1), 6, 6, (6,)),
    tokens("var of tokens", lambda m, x: x.var(1), 6, 6, (6,)),
    tokens("std of tokens", lambda m, x: x.std(1), 6, 6, (6,)),
    tokens(
        "var_mean of channels", lambda m, x: x - torch.var_mean(x, -1, keepdim=True)[1],
        6, 6, (), (6,),
    ),
    tokens(
        "std_mean of channels", lambda m, x: x - torch.std_mean(x, -1, keepdim=True)[1],
        6, 6, (), (6,),
    ),
    tokens("logsumexp of tokens", lambda m, x: x.logsumexp(1), 6, 6, (6,), keeps_zero=False),
    tokens("norm of channels", lambda m, x: x / x.norm(dim=-1, keepdim=True), 6, 6, (), (6,)),
    tokens("normalize", lambda m, x: F.normalize(x, dim=-1), 6, 6, (), (6,)),
    tokens("rms by hand", lambda m, x: x * x.pow(2).mean(-1, True).rsqrt(), 6, 6, (), (6,)),
    tokens("softmax of tokens", lambda m, x: x.softmax(1), 6, 6, (6,), keeps_zero=False),
    tokens("softmax of channels", lambda m, x: x.softmax(-1), 6, 6, (), (6,)),
    tokens("log_softmax of channels", lambda m, x: x.log_softmax(-1), 6, 6, (), (6,)),
    tokens("cumsum of channels", lambda m, x: x.cumsum(-1), 6, 6, (), (6,)),
    tokens("cumprod of tokens", lambda m, x: x.cumprod(1), 6, 6, (6,)),
    tokens("logcumsumexp of tokens", lambda m, x: x.logcumsumexp(1), 6, 6, (6,), keeps_zero=False),
    tokens("cummax", lambda m, x: x.cummax(1).values, 6, 6, (6,)),
    tokens("cummin of channels", lambda m, x: x.cummin(-1).values, 6, 6),
    tokens("topk of tokens", lambda m, x: x.topk(2, 1).values, 6, 6, (6,)),
    tokens("topk of channels", lambda m, x: x.topk(2, -1).values, 6, 2, (), (6,)),
    tokens("places of the topk", lambda m, x: x * x.topk(1, -1).indices.clamp(1, 1), 6, 6),
    tokens("sort of tokens", lambda m, x: x.sort(1).values, 6, 6, (6,)),
    tokens("sort of channels", lambda m, x: x.sort(-1).values, 6, 6),
    tokens("argsort", lambda m, x: x * x.argsort(1).clamp(1, 1), 6, 6, (6,)),
    tokens("kthvalue", lambda m, x: x.kthvalue(2, 1).values, 6, 6, (6,)),
    tokens("tril", lambda m, x: x.tril(), 6, 6),
    tokens("triu of a product", lambda m, x: (x @ x.mT).triu() @ x, 6, 6, (6,)),
    tokens("glu", lambda m, x: F.glu(x, -1), 12, 6, (6,)),
    tokens("layer norm", lambda m, x: m.norm(x), 6, 6, (), (6,), norm=lambda: nn.LayerNorm(6)),
    tokens("rms norm", lambda m, x: m.norm(x), 6, 6, (), (6,), norm=lambda: nn.RMSNorm(6)),
    pictures("batch norm", Built(nn.BatchNorm2d, 6), 6, 6, (6,), keeps_zero=False),
    pictures(
        "batch norm of the batch", Built(nn.BatchNorm2d, 6, track_running_stats=False), 6, 6, (6,)
    ),
    pictures("instance norm", Built(nn.InstanceNorm2d, 6), 6, 6, (6,)),
    pictures("group norm", Built(nn.GroupNorm, 2, 6), 6, 6, (2,), (3,), keeps_zero=False),
    pictures("one group", Built(nn.GroupNorm, 1, 6), 6, 6, (), (6,), keeps_zero=False),
    pictures("a group each", Built(nn.GroupNorm, 6, 6), 6, 6, (6,), keeps_zero=False),
)  # fmt: skip

PRODUCTS = (
    tokens("mm", lambda m, x: (x.flatten(0, 1) @ m.weight).view(2, 4, -1), 6, 7, (6, 7),
           weight=lambda: nn.Parameter(torch.randn(6, 7))),
    tokens("addmm", lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight), 6, 7, (6, 7),
           weight=lambda: nn.Parameter(torch.randn(6, 7)),
           bias=lambda: nn.Parameter(torch.randn(7))),
    tokens("bmm", lambda m, x: x @ m.weight, 6, 7, (6, 7),
           weight=lambda: nn.Parameter(torch.randn(2, 6, 7))),
    tokens("baddbmm", lambda m, x: torch.baddbmm(m.bias, x, m.weight), 6, 7, (6, 7),
           weight=lambda: nn.Parameter(torch.randn(2, 6, 7)),
           bias=lambda: nn.Parameter(torch.randn(2, 1, 7))),
    tokens("mv", lambda m, x: (x.flatten(0, 1) @ m.weight).view(2, 4, 1), 6, 1, (6,),
           weight=lambda: nn.Parameter(torch.randn(6))),
    tokens("dot", lambda m, x: x * torch.dot(m.one, m.two), 6, 6, (6, 4),
           keeps_zero=False,
           one=lambda: nn.Parameter(torch.randn(4)), two=lambda: nn.Parameter(torch.randn(4))),
    tokens("addmv", lambda m, x: torch.addmv(m.bias, x[0], m.weight)[:, None], 6, 1, (6,),
           weight=lambda: nn.Parameter(torch.randn(6)), bias=lambda: nn.Parameter(torch.randn(4))),
    tokens("linear", lambda m, x: F.linear(x, m.weight, m.bias), 6, 7, (6, 7),
           weight=lambda: nn.Parameter(torch.randn(7, 6)),
           bias=lambda: nn.Parameter(torch.randn(7))),
    tokens("einsum", lambda m, x: torch.einsum("btc,ch->bth", x, m.weight), 6, 7, (6, 7),
           weight=lambda: nn.Parameter(torch.randn(6, 7))),
    tokens("two activations", lambda m, x, y: (x @ y.mT) @ y, (6, 6), 6, (6,)),
    RuleCase(
        "weight norm",
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 7)), nn.Linear(7, 3)
        ),
        lambda: torch.randn(2, 4, 5), (7,), (6,), keeps_zero=False,
    ),
    RuleCase("experts", Experts, lambda: torch.randn(6, 5), (8, 8), multiple=4),
    RuleCase("routed experts", Routed, lambda: torch.randn(6, 5), (8, 8), (4,), multiple=4),
    pictures("convolution", Built(nn.Conv2d, 6, 7, 3), 6, 7, (6, 7)),
    pictures("depthwise", Built(nn.Conv2d, 6, 6, 3, groups=6), 6, 6, (6,)),
    pictures("depthwise times two", Built(nn.Conv2d, 6, 12, 3, groups=6), 6, 12, (2, 6)),
    pictures("grouped", Built(nn.Conv2d, 6, 12, 3, groups=3), 6, 12, (2, 3, 4)),
    pictures("transposed", Built(nn.ConvTranspose2d, 6, 7, 2, stride=2), 6, 7, (6, 7)),
    pictures("transposed grouped", Built(nn.ConvTranspose2d, 6, 12, 2, groups=3), 6, 12, (2, 3, 4)),
    tokens(
        "a convolution over tokens, for each channel", lambda m, x: m.over(x), 6, 6, (6, 6),
        keeps_zero=False,
        over=lambda: nn.Sequential(nn.Conv1d(4, 6, 1), nn.Conv1d(6, 4, 1)),
    ),
    tokens(
        "a transposed convolution over tokens", lambda m, x: m.over(x), 6, 6, (6,),
        keeps_zero=False,
        over=lambda: nn.ConvTranspose1d(4, 4, 1),
    ),
    tokens(
        "a padded convolution over tokens", lambda m, x: m.over(x), 6, 8,
        over=lambda: nn.Conv1d(4, 4, 1, padding=1),
    ),
    pictures("convolution 1d", Built(nn.Conv1d, 6, 7, 3), 6, 7, (6, 7), dims=1),
    pictures("convolution 3d", Built(nn.Conv3d, 6, 7, 3), 6, 7, (6, 7), dims=3),
)  # fmt: skip

WINDOWS = (
    *(
        pictures(name, module, 6, 6, (6,))
        for name, module in (
            ("average pool", Built(nn.AvgPool2d, 2)),
            ("max pool", Built(nn.MaxPool2d, 2)),
            ("adaptive average pool", Built(nn.AdaptiveAvgPool2d, 3)),
            ("adaptive average pool to one", Built(nn.AdaptiveAvgPool2d, 1)),
            ("adaptive max pool", Built(nn.AdaptiveMaxPool2d, 3)),
            ("reflection pad", Built(nn.ReflectionPad2d, 1)),
            ("replication pad", Built(nn.ReplicationPad2d, 1)),
            ("zero pad", Built(nn.ZeroPad2d, 1)),
            ("upsample nearest", Built(nn.Upsample, scale_factor=2)),
            ("upsample bilinear", Built(nn.Upsample, scale_factor=2, mode="bilinear")),
            ("upsample bicubic", Built(nn.Upsample, scale_factor=2, mode="bicubic")),
        )
    ),
    *(
        pictures(name, module, 6, 6, (6,), dims=1)
        for name, module in (
            ("average pool 1d", Built(nn.AvgPool1d, 2)),
            ("max pool 1d", Built(nn.MaxPool1d, 2)),
            ("adaptive average pool 1d", Built(nn.AdaptiveAvgPool1d, 2)),
            ("reflection pad 1d", Built(nn.ReflectionPad1d, 1)),
            ("replication pad 1d", Built(nn.ReplicationPad1d, 1)),
            ("upsample nearest 1d", Built(nn.Upsample, scale_factor=2)),
            ("upsample linear 1d", Built(nn.Upsample, scale_factor=2, mode="linear")),
        )
    ),
    *(
        pictures(name, module, 6, 6, (6,), dims=3)
        for name, module in (
            ("average pool 3d", Built(nn.AvgPool3d, 2)),
            ("max pool 3d", Built(nn.MaxPool3d, 2)),
            ("adaptive average pool 3d", Built(nn.AdaptiveAvgPool3d, 2)),
            ("adaptive max pool 3d", Built(nn.AdaptiveMaxPool3d, 2)),
            ("reflection pad 3d", Built(nn.ReflectionPad3d, 1)),
            ("replication pad 3d", Built(nn.ReplicationPad3d, 1)),
            ("upsample nearest 3d", Built(nn.Upsample, scale_factor=2)),
            ("upsample trilinear", Built(nn.Upsample, scale_factor=2, mode="trilinear")),
        )
    ),
    pictures(
        "nearest exact 1d", lambda m, x: F.interpolate(x, 6, mode="nearest-exact"), 6, 6, (6,),
        dims=1,
    ),
    pictures(
        "nearest exact 3d", lambda m, x: F.interpolate(x, 6, mode="nearest-exact"), 6, 6, (6,),
        dims=3,
    ),
    pictures(
        "antialiased bilinear",
        lambda m, x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True), 6, 6, (6,),
    ),
    pictures(
        "antialiased bicubic",
        lambda m, x: F.interpolate(x, (5, 5), mode="bicubic", antialias=True), 6, 6, (6,),
    ),
    pictures(
        "nearest exact", lambda m, x: F.interpolate(x, (5, 5), mode="nearest-exact"), 6, 6, (6,)
    ),
    pictures(
        "grid sample",
        lambda m, x: F.grid_sample(x, m.places[None].expand(2, -1, -1, -1), align_corners=False),
        6, 6, (6,), places=nn.Parameter(torch.rand(5, 5, 2) - 0.5),
    ),
    pictures(
        "grid sample 3d",
        lambda m, x: F.grid_sample(
            x, m.places[None].expand(2, -1, -1, -1, -1), align_corners=False
        ),
        6, 6, (6,), dims=3, places=nn.Parameter(torch.rand(4, 4, 4, 3) - 0.5),
    ),
    pictures("pixel shuffle", Built(nn.PixelShuffle, 2), 12, 3, (3,)),
    pictures("pixel unshuffle", Built(nn.PixelUnshuffle, 2), 3, 12, (3,)),
    pictures(
        "unfold", lambda m, x: F.unfold(x, 3, padding=1).view(2, -1, 8, 8), 3, 27, (3,)
    ),
    pictures(
        "windows of each channel put together", lambda m, x: F.fold(
            F.unfold(x, 3, padding=1), (8, 8), 3, padding=1
        ), 6, 6, (6,),
    ),
    pictures(
        "windows along a dimension",
        lambda m, x: x.unfold(2, 3, 1).unfold(3, 4, 4).mean((-1, -2)), 6, 6, (6,),
    ),
    pictures("windows over channels", lambda m, x: x.unfold(1, 3, 3).sum(-1), 6, 2),
    pictures(
        "boxes", lambda m, x: roi_align(x, [torch.tensor([[0.0, 0, 4, 4]])] * len(x), (3, 3)), 6, 6,
        (6,),
    ),
    pictures(
        "largest of boxes",
        lambda m, x: roi_pool(x, [torch.tensor([[0.0, 0, 4, 4]])] * len(x), (3, 3)), 6, 6, (6,),
    ),
    pictures(
        "windows at learned places", lambda m, x: deform_conv2d(
            x, m.shifts.expand(2, -1, -1, -1), m.weight, m.bias, padding=1
        ), 6, 7, (6, 7), shifts=nn.Parameter(torch.rand(1, 18, 8, 8)),
        weight=nn.Parameter(torch.randn(7, 6, 3, 3)), bias=nn.Parameter(torch.randn(7)),
    ),
    pictures(
        "channel shuffle", Built(nn.ChannelShuffle, 3), 12, 12, (3, 4)
    ),
    pictures(
        "shuffle by hand",
        lambda m, x: x.view(2, m.groups, -1, 8, 8).transpose(1, 2).reshape(2, -1, 8, 8),
        12, 12, (3, 4), groups=3,
    ),
)  # fmt: skip


def _attend(m: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    q, k, v = (t.view(2, 4, -1, m.dim).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **more).transpose(1, 2).reshape(2, 4, -1)


def _attend_over_channels(m: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    q, k, v = (t.view(2, 4, -1, m.dim).permute(0, 2, 3, 1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=0.5, **more)
    return out.permute(0, 3, 1, 2).reshape(2, 4, -1)


def _windows(m: Any, x: Tensor) -> Tensor:
    """Overlapping windows of two tokens."""
    (batch, length, width), (sample, row, column) = x.shape, x.stride()
    return x.as_strided((batch, length - 1, 2, width), (sample, row, row, column)).sum(2)


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([x, 2 * x], -1))


class Recurrent(nn.Module):
    """An LSTM, of samples of their own lengths where these are given."""

    def __init__(self, lengths: Sequence[int] = (), **options: Any) -> None:
        super().__init__()
        self.memory = nn.LSTM(6, 8, batch_first=True, **options)
        self.lengths = lengths

    def forward(self, x: Tensor) -> Tensor:
        if not self.lengths:
            return self.memory(x)[0]
        packed = pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True)
        return pad_packed_sequence(self.memory(packed)[0], batch_first=True)[0]


def _place(m: Any, x: Tensor, y: Tensor, *, expanded: bool) -> Tensor:
    """Rows of another tensor in places of the first one, as pictures in a prompt."""
    mask = (torch.arange(8) % 2 == 0).view(2, 4, 1)
    rows = y.flatten(0, 1)[:4]
    if mask.sum() * x.shape[-1] != rows.numel():
        raise ValueError("another number of rows")
    if expanded:
        mask = mask.expand_as(x)
        if x[mask].numel() != rows.numel():
            raise ValueError("another number of elements")
    return x.masked_scatter(mask, rows)


def _fold(m: Any, x: Tensor) -> Tensor:
    """Half as many tokens that are twice as wide; the factor comes as a float."""
    batch, length, width = x.shape
    x = x.view(batch, int(length * m.share), int(width / m.share))
    return x.unflatten(-1, (-1, m.width)).flatten(1, 2)


REST = (
    tokens(
        "rows put in places", lambda m, x, y: _place(m, x, y, expanded=False), (6, 6), 6, (6,)
    ),
    tokens(
        "rows put in places that are marked one by one",
        lambda m, x, y: _place(m, x, y, expanded=True), (6, 6), 6, (6,),
    ),
    tokens(
        "rows picked by a mask",
        lambda m, x: x + x[(torch.arange(4) > 1).view(1, 4, 1).expand_as(x)].sum(), 6, 6, (),
        (6,),
    ),
    tokens("fewer and wider tokens", _fold, 6, 6, (6,), share=0.5, width=6),
    tokens(
        "a factor that is also a value",
        lambda m, x: x.view(2, 4 // m.factor, m.factor * x.shape[-1]).unflatten(
            -1, (m.factor, -1)
        ).flatten(1, 2) * (1 / m.factor), 6, 6, (6,), factor=2,
    ),
    tokens(
        "a width made plain", lambda m, x: x.reshape(-1, int(m.width)).view(2, 4, -1), 6, 6, (6,),
        width=6,
    ),
    tokens("places among borders", lambda m, x: x + torch.bucketize(x, m.at), 6, 6, (6,),
           keeps_zero=False, at=lambda: torch.tensor([0.0, 0.5])),
    tokens("places found among borders", lambda m, x: x + torch.searchsorted(m.at, x), 6, 6, (6,),
           keeps_zero=False, at=lambda: torch.tensor([0.0, 0.5])),
    tokens(
        "a slice that ends where a tensor says",
        lambda m, x: F.pad(x, (0, 0, 0, torch.tensor(2)))[:, : torch.tensor(4)], 6, 6, (6,),
    ),
    tokens("overlapping windows", _windows, 6, 6, (6,)),
    tokens(
        "rows gathered by number", lambda m, x: torch.zeros_like(x).scatter_reduce(
            1, torch.arange(4).div(2, rounding_mode="floor").view(1, 4, 1).expand_as(x), x, "sum"
        ), 6, 6, (6,),
    ),
    tokens(
        "bags of words", lambda m, x: x * m.words(torch.tensor([[0, 1], [2, 3]]))[:, None], 6, 6,
        (6,), words=lambda: nn.EmbeddingBag(5, 6),
    ),
    tokens(
        "bilinear", lambda m, x, y: m.pairs(x, y), (6, 8), 7, (6, 7, 8),
        pairs=lambda: nn.Bilinear(6, 8, 7),
    ),
    tokens(
        "distances to centres", lambda m, x: torch.cdist(x, m.centres), 6, 7, (7,), (6,),
        keeps_zero=False, centres=lambda: nn.Parameter(torch.randn(7, 6)),
    ),
    tokens(
        "distances to many centres", lambda m, x: torch.cdist(x, m.centres), 6, 30, (30,), (6,),
        keeps_zero=False, centres=lambda: nn.Parameter(torch.randn(30, 6)),
    ),
    tokens(
        "complex filters over frequencies",
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * m.filters, n=4, dim=1),
        6, 6, (6,), filters=lambda: nn.Parameter(torch.randn(3, 6, dtype=torch.cfloat)),
    ),
    tokens(
        "complex weights",
        lambda m, x: (torch.fft.fft(x, dim=1) @ m.mix).real,
        6, 8, (6, 8), mix=lambda: nn.Parameter(torch.randn(6, 8, dtype=torch.cfloat)),
    ),
    tokens(
        "complex frequencies of complex numbers",
        lambda m, x: torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real, 6, 6, (6,),
    ),
    tokens("pairs as complex", lambda m, x: torch.view_as_real(_as_complex(x))[..., 1], 6, 6, (6,)),
    RuleCase(
        "lstm", lambda: Sandwich([nn.Linear(5, 6)], Recurrent(), nn.Linear(8, 3)),
        lambda: torch.randn(2, 4, 5), (6, 8),
    ),
    RuleCase(
        "packed lstm",
        lambda: Sandwich([nn.Linear(5, 6)], Recurrent(lengths=(4, 2)), nn.Linear(8, 3)),
        lambda: torch.randn(2, 4, 5), (6, 8),
    ),
    RuleCase(
        "lstm in two directions",
        lambda: Sandwich(
            [nn.Linear(5, 6)], Recurrent(bidirectional=True, num_layers=2), nn.Linear(16, 3)
        ),
        lambda: torch.randn(2, 4, 5), (6, 8),
    ),
)  # fmt: skip

ATTENTIONS = (
    tokens("attention", _attend, (12, 12, 12), 12, (3, 4), (4,), keeps_zero=False, **HEADS),
    tokens(
        "attention with its own scale", lambda m, *qkv: _attend(m, *qkv, scale=0.5),
        (12, 12, 12), 12, (3, 4, 4), keeps_zero=False, **HEADS,
    ),
    tokens(
        "causal attention", lambda m, *qkv: _attend(m, *qkv, is_causal=True, scale=0.5),
        (12, 12, 12), 12, (3, 4, 4), keeps_zero=False, **HEADS,
    ),
    tokens(
        "grouped queries", lambda m, *qkv: _attend(m, *qkv, enable_gqa=True, scale=0.5),
        (24, 12, 12), 24, (2, 3, 4, 4), keeps_zero=False, **HEADS,
    ),
    tokens(
        "values of another width",
        lambda m, q, k, v: F.scaled_dot_product_attention(
            *(t.view(2, 4, m.heads, -1).transpose(1, 2) for t in (q, k, v)), scale=0.5
        ).transpose(1, 2).reshape(2, 4, -1),
        (12, 12, 15), 15, (3, 4, 5), keeps_zero=False, **HEADS,
    ),
    tokens(
        "attention over channels", _attend_over_channels, (12, 12, 12), 12, (3, 4), (4,),
        keeps_zero=False, **HEADS,
    ),
    tokens(
        "causal attention over channels",
        lambda m, *qkv: _attend_over_channels(m, *qkv, is_causal=True), (12, 12, 12), 12, (3,),
        keeps_zero=False, **HEADS,
    ),
    tokens(
        "attention by hand",
        lambda m, q, k, v: _plain(
            *(t.view(2, 4, m.heads, m.dim).transpose(1, 2) for t in (q, k, v))
        ),
        (12, 12, 12), 12, (3, 4, 4), keeps_zero=False, **HEADS,
    ),
)  # fmt: skip


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


ELEMENTWISE = tuple(
    tokens(name, lambda m, x, f=f: f(x), 6, 6, (6,), keeps_zero=zero)
    for name, f, zero in (
        ("relu", torch.relu, True),
        ("gelu", F.gelu, True),
        ("silu", F.silu, True),
        ("hardswish", F.hardswish, True),
        ("hardsigmoid", F.hardsigmoid, False),
        ("hardtanh", F.hardtanh, True),
        ("relu6", F.relu6, True),
        ("leaky relu", F.leaky_relu, True),
        ("elu", F.elu, True),
        ("softplus", F.softplus, False),
        ("mish", F.mish, True),
        ("sigmoid", torch.sigmoid, False),
        ("logsigmoid", F.logsigmoid, False),
        ("tanh", torch.tanh, True),
        ("exp", torch.exp, False),
        ("clamp", lambda x: x.clamp(-1, 1), True),
        ("where", lambda x: torch.where(x > 0, x, 0.1 * x), True),
        ("masked_fill", lambda x: x.masked_fill(x > 1, 0.0), True),
        ("to double", lambda x: x.double().float(), True),
        ("dropout", lambda x: F.dropout(x, training=False), True),
        ("clone and detach", lambda x: x.clone().detach().contiguous(), True),
        ("floor_divide", lambda x: x.floor_divide(0.3), True),
        ("prelu", lambda x: F.prelu(x, torch.tensor([0.2])), True),
    )
)

CASES = (
    *SHAPES, *LOOKUPS, *REDUCTIONS, *PRODUCTS, *WINDOWS, *ATTENTIONS, *REST, *ELEMENTWISE,
)  # fmt: skip
