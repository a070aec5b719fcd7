"""Norms of the loss' gradient: of layers as they are, or put into a freshly initialised net."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import BatchNorm
from sosp_hub.errors import CriterionError
from sosp_hub.gates import gated
from sosp_hub.tasks.batches import num_samples
from sosp_hub.tasks.loss import batch_loss

if TYPE_CHECKING:
    from sosp_hub.types import LossFn


class FreshNet:
    """A copy of a model with new weights, in which some layers can have the old ones for a while.

    BatchNorms run on the statistics of the batch, since new weights have no others.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], seed: int) -> None:
        self.model = copy.deepcopy(model).eval()
        self._old = _states(self.model, layers)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in self.model.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
                if isinstance(module, BatchNorm):
                    module.train()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self._new = _states(self.model, layers)

    @contextmanager
    def holding(self, layers: Sequence[str]) -> Iterator[nn.Module]:
        """The net while these layers have their old weights."""
        for states in (self._old, self._new):
            for name in layers:
                self.model.get_submodule(name).load_state_dict(states[name])
            if states is self._old:
                yield self.model


@dataclass(frozen=True)
class GradientNorms:
    """Norms by the same batches, as means over the samples of all processes.

    Attributes:
        samples: Batches of this process.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        process_sum: Sum over processes.
    """

    samples: list[Any]
    loss_fn: "LossFn | None"
    process_sum: Callable[[Tensor], Tensor] | None

    def of_fresh(self, net: FreshNet, layers: Sequence[str]) -> float:
        """Of all weights of the net while these layers have their old ones."""
        with net.holding(layers) as model:
            weights = [p for p in model.parameters() if p.requires_grad]
            rows = [self._squares(model, weights, b).sum().sqrt().view(1) for b in self.samples]
        return self._mean(rows, 1).item()

    def of_layers(self, model: nn.Module, layers: Sequence[str]) -> dict[str, float]:
        """Of each layer's own weights, in the model as it is, in eval mode."""
        own = [
            [p for p in model.get_submodule(name).parameters() if p.is_floating_point()]
            for name in layers
        ]
        weights = list(dict.fromkeys(weight for of_layer in own for weight in of_layer))
        place = {weight: i for i, weight in enumerate(weights)}
        trained = [weight.requires_grad for weight in weights]
        rows = []
        with gated(model, {}):  # no gates: eval mode alone
            try:
                for weight in weights:
                    weight.requires_grad_(True)
                for batch in self.samples:
                    squares = self._squares(model, weights, batch)
                    sums = [
                        squares[[place[weight] for weight in of_layer]].sum() for of_layer in own
                    ]
                    rows.append(torch.stack(sums).sqrt())
            finally:
                for weight, flag in zip(weights, trained, strict=True):
                    weight.requires_grad_(flag)
        return dict(zip(layers, self._mean(rows, len(layers)).tolist(), strict=True))

    def _squares(self, model: nn.Module, weights: list[nn.Parameter], batch: Any) -> Tensor:
        """Squared norm of the gradient by each weight."""
        loss = batch_loss(model, batch, self.loss_fn).value
        gradients = (
            torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else [None]
        )
        if all(gradient is None for gradient in gradients):
            raise CriterionError(
                "the loss does not depend on the weights of any layer that is scored: does the "
                "output of these layers reach it?"
            )
        squares = [
            torch.zeros(()) if g is None else g.abs().double().square().sum() for g in gradients
        ]
        return torch.stack([square.cpu().double() for square in squares])

    def _mean(self, rows: list[Tensor], size: int) -> Tensor:
        total = torch.zeros(size + 1, dtype=torch.float64)
        for row, batch in zip(rows, self.samples, strict=True):
            total += torch.cat([row, torch.ones(1)]) * num_samples(batch)
        total = total if self.process_sum is None else self.process_sum(total)
        if not total.isfinite().all():
            raise CriterionError(
                "a gradient norm is not finite; look at the weights and the data, or score in "
                "float32"
            )
        return total[:-1] / total[-1]


def _states(model: nn.Module, layers: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    return {name: copy.deepcopy(model.get_submodule(name).state_dict()) for name in layers}
