"""Parameters that ``apply_`` replaced, and the optimizers that still hold them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from sosp_hub.compat.torch import TensorTable, after_steps
from sosp_hub.errors import PlanError
from sosp_hub.plan import PruningPlan


class Replaced(NamedTuple):
    """What became of a parameter.

    Attributes:
        name: Its name in the model before the cut.
        plan: The plan of the cut.
    """

    name: str
    plan: PruningPlan


_REPLACED = TensorTable()  # from the old parameter; it goes when nobody holds the parameter
_WATCH: list[Any] = []


def note_replaced(parameters: Mapping[str, nn.Parameter], plan: PruningPlan) -> None:
    """Remembers parameters that no model holds any more, and watches the steps of optimizers."""
    for name, parameter in parameters.items():
        _REPLACED[parameter] = Replaced(name, plan)
    if not _WATCH:
        _WATCH.append(after_steps(_refuse_stale))


def replaced(parameter: Tensor) -> Replaced | None:
    """What became of a parameter, if ``apply_`` replaced it."""
    return _REPLACED.get(parameter)


def _refuse_stale(optimizer: Optimizer, *_: Any) -> None:
    """Raises where a step moved nothing because all that it could move was replaced."""
    if not len(_REPLACED):
        return
    stale = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter in _REPLACED
    ]
    if stale and all(parameter.grad is None for parameter in stale):
        raise PlanError(
            f"this optimizer holds {len(stale)} parameters that apply_ replaced, such as "
            f"{_REPLACED[stale[0]].name!r}; they get no gradients, so its steps do not train the "
            "cut model: call sosp_hub.carry(optimizer, model, graph, plan) after apply_, or make "
            "a new optimizer"
        )
