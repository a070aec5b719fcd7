"""Models that try to fool the engine. Each is cut right, or left whole, or refused; never wrong.

``cut``: groups are found, the cut equals the dense model with gates. ``whole``: what would go wrong
is pinned. ``refused``: a cut is tried, and verification stops it.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sosp_hub.errors import VerificationError
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.compare import assert_close
from tests.structure.oracles import fill, gated, half, ragged, run


class Between(nn.Module):
    """Linear 5 -> width, something adversarial, Linear after -> 3, on (2, 4, 5)."""

    width = 12
    after = 12

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, self.width)
        self.last = nn.Linear(self.after, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.trick(self.first(x)))


# --- literals ---


class LiteralView(Between):
    def trick(self, x):
        return x.view(2, 4, 3, 4).transpose(2, 3).flatten(2)


class LiteralSlice(Between):
    after = 8

    def trick(self, x):
        return x[..., :8]


class LiteralFromEnd(Between):
    after = 8

    def trick(self, x):
        return x[..., -8:]


class LiteralSplit(Between):
    after = 6

    def trick(self, x):
        one, two = x.split(6, -1)
        return one * two


class LiteralNegativePad(Between):
    after = 10

    def trick(self, x):
        return F.pad(x, (0, -2))


class LengthOfList(Between):
    """``len`` gives a number that remembers nothing."""

    def trick(self, x):
        return x.reshape(-1, len(x[0, 0])).view(2, 4, -1)


class PlainConfig(Between):
    """Numbers in an object the engine does not know."""

    def __init__(self):
        super().__init__()
        self.config = {"heads": 3, "dim": 4}

    def trick(self, x):
        return x.view(2, 4, self.config["heads"], self.config["dim"]).transpose(2, 3).flatten(2)


# --- sizes as values ---


class RootOfSize(Between):
    def trick(self, x):
        return x / math.sqrt(x.shape[-1])


class RootByNumpy(Between):
    """As in Reformer."""

    def trick(self, x):
        return x / np.sqrt(x.shape[-1])


class SizeOverTensor(Between):
    """As SigLIP 2 scales its positions, by a size of its table."""

    def trick(self, x):
        return x * (x.shape[-1] / torch.tensor([[1.0], [2.0], [4.0], [8.0]]))


class FloatOverSize(Between):
    """Python never asks the int on the right of a float."""

    def trick(self, x):
        return x * (1.0 / x.shape[-1])


class TimesSize(Between):
    def trick(self, x):
        return x * x.shape[-1]


class TimesAttribute(Between):
    def __init__(self):
        super().__init__()
        self.number = 12

    def trick(self, x):
        return x * self.number


class TensorOfSize(Between):
    def trick(self, x):
        return x / torch.tensor(x.shape[-1])


class MeanByHand(Between):
    def trick(self, x):
        return x - x.sum(-1, keepdim=True) / x.shape[-1]


class NumberOfElements(Between):
    def trick(self, x):
        return x * (x.numel() / 1000)


class Positions(Between):
    def trick(self, x):
        return x + torch.arange(x.shape[-1])


class ScaleFromConstructor(Between):
    """A float that was computed once stays what it was, as in the masked model."""

    def __init__(self):
        super().__init__()
        self.scale = self.width**-0.5

    def trick(self, x):
        return x * self.scale


# --- branches ---


class BranchOnValues(Between):
    def trick(self, x):
        return x * 2 if x.sum() > -1e9 else x[..., :6]


class BranchOnSize(Between):
    def trick(self, x):
        return x * 2 if x.shape[-1] > 8 else x


class GrowsByItsWidths(Between):
    """Nothing but the comparison uses the width before, so no cut changes it."""

    def __init__(self):
        super().__init__()
        self.before, self.now = 6, 12

    def trick(self, x):
        x = x.view(2, -1, self.now)
        return torch.relu(x) if self.before != self.now else x


class ChecksItsSize(Between):
    def __init__(self):
        super().__init__()
        self.expected = 12

    def trick(self, x):
        if x.shape[-1] != self.expected:
            raise ValueError("another width")
        return x


class AnotherLayout(Between):
    """A product without bias takes one of two paths by the memory layout of what it is given."""

    after = 8

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(12, 8, bias=False)

    def trick(self, x):
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        return self.middle(turned * 2)


class LoopOverHeads(Between):
    def __init__(self):
        super().__init__()
        self.heads = 3

    def trick(self, x):
        pieces = x.view(2, 4, self.heads, -1)
        return torch.cat([pieces[:, :, i] * (i + 1) for i in range(self.heads)], -1)


class CopiesForHeads(Between):
    """Weights are given back once for each head, and nobody takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3

    def trick(self, x):
        x = x.view(2, 4, self.heads, -1)
        self.use(x.new_ones(2, 4, 1).expand(2, 4, self.heads))
        return x.flatten(2)

    def use(self, copies):
        return copies.relu()


class AsLongAsOneChannel(Between):
    """As BART's encoder asks how many tokens there are."""

    def trick(self, x):
        length = x[:, :, -1].shape[1]
        return x * torch.arange(1, length + 1).view(1, length, 1)


class ElementForItsLikes(Between):
    """Masks of the size of an element are made without a look at it (UDOP)."""

    def trick(self, x):
        twice, nothing = torch.full_like(x[:, :, 0], 2.0), torch.zeros_like(x[:, :, -1])
        return x * twice.unsqueeze(-1) + nothing.unsqueeze(-1)


class OneChannel(Between):
    def trick(self, x):
        return x * x[:, :, -1].unsqueeze(-1)


class FourthChannel(Between):
    def trick(self, x):
        return x * x[:, :, 3].unsqueeze(-1)


class OneChannelInPython(Between):
    def trick(self, x):
        return x * max(x[0, 0, -1].tolist(), 1.0)


class RowsByRepeatedNumbers(Between):
    """As masked autoencoders and detectors pick tokens."""

    def trick(self, x):
        order = torch.tensor([[3, 0, 1, 2], [1, 0, 3, 2]])
        return torch.gather(x, 1, order.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


class RepeatedByALiteral(Between):
    def trick(self, x):
        return x * x.new_ones(1).repeat(12)


class SumOfCopies(CopiesForHeads):
    """As many ones as heads, summed: the number of heads as a value."""

    def trick(self, x):
        x = x.view(2, 4, self.heads, -1)
        return x.flatten(2) * x.new_ones(2, 4, 1).expand(2, 4, self.heads).sum(-1, keepdim=True)


class LoopOverChunks(Between):
    def __init__(self):
        super().__init__()
        self.heads = 3

    def trick(self, x):
        return torch.cat([piece.softmax(1) for piece in x.chunk(self.heads, -1)], -1)


# --- state ---


class CachesATensor(Between):
    """Built in the first pass, kept for later ones."""

    def __init__(self):
        super().__init__()
        self.cache = None

    def trick(self, x):
        if self.cache is None:
            self.cache = torch.ones(x.shape[-1])
        return x * self.cache


class CachesByKey(Between):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def trick(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = self.first.bias * 2
        return x + self.cache["bias"]


class FullCache(CachesATensor):
    """The cache is already there when the model is traced."""

    def __init__(self):
        super().__init__()
        self.cache = torch.rand(12)


class Counts(Between):
    def __init__(self):
        super().__init__()
        self.passes = 0

    def trick(self, x):
        self.passes += 1
        return x


class PlainTensor(Between):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.rand(12)

    def trick(self, x):
        return x * self.scale


class Buffer(Between):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(12))

    def trick(self, x):
        return x * self.scale


class IntBuffer(Between):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.randperm(12))

    def trick(self, x):
        return x[..., self.order]


# --- sharing ---


class SharedModule(Between):
    """One square layer twice: what it reads and what it makes are one."""

    def __init__(self):
        super().__init__()
        self.square = nn.Linear(12, 12)

    def trick(self, x):
        return self.square(self.square(x).relu())


class SharedInTwoPlaces(Between):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(5, 12)
        self.norm = nn.Linear(12, 12)

    def forward(self, x):
        return self.last(self.norm(self.first(x)) * self.norm(self.other(x)))


class TwoNames(Between):
    """The same layer under two names."""

    def __init__(self):
        super().__init__()
        self.alias = self.first

    def forward(self, x):
        return self.last(self.first(x) + self.alias(x.flip(1)))


class TiedTransposed(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 12)

    def forward(self, x):
        return F.linear(self.first(x).relu(), self.first.weight.t())


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.head = nn.Linear(12, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


class Normed(Between):
    """A parametrised weight (weight norm): its length runs over what the layer reads."""

    def __init__(self):
        super().__init__()
        self.middle = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))

    def trick(self, x):
        return self.middle(x).relu()


# --- rearrangements ---


class ChannelShuffle(Between):
    def __init__(self):
        super().__init__()
        self.groups = 3

    def trick(self, x):
        batch, tokens, width = x.shape
        x = x.view(batch, tokens, self.groups, width // self.groups)
        return x.transpose(2, 3).reshape(batch, tokens, width)


class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 12, 1), nn.Conv2d(3, 3, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        return self.last(self.shuffle(self.first(x)))


class FlattenedPicture(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 1), nn.Linear(6 * 9, 3)

    def forward(self, x):
        return self.last(self.first(x).relu().view(x.size(0), -1))


class WritesInPlace(Between):
    def trick(self, x):
        x = x.clone()
        x[..., ::2] *= 2
        x += 1
        return x.relu_()


class WritesHalf(Between):
    """Partial channels, as PConv does it: the border is a literal of the constructor."""

    def __init__(self):
        super().__init__()
        self.part = 4
        self.mix = nn.Linear(4, 4)

    def trick(self, x):
        x = x.clone()
        x[..., : self.part] = self.mix(x[..., : self.part])
        return x


class WritesIntoAnother(Between):
    def trick(self, x):
        out = torch.empty_like(x)
        out[:, :2] = x[:, 2:]
        out[:, 2:].copy_(x[:, :2])
        return out


class RowsByMask(Between):
    """Learned rows are put where a mask says, as those of KOSMOS-2's picture are."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 12))

    def trick(self, x):
        x, mask = x.clone(), torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[0, :3] = True
        x[mask] = self.rows.tanh()
        return x


class InterleavedRotation(Between):
    def trick(self, x):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * 0.8 + turned * 0.6


class HalvedRotation(Between):
    def trick(self, x):
        half_width = x.shape[-1] // 2
        return x * 0.8 + torch.cat((-x[..., half_width:], x[..., :half_width]), -1) * 0.6


class ProductWithItself(Between):
    """Of 144 features each has two positions of one axis; no list of positions says what goes."""

    after = 144

    def trick(self, x):
        return (x[..., None] * x[..., None, :]).flatten(2)


class TwoViewsThatDisagree(Between):
    def __init__(self):
        super().__init__()
        self.three, self.four = 3, 4

    def trick(self, x):
        one = x.view(2, 4, self.three, self.four).transpose(2, 3).flatten(2)
        two = x.view(2, 4, self.four, self.three).transpose(2, 3).flatten(2)
        return one + two


# --- torch's own blocks ---


class Attends(Between):
    """``nn.MultiheadAttention`` with a projection inside it."""

    need_weights = False

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def trick(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class AttendsWithWeights(Attends):
    need_weights = True


class SharesItsWidth(Between):
    """Heads are parts of its width, and it computes with how wide they come out."""

    def __init__(self):
        super().__init__()
        self.heads = 3

    def trick(self, x):
        b, n, width = x.shape
        h = x.reshape(b, n, self.heads, width // self.heads) * (width // self.heads) ** -0.5
        return h.softmax(1).reshape(b, n, width)


class OneVector(Between):
    """A linear layer of one vector, whose result torch squeezes in place (Pocket TTS)."""

    def __init__(self):
        super().__init__()
        self.vector, self.layer = nn.Parameter(torch.randn(7)), nn.Linear(7, 12, bias=False)

    def trick(self, x):
        return torch.where(torch.arange(4)[:, None] > 2, self.layer(self.vector), x)


class AddsAndTakesDimensions(Between):
    def trick(self, x):
        x = x.tanh().unsqueeze_(-1).unsqueeze_(0)
        return x.relu().squeeze_(-1).squeeze_(0)


class SharesTwoPieces(Between):
    """Two tables side by side are added to its width, as rows and columns are in Florence-2."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.rows, self.columns = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def trick(self, x):
        x = x + torch.cat([self.rows, self.columns])
        b, n, width = x.shape
        return x.reshape(b, n, self.heads, width // self.heads).softmax(1).reshape(b, n, width)


class TimesAShare(SharesItsWidth):
    def trick(self, x):
        return x * (x.shape[-1] // self.heads)


class AttendsWithBias(Between):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, add_bias_kv=True, add_zero_attn=True)

    def trick(self, x):
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)


class AttendsAcross(Between):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, kdim=5, vdim=5, batch_first=True)

    def forward(self, x):
        return self.last(self.attention(self.first(x), x, x)[0])


class EncoderLayer(Between):
    """Has a fast path of its own in eval mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)

    def trick(self, x):
        return self.layer(x)


class Remembers(Between):
    after = 8

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(12, 8, batch_first=True)

    def trick(self, x):
        return self.memory(x)[0]


class RemembersBothWays(Between):
    after = 16

    def __init__(self):
        super().__init__()
        self.memory = nn.GRU(12, 8, 2, batch_first=True, bidirectional=True)

    def trick(self, x):
        return self.memory(x)[0]


class Spectrum(Between):
    def trick(self, x):
        return torch.fft.irfft(torch.fft.rfft(x, dim=1), n=4, dim=1)


class Checkpointed(Between):
    def trick(self, x):
        return torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=False)


class Mapped(Between):
    def trick(self, x):
        return torch.vmap(torch.relu)(x)


class ReturnsFeatures(Between):
    """The hidden layer is an output as well."""

    def forward(self, x):
        hidden = self.first(x)
        return {"logits": self.last(hidden), "features": [hidden]}


# --- the table ---


def tokens() -> Tensor:
    return torch.randn(2, 4, 5)


@dataclass(frozen=True)
class Trick:
    model: type[nn.Module]
    outcome: str
    sizes: tuple[int, ...] = ()
    inputs: Any = field(default=tokens, repr=False)

    def __str__(self):
        return self.model.__name__


TRICKS = (
    Trick(LiteralView, "whole"),
    Trick(LiteralSlice, "whole"),
    Trick(LiteralFromEnd, "whole"),
    Trick(LiteralSplit, "whole"),
    Trick(LiteralNegativePad, "whole"),
    Trick(LengthOfList, "whole"),
    Trick(PlainConfig, "whole"),
    Trick(RootOfSize, "whole"),
    Trick(RootByNumpy, "whole"),
    Trick(SizeOverTensor, "whole"),
    Trick(FloatOverSize, "refused", (12,)),
    Trick(TimesSize, "whole"),
    Trick(TimesAttribute, "cut", (12,)),
    Trick(TensorOfSize, "whole"),
    Trick(MeanByHand, "whole"),
    Trick(NumberOfElements, "whole"),
    Trick(Positions, "whole"),
    Trick(ScaleFromConstructor, "cut", (12,)),
    Trick(BranchOnValues, "whole", (12,)),
    Trick(BranchOnSize, "cut", (12,)),
    Trick(GrowsByItsWidths, "cut", (12,)),
    Trick(ChecksItsSize, "cut", (12,)),
    Trick(AnotherLayout, "cut", (8, 12)),
    Trick(LoopOverHeads, "cut", (4,)),
    Trick(CopiesForHeads, "cut", (3, 4)),
    Trick(ElementForItsLikes, "cut", (12,)),
    Trick(AsLongAsOneChannel, "cut", (12,)),
    Trick(OneChannel, "whole"),
    Trick(FourthChannel, "whole"),
    Trick(OneChannelInPython, "whole"),
    Trick(RowsByRepeatedNumbers, "cut", (12,)),
    Trick(RepeatedByALiteral, "whole"),
    Trick(SumOfCopies, "cut", (3, 4)),  # the heads are no exact group
    Trick(LoopOverChunks, "cut", (4, 4, 4)),
    Trick(CachesATensor, "cut", (12,)),
    Trick(CachesByKey, "cut", (12,)),
    Trick(FullCache, "whole"),
    Trick(Counts, "cut", (12,)),
    Trick(PlainTensor, "whole"),
    Trick(Buffer, "cut", (12,)),
    Trick(IntBuffer, "whole"),
    Trick(SharedModule, "cut", (12,)),
    Trick(SharedInTwoPlaces, "cut", (12, 12)),
    Trick(TwoNames, "cut", (12,)),
    Trick(TiedTransposed, "cut", (12,)),
    Trick(TiedEmbedding, "cut", (12,), lambda: torch.tensor([[1, 2, 3], [4, 5, 6]])),
    Trick(Normed, "cut", (12, 12)),
    Trick(ChannelShuffle, "cut", (3, 4)),
    Trick(PixelShuffle, "cut", (3,), lambda: torch.randn(2, 2, 4, 4)),
    Trick(FlattenedPicture, "cut", (6,), lambda: torch.randn(2, 2, 3, 3)),
    Trick(WritesInPlace, "cut", (6,)),
    Trick(WritesHalf, "cut", (4, 8)),
    Trick(WritesIntoAnother, "cut", (12,)),
    Trick(RowsByMask, "cut", (12,)),
    Trick(InterleavedRotation, "cut", (6,)),
    Trick(HalvedRotation, "cut", (6,)),
    Trick(ProductWithItself, "whole"),
    Trick(TwoViewsThatDisagree, "whole"),
    Trick(Attends, "cut", (3, 4, 12, 3, 4)),  # the stream before it, the one after it, its own
    Trick(AttendsWithWeights, "cut", (3, 12, 3)),  # it computes with its head dim
    Trick(AttendsAcross, "cut", (3, 12, 3)),
    Trick(SharesItsWidth, "cut", (3,)),
    Trick(OneVector, "cut", (7, 12)),
    Trick(AddsAndTakesDimensions, "cut", (12,)),
    Trick(SharesTwoPieces, "cut", (2, 2, 3)),
    Trick(TimesAShare, "whole"),
    Trick(AttendsWithBias, "cut", (3, 4, 12, 3, 4)),
    Trick(EncoderLayer, "cut", (3, 4, 20, 3, 4)),
    Trick(Remembers, "cut", (8, 12)),
    Trick(RemembersBothWays, "cut", (8, 12)),
    Trick(Spectrum, "cut", (12,)),
    Trick(Checkpointed, "cut", (12,)),
    Trick(Mapped, "cut", (12,)),
    Trick(ReturnsFeatures, "whole"),
)


def build(trick: Trick):
    torch.manual_seed(0)
    model = fill(trick.model().eval())
    return model, (trick.inputs(),)


def outcome(model, graph, plan) -> str:
    """What comes of a plan; raises where a wrong cut is handed out."""
    if not plan.kept:
        return "whole"
    try:
        pruned = apply(model, graph, plan, strict=True)
    except VerificationError:
        return "refused"
    assert_close(run(pruned, graph), gated(model, graph, plan), what="a cut that was verified")
    return "cut"


@pytest.mark.parametrize("trick", TRICKS, ids=str)
def test_no_cut_is_silently_wrong(trick):
    model, inputs = build(trick)
    graph = trace(model, inputs)
    untouched = copy.deepcopy(model.state_dict())
    found = {outcome(model, graph, half(graph, lambda group: group.exact))}
    found |= {
        outcome(model, graph, ragged(graph, lambda group: group.exact, seed)) for seed in (1, 2)
    }
    assert found == {trick.outcome}, str(graph)
    sizes = sorted(group.size for group in graph.groups.values())
    assert sizes == sorted(trick.sizes), str(graph)
    assert_close(model.state_dict(), untouched, relative=0, what="the caller's model")
