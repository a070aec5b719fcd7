"""Structured pruning for the Hugging Face ecosystem: score, cut for real, publish.

The verbs are loaded when first used, so that importing the package costs next to nothing.
"""

import importlib
import random
from typing import TYPE_CHECKING, Any

from sosp_hub.checkpoint.hooks import disable, enable  # on import: pruned checkpoints just load

if TYPE_CHECKING:
    from sosp_hub.allocation import allocate
    from sosp_hub.checkpoint.weightless import save_plan
    from sosp_hub.compare import compare
    from sosp_hub.cut import apply, apply_, apply_plan_file, carry
    from sosp_hub.evaluate import evaluate
    from sosp_hub.expand import expand
    from sosp_hub.export import export
    from sosp_hub.gradual import GradualPruning, trainer_callback
    from sosp_hub.hub.push import push_to_hub
    from sosp_hub.pipeline.any_budget import from_pretrained
    from sosp_hub.pipeline.finetuning import finetune, finetune_
    from sosp_hub.plan import PruningPlan
    from sosp_hub.promise.within import allocate_within
    from sosp_hub.prune import prune
    from sosp_hub.reconstruction.rebuild import rebuild
    from sosp_hub.report.plot import plot
    from sosp_hub.report.saved import save_pretrained
    from sosp_hub.scoring import score
    from sosp_hub.structure.trace import trace

__version__ = "0.1.0"

_HOME = {
    "GradualPruning": "sosp_hub.gradual",
    "trainer_callback": "sosp_hub.gradual",
    "PruningPlan": "sosp_hub.plan",
    "allocate": "sosp_hub.allocation",
    "allocate_within": "sosp_hub.promise.within",
    "apply": "sosp_hub.cut",
    "apply_": "sosp_hub.cut",
    "apply_plan_file": "sosp_hub.cut",
    "carry": "sosp_hub.cut",
    "compare": "sosp_hub.compare",
    "evaluate": "sosp_hub.evaluate",
    "expand": "sosp_hub.expand",
    "finetune": "sosp_hub.pipeline.finetuning",
    "finetune_": "sosp_hub.pipeline.finetuning",
    "from_pretrained": "sosp_hub.pipeline.any_budget",
    "export": "sosp_hub.export",
    "plot": "sosp_hub.report.plot",
    "prune": "sosp_hub.prune",
    "push_to_hub": "sosp_hub.hub.push",
    "save_plan": "sosp_hub.checkpoint.weightless",
    "save_pretrained": "sosp_hub.report.saved",
    "rebuild": "sosp_hub.reconstruction.rebuild",
    "score": "sosp_hub.scoring",
    "trace": "sosp_hub.structure.trace",
}

__all__ = [
    "GradualPruning",
    "PruningPlan",
    "allocate",
    "allocate_within",
    "apply",
    "apply_",
    "apply_plan_file",
    "carry",
    "compare",
    "disable",
    "enable",
    "evaluate",
    "expand",
    "export",
    "finetune",
    "finetune_",
    "from_pretrained",
    "plot",
    "prune",
    "push_to_hub",
    "rebuild",
    "save_plan",
    "save_pretrained",
    "score",
    "trace",
    "trainer_callback",
]


_ROOMS = ("errors", "tasks")  # rooms whose names are public


def __getattr__(name: str) -> Any:
    if name in _HOME:
        state = random.getstate()  # rich, for one, draws while it is imported
        try:
            return getattr(importlib.import_module(_HOME[name]), name)
        finally:
            random.setstate(state)
    if name in _ROOMS:
        return importlib.import_module(f"sosp_hub.{name}")
    raise AttributeError(
        f"module 'sosp_hub' has no attribute {name!r}; it offers {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS, "__version__"]
