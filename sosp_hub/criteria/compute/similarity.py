"""How alike the outputs of a network's blocks are, and where the row of blocks falls apart."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sosp_hub.criteria.compute.activations import (
    ProcessSum,
    check_data,
    run,
    sum_over_processes,
    unpadded,
)
from sosp_hub.errors import CriterionError

if TYPE_CHECKING:
    from sosp_hub.types import Batches

_LEAST_DROP = 0.05  # of the loss of one segment: a further segment has to be worth that much


def cka_matrix(
    model: nn.Module,
    blocks: Sequence[str],
    batches: "Batches",
    max_rows: int,
    process_sum: ProcessSum | None,
) -> NDArray[np.float64]:
    """Linear CKA (biased HSIC) between what the first block is given and what each block gives.

    Rows are samples, or tokens that are not padding where a block works on tokens; at most
    ``max_rows`` of a batch, evenly spaced. The mean runs over batches, by their rows.

    Returns:
        ``(1 + blocks, 1 + blocks)``, symmetric with a diagonal of 1.

    Raises:
        CriterionError: No data, a block that did not run or whose output does not vary, or blocks
            that work on different numbers of tokens.
    """
    size = len(blocks) + 1
    total, num_rows = torch.zeros(size, size, dtype=torch.float64), torch.zeros(1)
    grams: dict[int, Tensor] = {}

    def see(number: int, entry: Tensor, result: Any, mask: Tensor | None) -> None:
        if number == 0:
            grams[0] = _unit_gram(entry, mask, max_rows)
        output = result if isinstance(result, Tensor) else result[0]
        grams[number + 1] = _unit_gram(output, mask, max_rows)

    def add() -> None:
        if missing := [name for i, name in enumerate(blocks) if i + 1 not in grams]:
            raise CriterionError(
                f"layer {missing[0]!r} did not run on the calibration data; score other kinds "
                "(`kinds=`)"
            )
        rows = {len(gram) for gram in grams.values()}
        if len(rows) > 1:
            raise CriterionError(
                f"the layers work on {', '.join(map(str, sorted(rows)))} rows (samples or tokens) "
                "of the same batch, and only equally many compare; use `block_influence`"
            )
        if rows != {1}:  # one row has nothing to be like
            flat = torch.stack([grams[i].flatten() for i in range(size)])
            total.add_((flat @ flat.T).cpu().double(), alpha=len(grams[0]))
            num_rows.add_(len(grams[0]))
        grams.clear()

    def each() -> Iterable[Any]:
        for batch in batches:
            yield batch
            add()  # the model has run on it by the time the next is asked for

    seen = run(model, each(), [(name, i) for i, name in enumerate(blocks)], see)
    samples, rows, flat = sum_over_processes(
        [torch.tensor([float(seen)]), num_rows, total.flatten()], process_sum
    )
    check_data(samples)
    matrix = (flat / rows).view(size, size)
    if not matrix.isfinite().all():
        first = int((~matrix.diagonal().isfinite()).long().argmax())
        source = (
            f"what comes out of {blocks[first - 1]!r}"
            if first
            else "what goes into the first layer"
        )
        raise CriterionError(
            f"{source} is the same for all samples of a batch (or not finite), so its similarity "
            "is not known; give batches of several different samples"
        )
    return matrix.numpy()


def segments(values: Sequence[float], count: int | None, most: int) -> list[int]:
    """The first positions of the segments of a row with the least variation inside (Fisher).

    Exact, by dynamic programming with back-tracking. Without ``count`` the number is the last one,
    up to ``most``, with which the sum of squares within segments drops by more than 5 % of what it
    is without borders.
    """
    row = np.asarray(values, dtype=np.float64) - np.mean(values)
    n = len(row)
    most = min(n, most if count is None else count)
    sums, squares = (np.concatenate([[0.0], np.cumsum(x)]) for x in (row, row**2))
    start, end = np.arange(n)[:, None], np.arange(1, n + 1)[None, :]
    length = np.maximum(end - start, 1)
    within = squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / length
    within = np.where(end > start, np.maximum(within, 0), np.inf)  # of the rows start:end
    losses, border = [within[0]], [np.zeros(n, dtype=int)]
    for _ in range(1, most):
        ways = np.concatenate([[np.inf], losses[-1][:-1]])[:, None] + within
        border.append(ways.argmin(0))
        losses.append(ways.min(0))
    if count is None:
        drops = -np.diff([loss[-1] for loss in losses])
        worth = np.flatnonzero(drops > _LEAST_DROP * losses[0][-1])
        most = int(worth[-1]) + 2 if len(worth) else 1
    firsts, last = [], n - 1
    for level in reversed(range(most)):
        firsts.append(int(border[level][last]))
        last = firsts[-1] - 1
    return firsts[::-1]


def _unit_gram(x: Tensor, mask: Tensor | None, max_rows: int) -> Tensor:
    """Inner products of centred rows, of Frobenius norm 1; a dot product of two is their CKA."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 3:
        mask = unpadded(mask, tuple(x.shape[:2]))
        x = x.flatten(0, 1) if mask is None else x[mask.bool()]
    x = x.flatten(1)
    if len(x) > max_rows:
        x = x[torch.linspace(0, len(x) - 1, max_rows).round().long().to(x.device)]
    x = x - x.mean(0)
    gram = x @ x.T
    return gram / gram.norm()
