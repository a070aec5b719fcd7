"""Following a teacher while training: its outputs, whole or the most probable, and hidden states.

Of hidden states their values are followed, or how alike they are to one another.

One forward pass of the teacher for each batch gives all that is followed. With ``top_k`` its
outputs are computed once and read from disk, and the teacher is not needed any more.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as functional
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from sosp_hub.compat.torch import unwrapped
from sosp_hub.distributed import (
    is_main,
    logger,
    process_state,
    process_sum,
    to_device,
    wait_for_everyone,
)
from sosp_hub.errors import DataError, ModelError
from sosp_hub.modes import evaluating
from sosp_hub.progress import progress
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.tasks.loss import Loss, batch_loss
from sosp_hub.tasks.predictions import Predictions, at_least_float32

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

_MOST_PAIRS = 4  # of layers whose states are followed, where none are named


class Teacher:
    """What is followed in a training.

    Args:
        teacher: Gives the outputs, with each batch or once and for all.
        student: What is trained; its widths may be smaller.
        config: What counts, and how much.
        loss_fn: The loss, which says what outputs are read.

    Attributes:
        pairs: Layers whose states are followed, and the teacher's.
        projections: From the student's states to the teacher's, where widths differ: solved once
            by `fit`, and fixed.
        scales: Mean squares of the teacher's states, found by `fit` as well.
    """

    def __init__(
        self,
        teacher: "nn.Module | StoredOutputs",
        student: nn.Module,
        config: FinetuneSection,
        *,
        loss_fn: "LossFn | None" = None,
    ) -> None:
        self._teacher, self._config, self._loss_fn = teacher, config, loss_fn
        self._student = student
        self.pairs: dict[str, str] = {}
        if config.follows_states():
            self.pairs = layer_pairs(student, teacher, config.layers)
        self.projections: dict[str, Float[Tensor, "theirs mine"]] = {}
        self.scales: dict[str, Float[Tensor, ""]] = {}

    def states(self) -> AbstractContextManager[dict[str, Tensor]]:
        """The student's states of the forward pass that runs inside."""
        return _states(self._student, self.pairs)

    @torch.no_grad()
    def fit(self, batch: Any, path: Path | None = None) -> None:
        """Solves the projections by least squares on one batch, or reads them.

        Args:
            batch: Of each process its own: they count together.
            path: Where an earlier start of the same training left them.

        Raises:
            ModelError: Outputs of another shape, or layers that work on other places.
        """
        if isinstance(self._teacher, StoredOutputs):
            return
        device = next(self._student.parameters()).device
        check_teacher(self._student, self._teacher, batch, self._loss_fn)
        if path is not None and path.is_file():
            for key, tensor in load_file(path).items():
                kind, _, name = key.partition(" ")
                getattr(self, kind)[name] = tensor.to(device)
            return
        with self.states() as mine, _states(self._teacher, self.pairs.values()) as theirs:
            check_teacher(self._student, self._teacher, batch, self._loss_fn, quiet=True)
        for name, other in self.pairs.items() if self._config.hidden else ():
            one, two = (at_least_float32(s).flatten(0, -2) for s in (mine[name], theirs[other]))
            if len(one) != len(two):
                raise ModelError(
                    f"finetune.layers: {name!r} gives {len(one)} rows and the teacher's {other!r} "
                    f"{len(two)}; name layers that work on the same places"
                )
            x, y = one.double().cpu(), two.double().cpu()
            squares = process_sum(torch.tensor([y.square().sum(), y.numel()]))
            self.scales[name] = (squares[0] / squares[1]).float().to(device)
            if x.shape[1] == y.shape[1]:
                continue
            gram, cross = process_sum(x.T @ x), process_sum(x.T @ y)
            gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            self.projections[name] = torch.linalg.solve(gram, cross).T.float().to(device)
        if path is not None and self.scales:
            if is_main():
                found = {"projections": self.projections, "scales": self.scales}
                draft = path.with_suffix(".draft")
                save_file(
                    {
                        f"{kind} {name}": tensor.contiguous()
                        for kind, tensors in found.items()
                        for name, tensor in tensors.items()
                    },
                    draft,
                )
                draft.replace(path)
            wait_for_everyone()

    def loss(
        self,
        own: Tensor,
        mine: Loss,
        batch: Any,
        states: Mapping[str, Tensor],
        numbers: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch: the task's, what is far from the teacher's outputs, its states.

        Args:
            own: The task's loss.
            mine: The student's loss and outputs.
            batch: What both are given.
            states: Of the student's layers.
            numbers: Of the samples, for stored outputs.
        """
        config = self._config
        if isinstance(self._teacher, StoredOutputs):
            assert numbers is not None
            far = self._teacher.divergence(_read(mine), numbers.cpu(), config.temperature)
            return (1 - config.distill) * own + config.distill * far
        with _states(self._teacher, self.pairs.values()) as theirs, torch.no_grad():
            target = batch_loss(self._teacher, batch, self._loss_fn)
        value = own
        if config.distill:
            far = _read(mine).divergence(_read(target), config.temperature)
            value = (1 - config.distill) * own + config.distill * far
        for name, other in self.pairs.items():
            one, two = at_least_float32(states[name]), at_least_float32(theirs[other])
            if config.hidden:
                value = value + config.hidden / len(self.pairs) * self._distance(name, one, two)
            if config.relations:
                apart = relations_apart(name, one, two, batch)
                value = value + config.relations / len(self.pairs) * apart
        return value

    def _distance(self, name: str, mine: Tensor, theirs: Tensor) -> Tensor:
        """Mean squared distance of states, as a share of what `fit` found for the teacher's."""
        if name in self.projections:
            mine = mine @ self.projections[name].T.to(mine.dtype)
        return (mine - theirs).square().mean() / self.scales[name].clamp_min(1e-12)


def relations_apart(name: str, mine: Tensor, theirs: Tensor, batch: Any = None) -> Tensor:
    """Mean squared difference of the cosines between hidden states; widths may differ.

    States of shape (samples, places, width) are compared with those of the other places of their
    sample, padding left out; all others with those of the other samples.

    Paper: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", of samples; Wang et
    al. 2020, "MiniLM", of places.
    Differs from the paper: Cosines, where the first divides rows of the Gram matrix by their norms
    and the second takes a softmax of it: one large state is not all that counts.

    Args:
        name: Of the layer.
        mine: The student's states.
        theirs: The teacher's.
        batch: A mapping may hold an ``attention_mask``, one number for each place.

    Raises:
        ModelError: States of other samples or places.
    """
    places = mine.dim() == theirs.dim() == 3
    both = [states if places else states.flatten(1)[None] for states in (mine, theirs)]
    if both[0].shape[:2] != both[1].shape[:2]:
        raise ModelError(
            f"finetune.layers: {name!r} gives states of {tuple(mine.shape[:-1])} and the teacher's "
            f"layer {tuple(theirs.shape[:-1])}; name layers that work on the same places"
        )
    unit = [functional.normalize(states, dim=-1) for states in both]
    apart = (unit[0] @ unit[0].mT - unit[1] @ unit[1].mT).square()
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not places or mask is None or mask.shape != mine.shape[:2]:
        return apart.mean()
    there = mask.to(apart)
    pairs = there[:, :, None] * there[:, None, :]
    return (apart * pairs).sum() / pairs.sum().clamp_min(1)


@contextmanager
def _states(model: nn.Module, names: Any) -> Iterator[dict[str, Tensor]]:
    """What some modules give in the forward passes inside."""
    found: dict[str, Tensor] = {}
    modules = dict(unwrapped(model).named_modules())
    handles = []
    for name in names:

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            found[name] = output[0] if isinstance(output, tuple | list) else output

        handles.append(modules[name].register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layer_pairs(
    student: nn.Module, teacher: "nn.Module | StoredOutputs", named: Mapping[str, str] | None
) -> dict[str, str]:
    """Which layers of a student follow which of its teacher, by module names.

    Args:
        student: What is trained.
        teacher: What is followed.
        named: Pairs; None = up to four of the longest stack of layers, at equal depth.

    Raises:
        ModelError: A name that is no module, or no stack of layers.
    """
    if isinstance(teacher, StoredOutputs):
        raise ModelError(
            "finetune.hidden, finetune.relations: hidden states need the teacher; leave out top_k"
        )
    models = {"the model": unwrapped(student), "the teacher": unwrapped(teacher)}
    if named is not None:
        for names, (who, model) in zip((named.keys(), named.values()), models.items(), strict=True):
            modules = dict(model.named_modules())
            for name in names:
                if name not in modules:
                    near = [
                        other for other in modules if other and other.count(".") == name.count(".")
                    ][:5]
                    raise ModelError(
                        f"finetune.layers: {who} has no module {name!r}; it has {', '.join(near)}"
                    )
        return dict(named)
    stacks = {who: _longest_stack(model) for who, model in models.items()}
    for who, stack in stacks.items():
        if not stack:
            raise ModelError(
                f"finetune.layers: {who} has no stack of layers that could be followed; name them: "
                "{MODULE: TEACHER_MODULE}"
            )
    mine, theirs = stacks.values()
    number = min(_MOST_PAIRS, len(mine))
    places = [(step + 1) * len(mine) // number - 1 for step in range(number)]
    return {mine[place]: theirs[(place + 1) * len(theirs) // len(mine) - 1] for place in places}


def _longest_stack(model: nn.Module) -> list[str]:
    """The modules of the longest list of layers of one class."""
    stacks = [
        [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(child) for child in module.children()}) == 1
    ]
    return max(stacks, key=len, default=[])


def _read(loss: Loss) -> Predictions:
    if loss.predictions is None:
        raise ModelError(
            "finetune.distill: this loss does not say what it reads of the outputs; leave it out, "
            "or give a loss_fn that returns sosp_hub.tasks.softmax(logits, labels), sigmoid(...) "
            "or squared(...)"
        )
    return loss.predictions


class StoredOutputs:
    """The most probable classes of a teacher at each place of each sample, in two files.

    What is not among them counts as one class: the divergence between the coarser distributions,
    which is at most the whole one, and equal to it where all classes are stored.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._logs = np.load(folder / "teacher_logs.npy", mmap_mode="r")
        self._classes = np.load(folder / "teacher_classes.npy", mmap_mode="r")

    @classmethod
    def make(
        cls,
        teacher: nn.Module,
        split: Any,
        config: FinetuneSection,
        folder: Path,
        *,
        loss_fn: "LossFn | None" = None,
    ) -> "StoredOutputs":
        """Computes them, each process its share; finds those of an earlier start.

        Raises:
            DataError: Samples of different lengths.
        """
        paths = [folder / "teacher_logs.npy", folder / "teacher_classes.npy"]
        if not all(path.is_file() for path in paths) and is_main():
            batches = [
                list(range(start, min(start + config.batch_size, len(split))))
                for start in range(0, len(split), config.batch_size)
            ]
            files: list[Any] = []
            drafts = [path.with_suffix(".draft") for path in paths]
            with torch.no_grad(), evaluating(teacher):
                for numbers in progress(batches, "teacher"):
                    batch = to_device(split.__getitems__(numbers))
                    read = _read(batch_loss(teacher, batch, loss_fn))
                    if read.form != "softmax":
                        raise ModelError(
                            f"finetune.top_k: the loss reads outputs as {read.form}, of which "
                            "there are no most probable ones; leave it out"
                        )
                    values = at_least_float32(read.values) / config.temperature
                    k = min(config.top_k or 1, values.shape[-1])
                    logs, classes = values.log_softmax(-1).topk(k, dim=-1)
                    if not files:
                        shape = (len(split), *logs.shape[1:])
                        files = [
                            np.lib.format.open_memmap(draft, "w+", dtype, shape)
                            for draft, dtype in zip(drafts, ("float32", "int32"), strict=True)
                        ]
                    if files[0].shape[1:] != tuple(logs.shape[1:]):
                        raise DataError(
                            "finetune.top_k: samples have different lengths, of which no table can "
                            "be made; leave it out"
                        )
                    files[0][numbers] = logs.cpu().numpy()
                    files[1][numbers] = classes.cpu().numpy()
            for file, draft, path in zip(files, drafts, paths, strict=True):
                file.flush()
                draft.replace(path)
            size = sum(path.stat().st_size for path in paths)
            logger.info("teacher: the outputs of %d samples take %.3g GB", len(split), size / 1e9)
        wait_for_everyone()
        return cls(folder)

    def divergence(self, mine: Predictions, numbers: Tensor, temperature: float) -> Tensor:
        """As `Predictions.divergence`, from the stored outputs of the samples of these numbers."""
        chosen = numbers.numpy()
        device = mine.values.device
        logs = torch.from_numpy(np.array(self._logs[chosen])).to(device)
        classes = torch.from_numpy(np.array(self._classes[chosen])).long().to(device)
        own = (at_least_float32(mine.values) / temperature).log_softmax(-1)
        own = own.gather(-1, classes)
        each = (logs.exp() * (logs - own)).sum(-1)
        if classes.shape[-1] < mine.values.shape[-1]:
            rest, own_rest = ((1 - part.exp().sum(-1)).clamp_min(1e-12) for part in (logs, own))
            each = each + rest * (rest.log() - own_rest.log())
        weights = mine.weights.to(each)
        each = torch.where(weights != 0, weights * each, 0.0)
        return each.sum() * temperature**2 / (mine.weight or 1)


class Numbered(Dataset[Any]):
    """A split whose batches come with the numbers of their samples."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Any]:
        """Numbers and batch."""
        return torch.tensor(indices), self.split.__getitems__(indices)


def teacher_bytes(teacher: nn.Module) -> int:
    """What its weights take."""
    tensors = {t.data_ptr(): t for t in (*teacher.parameters(), *teacher.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check_teacher(
    student: nn.Module,
    teacher: nn.Module,
    batch: Any,
    loss_fn: "LossFn | None" = None,
    *,
    quiet: bool = False,
) -> None:
    """Refuses a teacher whose outputs are not those of the student, by one batch.

    Raises:
        ModelError: Another vocabulary, other classes or places.
    """
    batch = to_device(batch)
    shapes = []
    with torch.no_grad(), evaluating(student, teacher):
        for model in (student, teacher):
            predictions = batch_loss(model, batch, loss_fn).predictions
            shapes.append(None if predictions is None else tuple(predictions.values.shape))
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"finetune.teacher: its outputs have the shape {shapes[1]}, those of the model "
            f"{shapes[0]}; a teacher has the same classes or vocabulary"
        )
    if not quiet:
        size = teacher_bytes(teacher) / 1e9
        logger.info("teacher: its weights take %.3g GB on %s", size, process_state().device)
