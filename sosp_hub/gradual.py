"""Cut, train, cut: a model that becomes smaller while it is trained, in the user's own loop.

Each round the model is traced and scored anew, cut in place by one more share of the whole way,
rebuilt where there is data for it, and what lives beside it (optimizer, averages of weights) is cut
with it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sosp_hub.allocation import allocate
from sosp_hub.atomic import write_text
from sosp_hub.compat.torch import unwrapped
from sosp_hub.compat.transformers import exportable_state
from sosp_hub.cost import Cost, cost
from sosp_hub.cut import apply_, carrying
from sosp_hub.errors import BudgetError, PlanError
from sosp_hub.modes import as_the_caller, evaluating, in_own_modes
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.schedule import Curve, kept_after
from sosp_hub.reconstruction.norms import carried, norm_moments, recalibrate_norm
from sosp_hub.reconstruction.rebuild import rebuilt_weights
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from sosp_hub.tasks.batches import check_batches
from sosp_hub.untrusted import UnreadableError, read_json

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn

_COSTS = {"macs": "macs", "params": "params", "memory_bytes": "bytes"}
_FILE = "sosp_schedule.json"


class GradualPruning:
    """Rounds of cuts in a training loop: call ``step`` after each optimizer step.

        pruning = GradualPruning(model, inputs, batches, rounds=5, every=200, macs=0.5,
                                 optimizer=optimizer, averages=[ema])
        for batch in loader:
            ...  # forward, backward, optimizer.step()
            pruning.step()

    Args:
        model: Becomes smaller in place. What ``torch.compile`` or DataParallel makes of one is
            looked through; of DistributedDataParallel pass the module inside, and wrap it anew
            after each cut.
        example_inputs: As for ``trace``.
        batches: Calibration batches; scored with, rebuilt with.
        rounds: Cuts.
        every: Steps from one cut to the next; the first one comes before the first step.
        share: How the shares go: ``cubic`` cuts most at the beginning (Zhu and Gupta,
            arXiv 1710.01878), ``linear`` the same each round.
        criterion: As for ``score``.
        optimizer: Of the model; its state follows each cut.
        averages: Copies of the model with averaged weights, which follow too.
        rebuild: Solve the weights that read what was cut again, each round.
        loss_fn: As for ``score``.
        limits: Further keywords of ``allocate``: floors, which are shares of the groups before the
            first round, ``round_to``, ``uniform``, ``target``.
        **budget: One of ``macs``, ``params``, ``memory_bytes``: the share that is kept at the end.

    Attributes:
        rounds_done: Cuts so far.
        plans: Of each cut, for the model as it was then.

    Raises:
        BudgetError: No such budget, or a schedule that is none.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> batches = [(torch.randn(16, 4), torch.randint(0, 2, (16,)))]
        >>> pruning = sosp_hub.GradualPruning(
        ...     net, (batches[0][0],), batches, rounds=2, every=3, params=0.5, optimizer=optimizer
        ... )
        >>> for step in range(6):
        ...     loss = torch.nn.functional.cross_entropy(net(batches[0][0]), batches[0][1])
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     cut = pruning.step()
        >>> pruning.rounds_done, net[0].out_features < 8
        (2, True)
    """

    @in_own_modes
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        batches: "Batches",
        *,
        rounds: int = 5,
        every: int = 100,
        share: Curve = "cubic",
        criterion: str = "taylor",
        optimizer: Optimizer | None = None,
        averages: Sequence[nn.Module] = (),
        rebuild: bool = True,
        loss_fn: "LossFn | None" = None,
        limits: Mapping[str, Any] | None = None,
        **budget: float,
    ) -> None:
        if len(budget) != 1 or next(iter(budget)) not in _COSTS:
            raise BudgetError(
                f"GradualPruning got the budget {budget or 'nothing'}; expected one of "
                f"{', '.join(f'{name}=0.5' for name in _COSTS)}"
            )
        ((self._name, self._kept),) = budget.items()
        if share not in (shares := get_args(Curve)):
            raise BudgetError(
                f"GradualPruning got share={share!r}; expected one of {', '.join(shares)}"
            )
        whole = all(type(number) is int and number >= 1 for number in (rounds, every))
        if not whole or type(self._kept) not in (int, float) or not 0 < self._kept <= 1:
            raise BudgetError(
                f"GradualPruning got {self._name}={self._kept!r}, rounds={rounds!r}, "
                f"every={every!r}; expected a share in (0, 1], and at least one round and step"
            )
        if limits and self._name in limits:
            raise BudgetError(
                f"GradualPruning got {self._name} twice, as the budget and in limits; leave it out "
                "of limits"
            )
        check_batches(batches, "GradualPruning")
        self._model, self._inputs = unwrapped(model), example_inputs
        self._batches = list(as_the_caller(batches))
        self._rounds, self._every, self._share = rounds, every, share
        self._criterion, self._loss_fn = criterion, loss_fn
        self._optimizer, self._averages = optimizer, list(averages)
        self._rebuild, self._limits = rebuild, dict(limits or {})
        self._steps = 0
        self._dense = self._value(cost(trace(model, example_inputs)))
        self.plans: list[PruningPlan] = []

    @property
    def rounds_done(self) -> int:
        """Cuts so far."""
        return len(self.plans)

    def step(self) -> bool:
        """Counts a step, and cuts where one is due; whether it did."""
        due = self.rounds_done < self._rounds and self._steps >= self.rounds_done * self._every
        if due:
            self.cut()
        self._steps += 1
        return due

    @in_own_modes
    def cut(self) -> PruningPlan:
        """The next round, now.

        Raises:
            BudgetError: All rounds are done, or floors do not allow the share.
        """
        if self.rounds_done == self._rounds:
            raise BudgetError(f"GradualPruning: all {self._rounds} rounds are done")
        with evaluating(self._model):
            graph = trace(self._model, self._inputs).after(self.plans)
            kept = kept_after(self._kept, self.rounds_done + 1, self._rounds, self._share)
            share = min(1.0, kept * self._dense / self._value(cost(graph)))
            saliency = score(
                self._model, graph, self._batches, criterion=self._criterion, loss_fn=self._loss_fn
            )
            limits: dict[str, Any] = self._limits
            if not self.plans:  # what the last round will ask, before anything is cut
                allocate(graph, saliency, **{**limits, self._name: self._kept})
            plan = allocate(graph, saliency, **{**limits, self._name: share})
            moments = norm_moments(self._model, self._batches)
            self._apply(graph, plan)
        self.plans.append(plan)
        recalibrate_norm(self._model, self._batches, carried(moments, self._model, graph, plan))
        return plan

    def _apply(self, graph: Any, plan: PruningPlan, *, solve: bool = True) -> None:
        other = None
        if solve and self._rebuild and plan.kept:
            rebuilt = rebuilt_weights(self._model, graph, plan, self._batches)
            other, plan = rebuilt.model, rebuilt.plan
            _exchange(self._model, other)
        beside = [] if self._optimizer is None else [self._optimizer]
        try:
            follow = [carrying(each, graph, plan, self._model) for each in beside + self._averages]
            apply_(self._model, graph, plan, verify="fast", strict=True)
        except BaseException:
            if other is not None:
                _exchange(self._model, other)
            raise
        for each in follow:
            each(self._model)

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on needs beside the states of model and optimizer."""
        return {
            "steps": self._steps,
            "dense": self._dense,
            "params": self._num_params(),
            "plans": [plan.to_json() for plan in self.plans],
        }

    @in_own_modes
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cuts the dense model, its optimizer and averages as they were when the state was saved.

        Their own states are loaded after it. Of a model that is cut already, such as
        ``from_pretrained`` gives, use `resume`.

        Raises:
            PlanError: The model is not the dense one.
        """
        if self.plans:
            raise PlanError("GradualPruning: this one has cut its model already; make a new one")
        with evaluating(self._model):
            for text in state["plans"]:
                plan = PruningPlan.from_json(text)
                self._apply(trace(self._model, self._inputs), plan, solve=False)
                self.plans.append(plan)
        self._steps, self._dense = state["steps"], state["dense"]

    def save(self, folder: str | Path) -> None:
        """Writes the state beside a checkpoint."""
        write_text(Path(folder) / _FILE, json.dumps(self.state_dict()))

    def resume(self, folder: str | Path) -> None:
        """Reads the state beside a checkpoint whose model was loaded as it was: cut.

        Raises:
            PlanError: No such file, or a model of another size than that of the checkpoint.
        """
        path = Path(folder) / _FILE
        try:
            state = read_json(path)
        except (OSError, UnreadableError) as error:
            raise PlanError(f"{path}: no schedule that was saved ({error})") from error
        self.resume_state(state, str(path))

    def resume_state(self, state: Any, where: str) -> None:
        """`resume` from what `state_dict` gave, with words for where that comes from."""
        try:
            plans = [PruningPlan.from_json(text) for text in state["plans"]]
            steps, dense, params = int(state["steps"]), float(state["dense"]), int(state["params"])
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{where}: no schedule that was saved ({error})") from error
        if params != self._num_params():
            raise PlanError(
                f"{where}: was saved beside a model of {params:,} parameters, this one has "
                f"{self._num_params():,}; load the checkpoint's with sosp_hub.from_pretrained"
            )
        self.plans, self._steps, self._dense = plans, steps, dense

    def _num_params(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def _value(self, found: Cost) -> float:
        return getattr(found, _COSTS[self._name])


def _exchange(model: nn.Module, other: nn.Module) -> None:
    """Each gets the other's weights; the parameters themselves stay where they are."""
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data, theirs[name].data = theirs[name].data, parameter.data


def trainer_callback(make: Callable[[nn.Module, Optimizer], GradualPruning]) -> Any:
    """A callback of transformers' Trainer that cuts while it trains.

        trainer = Trainer(model, ..., callbacks=[trainer_callback(
            lambda model, optimizer: GradualPruning(
                model, inputs, batches, rounds=5, every=200, macs=0.5, optimizer=optimizer))])

    Each checkpoint of the Trainer holds the state of the schedule (in ``trainer_state.json``); to
    go on from one, load its model with ``sosp_hub.from_pretrained(checkpoint)`` and train with
    ``resume_from_checkpoint=checkpoint``. The best checkpoint (``load_best_model_at_end``, early
    stopping) is one of those since the last cut: what came before it was of a larger model.

    Args:
        make: From the model and the optimizer of the Trainer to the schedule.

    Example:
        >>> import sosp_hub
        >>> callback = sosp_hub.trainer_callback(
        ...     lambda model, optimizer: sosp_hub.GradualPruning(
        ...         model, inputs, batches, macs=0.5, optimizer=optimizer
        ...     )
        ... )  # for Trainer(..., callbacks=[callback])
    """
    from transformers import TrainerCallback  # the package does without

    class PruningCallback(TrainerCallback, exportable_state()):
        pruning: GradualPruning | None = None
        schedule: Any = None  # what `state` gave, where the Trainer restores its callbacks
        guard: RemovableHandle | None = None

        def state(self) -> dict[str, Any]:
            schedule = self.schedule if self.pruning is None else self.pruning.state_dict()
            return {"args": {}, "attributes": {"schedule": schedule}}

        def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            del args, state, control
            if isinstance(model := given.get("model"), nn.Module):
                self.guard = model.register_load_state_dict_pre_hook(_refuse_cut)

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            del args, control
            if self.guard is not None:
                self.guard.remove()
            if hasattr(given["model"], "merge_and_unload"):
                raise PlanError(
                    f"trainer_callback: the {type(given['model']).__name__} has adapters beside "
                    "its weights, and checkpoints would hold these alone, of a cut model that is "
                    "in no file; train without adapters, or add them after the last cut"
                )
            optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
            self.pruning = make(given["model"], optimizer)
            if state.global_step:
                saved = state.stateful_callbacks.get(type(self).__name__, {})
                where = f"the checkpoint of step {state.global_step}"
                self.pruning.resume_state(saved.get("attributes", {}).get("schedule"), where)

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            del args, control, given
            assert self.pruning is not None
            if self.pruning.step():
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    return PruningCallback()


def _refuse_cut(model: nn.Module, state: Mapping[str, Any], *_: Any) -> None:
    """Before a checkpoint of a cut model is loaded into the dense one."""
    own = dict(model.named_parameters())
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            raise PlanError(
                f"the checkpoint holds {name!r} with {list(tensor.shape)}, as it was cut, the "
                f"Trainer's model has {list(own[name].shape)}; give the Trainer the model that "
                "sosp_hub.from_pretrained(checkpoint) loads"
            )
