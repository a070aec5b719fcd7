"""Class labels as numbers from 0, whatever the source writes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sosp_hub.data.rows import Label, Rows
from sosp_hub.errors import DataError, shortened


def code_labels(train: Rows, test: Rows, where: str) -> tuple[tuple[str, ...], Rows, Rows]:
    """Class names, and both splits with numbers for labels.

    Whole numbers stay what they are; text is numbered in alphabetical order of the train split's
    classes, unless the source itself lists its classes.

    Raises:
        DataError: Labels that are neither, negative numbers, a single class, classes that train
            does not have.
    """
    names = train.class_names or _class_names(train.labels or (), where)
    there = set(train.labels or ())
    if len(names) < 2 or len(there) < 2:
        only = ", ".join(str(label) for label in there) or ", ".join(names)
        raise DataError(f"data.label: {where} has only the class {only}; expected two or more")
    numbers: dict[Label, int] = {name: number for number, name in enumerate(names)}
    numbers |= {number: number for number in range(len(names))}
    coded = _coded(train, numbers, names, f"train split of {where}")
    if test is train:
        return names, coded, coded
    return names, coded, _coded(test, numbers, names, f"test split of {where}")


def label_order(data: Sequence[str], model: Sequence[str]) -> tuple[int, ...] | None:
    """For each class of the data the head output of that name; None unless all have one."""
    outputs = {name.casefold(): number for number, name in enumerate(model)}
    folded = [name.casefold() for name in data]
    if set(folded) != set(outputs) or len(folded) != len(outputs) or folded == list(outputs):
        return None
    return tuple(outputs[name] for name in folded)


_MOST_ABSENT = 1000  # classes between 0 and the largest number that no sample has


def _class_names(labels: Sequence[Label], where: str) -> tuple[str, ...]:
    for row, label in enumerate(labels):
        if label is None or label == "":
            raise DataError(
                f"data.label: row {row} of {where} has no label; give each sample one, or take it "
                "out"
            )
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted({str(label) for label in labels}))
    odd = [v for v in labels if not isinstance(v, int) or v < 0]
    if odd:
        raise DataError(
            f"data.label: {where} has the label {shortened(repr(odd[0]))}; expected names, or "
            "whole numbers from 0"
        )
    classes = {int(label) for label in labels}
    if (largest := max(classes)) > 10 * len(classes) + _MOST_ABSENT:
        raise DataError(
            f"data.label: {where} has the label {largest}, and {len(classes)} classes in all; "
            "expected numbers from 0 without such gaps, or names"
        )
    return tuple(str(number) for number in range(largest + 1))


def _coded(rows: Rows, numbers: Mapping[Label, int], names: Sequence[str], where: str) -> Rows:
    try:
        return replace(rows, labels=[numbers[label] for label in rows.labels or ()])
    except (KeyError, TypeError) as error:
        unknown = sorted({repr(v) for v in rows.labels or () if v not in numbers})[:5]
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise DataError(
            f"data.label: the {where} has labels {', '.join(unknown)} that are none of the "
            f"{len(names)} classes of train ({shown})"
        ) from error
