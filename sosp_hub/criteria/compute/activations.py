"""What flows where structures are read, for criteria that look at activations."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import is_sharded
from sosp_hub.criteria.compute.context import Context
from sosp_hub.criteria.compute.weights import by_structure, check_read, reading
from sosp_hub.errors import CriterionError
from sosp_hub.gates import gated
from sosp_hub.structure.groups import Group, Groups, Site
from sosp_hub.tasks.batches import num_samples
from sosp_hub.tasks.loss import forward

if TYPE_CHECKING:
    from sosp_hub.types import Batches

_MOST_GRAM_BYTES = 4 * 2**30
ProcessSum = Callable[[Tensor], Tensor]


class Seen(NamedTuple):
    """The tensor at a site in one forward pass, in float32 or wider.

    Attributes:
        group: The group.
        site: Where it is read.
        rows: ``(samples, places, positions)``: a place is a pixel or a token, a position one along
            the site's dimension. Padding is zero.
        places: ``(samples,)``: places that are not padding.
        shape: Of the places: ``(height, width)``, ``(tokens,)`` or ``()``.
    """

    group: Group
    site: Site
    rows: Tensor
    places: Tensor
    shape: tuple[int, ...]

    def by_structure(self) -> Tensor:
        """``(structures, samples, places, positions of one structure)``.

        Raises:
            CriterionError: Structures that have different numbers of positions.
        """
        index = torch.from_numpy(self.site.index)
        order = index.argsort(stable=True)[int((index < 0).sum()) :]
        each, rest = divmod(len(order), self.group.size)
        alike = torch.arange(self.group.size, device=index.device).repeat_interleave(each)
        if rest or not torch.equal(index[order], alike):
            raise CriterionError(
                f"group {self.group.name!r} ({self.group.kind}): its structures have different "
                "numbers of positions; score it with a criterion on gates, such as `taylor`"
            )
        plain = torch.equal(order, torch.arange(self.rows.shape[-1], device=order.device))
        parts = self.rows if plain else self.rows[..., order.to(self.rows.device)]
        return parts.unflatten(-1, (self.group.size, each)).permute(2, 0, 1, 3)


Measure = Callable[[Seen], tuple[Tensor, Tensor | int]]
"""From what is seen at a site to sums over it, and the number of what was added up."""


def site_means(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    measure: Measure,
    process_sum: ProcessSum | None,
    *,
    per_position: int = 0,
) -> dict[str, dict[int, Tensor]]:
    """Means over all batches and processes of what ``measure`` adds up at each site.

    Args:
        model: The model; it runs in eval mode and comes back as it was.
        groups: The groups whose sites are watched.
        batches: Calibration data, gone through once.
        measure: Gives one sum per structure.
        process_sum: Sum over processes.
        per_position: ``measure`` gives so many sums for each position along the site's dimension
            instead, ``(per_position, positions)``.

    Returns:
        For each group the means at its sites that ran, by the number of the site.

    Raises:
        CriterionError: No data, or a group without a module that reads it.
    """
    places = _watched_sites(groups)
    shapes = [
        (per_position, len(site.index)) if per_position else (group.size,)
        for group, _, site in places
    ]
    totals = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    counts = torch.zeros(len(places), dtype=torch.float64)

    def add(at: int, x: Tensor, mask: Tensor | None) -> None:
        group, _, site = places[at]
        total, count = measure(_seen(group, site, x, mask))
        totals[at] += total.to("cpu", torch.float64)
        counts[at] += float(count)

    watched = [(site.module or "", i) for i, (_, _, site) in enumerate(places)]
    seen = run(model, batches, watched, lambda i, args, _, mask: add(i, args, mask))
    flat = torch.cat([total.flatten() for total in totals])
    samples, counts, flat = sum_over_processes(
        [torch.tensor([float(seen)]), counts, flat], process_sum
    )
    check_data(samples)
    means: dict[str, dict[int, Tensor]] = {name: {} for name in groups}
    sums = flat.split([total.numel() for total in totals])
    for (group, number, _), total, count, own in zip(places, sums, counts, totals, strict=True):
        if count > 0:
            means[group.name][number] = (total / count).view_as(own)
    _check_watched(groups, {name for name, of_sites in means.items() if of_sites})
    return means


def site_grams(context: Context) -> tuple[dict[str, dict[int, Tensor]], int]:
    """Of each structure the products of its maps' places, ``A^T A / size``, over all samples.

    A row of ``A`` is what a structure hands on in one sample, its places by its positions; the size
    is the mean number of them that are not padding. Float64, ``(structures, row, row)``.

    Returns:
        By group and number of the site, and the number of samples of all processes.

    Raises:
        CriterionError: No data, maps of different sizes, or sums of more than a few GB.
    """
    groups = context.groups
    places = _watched_sites(groups)
    sums: dict[int, Tensor] = {}
    sizes = torch.zeros(len(places), dtype=torch.float64)

    def add(at: int, x: Tensor, mask: Tensor | None) -> None:
        group, _, site = places[at]
        seen = _seen(group, site, x, mask)
        rows = seen.by_structure()
        sizes[at] += float(seen.places.sum()) * rows.shape[-1]
        rows = rows.flatten(2)
        size = rows.shape[-1]
        known = sums.get(at)
        if known is None:
            held = sum(total.nbytes for total in sums.values())
            if held + 8 * group.size * size * size > _MOST_GRAM_BYTES:
                raise CriterionError(
                    f"group {group.name!r}: one matrix of all samples needs products of "
                    f"{size:,} x {size:,} places for each of {group.size} structures, more than "
                    f"{_MOST_GRAM_BYTES / 1e9:.0f} GB in all; write set_size: 32, or score fewer "
                    "kinds"
                )
            known = sums[at] = torch.zeros(group.size, size, size, dtype=torch.float64)
        if known.shape[-1] != size:
            raise CriterionError(
                f"group {group.name!r}: maps of {known.shape[-1]} and of {size} places are no rows "
                "of one matrix; give batches of one size, or write set_size: 32"
            )
        known += (rows.mT @ rows).to("cpu", torch.float64)

    watched = [(site.module or "", i) for i, (_, _, site) in enumerate(places)]
    seen = run(context.model, context.batches, watched, lambda i, args, _, mask: add(i, args, mask))
    order = sorted(sums)
    samples, sizes, *flat = sum_over_processes(
        [torch.tensor([float(seen)]), sizes, *(sums[at].flatten() for at in order)],
        context.process_sum,
    )
    check_data(samples)
    grams: dict[str, dict[int, Tensor]] = {name: {} for name in groups}
    for at, total in zip(order, flat, strict=True):
        group, number, _ = places[at]
        size = (sizes[at] / samples).clamp(min=1)
        grams[group.name][number] = total.view_as(sums[at]) / size
    _check_watched(groups, {name for name, of_sites in grams.items() if of_sites})
    return grams, int(samples.item())


def weighted_inputs(
    context: Context,
    criterion: str,
    *,
    of_weights: Callable[[Tensor], Tensor],
    moments: Measure,
    of_inputs: Callable[[Tensor], Tensor],
    num_moments: int,
) -> dict[str, Tensor]:
    """What the weights that read a structure measure, times what they read, summed over its inputs.

    Args:
        context: What is scored.
        criterion: Its name, for errors.
        of_weights: From the weights of each position, ``(positions, weights)``, to one number each.
        moments: ``num_moments`` sums over what is read, of each position.
        of_inputs: From their means to one number for each position.
        num_moments: How many.

    Raises:
        CriterionError: Groups that no weight reads.
    """
    groups = context.groups
    read = {name: reading(context.model, group, of_weights) for name, group in groups.items()}
    check_read(groups, read, criterion)
    means = site_means(
        context.model,
        groups,
        context.batches,
        moments,
        context.process_sum,
        per_position=num_moments,
    )
    return mean_of_sites(
        {
            name: {
                i: by_structure(group, group.sites[i], read[name][i] * of_inputs(mean))
                for i, mean in means[name].items()
                if i in read[name]
            }
            for name, group in groups.items()
        }
    )


def mean_of_sites(means: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    """One value per structure where a group is read in several places."""
    return {name: torch.stack(list(of_sites.values())).mean(0) for name, of_sites in means.items()}


def run(
    model: nn.Module,
    batches: "Batches",
    watched: list[tuple[str, int]],
    see: Callable[[int, Tensor, Any, Tensor | None], None],
) -> int:
    """Runs the model on all batches; ``see`` gets what goes into and out of the modules.

    Args:
        model: The model; it runs in eval mode and comes back as it was.
        batches: Calibration data, gone through once.
        watched: Names of modules, with a number for each.
        see: Gets that number, the module's first input, its output, and which tokens of the batch
            are not padding (None = all).

    Returns:
        Number of samples.
    """
    mask: Tensor | None = None
    seen = 0
    if is_sharded(model):
        raise CriterionError(
            "weights are sharded (FSDP2), which activations are not collected through; choose a "
            "criterion that looks at the loss, such as `taylor` or `sosp_h`"
        )
    with torch.no_grad(), gated(model, {}), ExitStack() as stack:  # no gates: eval mode alone
        for name, number in watched:

            def hook(
                _: nn.Module,
                args: Any,
                kwargs: Any,
                result: Any,
                name: str = name,
                number: int = number,
            ) -> None:
                entry = args[0] if args else next(iter(kwargs.values()))
                if any(each.is_complex() for each in (entry, result) if isinstance(each, Tensor)):
                    raise CriterionError(
                        f"module {name!r} works on complex numbers, which criteria "
                        "on activations do not measure; choose one on gates, such as `taylor`, or "
                        "`magnitude`"
                    )
                see(number, entry, result, mask)

            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            is_dict = isinstance(batch, Mapping)
            mask = batch.get("attention_mask") if is_dict else None
            forward(model, batch)
            seen += num_samples(batch)
    return seen


def sum_over_processes(parts: list[Tensor], process_sum: ProcessSum | None) -> list[Tensor]:
    """The sums of 1-D tensors, in one exchange of float64 numbers."""
    flat = torch.cat([part.to(torch.float64) for part in parts])
    flat = flat if process_sum is None else process_sum(flat)
    return list(flat.split([len(part) for part in parts]))


def check_data(samples: Tensor) -> None:
    """Raises where no process has seen a sample."""
    if not samples.any():
        raise CriterionError(
            "no calibration data: the criterion needs at least one batch; `magnitude` and `random` "
            "need none"
        )


def unpadded(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask of tokens where it is about a tensor that begins with (samples, tokens)."""
    return mask if mask is not None and mask.shape == shape else None


def _seen(group: Group, site: Site, x: Tensor, mask: Tensor | None) -> Seen:
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).movedim(site.dim, -1)
    shape = tuple(x.shape[1:-1])
    if x.shape[-1] != len(site.index):
        raise CriterionError(
            f"{site.module}: dimension {site.dim} of its input has {x.shape[-1]} positions, in the "
            f"graph {len(site.index)}; trace the model that is scored"
        )
    rows = x.reshape(len(x), -1, x.shape[-1])
    mask = unpadded(mask, tuple(rows.shape[:2]))
    if mask is None:
        return Seen(group, site, rows, rows.new_full((len(rows),), rows.shape[1]), shape)
    mask = mask.to(rows)
    return Seen(group, site, rows * mask.unsqueeze(-1), mask.sum(1), shape)


def _watched_sites(groups: Groups) -> list[tuple[Group, int, Site]]:
    """The sites that modules read, with their numbers.

    Raises:
        CriterionError: A group without one.
    """
    sites = [
        (group, number, site)
        for group in groups.values()
        for number, site in enumerate(group.sites)
        if site.module is not None
    ]
    _check_watched(groups, {group.name for group, _, _ in sites})
    return sites


def _check_watched(groups: Groups, watched: set[str]) -> None:
    if missing := [group for name, group in groups.items() if name not in watched]:
        shown = ", ".join(f"{group.name!r} ({group.kind})" for group in missing[:8])
        raise CriterionError(
            f"no module that ran reads the groups {shown}, so their activations cannot be watched: "
            "score other kinds (`kinds=`), or use a criterion on weights, such as `magnitude`"
        )
