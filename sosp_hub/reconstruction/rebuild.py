"""``rebuild``: a cut whose readers are solved again, so that little of it is lost."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat, takewhile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import unwrapped
from sosp_hub.cut import apply
from sosp_hub.errors import DataError, PlanError, SospHubError
from sosp_hub.modes import as_the_caller, evaluating, in_own_modes, without_autocast
from sosp_hub.plan import PruningPlan
from sosp_hub.progress import progress
from sosp_hub.reconstruction.gram import Gram, ProcessSum
from sosp_hub.reconstruction.norms import recalibrate_after, recalibrate_where_nearer
from sosp_hub.reconstruction.products import Product, Watched, from_matrices, to_matrices
from sosp_hub.reconstruction.readers import PartlyCut, Reader, partly_cut
from sosp_hub.reconstruction.refine import RefinedBlock, refined
from sosp_hub.reconstruction.ridge import Layer
from sosp_hub.reconstruction.stream import Stream
from sosp_hub.structure.copies import copy_model, share_model
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.isolation import isolated
from sosp_hub.surgery.apply import Verify, check_arguments, check_model, fold
from sosp_hub.surgery.tensors import get_tensor
from sosp_hub.tasks.batches import as_batch, check_batches, num_samples

if TYPE_CHECKING:
    from sosp_hub.types import Batches

logger = logging.getLogger("sosp_hub")

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""What ``damping="auto"`` tries in each layer."""
_OUTPUTS = 128  # of a layer, by which that is judged


@dataclass(frozen=True)
class RebuiltLayer:
    """What became of one weight that reads a cut axis.

    Attributes:
        tensor: Its name.
        inputs: Columns before the cut.
        kept: Columns after it.
        rows: Calibration rows (tokens, positions) that it was fitted to.
        damping: Share of the mean diagonal.
        error_cut: Squared distance to its uncut output over the squares of that, after the cut.
        error: The same once it was solved again.
    """

    tensor: str
    inputs: int
    kept: int
    rows: int
    damping: float
    error_cut: float
    error: float


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A model whose weights make up for a cut, before that cut.

    Attributes:
        model: In the dense model's shapes; ``apply`` with ``plan`` cuts it.
        plan: The plan without what is in these weights already (gates, shifts).
        layers: What was solved again, in the order of the forward pass.
        blocks: What was trained after that, in the same order.
        left: Why other weights that read a cut axis are as they were, by name.
    """

    model: nn.Module
    plan: PruningPlan
    layers: tuple[RebuiltLayer, ...]
    blocks: tuple[RefinedBlock, ...]
    left: dict[str, str]


@in_own_modes
def rebuild(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    batches: "Batches",
    *,
    damping: float | Literal["auto"] = "auto",
    dense_share: float = 0.0,
    refine_steps: int = 0,
    norms: bool | None = None,
    verify: Verify = "thorough",
    process_sum: ProcessSum | None = None,
) -> nn.Module:
    """``apply``, and every weight that reads a cut axis is solved again to make up for what went.

    Layer by layer, in the order of the forward pass and on what the layers before now give, the
    kept columns of a weight come as near as they can to what it computed with all of them: a ridge
    regression toward the old weights on the calibration inputs. It needs no labels and no
    gradients; a bias takes the mean. Choose with any criterion, then rebuild.

    Args:
        model: The dense model; it stays as it is.
        graph: What ``trace`` found in it.
        plan: Kept indices per group; gates and shifts are folded in first.
        batches: Calibration data, ``(inputs, labels)`` or dicts; labels take no part.
        damping: How strongly weights are held to what they were, as a share of the mean square of
            a layer's inputs; ``auto``: of each layer the one of least error on a quarter of the
            data that the fit does not see.
        dense_share: What a layer should compute: 0 = what it computed with all its columns, of
            what it is given now; 1 = what it computes in the dense model; between: a mix. Where a
            normalisation or another mean runs over what is cut, so that no mask stands for it, it
            is always what it computes in the dense model.
        refine_steps: Steps of Adam on all weights of each block (the smallest module that holds
            all that makes and reads what is cut: an MLP, an attention, a residual block), after its
            readers are solved, toward what the uncut block computes of the same inputs; a batch a
            step. Every fourth batch is held out, and what is best on those stays.
        norms: Re-estimate BatchNorm statistics afterwards, so that each channel has the mean and
            the deviation that it has in the dense model on these batches; None = yes, unless the
            outputs on these batches are then half as far again from the dense model's, but for
            ``refine_steps``, which are made for the statistics as they are, and where batches of
            one sample allow it.
        verify: As in ``apply``.
        process_sum: Sum of a tensor over all processes, where each has its own batches.

    Returns:
        A new, smaller model of the same class.

    Raises:
        PlanError: A plan that does not fit, or a model without weights.
        DataError: No calibration data, activations that are not finite, or norms that are to be
            re-estimated from one sample alone.
        VerificationError: As ``apply(strict=True)`` does: the weights were made for the whole plan.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, structures=0.5)
        >>> batches = [(torch.randn(16, 4), torch.randint(0, 2, (16,))) for _ in range(4)]
        >>> small = sosp_hub.rebuild(net, graph, plan, batches)
        >>> small[2].in_features
        4
    """
    model = unwrapped(model)
    check_batches(batches, "rebuild")
    batches = list(as_the_caller(batches))
    try:
        rebuilt = rebuilt_weights(
            model,
            graph,
            plan,
            batches,
            damping=damping,
            dense_share=dense_share,
            refine_steps=refine_steps,
            process_sum=process_sum,
        )
    except SospHubError:
        raise
    except Exception:
        apply(model, graph, plan, verify=verify, strict=True)  # tells whose cut does not run
        raise
    pruned = apply(rebuilt.model, graph, rebuilt.plan, verify=verify, strict=True)
    if plan.kept and (not refine_steps if norms is None else norms):
        try:
            alone = process_sum or (lambda tensor: tensor)
            with isolated(model), without_autocast(model):
                estimate = recalibrate_after if norms else recalibrate_where_nearer
                estimate(pruned, model, graph, plan, batches, alone)
        except DataError as error:
            if norms:
                raise
            logger.warning("rebuild: %s", error)
    return pruned


def rebuilt_weights(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    batches: "Batches",
    *,
    damping: float | Literal["auto"] = "auto",
    dense_share: float = 0.0,
    refine_steps: int = 0,
    process_sum: ProcessSum | None = None,
) -> Rebuilt:
    """What ``rebuild`` cuts, and what it did to each layer; arguments as there."""
    _check(model, graph, plan, damping, dense_share, refine_steps)
    check_batches(batches, "rebuild")
    kept_batches = [as_batch(batch) for batch in as_the_caller(batches)]
    result = _own_readers(model, graph, plan)
    if plan.gates or plan.shifts:
        fold(result, graph, plan)
    partly = partly_cut(_own_readers(result, graph, plan).eval(), graph, plan)
    partly.model.requires_grad_(False)
    rest = replace(plan, gates={}, shifts={})
    layers: list[RebuiltLayer] = []
    refined: list[RefinedBlock] = []
    left = dict(partly.left)
    if partly.readers:
        with isolated(partly.model), evaluating(result), without_autocast(result):
            options = _Options(damping, dense_share, refine_steps, process_sum)
            work = _Work(model, result, graph, partly, kept_batches, options)
            blocks = _blocks(graph, partly, work.order, work.runs_once) if refine_steps else {}
            layers += work.run(blocks)
            left |= work.left
            refined += work.blocks
    _tell(layers, left)
    return Rebuilt(result, rest, tuple(layers), tuple(refined), left)


def _own_readers(model: nn.Module, graph: Graph, plan: PruningPlan) -> nn.Module:
    """A copy that shares all but the weights that read what is cut, and vectors such as biases."""
    readers = {member.tensor for name in plan.kept for member in graph.readers(name)}
    vectors = {name for name, parameter in model.named_parameters() if parameter.dim() < 2}
    return share_model(model, graph.written | readers | vectors)


def _check(
    model: Any, graph: Any, plan: Any, damping: Any, dense_share: Any, refine_steps: Any
) -> None:
    check_arguments(model, graph, plan)
    number = isinstance(damping, int | float) and not isinstance(damping, bool) and damping > 0
    if damping != "auto" and not number:
        raise PlanError(f"damping: got {damping!r}, expected 'auto' or a number above 0")
    if isinstance(dense_share, bool) or not (0 <= dense_share <= 1):
        raise PlanError(f"dense_share: got {dense_share!r}, expected a number from 0 to 1")
    if isinstance(refine_steps, bool) or not isinstance(refine_steps, int) or refine_steps < 0:
        raise PlanError(f"refine_steps: got {refine_steps!r}, expected a whole number, 0 or more")
    graph.check(plan)
    check_model(model, graph)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(
            "the model has no weights (meta device), and to rebuild is to compute new ones: load "
            "them, or cut with apply(..., verify='fast')"
        )


@dataclass(frozen=True)
class _Options:
    damping: float | Literal["auto"]
    dense_share: float
    refine_steps: int
    process_sum: ProcessSum | None


class _Work:
    """One rebuild while it runs."""

    def __init__(
        self,
        dense: nn.Module,
        result: nn.Module,
        graph: Graph,
        partly: PartlyCut,
        batches: Sequence[Any],
        options: _Options,
    ) -> None:
        self._dense, self._result, self._graph, self._partly = dense, result, graph, partly
        self._options = options
        self._biases = {
            p.untyped_storage().data_ptr(): n for n, p in partly.model.named_parameters()
        }
        chains, total = _chains(dense, graph), self._num_samples(batches)

        def stream(model: nn.Module, names: Iterable[str]) -> Stream:
            watched = {
                name: Watched(get_tensor(model, name), dim, get_tensor(dense, name).shape[dim])
                for name in names
                for dim in [partly.readers[name].dim]
            }
            return Stream(model, watched, batches, chains, graph.example_inputs, total)

        self._stream = stream(partly.model, partly.readers)
        self.left = dict(self._stream.refused)
        self.blocks: list[RefinedBlock] = []
        self._dense_stream = None
        aside = [name for name in self._stream.order if self._share(name)]
        if aside:
            twin = share_model(dense, graph.written).eval().requires_grad_(False)
            self._dense_stream = stream(twin, aside)

    def _share(self, name: str) -> float:
        """How much of what a weight should compute is what it computes in the dense model."""
        return 1.0 if self._partly.reads_cut(name) else self._options.dense_share

    def _num_samples(self, batches: Sequence[Any]) -> int:
        own = torch.tensor(float(sum(num_samples(batch) for batch in batches)))
        process_sum = self._options.process_sum
        return int(own if process_sum is None else process_sum(own))

    @property
    def order(self) -> list[str]:
        """The weights that are solved, as they run."""
        return self._stream.order

    def runs_once(self, block: str) -> bool:
        """Whether a module can be run by itself."""
        return self._stream.holds_once(block)

    def run(self, blocks: Mapping[str, str]) -> list[RebuiltLayer]:
        """Solves one weight after the other, and trains each block after the last of its weights.

        Args:
            blocks: By that weight.
        """
        order = self._stream.order
        largest = max((self._num_bytes(name) for name in order), default=0)
        streams = [each for each in (self._stream, self._dense_stream) if each is not None]
        logger.info(
            "rebuild: solving %d weights that read a cut axis takes up to %.2g GB of memory, and "
            "%.2g GB for each activation kept between passes",
            len(order), largest / 1e9, sum(each.num_bytes for each in streams) / 1e9,
        )  # fmt: skip
        layers = []
        for name in progress(order, "rebuild", unit="weights"):
            if (layer := self._layer(name)) is not None:
                layers.append(layer)
            if name in blocks:
                self._refine(blocks[name])
        return layers

    def _refine(self, name: str) -> None:
        """Trains the weights of a block toward what it computed with all of its columns."""
        work, inside = self._partly.model, f"{name}."
        block = work.get_submodule(name)
        uncut = copy_model(block)
        for part, tensor in (*uncut.named_parameters(), *uncut.named_buffers()):
            if inside + part in self._partly.positions:
                before = get_tensor(self._dense, inside + part).detach()
                tensor.data.copy_(before[_on(self._partly.index(inside + part), before)])
        frozen: dict[str, Tensor] = {}
        for part, parameter in block.named_parameters():
            full = inside + part
            tied = self._graph.aliases.get(full)
            if not parameter.is_floating_point() or tied or full not in self._partly.positions:
                continue
            frozen[part] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
            if (reader := self._partly.readers.get(full)) is not None:
                frozen[part].fill_(True)
                kept = torch.as_tensor(reader.kept, device=parameter.device)
                frozen[part].index_fill_(reader.dim, kept, False)
        made = refined(
            block, uncut, frozen, self._stream.calls(name), self._options.refine_steps,
            self._options.process_sum,
        )  # fmt: skip
        if isinstance(made, str):
            logger.info("rebuild: block %r is not trained: %s", name, made)
            return
        state, before, after = made
        for part, new in state.items() if after < before else ():
            own, whole = get_tensor(work, inside + part), get_tensor(self._result, inside + part)
            own.data = new.to(own)
            whole.data = whole.detach().clone()
            _put(whole.data, self._partly.index(inside + part), own)
        self.blocks.append(RefinedBlock(name, tuple(state), before, after))

    def _num_bytes(self, name: str) -> int:
        slots, _, inputs = self._matrices(self._partly.model, name).shape
        targets = self._matrices(self._dense, name).shape[2] if self._share(name) else 0
        return 8 * 4 * slots * (inputs**2 + targets * inputs + targets**2)  # two parts, sum, damped

    def _matrices(self, model: nn.Module, name: str) -> Tensor:
        weight, dim = get_tensor(model, name).detach(), self._partly.readers[name].dim
        if model is not self._partly.model:
            weight = weight[_on(self._partly.outputs(name, weight.shape[dim]), weight)]
        return to_matrices(weight, dim, self._stream.first[name].groups).double()

    def _layer(self, name: str) -> RebuiltLayer | None:
        """Solves a weight; None where that cannot be done, for which `left` says why."""
        reader, first = self._partly.readers[name], self._stream.first[name]
        start, dense = self._matrices(self._partly.model, name), self._matrices(self._dense, name)
        slots, outputs, inputs = dense.shape
        parts = self._sums(name, start, dense)
        if parts is None:
            return None
        gram = parts[0] + parts[1]
        if not gram.counts.any():
            raise DataError(
                f"no calibration data reaches {name!r}: rebuild needs at least one batch"
            )
        if not gram.is_finite():
            raise DataError(
                f"what {name!r} reads on the calibration data is not finite; look at the data and "
                "the weights, or rebuild in float32"
            )
        bias = self._bias(name, reader, first, (slots, outputs))
        layer = Layer(dense, start, _columns(reader, start, first), bias[1])
        damping = self._options.damping
        if damping == "auto":
            damping = _best(layer, parts[0], parts[1])
        new = next(layer.solved(gram, [damping]))
        errors = layer.error(gram), new.error(gram)
        better = (errors[1] <= errors[0]) & new.start.flatten(1).isfinite().all(1)
        new = layer.take(new, better)
        self._write(name, reader, first, new, bias[0])
        own = gram if self._partly.reads_cut(name) else gram.toward(0)
        size = float(Layer(dense, torch.zeros_like(start), layer.kept, None).error(own).sum())
        error = float(torch.where(better, errors[1], errors[0]).sum())
        return RebuiltLayer(
            name, inputs, len(layer.kept), int(gram.counts.max()), float(damping),
            float(errors[0].sum()) / (size or 1.0), error / (size or 1.0),
        )  # fmt: skip

    def _sums(self, name: str, start: Tensor, dense: Tensor) -> list[Gram] | None:
        """Sums over three quarters of the samples and over the others, of all processes.

        None where nothing but what the dense model computes can be the target, and that reads other
        rows.
        """
        share, stream = self._share(name), self._dense_stream if self._share(name) else None
        if stream is not None and name in stream.refused:
            self.left[name] = f"in the dense model {stream.refused[name]}"
            return None
        (slots, _, inputs), device = start.shape, start.device
        aside = dense.shape[2] if stream is not None else None
        parts = [Gram.zeros(slots, inputs, device, aside) for _ in range(2)]
        run = self._stream.run(name)
        beside = repeat(None) if stream is None else stream.run(name)
        apart = torch.zeros((), device=device)
        for products, others in zip(run, beside, strict=stream is not None):
            if others is not None and not _alike(products, others):
                apart += 1
                continue
            for product, other in zip(products, others or products, strict=True):
                keys = product.keys
                keys = torch.arange(product.rows.shape[1]) if keys is None else keys
                held_out = (keys % 4 == 3).to(product.rows.device)
                for part, chosen in zip(parts, (~held_out, held_out), strict=True):
                    if bool(chosen.any()):
                        target = None if stream is None else other.rows[:, chosen]
                        part.add(product.rows[:, chosen], product.slots, target)
        process_sum = self._options.process_sum
        if stream is not None and (apart if process_sum is None else process_sum(apart)):
            if self._partly.reads_cut(name):
                self.left[name] = "it reads other rows in the dense model than after the cut"
                return None
            raise DataError(
                f"{name!r} reads other rows in the dense model than after the cut (experts get "
                "other tokens); write dense_share=0"
            )
        for part in parts:
            part.sum_over(process_sum)
        return [part.toward(share) for part in parts]

    def _bias(
        self, name: str, reader: Reader, first: Product, shape: tuple[int, ...]
    ) -> tuple[str | None, Tensor | None]:
        """The parameter or buffer that can take a constant, and how far it is from the dense's."""
        model, zero = self._partly.model, torch.zeros(shape, dtype=torch.float64)
        zero = zero.to(get_tensor(model, name).device)
        if first.bias is not None:
            bias = self._biases.get(first.bias.untyped_storage().data_ptr())
            if bias is None or self._graph.aliases.get(bias):
                return None, None
            found = get_tensor(model, bias)
            if found.numel() != zero.numel() or not torch.equal(found, first.bias):
                return None, None
            before = get_tensor(self._dense, bias).detach()
            before = before[_on(self._partly.index(bias), before)]
            return bias, (found.double() - before.double()).view(shape)
        norm = reader.bias_norm
        if norm is None or not first.groups:
            return None, None
        return f"{norm}.running_mean", zero

    def _write(
        self, name: str, reader: Reader, first: Product, layer: Layer, bias: str | None
    ) -> None:
        """Puts a solved layer into the model that runs on and into the result."""
        work = get_tensor(self._partly.model, name)
        with torch.no_grad():
            new = from_matrices(layer.start, work, reader.dim, first.groups).to(work)
            work.copy_(new)
            _put(get_tensor(self._result, name), self._partly.index(name), new)
            if bias is None or layer.bias is None:
                return
            constant = layer.bias.flatten()
            own = get_tensor(self._partly.model, bias)
            if bias.endswith("running_mean"):  # what is added before the norm is taken off here
                own -= constant.to(own)
            else:
                before = get_tensor(self._dense, bias)
                before = before[_on(self._partly.index(bias), before)].double()
                own.copy_(before + constant)
            _put(get_tensor(self._result, bias), self._partly.index(bias), own)


def _blocks(
    graph: Graph, partly: PartlyCut, order: Sequence[str], runs_once: Callable[[str], bool]
) -> dict[str, str]:
    """The smallest modules that hold all that makes and reads a masked group, by last weight."""
    found: set[str] = set()
    for name in partly.masked:
        group, solved = graph.groups[name], {member.tensor for member in graph.readers(name)}
        if group.kind in ("residual", "layer") or not solved & set(order):
            continue
        paths = [member.tensor.split(".")[:-1] for member in group.members]
        shared = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
        block = ".".join(names[0] for names in shared)
        if block and runs_once(block):
            found.add(block)
    outer = {name for name in found if not any(name.startswith(f"{other}.") for other in found)}
    last = {block: [n for n in order if n.startswith(f"{block}.")][-1] for block in outer}
    return {weight: block for block, weight in last.items()}


def _columns(reader: Reader, start: Tensor, first: Product) -> Tensor:
    """Kept columns of the matrices; a convolution's channel has one for each tap of its window."""
    kept = torch.as_tensor(reader.kept, device=start.device)
    if not first.groups:
        return kept
    taps = first.taps
    if reader.dim == 0:  # of a transposed one that counts through all groups, each keeps the same
        kept = (kept % (start.shape[2] // taps)).unique()
    return (kept[:, None] * taps + torch.arange(taps, device=kept.device)).flatten()


def _best(layer: Layer, fit: Gram, held_out: Gram) -> float:
    """The damping with which what is fitted to one part of the data serves the other best."""
    if not held_out.counts.any() or not fit.counts.any():
        return 0.1
    layer = layer.some(_OUTPUTS)
    found = zip(DAMPINGS, layer.solved(fit, DAMPINGS), strict=True)
    errors = {damping: float(new.error(held_out).sum()) for damping, new in found}
    return min(errors, key=lambda damping: errors[damping])


def _alike(products: Sequence[Product], others: Sequence[Product]) -> bool:
    """Whether two passes took the same rows of the same samples."""
    rows = [[(p.slots, p.rows.shape[:2]) for p in each] for each in (products, others)]
    return rows[0] == rows[1]


def _on(index: tuple[np.ndarray, ...], tensor: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(at, device=tensor.device) for at in index)


def _put(tensor: Tensor, index: tuple[np.ndarray, ...], new: Tensor) -> None:
    tensor[_on(index, tensor)] = new.to(tensor)


def _chains(model: nn.Module, graph: Graph) -> list[list[str]]:
    """Rows of modules each of which gives its result to the next one alone."""
    chains = []
    for name, group in graph.groups.items():
        if group.kind == "layer":
            stack = name.rpartition(":")[0]
            inside = f"{stack}." if stack else ""
            chains.append([f"{inside}{n}" for n, _ in model.get_submodule(stack).named_children()])
    for name, module in model.named_modules():
        if type(module).forward is nn.Sequential.forward and isinstance(module, nn.Sequential):
            inside = f"{name}." if name else ""
            chains.append([f"{inside}{child}" for child, _ in module.named_children()])
    return chains


def _tell(layers: Sequence[RebuiltLayer], left: dict[str, str]) -> None:
    if left:
        shown = "; ".join(f"{name!r}: {why}" for name, why in list(left.items())[:4])
        logger.info(
            "rebuild: %d weights that read a cut axis stay as they are: %s%s",
            len(left), shown, "; ..." * (len(left) > 4),
        )  # fmt: skip
    scarce = [layer for layer in layers if layer.rows < layer.inputs]
    if scarce:
        worst = min(scarce, key=lambda layer: layer.rows / layer.inputs)
        logger.warning(
            "rebuild: %d of %d weights have fewer calibration rows than inputs; the worst is %r "
            "with %d rows for %d inputs (ratio %.2g). Damping keeps them near their old values; "
            "give more samples (rebuild.num_samples)",
            len(scarce), len(layers), worst.tensor, worst.rows, worst.inputs,
            worst.rows / worst.inputs,
        )  # fmt: skip
