"""Whether a head fits the labels, and when a new one is made."""

import logging

from sosp_hub.data.source import DataInfo
from sosp_hub.errors import DataError
from sosp_hub.recipe.schema import ModelSection

log = logging.getLogger(__name__)


def fit_head(
    section: ModelSection, data: DataInfo | None, checkpoint: int | None
) -> tuple[int | None, bool]:
    """Number of outputs, and whether their weights are new (random).

    Args:
        section: A new head is asked for by ``num_labels`` or ``train``.
        data: What it has to fit, where known.
        checkpoint: Outputs of the head that the weights bring; None where they bring none.

    Raises:
        DataError: A head that does not fit the labels and was not asked for, or fewer outputs than
            labels.
    """
    labels = data.num_labels if data else None
    asked = section.num_labels
    if asked is not None and labels is not None and asked < labels:
        raise DataError(
            f"model.num_labels: {asked} outputs for data with {labels} labels; write {labels}, or "
            "leave it out"
        )
    if checkpoint is not None and asked in (None, checkpoint):
        if labels in (None, checkpoint) or asked == checkpoint:
            return checkpoint, False
        if section.train is None:
            raise DataError(
                f"model.num_labels: the head of {section.id} has {checkpoint} outputs, but the "
                f"data has {labels} labels. For a new head write model.num_labels: {labels} and a "
                "model.train section that trains it; otherwise give the data that the model was "
                "trained on"
            )
    wanted = asked or labels
    if wanted is not None and section.pretrained:
        trained = "" if section.train else "; it stays random, since model.train is not given"
        lost = "" if checkpoint is None else f", in place of its trained one with {checkpoint}"
        level = logging.INFO if checkpoint is None or asked else logging.WARNING
        told = "%s gets a new head with %d output%s%s%s"
        log.log(level, told, section.id, wanted, "s" if wanted != 1 else "", lost, trained)
    return wanted, True
