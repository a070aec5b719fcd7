"""The verbs that cut a model and what lives beside it: by a plan in memory or a published one."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from sosp_hub.checkpoint import io
from sosp_hub.checkpoint.cut_files import cut_files
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.checkpoint.own_save import describe_cut, skeleton_before, why_not_plain
from sosp_hub.checkpoint.unregistered import tell_unregistered
from sosp_hub.checkpoint.weightless import holds_only_a_plan, read_plan
from sosp_hub.command_name import command_name
from sosp_hub.compat.torch import unwrapped
from sosp_hub.compat.versions import tell_newer
from sosp_hub.errors import CheckpointError, PlanError, SospHubError
from sosp_hub.modes import in_own_modes
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.trace import trace
from sosp_hub.surgery import apply as surgery
from sosp_hub.surgery.apply import Verify
from sosp_hub.surgery.carry import carried_tensors, copy_of_the_model
from sosp_hub.surgery.carry import carrying as surgery_carrying

Carried = TypeVar("Carried", Optimizer, nn.Module, Mapping[str, Tensor])


@in_own_modes
def apply(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    verify: Verify = "thorough",
    *,
    strict: bool = False,
) -> nn.Module:
    """A new, smaller model of the same class; the given model stays as it is.

    Of what DataParallel, DistributedDataParallel or ``torch.compile`` made, the model inside is
    cut. Gates of the plan are folded into the weights that read the kept structures, and its
    shifts into the biases of those layers, so that the result needs no extra parameter. The result
    also says what was cut, so that ``save_pretrained``, ``push_to_hub``, ``Trainer``, timm's and
    ``PyTorchModelHubMixin``'s own ways of saving write what loads again.

    Args:
        model: The model that ``graph`` was traced from.
        graph: What ``trace`` found.
        plan: Kept indices per group.
        verify: ``thorough`` compares every tensor shape of the cut model's forward pass with the
            predicted one, and its outputs with those of the masked model on the traced inputs;
            ``fast`` compares shapes only and needs no data, but where the cut model takes other
            steps than were traced: there outputs are compared, or, without weights, it is told.
        strict: Raise where the cut of a group goes wrong. Else that group stays whole and all
            else is cut; ``graph.unproved`` and a line of the log say which, and why. A plan with
            gates or shifts is cut as it is or not at all.

    Raises:
        PlanError: The plan was made for another model, breaks a tie, has gates that no weight
            of their own reads or shifts of what is no bias, or is no plan.
        VerificationError: The cut model does not compute what the masked model computes, and no
            group was found that can be left whole, or ``strict``; its ``groups`` are those where
            it goes wrong.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, structures=0.5)
        >>> small = sosp_hub.apply(net, graph, plan)
        >>> small[0].out_features, net[0].out_features
        (4, 8)
    """
    model = unwrapped(model)
    pruned = surgery.apply(model, graph, plan, verify, strict=strict)
    describe_cut(pruned, skeleton_before(model), _shown(graph, verify))
    tell_unregistered(pruned)
    if plan.provenance.get("uniform") is True:
        io.tell_obstacle(why_not_plain(pruned))
    return pruned


@in_own_modes
def apply_(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    verify: Verify = "thorough",
    *,
    strict: bool = False,
) -> nn.Module:
    """``apply`` in place: the given model becomes the smaller one, after the cut was verified.

    The model object stays; its submodules and parameters are new ones, so fetch them again where
    you hold any. An optimizer holds the old ones: ``sosp_hub.carry`` points it at the new ones,
    and a step of an optimizer that was not carried raises.

    Args:
        model: As for ``apply``, like the others.
        graph: What ``trace`` found.
        plan: Kept indices per group.
        verify: How much is compared.
        strict: Whether a group whose cut goes wrong is an error.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, structures=0.5)
        >>> sosp_hub.apply_(net, graph, plan) is net
        True
        >>> net[0].out_features
        4
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise PlanError(
            "apply_: DistributedDataParallel holds the parameters that it was made with; cut "
            "model.module and wrap the result again"
        )
    inside = unwrapped(model)
    skeleton = skeleton_before(inside) if isinstance(inside, nn.Module) else None
    surgery.apply_(inside, graph, plan, verify, strict=strict)
    describe_cut(inside, skeleton, _shown(graph, verify))
    tell_unregistered(inside)
    if plan.provenance.get("uniform") is True:
        io.tell_obstacle(why_not_plain(inside))
    return model


@in_own_modes
def carry(
    what: Carried,
    pruned: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    *,
    dense: nn.Module | None = None,
) -> Carried:
    """Cuts what belongs to a model like the model was cut; call it right after each cut.

    Args:
        what: An optimizer of the model: it is pointed at the parameters of ``pruned``, its moments
            are cut like the weights, and its groups and learning rates stay, as do parameters of
            other models that it holds. A copy of the model
            with averaged weights (EMA), or what holds one, such as
            ``torch.optim.swa_utils.AveragedModel``: it is cut in place. Or a dictionary of tensors
            that are named and shaped like the model's: a new one is returned. Gates and shifts
            of the plan are folded into weights; moments stay those of the weights as they were.
        pruned: The cut model.
        graph: What ``trace`` found in the model before the cut.
        plan: The plan of the cut.
        dense: For an optimizer after ``apply``: the model before the cut. After ``apply_``, which
            remembers what it replaced, nothing.

    Returns:
        The optimizer or the module itself; a new dictionary.

    Raises:
        PlanError: A tensor that is none of the model's, or not of its size before the cut, or an
            optimizer with none of its parameters, or with tensors that do not say how they are cut;
            what was given is left as it was.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, structures=0.5)
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> small = sosp_hub.apply(net, graph, plan)
        >>> optimizer = sosp_hub.carry(optimizer, small, graph, plan, dense=net)
        >>> [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
        [(4, 4), (4,), (2, 4), (2,)]
    """
    if not isinstance(graph, Graph) or not isinstance(plan, PruningPlan):
        raise PlanError(
            f"carry got a {type(graph).__name__} and a {type(plan).__name__}; expected "
            "carry(what, pruned, graph, plan)"
        )
    plan = graph.provable(plan)
    pruned, dense = unwrapped(pruned), unwrapped(dense)
    if what is pruned:
        raise PlanError(
            "carry got one model as what follows the cut and as the cut model; give what "
            "apply(...) returned as the second, or cut it with apply_(model, graph, plan)"
        )
    if isinstance(what, Optimizer | nn.Module):
        carrying(what, graph, plan, dense)(pruned)
        return what
    if isinstance(what, Mapping) and all(isinstance(each, Tensor) for each in what.values()):
        return carried_tensors(what, pruned, graph, plan)
    raise PlanError(
        f"carry got a {type(what).__name__}; expected an optimizer, a module with averaged weights "
        "or a dictionary of tensors such as a state dict"
    )


def carrying(
    what: Optimizer | nn.Module, graph: Graph, plan: PruningPlan, dense: nn.Module | None = None
) -> Callable[[nn.Module], None]:
    """`sosp_hub.surgery.carry.carrying`; a module then also says what was cut when it is saved."""
    put = surgery_carrying(what, graph, plan, dense)
    if isinstance(what, Optimizer):
        return put
    average = copy_of_the_model(what, graph)
    skeleton = skeleton_before(average)

    def put_and_describe(pruned: nn.Module) -> None:
        put(pruned)
        describe_cut(average, skeleton, None)

    return put_and_describe


def _shown(graph: Graph, verify: Verify) -> Any:
    return graph.example_inputs if verify == "thorough" else None


@overload
def apply_plan_file(
    path: str | Path,
    base: "nn.Module | str | Path | None" = None,
    *,
    out: None = None,
    example_inputs: Any = None,
    **kwargs: Any,
) -> nn.Module: ...


@overload
def apply_plan_file(
    path: str | Path,
    base: "str | Path | None" = None,
    *,
    out: str | Path,
    example_inputs: Any = None,
    **kwargs: Any,
) -> Path: ...


@in_own_modes
def apply_plan_file(
    path: str | Path,
    base: "nn.Module | str | Path | None" = None,
    *,
    out: str | Path | None = None,
    example_inputs: Any = None,
    **kwargs: Any,
) -> nn.Module | Path:
    """Cuts a base model by a plan that was published alone: in memory, or from folder to folder.

    Args:
        path: The plan, or the folder that holds it.
        base: The base model or its folder; None takes the id and revision that the plan names.
        out: A folder to write the pruned model to, tensor by tensor: the base is never loaded, so
            that a model of any size takes less than 4 GB of memory. The files are those that
            `apply` and `save_pretrained` would write. None = in memory.
        example_inputs: As for ``trace``, where no config tells how the inputs of the base look.
        **kwargs: For `from_pretrained` of the base; with ``out`` where to fetch it from, and
            ``max_shard_size``.

    Returns:
        The pruned model, verified against the masked one, without any fine-tuning; or ``out``, of
        which all shapes and some tensors were verified.

    Raises:
        CheckpointError: No usable plan, a base that is a plan too or whose inputs cannot be made
            up, or with ``out`` one that has no weights in safetensors files or belongs to no
            library.
        PlanError: The plan was made for another model, or the base is quantised.
        HubError: The base cannot be fetched.
        OutputError: ``out`` cannot be written; what was there stays.

    Example:
        >>> import sosp_hub, tempfile, timm, torch
        >>> net = timm.create_model("test_resnet", num_classes=5).eval()
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 3, 32, 32),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, params=0.7)
        >>> small = sosp_hub.apply(net, graph, plan)
        >>> from dataclasses import replace
        >>> folder = sosp_hub.save_plan(replace(plan, base_model="me/dense"), tempfile.mkdtemp())
        >>> again = sosp_hub.apply_plan_file(folder, net)
        >>> [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]
        True
    """
    plan = read_plan(path)
    if out is not None:
        return _cut_files(plan, base, Path(out), example_inputs, kwargs)
    if not isinstance(base, nn.Module):
        base = _load_base(plan, base, kwargs)
    surgery.check_not_packed(base)
    if example_inputs is not None:
        return apply(base, trace(base, example_inputs), plan, strict=True).eval()
    inputs = made_up_inputs(base)
    if inputs is None:
        raise CheckpointError(
            f"{type(base).__name__}: no config tells how its inputs look; pass example_inputs=, "
            "the inputs of one forward pass, as for sosp_hub.trace"
        )
    if isinstance(inputs, dict) and hasattr(getattr(base, "config", None), "use_cache"):
        inputs["use_cache"] = False
    return apply(base, trace(base, inputs), plan, strict=True).eval()


def from_pretrained(path_or_id: str | Path, **kwargs: Any) -> nn.Module:
    """Loads a checkpoint as it is: `sosp_hub.from_pretrained` without a budget.

    Args:
        path_or_id: A folder or a hub id.
        **kwargs: As there.
    """
    tell_newer()
    folder = io.fetch(path_or_id, kwargs)
    if holds_only_a_plan(folder):
        return apply_plan_file(folder, kwargs.pop("model", None), **kwargs)
    return io.load(folder, kwargs, str(path_or_id))


def _cut_files(
    plan: PruningPlan,
    base: "nn.Module | str | Path | None",
    out: Path,
    example_inputs: Any,
    kwargs: dict[str, Any],
) -> Path:
    if isinstance(base, nn.Module):
        raise CheckpointError(
            "apply_plan_file with out= cuts the files of a folder; give base=FOLDER, or save what "
            "sosp_hub.apply makes of the model"
        )
    size = {key: kwargs.pop(key) for key in ("max_shard_size",) if key in kwargs}
    folder = io.fetch(base or _name_of_base(plan, kwargs), kwargs)
    if kwargs:
        raise CheckpointError(
            f"apply_plan_file with out= loads nothing: {', '.join(kwargs)} cannot be used"
        )
    if holds_only_a_plan(folder):
        raise CheckpointError(f"{folder}: holds a plan and no weights; give the base it names")
    return cut_files(plan, folder, out, example_inputs=example_inputs, **size)


def _name_of_base(plan: PruningPlan, kwargs: dict[str, Any]) -> str:
    """The base that a plan names; its revision goes into the arguments for the hub."""
    if plan.base_model is None:
        raise CheckpointError("the plan names no base model: pass base=FOLDER")
    if plan.base_revision and not Path(str(plan.base_model)).is_dir():
        kwargs.setdefault("revision", plan.base_revision)
    return str(plan.base_model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code: 0 done, 2 something for the user to change."""
    options = command_parser().parse_args(arguments)
    given = {"revision": options.revision} if options.revision else {}
    try:
        folder = apply_plan_file(
            options.plan,
            options.base,
            out=options.out,
            max_shard_size=options.max_shard_size,
            **given,
        )
    except SospHubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    size = sum(path.stat().st_size for path in written)
    print(f"{folder}: {size / 1e6:.1f} MB of weights, in {len(written)} files")
    return 0


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``cut``."""
    parser = argparse.ArgumentParser(
        prog=command_name("cut"),
        description="Cuts the weight files of a model by a plan, tensor by tensor, into another "
        "folder: the model is never in memory. Shapes are verified, outputs are not.",
    )
    parser.add_argument("plan", metavar="PLAN", help="sosp_plan.json, or the folder that holds it")
    parser.add_argument("out", metavar="OUT", help="folder to write the pruned model to")
    parser.add_argument(
        "--base", metavar="PATH_OR_ID", help="the base model; by default the one the plan names"
    )
    parser.add_argument("--revision", help="commit, branch or tag of the base on the hub")
    parser.add_argument("--max-shard-size", default="5GB", help="of one weight file")
    return parser


def _load_base(plan: PruningPlan, base: "str | Path | None", kwargs: dict[str, Any]) -> nn.Module:
    """The base model with its weights; a base that is a plan itself could go round in circles."""
    return io.from_pretrained(base or _name_of_base(plan, kwargs), **kwargs)


if __name__ == "__main__":
    sys.exit(main())
