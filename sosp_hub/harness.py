"""Tasks of EleutherAI's lm-evaluation-harness as metrics, where it is installed."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sosp_hub.errors import DataError
from sosp_hub.evaluate import Metric
from sosp_hub.modes import evaluating

_NAMES = {"acc": "accuracy", "acc_norm": "accuracy_norm"}
"""Of the harness, and of this package, where shares are known by them."""


def check_harness() -> None:
    """Raises DataError where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            "evaluate.harness: needs lm-evaluation-harness; pip install lm_eval, or leave it out"
        ) from error


def harness_metrics(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Metric]:
    """What the harness measures, as ``METRIC@TASK`` with its standard errors.

    Args:
        model: A language model of transformers; its mode is restored.
        tokenizer: Of the model.
        tasks: Names, such as ``arc_easy``.
        folder: Where task files of one's own are; None = those of the harness alone.
        limit: Samples of each task at most.
        batch_size: Samples of one step.

    Raises:
        DataError: The harness is not installed, or has no such task.
    """
    check_harness()
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = None
    if folder is not None:  # alone first: the harness reads thousands of files to know its own
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise DataError(
            f"evaluate.harness: the harness has no task {unknown[0]!r}; `lm_eval ls tasks` lists "
            "what there is, and evaluate.harness_folder names a folder with more"
        )
    with _own_generators(), evaluating(model):
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=100,
            log_samples=False,
            verbosity="ERROR",
        )
    metrics = {}
    for task, results in (found or {})["results"].items():
        number = (found or {})["n-samples"].get(task, {}).get("effective", 0)
        for key, value in results.items():
            name, _, variant = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, int | float) or not variant:
                continue
            error = results.get(f"{name}_stderr,{variant}")
            error = float(error) if isinstance(error, int | float) else None
            metrics[f"{_NAMES.get(name, name)}@{task}"] = Metric(float(value), number, error)
    return metrics


@contextmanager
def _own_generators() -> Iterator[None]:
    """The harness seeds all generators; afterwards they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
