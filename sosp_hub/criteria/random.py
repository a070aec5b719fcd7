"""The control: random scores."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final, get_args

import torch
from torch import nn

from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.types import Kind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency


@register
@final
@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1), the same for the same seed.

    Attributes:
        seed: Of the numbers.
    """

    seed: int = 0
    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "control"
    needs: ClassVar[Needs] = "nothing"
    kinds: ClassVar[tuple[Kind, ...]] = get_args(Kind)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """Looks at nothing."""
        del model, batches
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: torch.rand(group.size, generator=generator)
            for name, group in graph.groups.items()
        }
