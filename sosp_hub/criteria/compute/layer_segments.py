"""Segments of layers with alike outputs, and the layers of each that SGLP removes."""

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sosp_hub.criteria.compute.context import Context
from sosp_hub.criteria.compute.gradient_norms import FreshNet, GradientNorms
from sosp_hub.criteria.compute.similarity import cka_matrix, segments
from sosp_hub.errors import CriterionError
from sosp_hub.structure.groups import Groups
from sosp_hub.tasks.batches import num_samples, split_batch

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency

logger = logging.getLogger("sosp_hub")

_PASS = 64  # samples of one gradient norm


@dataclass(frozen=True)
class Partition:
    """What SGLP found, as plain data; ``report.matrices.draw_cka`` draws it.

    Attributes:
        blocks: Names of all blocks, in order.
        cka: Similarity of what goes into the first block and of what comes out of each.
        borders: Positions in ``blocks`` at which the segments begin.
        norms: Gradient norm of each layer that may go.
        removed: The layers that SGLP removes, by its own quota.
        fixed: Blocks that stay whatever their norm.
        num_subsets: Subsets that were tried in each segment; 0 = chosen by the layers' own norms.
        stepwise: Segments, by number, that gave up one layer at a time, since their subsets were
            more than ``max_subsets``.
    """

    blocks: tuple[str, ...]
    cka: tuple[tuple[float, ...], ...]
    borders: tuple[int, ...]
    norms: dict[str, float]
    removed: tuple[str, ...]
    fixed: tuple[str, ...]
    num_subsets: tuple[int, ...]
    stepwise: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def segment_scores(groups: Groups, partition: Partition) -> "Saliency":
    """Below 0 for the layers that go, by their gradient norms; 1 for those that are fixed."""
    score = dict.fromkeys(partition.fixed, 1.0)
    norms = partition.norms
    for segment in _split(partition.blocks, partition.borders):
        by_norm = sorted((name for name in segment if name in norms), key=norms.__getitem__)
        going = [name for name in by_norm if name in partition.removed]
        staying = [name for name in by_norm if name not in partition.removed]
        for start, part in ((-1, going), (0, staying)):
            score |= {name: start + (i + 0.5) / len(part) for i, name in enumerate(part)}
    return {
        name: torch.tensor([score[layer] for layer in group.layers], dtype=torch.float64)
        for name, group in groups.items()
    }


def partition(
    context: Context,
    *,
    keep: float,
    max_subsets: int,
    max_rows: int,
    norm_samples: int,
    num_fresh: int,
    norms: Literal["auto", "fresh", "pretrained"],
    kept_per_segment: tuple[int, ...] | None = None,
    num_segments: int | None = None,
    max_segments: int | None = None,
) -> Partition:
    """The segments and what goes from each, with all that led to it; options as in ``sglp``.

    Raises:
        CriterionError: Options that do not fit each other, or the segments.
    """
    if kept_per_segment is not None and num_segments not in (None, len(kept_per_segment)):
        raise CriterionError(
            f"criterion 'sglp': kept_per_segment lists {len(kept_per_segment)} segments, "
            f"num_segments is {num_segments}; leave num_segments out"
        )
    model, process_sum = context.model, context.process_sum
    blocks = _blocks(model, context.groups)
    samples: list[Any] = []
    batches = _keeping(context.batches, samples, norm_samples)
    cka = cka_matrix(model, blocks, batches, max_rows, process_sum)
    borders = segments(
        list(cka.sum(1)[1:]),
        len(kept_per_segment) if kept_per_segment else num_segments,
        max_segments or max(len(blocks) // 3, 1),
    )
    parts = _split(blocks, borders)
    by_token = torch.tensor([float(any(map(_labels_tokens, samples)))])
    pretrained = norms == "pretrained" or (
        norms == "auto" and bool(_summed(by_token, process_sum).item())
    )
    loose = {layer for group in context.groups.values() for layer in group.layers}
    loose -= {blocks[0]}  # it sets what all others read
    quota = _quota(parts, loose, keep, kept_per_segment)
    able = [name for name in blocks if name in loose]
    gradients = GradientNorms(samples, context.loss_fn, process_sum)
    fixed = tuple(name for name in blocks if name not in loose)
    if stay := fixed[1:]:
        logger.info(
            "sglp: %s cannot be left out (another width, stride or form) and stay",
            ", ".join(stay),
        )
    seeds = [] if pretrained else range(context.seed, context.seed + num_fresh)
    nets = [FreshNet(model, able, seed) for seed in seeds]

    def of_fresh(layers: Sequence[str]) -> float:
        return statistics.fmean(gradients.of_fresh(net, layers) for net in nets)

    norm_of = None if pretrained else of_fresh
    norm = (
        gradients.of_layers(model, able)
        if pretrained
        else {name: of_fresh((name,)) for name in able}
    )
    removed, tried, stepwise = [], [], []
    for i, (part, num_removed) in enumerate(zip(parts, quota, strict=True)):
        own = [name for name in part if name in loose]
        kept, num = _best(own, len(own) - num_removed, norm, norm_of, max_subsets)
        removed += [name for name in own if name not in kept]
        tried.append(num)
        number = math.comb(len(own), num_removed)
        if norm_of is not None and number > max_subsets:
            stepwise.append(i)
            logger.warning(
                "sglp: the segment from %s has %d subsets, more than max_subsets=%d: it gave up "
                "one layer at a time, %d subsets were tried",
                part[0], number, max_subsets, num,
            )  # fmt: skip
    logger.info(
        "sglp: segments of %s blocks, of which %s go",
        ", ".join(str(len(part)) for part in parts), ", ".join(map(str, quota)),
    )  # fmt: skip
    return Partition(
        blocks=tuple(blocks),
        cka=tuple(tuple(row) for row in cka.tolist()),
        borders=tuple(borders),
        norms=norm,
        removed=tuple(removed),
        fixed=fixed,
        num_subsets=tuple(tried),
        stepwise=tuple(stepwise),
    )


def _keeping(batches: "Batches", samples: list[Any], num: int) -> Iterator[Any]:
    """The batches, whose first samples stay for the gradient norms."""
    left = num
    for batch in batches:
        for part in split_batch(batch, min(_PASS, left)) if left > 0 else ():
            if left > 0:
                samples.append(part)
                left -= num_samples(part)
        yield batch


def _quota(
    parts: list[list[str]], loose: set[str], keep: float, kept_per_segment: tuple[int, ...] | None
) -> list[int]:
    """How many blocks of each segment go."""
    able = [sum(name in loose for name in part) for part in parts]
    most = [min(num, len(part) - 1) for num, part in zip(able, parts, strict=True)]
    if kept_per_segment is None:
        return _in_proportion(round((1 - keep) * sum(able)), able, most)
    quota = [len(part) - kept for part, kept in zip(parts, kept_per_segment, strict=False)]
    if len(quota) != len(parts) or any(not 0 <= q <= m for q, m in zip(quota, most, strict=True)):
        ranges = ", ".join(
            f"{len(part) - num} to {len(part)}" for part, num in zip(parts, most, strict=True)
        )
        raise CriterionError(
            f"criterion 'sglp': kept_per_segment={list(kept_per_segment)}; the segments "
            f"found here can keep {ranges} blocks"
        )
    return quota


def _summed(flat: Tensor, process_sum: Callable[[Tensor], Tensor] | None) -> Tensor:
    return flat if process_sum is None else process_sum(flat.double())


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
    number = math.comb(len(able), num_kept)
    if norm_of is None or number == 1 or num_kept == 1:
        return tuple(sorted(able, key=norms.__getitem__, reverse=True)[:num_kept]), 0
    if number <= max_subsets:
        return max(itertools.combinations(able, num_kept), key=norm_of), number
    kept, tried = tuple(able), 0
    while len(kept) > num_kept:
        tried += len(kept)
        kept = max(itertools.combinations(kept, len(kept) - 1), key=norm_of)
    return kept, tried


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
