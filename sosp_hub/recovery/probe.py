"""Which learning rate suits a model: a short training at each of a few, judged on held-out samples.

Samples that are trained with in a probe are of the train split, and so are those that judge: test
data is never seen. Model and optimizer begin anew for each rate.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from torch import nn

from sosp_hub.atomic import write_text
from sosp_hub.distributed import is_main, logger, wait_for_everyone
from sosp_hub.errors import ModelError
from sosp_hub.recipe.schema import FinetuneSection

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the learning rate that is given, or suits the task."""

Rates = tuple[tuple[float, float], ...]


def probe_rates(
    model: nn.Module,
    config: FinetuneSection,
    train: Callable[[FinetuneSection], object],
    judge: Callable[[], float],
    folder: Path,
    *,
    batch_size: int,
) -> Rates:
    """Each rate and the held-out loss after a short training at it; the model is as before.

    What was found is kept in the folder, so that a training that was killed goes on with it.

    Args:
        model: What is trained.
        config: Of the training that follows.
        train: Trains the model in place by another config.
        judge: The loss on held-out samples.
        folder: Where the result is kept.
        batch_size: Samples of one optimizer step, on all processes.
    """
    path = folder / "probe.json"
    if path.is_file():
        return tuple((rate, loss) for rate, loss in json.loads(path.read_text()))
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    was_training, rates = model.training, []
    steps = config.probe_steps or 1
    for factor in FACTORS:
        rate = factor * config.rate
        short = {"epochs": 1, "num_samples": steps * batch_size, "learning_rate": rate}
        try:
            train(config.model_copy(update={**short, "probe_steps": None}))
            loss = judge()
        except ModelError:  # it diverged
            loss = math.inf
        finally:
            model.load_state_dict(before)
            model.train(was_training)
        rates.append((rate, loss if math.isfinite(loss) else math.inf))
    wait_for_everyone()
    if is_main():
        write_text(path, json.dumps(rates))
    wait_for_everyone()
    return tuple(rates)


def best_rate(rates: Rates) -> float:
    """The rate of least loss; the smaller of equal ones."""
    rate, loss = min(rates, key=lambda each: (each[1], each[0]))
    logger.info(
        "fine-tune: learning rate %g, the best of %s on held-out samples (loss %.4g)",
        rate,
        ", ".join(f"{each:g} ({found:.4g})" for each, found in rates),
        loss,
    )
    return rate
