"""SGLP: layers fall into segments of alike outputs, and each segment gives up its least."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sosp_hub.criteria.gradient_norms import FreshNet, GradientNorms
from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.criteria.similarity import cka_matrix, segments
from sosp_hub.errors import CriterionError
from sosp_hub.structure.groups import Groups
from sosp_hub.tasks.batches import num_samples, split_batch
from sosp_hub.types import Kind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency

logger = logging.getLogger("sosp_hub")

_PASS = 64  # samples of one gradient norm


@dataclass(frozen=True)
class Partition:
    """What SGLP found, as plain data; ``hub.matrices.draw_cka`` draws it.

    Attributes:
        blocks: Names of all blocks, in order.
        cka: Similarity of what goes into the first block and of what comes out of each.
        borders: Positions in ``blocks`` at which the segments begin.
        norms: Gradient norm of each layer that may go.
        removed: The layers that SGLP removes, by its own quota.
        fixed: Blocks that stay whatever their norm.
        num_subsets: Subsets that were tried in each segment; 0 = chosen by the layers' own norms.
    """

    blocks: tuple[str, ...]
    cka: tuple[tuple[float, ...], ...]
    borders: tuple[int, ...]
    norms: dict[str, float]
    removed: tuple[str, ...]
    fixed: tuple[str, ...]
    num_subsets: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


@register
@final
@dataclass(frozen=True)
class Sglp:
    """Layers fall into segments of alike outputs (CKA); in each those with the least gradient go.

    Segments: Fisher's optimal partition of the blocks' row sums of the CKA matrix. Layers,
    ``fresh``: the subset of a segment's layers is kept with the largest gradient norm when its
    pretrained weights stand in a net that is otherwise freshly initialised. ``pretrained``: the
    layers are kept whose own weights have the largest gradient norm in the pretrained net, the
    first block always; for language models (our choice).

    Scores are below 0 for the layers that go by SGLP's own quota (``keep``, in proportion to the
    segments, or ``kept_per_segment``; a block stays of each): ``budget: {threshold: 0}`` removes
    exactly these. With any other budget they go first, one at a time, from all segments in
    proportion; then the others, until the budget holds.

    Paper: Li et al., "SGLP: A Similarity Guided Fast Layer Partition Pruning for Compressing Large
    Deep Models", arXiv 2410.14720.

    Differs from the paper: calibration samples are training samples; the partition is the exact
    optimum (the authors' code does not back-track); the fresh net is the same for all subsets; the
    number of segments is the last that saves 5 % of the variation without borders (our reading);
    the stem compares but is in no segment; a segment with more than ``max_subsets`` subsets keeps
    the layers with the largest norms alone; tokens are the rows where blocks work on tokens.
    Blocks that change width or stride stay. Weights that no module can reset (class tokens,
    scales) are not fresh.

    Attributes:
        keep: Share of the layers that may go which stays.
        kept_per_segment: Blocks that each segment keeps, those that may not go included.
        num_segments: None = automatic.
        max_segments: Of the automatic number; None = a third of the blocks.
        max_subsets: Of a segment whose subsets are all tried.
        max_rows: Samples or tokens of a batch that compare.
        norm_samples: Samples of a gradient norm, of each process.
        norms: ``auto`` = ``pretrained`` for language models (labels for tokens), else ``fresh``.
        loss_fn: Loss of (outputs, targets).
        seed: Of the fresh weights.
        process_sum: Sum over processes.
    """

    keep: float = 0.5
    kept_per_segment: tuple[int, ...] | None = None
    num_segments: int | None = None
    max_segments: int | None = None
    max_subsets: int = 20
    max_rows: int = 500
    norm_samples: int = 128
    norms: Literal["auto", "fresh", "pretrained"] = "auto"
    loss_fn: "LossFn | None" = None
    seed: int = 0
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "sglp"
    paper: ClassVar[str] = "arXiv 2410.14720"
    needs: ClassVar[Needs] = "labels"
    first_order: ClassVar[bool] = True
    signed: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("layer",)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One forward pass per batch, then the gradient norms."""
        found = self.partition(model, graph, batches)
        score = dict.fromkeys(found.fixed, 1.0)
        for segment in _split(found.blocks, found.borders):
            alone = sorted((n for n in segment if n in found.norms), key=found.norms.__getitem__)
            going = [name for name in alone if name in found.removed]
            staying = [name for name in alone if name not in found.removed]
            for start, part in ((-1, going), (0, staying)):
                score |= {n: start + (i + 0.5) / len(part) for i, n in enumerate(part)}
        return {
            name: torch.tensor([score[layer] for layer in group.layers], dtype=torch.float64)
            for name, group in graph.groups.items()
        }

    def partition(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> Partition:
        """The segments and what goes from each, with all that led to it."""
        self._check()
        blocks = _blocks(model, graph.groups)
        samples: list[Any] = []
        cka = cka_matrix(
            model, blocks, self._kept(batches, samples), self.max_rows, self.process_sum
        )
        borders = segments(
            list(cka.sum(1)[1:]),
            len(self.kept_per_segment) if self.kept_per_segment else self.num_segments,
            self.max_segments or max(len(blocks) // 3, 1),
        )
        parts = _split(blocks, borders)
        by_token = torch.tensor([float(any(map(_labels_tokens, samples)))])
        pretrained = self.norms == "pretrained" or (
            self.norms == "auto" and bool(self._summed(by_token).item())
        )
        loose = {layer for group in graph.groups.values() for layer in group.layers}
        loose -= {blocks[0]} if pretrained else set()
        quota = self._quota(parts, loose)
        able = [name for name in blocks if name in loose]
        gradients = GradientNorms(samples, self.loss_fn, self.process_sum)
        fixed = tuple(name for name in blocks if name not in loose)
        if stay := [name for name in fixed if not (pretrained and name == blocks[0])]:
            logger.info(
                "sglp: %s cannot be left out (another width, stride or form) and stay",
                ", ".join(stay),
            )
        if pretrained:
            norm_of = None
            norms = gradients.of_layers(model, able)
        else:
            norm_of = partial(gradients.of_fresh, FreshNet(model, able, self.seed))
            norms = {name: norm_of((name,)) for name in able}
        removed, tried = [], []
        for part, num_removed in zip(parts, quota, strict=True):
            own = [name for name in part if name in loose]
            kept, num = _best(own, len(own) - num_removed, norms, norm_of, self.max_subsets)
            removed += [name for name in own if name not in kept]
            tried.append(num)
        logger.info(
            "sglp: segments of %s blocks, of which %s go",
            ", ".join(str(len(part)) for part in parts), ", ".join(map(str, quota)),
        )  # fmt: skip
        return Partition(
            blocks=tuple(blocks),
            cka=tuple(tuple(row) for row in cka.tolist()),
            borders=tuple(borders),
            norms=norms,
            removed=tuple(removed),
            fixed=fixed,
            num_subsets=tuple(tried),
        )

    def _check(self) -> None:
        if not 0 < self.keep <= 1:
            raise CriterionError(f"criterion 'sglp': keep={self.keep!r}, expected in (0, 1]")
        kept, count = self.kept_per_segment, self.num_segments
        if kept is not None and count not in (None, len(kept)):
            raise CriterionError(
                f"criterion 'sglp': kept_per_segment lists {len(kept)} segments, num_segments is "
                f"{count}; leave num_segments out"
            )

    def _kept(self, batches: "Batches", samples: list[Any]) -> Iterator[Any]:
        """The batches, whose first samples stay for the gradient norms."""
        left = self.norm_samples
        for batch in batches:
            for part in split_batch(batch, min(_PASS, left)) if left > 0 else ():
                if left > 0:
                    samples.append(part)
                    left -= num_samples(part)
            yield batch

    def _quota(self, parts: list[list[str]], loose: set[str]) -> list[int]:
        """How many blocks of each segment go."""
        able = [sum(name in loose for name in part) for part in parts]
        most = [min(num, len(part) - 1) for num, part in zip(able, parts, strict=True)]
        if self.kept_per_segment is None:
            return _in_proportion(round((1 - self.keep) * sum(able)), able, most)
        quota = [len(part) - kept for part, kept in zip(parts, self.kept_per_segment, strict=False)]
        if len(quota) != len(parts) or any(
            not 0 <= q <= m for q, m in zip(quota, most, strict=True)
        ):
            told = ", ".join(
                f"{len(part) - num} to {len(part)}" for part, num in zip(parts, most, strict=True)
            )
            raise CriterionError(
                f"criterion 'sglp': kept_per_segment={list(self.kept_per_segment)}; the segments "
                f"found here can keep {told} blocks"
            )
        return quota

    def _summed(self, flat: Tensor) -> Tensor:
        return flat if self.process_sum is None else self.process_sum(flat.double())


def _blocks(model: nn.Module, groups: Groups) -> list[str]:
    """All modules of the classes of the layers that may go, none inside another, in order."""
    layers = {layer for group in groups.values() for layer in group.layers}
    classes = {type(model.get_submodule(layer)) for layer in layers}
    blocks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if type(module) in classes and not inside:
            blocks.append(name)
    return blocks


def _split(row: Sequence[str], firsts: Sequence[int]) -> list[list[str]]:
    ends = [*firsts[1:], len(row)]
    return [list(row[start:end]) for start, end in zip(firsts, ends, strict=True)]


def _best(
    able: list[str],
    num_kept: int,
    norms: dict[str, float],
    norm_of: Callable[[tuple[str, ...]], float] | None,
    max_subsets: int,
) -> tuple[tuple[str, ...], int]:
    """The layers of a segment to keep, and how many subsets were tried for that."""
    alone = tuple(sorted(able, key=norms.__getitem__, reverse=True)[:num_kept])
    number = math.comb(len(able), num_kept)
    if norm_of is None or (number in (1, len(able)) and num_kept == 1) or number > max_subsets:
        return alone, 0
    subsets = list(itertools.combinations(able, num_kept))
    return (alone, 0) if number == 1 else (max(subsets, key=norm_of), number)


def _in_proportion(total: int, sizes: list[int], most: list[int]) -> list[int]:
    """``total`` in whole parts proportional to ``sizes``, none above ``most``."""
    exact = [total * size / max(sum(sizes), 1) for size in sizes]
    parts = [min(int(share), cap) for share, cap in zip(exact, most, strict=True)]
    while sum(parts) < min(total, sum(most)):
        rest = [
            e - p if p < cap else -math.inf for e, p, cap in zip(exact, parts, most, strict=True)
        ]
        parts[rest.index(max(rest))] += 1
    return parts


def _labels_tokens(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.ndim == 2
