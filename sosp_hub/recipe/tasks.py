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
Inputs = Literal["images", "texts", "own"]


class Task(ABC):
    """What a model is used for. A subclass is a file of its own, and one object is registered.

    Attributes:
        name: The hub's pipeline tag.
        aliases: Other names in recipes.
        auto_class: Class of transformers that builds the model; "" = that of the weights.
        other_auto_classes: Others, for models that it does not build.
        by_type: Classes of transformers by ``model_type``, where no `auto_class` has them.
        by_timm: Whether timm's models do it; without a head where `auto_class` has none.
        inputs: What a sample is; ``own`` = what the model's own processor makes of a row.
        tokens: Whether samples may be token ids.
        auto_processor: Class of transformers that loads it, for ``own``; None = there is none.
        columns: Keys of the recipe's section ``data`` whose columns are read.
        more_columns: Keys of columns that are read where the data has them.
        pixels: Whether images in memory with a class each will do (idx files, digits).
        outputs: Names of the outputs that count, where not all do.
        head: Whether the model's head has an output for each label of the data.
        metrics: What can be measured; the first is measured where a recipe says nothing.
        of_all: Those that are of all samples together, and no means over them.
        counted: What metrics are means over.
        criterion: The section of a recipe that names no criterion; {} = what scores elsewhere.
        batch_size: Samples of one step where a model has no recipe; None = the recipe's defaults.
        learns: Whether there is something to train a model with; else only to follow another.
        pretrained_rate: Peak learning rate of weights that were trained.
        random_rate: Peak learning rate of weights that were random.
        sample: Lines of a card: their last value is what ``pipeline(name)`` is given. () = `use`.
        has_pipeline: Whether transformers has a pipeline of this name.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    auto_class: ClassVar[str]
    other_auto_classes: ClassVar[tuple[str, ...]] = ()
    by_type: ClassVar[Mapping[str, str]] = {}
    by_timm: ClassVar[bool] = False
    inputs: ClassVar[Inputs]
    tokens: ClassVar[bool] = True
    auto_processor: ClassVar[str | None] = None
    columns: ClassVar[tuple[str, ...]]
    more_columns: ClassVar[tuple[str, ...]] = ()
    pixels: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...] | None] = None
    head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]]
    of_all: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[str] = "samples"
    criterion: ClassVar[Mapping[str, Any]] = {}
    batch_size: ClassVar[int | None] = None
    learns: ClassVar[bool] = True
    pretrained_rate: ClassVar[float] = 5e-5
    random_rate: ClassVar[float] = 1e-3
    sample: ClassVar[tuple[str, ...]] = ()
    has_pipeline: ClassVar[bool] = True

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
        """What a transformers config has to say beside its labels, where these are new or none."""

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

    def loss_fn(self, model: Any, dense: Any = None) -> Any:
        """Loss of (outputs, targets) where the model's own is not the one; None = the model's own.

        Args:
            model: Whose outputs it gets.
            dense: The model that it was cut from, whose outputs may be its targets; None = it is
                that model.
        """
        del model, dense

    def meters(self, info: Any, processor: Any = None) -> Mapping[str, Any]:
        """Metrics of its own beside loss, accuracy and perplexity (`tasks.metrics`).

        Args:
            info: What is known of the data (`DataInfo`).
            processor: How the model wants its inputs (`Processing`).
        """
        del info, processor
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
