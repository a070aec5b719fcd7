"""Tasks by name: each is one file in ``sosp_hub/tasks/kinds``, which says all that is its own.

Such a file loads without torch: what it computes with is imported inside its methods.
"""

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

KINDS = "sosp_hub.tasks.kinds"


class Task(ABC):
    """What a model is used for. A subclass is a file of its own, and one object is registered.

    Attributes:
        name: The hub's pipeline tag.
        aliases: Other names in recipes.
        auto_class: Class of transformers that builds the model.
        inputs: What a sample is.
        columns: Keys of the recipe's section ``data`` whose columns are read.
        head: Whether the model's head has an output for each label of the data.
        metrics: What can be measured; the first is measured where a recipe says nothing.
        counted: What metrics are means over.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    auto_class: ClassVar[str]
    inputs: ClassVar[Literal["images", "texts"]]
    columns: ClassVar[tuple[str, ...]]
    head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]]
    counted: ClassVar[str] = "samples"

    @abstractmethod
    def rows(self, table: Any, section: Any, where: str) -> Any:
        """The samples of a table (`datasets.Dataset`) that has the columns."""

    @abstractmethod
    def prepare(self, data: Any) -> Any:
        """Opened data (`OpenData`) with labels as numbers, and its subsets drawn."""

    @abstractmethod
    def split(self, data: Any, name: str, processor: Any, *, augment: bool) -> Any:
        """One split as batches that a model takes (`Split`)."""

    def configure(self, config: Any, data: Any) -> None:  # noqa: B027 most have nothing to say
        """What a transformers config has to say beside its labels, of a model with a new head."""

    def default_metrics(self, info: Any) -> tuple[str, ...]:
        """What is measured where the recipe says nothing.

        Args:
            info: What is known of the data (`DataInfo`); None before it is opened.
        """
        del info
        return self.metrics[:1]

    @abstractmethod
    def example_inputs(self, loaded: Any, batch_size: int, num_tokens: int) -> Any:
        """Inputs for a trace or a timing, the same each time."""

    def meters(self, info: Any) -> Mapping[str, Any]:
        """Metrics of its own beside loss, accuracy and perplexity (`tasks.metrics.Meter`)."""
        del info
        return {}

    def use(self) -> list[str]:
        """Lines of a card that run a model of texts, with ``tokenizer`` and ``model``."""
        return [
            'inputs = tokenizer("The weather today is", return_tensors="pt")',
            "print(model(**inputs).logits)",
        ]


_TASKS: dict[str, Task] = {}


def register(task: type[Task]) -> type[Task]:
    """Makes a task known; a decorator of its class.

    Raises:
        ValueError: A name that is taken.
    """
    made = task()
    for name in (task.name, *task.aliases):
        known = _TASKS.setdefault(name, made)
        if type(known).__qualname__ != task.__qualname__:
            raise ValueError(f"two tasks are called {name!r}")
    return task


def tasks() -> dict[str, Task]:
    """All tasks by their names, without aliases."""
    package = importlib.import_module(KINDS)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{KINDS}.{module.name}")
    return {name: task for name, task in sorted(_TASKS.items()) if name == task.name}


def known_task(name: str | None) -> Task | None:
    """The task of this name or alias; None where there is none."""
    tasks()
    return _TASKS.get(name or "")


def find_task(name: str) -> Task:
    """The task of this name or alias.

    Raises:
        ValueError: There is none; says which there are.
    """
    task = known_task(name)
    if task is None:
        near = difflib.get_close_matches(name, list(_TASKS), n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"got {name!r}{guess}; expected one of {', '.join(tasks())}")
    return task


def metric_names(chosen: Sequence[str] | None, task: Task, info: Any) -> tuple[str, ...]:
    """The metrics that are measured."""
    return tuple(chosen) if chosen else task.default_metrics(info)
