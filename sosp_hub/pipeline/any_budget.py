"""A published model at another budget: scores and calibration inputs give any of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sosp_hub import cut
from sosp_hub.checkpoint import io
from sosp_hub.errors import BudgetError, ModelError
from sosp_hub.modes import callers_device, in_own_modes

if TYPE_CHECKING:
    from torch import nn

    from sosp_hub.pipeline.scores import Scores


@in_own_modes
def from_pretrained(
    path_or_id: "str | Path", *, budget: "float | dict[str, float] | None" = None, **kwargs: Any
) -> "nn.Module":
    """Loads what ``save_pretrained`` or ``save_plan`` wrote, or any transformers or timm model.

    A model of no library is built by the caller, as it was before the cut:
    ``from_pretrained(folder, model=Net())`` gives another one that is cut and has the weights.

    The config and the headers of the weight files are read and checked first. No tensor of the
    model is made up and none of the files is left out, except for a head that is asked for.

    Args:
        path_or_id: A folder or a hub id.
        budget: Another budget than that of the weights: the share that is kept, of what the run
            that made them counted, or with a name, ``{"params": 0.7}``. The dense model is loaded
            from where it was, cut by the stored scores, and rebuilt on the calibration inputs that
            a run with ``output.any_budget: true`` leaves; nothing is scored. Fine-tuning is not
            repeated.
        **kwargs: ``revision``, ``token``, ``cache_dir``, ``force_download`` and
            ``local_files_only`` for the hub; ``model_class``, a transformers class to load into,
            which may have a head that the files do not hold and lack one that they do;
            ``num_classes``, a new head of that size for a timm model; ``model`` and ``dtype`` for a
            model of no library (a plan is applied to ``model``, with ``example_inputs``); all else
            goes to the library. With ``budget`` only those for the hub.

    Returns:
        The model in eval mode, on torch's default device.

    Raises:
        CheckpointError: Damaged or hostile files, or weights that are not those of the config.
        HubError: A hub that cannot be reached, or has no such model.
        BudgetError: A budget that is none, or that cannot be met.
        OutputExistsError: A budget is given, and the folder lacks what it needs.
        ModelError: A budget is given, and the dense model is not to be had.

    Example:
        >>> import sosp_hub, tempfile, timm, torch
        >>> net = timm.create_model("test_resnet", num_classes=5).eval()
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 3, 32, 32),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, params=0.7)
        >>> small, folder = sosp_hub.apply(net, graph, plan), tempfile.mkdtemp()
        >>> path = sosp_hub.save_pretrained(small, folder)
        >>> sum(p.numel() for p in sosp_hub.from_pretrained(folder).parameters()) < sum(
        ...     p.numel() for p in net.parameters()
        ... )
        True
        >>> half = sosp_hub.from_pretrained("runs/any-budget", budget=0.5)  # doctest: +SKIP
    """
    placed = kwargs.keys() & {"device_map", "model"}
    model = _loaded(path_or_id, budget, kwargs)
    device = callers_device()
    placed = placed or getattr(model, "is_quantized", False)  # by its library, and refuses to move
    return model if placed or device.type in ("cpu", "meta") else model.to(device)


def _loaded(path_or_id: "str | Path", budget: Any, kwargs: dict[str, Any]) -> "nn.Module":
    if budget is None:
        return cut.from_pretrained(path_or_id, **kwargs)
    folder = io.fetch(path_or_id, kwargs)
    if kwargs:
        raise ModelError(
            f"from_pretrained: {', '.join(kwargs)}: a model that is cut anew takes none of the "
            "library's arguments; load it with budget= alone, and then move or convert it"
        )
    from sosp_hub.pipeline.scores import read_scores

    made = read_scores(folder, [f"budget.{key}={share}" for key, share in _shares(folder, budget)])
    import torch

    with torch.random.fork_rng(devices=[]):  # building a model may draw
        return _at_budget(made)


def _shares(folder: Path, budget: Any) -> "list[tuple[str, float]]":
    from sosp_hub.allocation import MEASURED
    from sosp_hub.pipeline.scores import recipe_of
    from sosp_hub.recipe.schema import BUDGETS

    named = budget
    if not isinstance(budget, dict):
        keys = list(recipe_of(folder).budget.targets())
        if len(keys) != 1:
            raise BudgetError(
                f"budget: got {budget!r}; the run counted {', '.join(keys) or 'no share'}: write "
                "which of them, such as budget={'params': 0.7}"
            )
        named = {keys[0]: budget}
    if not named:
        raise BudgetError("budget: got {}; name what is kept, such as budget={'params': 0.7}")
    for key, share in named.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        known = [name for name in BUDGETS if name not in ("threshold", *MEASURED)]
        if key not in known or not number or not 0 < share <= 1:
            raise BudgetError(
                f"budget: got {key}={share!r}; expected the share that is kept, in (0, 1], of "
                f"{', '.join(known)}"
            )
    return list(named.items())


def _at_budget(scores: "Scores") -> "nn.Module":
    from sosp_hub.data.source import DataInfo
    from sosp_hub.pipeline.blocks import as_blocks
    from sosp_hub.pipeline.planning import allocated
    from sosp_hub.reconstruction.norms import recalibrate_after
    from sosp_hub.reconstruction.rebuild import rebuild
    from sosp_hub.structure.trace import trace
    from sosp_hub.zoo.load import example_inputs, load_model

    recipe = scores.recipe
    batches = scores.inputs(recipe.rebuild.num_samples)
    if recipe.criterion.compensates() or recipe.criterion.compensate_bias:
        raise BudgetError(
            f"budget: the run of {scores.folder} folded gates or biases, for its own budget; run "
            "its recipe with criterion.compensate=false, or cut with --from-scores"
        )
    loaded = load_model(scores.model(), data=DataInfo(image_size=recipe.data.image_size))
    scores.check_weights(loaded.model)
    graph = trace(loaded.model, example_inputs(loaded), outputs=recipe.structure.outputs)
    gone = as_blocks(scores.blocks)
    plan = allocated(recipe, graph, scores.saliency, recipe.budget.targets(), gone=gone)
    verify = recipe.structure.verify
    if recipe.rebuilds():
        options = recipe.rebuild.options()
        small = rebuild(loaded.model, graph, plan, batches, norms=False, verify=verify, **options)
    else:
        small = cut.apply(loaded.model, graph, plan, verify=verify)
    if recipe.recalibrates():
        inputs = scores.inputs(recipe.criterion.num_samples)
        recalibrate_after(small.eval(), loaded.model, graph, plan, inputs)
    return small.eval()
