"""What several processes train of a cut model whose weights they share (FSDP2), or one alone."""

import copy
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import sosp_hub
from sosp_hub.data.split import MadeSplit
from sosp_hub.distributed import make_accelerator, process_state
from sosp_hub.pipeline.guest import as_guest
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recovery.recover import recover
from sosp_hub.sharding import prepared
from sosp_hub.tasks.loss import batch_loss
from tests.cases import CASES

CASE = next(case for case in CASES if case.name == "llama")
NUM_SAMPLES = 37
WAYS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.05, "gradient_checkpointing": True},
    "accumulated": {"gradient_accumulation": 3, "optimizer": "sgd", "learning_rate": 0.3},
    "probed, nothing else": {"probe_steps": 2, "max_grad_norm": None},
    "adapters": {"lora": {"rank": 2}},
    "a teacher": {"distill": 0.5, "hidden": 1.0},
    "tied, outputs from disk": {"distill": 0.5, "top_k": 3},
    "nothing is held out": {"held_out": 0},
}
STOP_AT = 7
"""Forward pass, in training, of the second epoch."""


class StoppedError(Exception):
    """A training that does not come to its end."""


def split() -> MadeSplit:
    """Texts that count, each from another number on."""
    batch: Any = CASE.batch(1)
    length = batch["input_ids"].shape[1]
    tokens = (torch.arange(NUM_SAMPLES)[:, None] * 5 + torch.arange(length)) % 23
    return MadeSplit(NUM_SAMPLES, lambda rows: {"input_ids": (t := tokens[rows]), "labels": t})


def cut_model(*, tied: bool = False) -> tuple[nn.Module, nn.Module]:
    """A dense model in float64, and one cut from it to widths that two processes do not divide."""
    model: Any = CASE.model().double()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    graph = sosp_hub.trace(model, CASE.inputs(), outputs="logits")
    saliency = sosp_hub.score(model, graph, [], "magnitude")
    plan = sosp_hub.allocate(graph, saliency, params=0.8)
    return model, sosp_hub.apply(model, graph, plan)


def train(name: str, folder: Path | None = None, *, stop_at: int = 0) -> dict[str, Any]:
    """What one of `WAYS` leaves, and what each process held of weights and of all it trained."""
    accelerator = make_accelerator(seed=3)
    dense, model = cut_model(tied="tied" in name)
    before = shape_of(model)
    config = FinetuneSection.model_validate(
        {
            "epochs": 2, "batch_size": 6 // accelerator.num_processes, "learning_rate": 1e-2,
            "save_every_steps": 1, "held_out": 0.2, **WAYS[name],
        }
    )  # fmt: skip
    held: list[float] = []
    if folder is not None:
        folder.mkdir(exist_ok=True)
    try:
        with watched(model, stop_at, held):
            done = recover(
                model, split(), config, accelerator=accelerator, seed=3, checkpoint_dir=folder,
                teacher=dense if config.follows() else None,
            )  # fmt: skip
    finally:
        assert shape_of(model) == before
        train.left = model
    return {
        "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "history": [[point["step"], point["loss"]] for point in done.history],
        "held out": [list(each) for each in done.selected.losses] if done.selected else [],
        "epoch": done.selected and done.selected.epoch,
        "rates": [list(each) for each in done.rates],
        "loss": sosp_hub.evaluate(model, [split()[1]], ("loss",))["loss"].value,
        "held": held[-1],
    }


def stopped(folder: Path, name: str) -> None:
    """Leaves the state of a training that stops; its model has the best weights so far."""
    with pytest.raises(StoppedError):
        train(name, folder, stop_at=STOP_AT)
    assert len(list(folder.glob("step-*"))) == 1


def shape_of(model: nn.Module) -> Any:
    """Classes, names, parameters, hooks: all of a model but its values."""
    modules = [
        (name, type(module), {k: len(v) for k, v in vars(module).items() if "hooks" in k})
        for name, module in model.named_modules()
    ]
    weights = [
        (name, type(p), id(p), p.shape, p.stride(), p.dtype, p.requires_grad)
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return modules, [sorted(vars(module)) for module in model.modules()], weights


@contextmanager
def watched(model: nn.Module, stop_at: int, held: list[float]) -> Iterator[None]:
    """Stops in this forward pass of a training.

    ``held`` gets the share of weights, gradients and moments that this process has at each step.
    """
    passes = iter(range(1, 10_000))

    def stop(*_: Any) -> None:
        if model.training and next(passes) == stop_at:
            raise StoppedError

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        whole, here = 0, 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                of = [p, p.grad, *(v for v in optimizer.state[p].values() if v.shape == p.shape)]
                whole += sum(each.numel() for each in of)
                here += sum(getattr(each, "to_local", lambda e=each: e)().numel() for each in of)
        held.append(here / whole)

    handles = [model.register_forward_pre_hook(stop), register_optimizer_step_post_hook(look)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_16_bits() -> dict[str, Any]:
    """A training of bfloat16 weights in mixed precision, by an accelerator of its own."""
    with as_guest():
        accelerator = make_accelerator("bf16", seed=3)
        _, model = cut_model()
        model.to(torch.bfloat16)
        before = shape_of(model)
        config = FinetuneSection(
            epochs=4, batch_size=6 // accelerator.num_processes, learning_rate=1e-2, held_out=0.2
        )
        done = recover(model, split(), config, accelerator=accelerator, seed=3)
        assert shape_of(model) == before
        assert done.selected is not None
        return {"losses": [loss for _, loss in done.selected.losses]}


def of_every_model() -> dict[str, float]:
    """How far one step of each toy model is from the step that it makes alone, at most."""
    accelerator, found = make_accelerator(), {}
    for case in CASES:
        model = case.model().eval()
        alone, batch = copy.deepcopy(model), case.batch(4)
        batch_loss(alone, batch, None).value.backward()
        torch.optim.SGD(alone.parameters(), 0.1).step()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with prepared(accelerator, model, optimizer) as (wrapped, optimizer):
            accelerator.backward(batch_loss(wrapped, batch, None).value)
            optimizer.step()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        found[case.name] = max((one - two).abs().max().item() for one, two in pairs)
    return found


def main(folder: Path, names: list[str]) -> None:
    """Some of `WAYS`; what others left goes on, and what goes on is left for others."""
    state = process_state()
    rank = state.process_index
    found: dict[str, Any] = {name: train(name) for name in names}
    stopped(folder / "of several", names[0])
    assert all(p.isfinite().all() for p in train.left.parameters())
    if rank == 0:
        shutil.copytree(folder / "of several", folder / "for one")
    state.wait_for_everyone()
    found["resumed"] = train(names[0], folder / "of several")
    found["resumed of one"] = train(names[0], folder / "of one")
    found["in 16 bits"] = in_16_bits()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    with pytest.raises(StoppedError):
        train("nothing is held out", stop_at=STOP_AT)
    left = list(train.left.parameters())
    (folder / f"{rank}.nan").write_text(str(all(p.isnan().all().item() for p in left)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["every model"]:
        steps = of_every_model()
        file = Path(sys.argv[1]) / f"{process_state().process_index}.json"
        file.write_text(json.dumps(steps))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
