"""Class labels as numbers from 0, whatever the source writes."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from sosp_hub.data.rows import Label, Rows
from sosp_hub.errors import DataError, shortened

log = logging.getLogger(__name__)

Problem = Literal["single_label", "multi_label", "regression"]


def problem_of(rows: Rows, asked: Problem | None, where: str) -> Problem:
    """What labels are: lists are of several classes, fractions are numbers, the rest classes.

    Raises:
        DataError: Both lists and others, or whole numbers that are written as fractions.
    """
    labels = list(rows.labels or ())
    lists = [isinstance(label, list | tuple) for label in labels]
    if any(lists) and not all(lists):
        odd = lists.index(False)
        raise DataError(
            f"data.label: row {odd} of {where} has {labels[odd]!r} where others have lists of "
            "labels; write a list there too, empty for none"
        )
    if any(lists):
        if asked not in (None, "multi_label"):
            raise DataError(f"data.problem: {asked}, but the labels of {where} are lists")
        return "multi_label"
    if asked == "multi_label":
        raise DataError(f"data.problem: multi_label, but the labels of {where} are no lists")
    numbers = [label for label in labels if isinstance(label, float)]
    if asked is None and numbers and all(number.is_integer() for number in numbers):
        raise DataError(
            f"data.label: {where} has the label {numbers[0]!r}, a whole number that is written as "
            "a fraction: for classes write whole numbers, for a number to meet data.problem: "
            "regression"
        )
    return asked or ("regression" if numbers else "single_label")


def listed_classes(
    lists: Sequence[Sequence[Label]],
    names: tuple[str, ...],
    where: str,
    key: str,
    least: int = 2,
) -> tuple[tuple[str, ...], Callable[[Sequence[Sequence[Label]]], list[list[int]]]]:
    """Names of the classes in lists, and what makes numbers of such lists.

    Args:
        lists: Of the train split.
        names: Where the source lists them.
        where: The source, for messages.
        key: Of the section ``data``, for messages.
        least: Number of classes.

    Raises:
        DataError: Labels that are neither names nor whole numbers, or too few classes; later
            one that train does not have.
    """
    names = names or _class_names([label for labels in lists for label in labels], where)
    if len(names) < least:
        raise DataError(
            f"data.{key}: {where} has only the class {', '.join(names)}; expected two or more"
        )
    numbers: dict[Label, int] = {name: number for number, name in enumerate(names)}
    numbers |= {number: number for number in range(len(names))}

    def coded(lists: Sequence[Sequence[Label]]) -> list[list[int]]:
        for row, labels in enumerate(lists):
            odd = next((label for label in labels if label not in numbers), None)
            if odd is not None:
                raise DataError(
                    f"data.{key}: row {row} of {where} has the label {odd!r}, which is none of the "
                    f"{len(names)} classes of train ({', '.join(names[:8])})"
                )
        return [[numbers[label] for label in labels] for labels in lists]

    return names, coded


def several_classes(train: Rows, test: Rows, where: str) -> tuple[tuple[str, ...], Rows, Rows]:
    """Class names, and both splits with a 0 or 1 for each class.

    Raises:
        DataError: As of ``listed_classes``.
    """
    lists: Any = train.labels or ()
    names, numbers = listed_classes(lists, train.class_names, where, "label")

    def coded(rows: Any) -> Any:
        chosen = ({*row} for row in numbers(rows.labels))
        labels = [[float(i in row) for i in range(len(names))] for row in chosen]
        return replace(rows, labels=labels)

    first = coded(train)
    return names, first, first if test is train else coded(test)


def number_values(train: Rows, test: Rows, where: str) -> tuple[Rows, Rows]:
    """Both splits with a number for each sample.

    Raises:
        DataError: A label that is no finite number.
    """

    def checked(rows: Rows) -> Rows:
        for row, value in enumerate(rows.labels or ()):
            if isinstance(value, str | bool | None) or not math.isfinite(value):
                raise DataError(
                    f"data.label: row {row} of {where} has {value!r}, expected a finite number"
                )
        return replace(rows, labels=[float(value) for value in rows.labels or ()])

    first = checked(train)
    return first, first if test is train else checked(test)


def code_labels(train: Rows, test: Rows, where: str) -> tuple[tuple[str, ...], Rows, Rows]:
    """Class names, and both splits with numbers for labels.

    Whole numbers stay what they are; text is numbered in alphabetical order of the train split's
    classes, unless the source itself lists its classes.

    Raises:
        DataError: Labels that are neither, negative numbers, a single class, classes that train
            does not have.
    """
    names = train.class_names or _class_names(train.labels or (), where)
    labels_in_train = set(train.labels or ())
    if len(names) < 2 or len(labels_in_train) < 2:
        only = ", ".join(str(label) for label in labels_in_train) or ", ".join(names)
        raise DataError(f"data.label: {where} has only the class {only}; expected two or more")
    numbers: dict[Label, int] = {name: number for number, name in enumerate(names)}
    numbers |= {number: number for number in range(len(names))}
    coded = _coded(train, numbers, names, f"train split of {where}")
    if test is train:
        return names, coded, coded
    return names, coded, _coded(test, numbers, names, f"test split of {where}")


def label_order(data: Sequence[str], model: Sequence[str]) -> tuple[int, ...] | None:
    """For each class of the data the head output of that name; None = its own number.

    Names of the data that are other than the model's say nothing of their order; then a warning
    says what is taken for what. Numbers are those of outputs.
    """
    outputs = {name.casefold(): number for number, name in enumerate(model)}
    folded = [name.casefold() for name in data]
    if set(folded) <= set(outputs) and len(set(folded)) == len(folded):
        order = tuple(outputs[name] for name in folded)
        return None if order == tuple(range(len(order))) else order
    if not all(name.isdecimal() for name in data):
        pairs = [f"{name} = {given}" for given, name in zip(data, model, strict=False)]
        shown = ", ".join(pairs[:_MOST_SHOWN]) + (", ..." if len(pairs) > _MOST_SHOWN else "")
        log.warning(
            "data: the model's classes have other names than the data's; matched by position: %s. "
            "If that is wrong, write the numbers of the model's outputs as labels",
            shortened(shown, 300),
        )
    return None


_MOST_SHOWN = 5
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
    if absent := sorted(set(range(largest)) - classes):
        shown = ", ".join(map(str, absent[:_MOST_SHOWN]))
        log.warning(
            "data.label: %s has labels up to %d, so %d classes, and no sample of %s%s",
            where,
            largest,
            largest + 1,
            shown,
            ", ..." if len(absent) > _MOST_SHOWN else "",
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
