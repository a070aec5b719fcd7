"""Following a teacher: outputs from disk, hidden states, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sosp_hub import distillation
from sosp_hub.data.split import Split
from sosp_hub.distillation import (
    Numbered,
    StoredOutputs,
    Teacher,
    layer_pairs,
    relations_apart,
)
from sosp_hub.errors import DataError, ModelError
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recovery.recover import recover
from sosp_hub.tasks.loss import batch_loss
from sosp_hub.training import train_model
from tests.compare import assert_close


class Points(Split):
    def __init__(self, num=48, classes=5):
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(num, 4, generator=generator)
        self.labels = torch.arange(num) % classes
        self.num_labels, self.class_names = classes, tuple(map(str, range(classes)))

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return self.points[list(indices)], self.labels[list(indices)]


class Net(nn.Module):
    """A stream of some width, which layers add to."""

    def __init__(self, width=8, layers=4, classes=5, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(4, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def config(**keys):
    return FinetuneSection(**{"epochs": 1, "batch_size": 16, "learning_rate": 1e-2, **keys})


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_outputs_from_disk_are_those_of_the_teacher(tmp_path, temperature):
    student, teacher, points = Net(), Net(seed=1), Points()
    settings = config(distill=1.0, top_k=5, temperature=temperature)
    stored = StoredOutputs.make(teacher, points, settings, tmp_path)
    for numbers in ([0, 1, 2], [47, 3]):
        batch = points.__getitems__(numbers)
        mine, target = (batch_loss(model, batch).predictions for model in (student, teacher))
        expected = mine.divergence(target, temperature)
        found = stored.divergence(mine, torch.tensor(numbers), temperature)
        assert_close(found, expected, relative=1e-5)


def test_fewer_outputs_are_the_divergence_with_the_others_as_one_class(tmp_path):
    student, teacher, points = Net(), Net(seed=1), Points()
    stored = StoredOutputs.make(
        teacher, points, config(distill=1.0, top_k=2, temperature=1.0), tmp_path
    )
    batch = points.__getitems__(range(6))
    mine, target = (batch_loss(model, batch).predictions for model in (student, teacher))
    expected = 0.0
    for row, logits in zip(mine.values[:, 0], target.values[:, 0], strict=True):
        p, q = logits.softmax(-1), row.softmax(-1)
        best = p.argsort(descending=True)
        p, q = (torch.stack([x[best[0]], x[best[1]], x[best[2:]].sum()]) for x in (p, q))
        expected += (p * (p / q).log()).sum().item() / 6
    found = stored.divergence(mine, torch.arange(6), 1.0)
    assert_close(found.item(), expected, relative=1e-4)
    assert found < mine.divergence(target, 1.0)


@pytest.mark.slow
def test_training_with_stored_outputs_is_training_with_the_teacher(tmp_path):
    settings = config(distill=0.5, epochs=2, held_out=0.25)
    students = Net(), Net()
    recover(students[0], Points(), settings, teacher=Net(seed=1))
    stored = settings.model_copy(update={"top_k": 5})
    calls = []
    teacher = Net(seed=1)
    teacher.register_forward_hook(lambda *given: calls.append(given))
    recover(students[1], Points(), stored, teacher=teacher, checkpoint_dir=tmp_path)
    assert len(calls) == 3  # each of 36 samples once
    assert_close(students[1].state_dict(), students[0].state_dict(), relative=1e-5)
    recover(Net(), Points(), stored, teacher=teacher, checkpoint_dir=tmp_path)
    assert len(calls) == 3  # found again


def state_of(model, layer, x):
    x = model.stem(x)
    for each in model.layers[:layer]:
        x = x + each(x).tanh()
    return model.layers[layer](x)


def test_hidden_states_of_a_narrower_stream_are_followed():
    """Half of a stream that is redundant: least squares finds the other half of it."""
    points = Points()
    teacher = Net(width=8, seed=1)
    student = Net(width=4, seed=2)
    follow = Teacher(teacher, student, config(hidden=1.0))
    assert list(follow.pairs.items()) == [(f"layers.{i}", f"layers.{i}") for i in range(4)]
    batch = points.__getitems__(range(48))
    follow.fit(batch)
    assert {name: p.shape for name, p in follow.projections.items()} == {
        f"layers.{i}": (8, 4) for i in range(4)
    }
    with follow.states() as states:
        loss = batch_loss(student, batch)
    found = follow.loss(loss.value, loss, batch, states)
    expected = loss.value.item()
    for i in range(4):
        seen = {}
        for name, model in (("mine", student), ("theirs", teacher)):
            seen[name] = state_of(model, i, batch[0])
        solved = torch.linalg.lstsq(seen["mine"], seen["theirs"]).solution
        best = (seen["mine"] @ solved - seen["theirs"]).square().mean()
        expected += 0.25 * (best / seen["theirs"].square().mean()).item()
    assert_close(found.item(), expected, relative=1e-3)
    found.backward()
    assert student.layers[0].weight.grad.abs().sum() > 0


def cosine(one, two):
    return (
        sum(a * b for a, b in zip(one, two, strict=True))
        / (sum(a * a for a in one) * sum(b * b for b in two)) ** 0.5
    )


def test_relations_of_places_are_cosines_without_padding():
    torch.manual_seed(0)
    mine, theirs = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    squares = [
        (
            cosine(mine[sample, i].tolist(), mine[sample, j].tolist())
            - cosine(theirs[sample, i].tolist(), theirs[sample, j].tolist())
        )
        ** 2
        for sample, length in ((0, 3), (1, 5))
        for i in range(length)
        for j in range(length)
    ]
    found = relations_apart("layer", mine, theirs, {"attention_mask": mask})
    assert_close(found.item(), sum(squares) / len(squares), relative=1e-5)
    found.backward()
    assert mine.grad[0, 3:].abs().max() == 0 < mine.grad[1].abs().min()


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 2, 2)])
def test_relations_of_samples_are_cosines_of_all_their_states(shape):
    mine, theirs = torch.randn(shape), torch.randn(6, 5)
    rows = [part.flatten(1).tolist() for part in (mine, theirs)]
    squares = [
        (cosine(rows[0][i], rows[0][j]) - cosine(rows[1][i], rows[1][j])) ** 2
        for i in range(6)
        for j in range(6)
    ]
    found = relations_apart("layer", mine, theirs)
    assert_close(found.item(), sum(squares) / 36, relative=1e-5)
    assert relations_apart("layer", mine, 3 * mine).item() < 1e-10


def test_relations_of_other_places_are_refused():
    with pytest.raises(ModelError, match=r"'layer' gives states of \(2, 5\) and the teacher's"):
        relations_apart("layer", torch.randn(2, 5, 3), torch.randn(2, 4, 3))


def test_relations_of_a_narrower_stream_need_no_projection():
    points, teacher, student = Points(), Net(width=8, seed=1), Net(width=4, seed=2)
    follow = Teacher(teacher, student, config(relations=3.0))
    batch = points.__getitems__(range(16))
    follow.fit(batch)
    assert follow.projections == {}
    with follow.states() as states:
        loss = batch_loss(student, batch)
    expected = loss.value.item()
    for i in range(4):
        mine, theirs = (state_of(model, i, batch[0]) for model in (student, teacher))
        expected += 3 / 4 * relations_apart("", mine, theirs).item()
    assert_close(follow.loss(loss.value, loss, batch, states).item(), expected, relative=1e-5)


@pytest.mark.slow
def test_hidden_states_come_nearer_in_training():
    points, teacher = Points(), Net(seed=1)
    frozen = copy.deepcopy(teacher.state_dict())
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    settings = config(hidden=1.0, distill=1.0, epochs=6)
    history = train_model(student, points, settings, teacher=teacher)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert_close(teacher.state_dict(), frozen, relative=0)


@pytest.mark.slow
def test_a_killed_training_finds_its_projections(tmp_path):
    settings = config(hidden=1.0, distill=0.5, epochs=4, save_every_steps=2)
    expected, again = Net(width=4), Net(width=4)
    train_model(expected, Points(), settings, teacher=Net(seed=1))
    stop = {"left": 5}

    class Dying(Points):
        def __getitems__(self, indices):
            stop["left"] -= 1
            if stop["left"] < 0:
                raise KeyboardInterrupt
            return super().__getitems__(indices)

    with pytest.raises(KeyboardInterrupt):
        train_model(again, Dying(), settings, teacher=Net(seed=1), checkpoint_dir=tmp_path)
    again = Net(width=4)
    train_model(again, Points(), settings, teacher=Net(seed=1), checkpoint_dir=tmp_path)
    assert_close(again.state_dict(), expected.state_dict(), relative=0)


def test_projections_that_a_kill_cut_off_are_solved_again(tmp_path, monkeypatch):
    settings, batch = config(hidden=1.0), Points().__getitems__(range(8))

    def killed(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:-20])
        raise KeyboardInterrupt

    path, follow = (
        tmp_path / "projections.safetensors",
        Teacher(Net(seed=1), Net(width=4), settings),
    )
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            follow.fit(batch, path)
    follow = Teacher(Net(seed=1), Net(width=4), settings)
    follow.fit(batch, path)
    assert follow.projections
    assert [path.name for path in tmp_path.iterdir()] == ["projections.safetensors"]


@pytest.mark.parametrize(
    ("mine", "theirs", "pairs"),
    [
        (4, 4, {0: 0, 1: 1, 2: 2, 3: 3}),
        (2, 4, {0: 1, 1: 3}),
        (8, 8, {1: 1, 3: 3, 5: 5, 7: 7}),
        (3, 6, {0: 1, 1: 3, 2: 5}),
    ],
)
def test_layers_follow_those_of_equal_depth(mine, theirs, pairs):
    found = layer_pairs(Net(layers=mine), Net(layers=theirs), None)
    assert found == {f"layers.{a}": f"layers.{b}" for a, b in pairs.items()}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"hidden": 1.0, "top_k": 2}, "no hidden states are kept"),
        ({"top_k": 2}, "nothing is followed"),
        ({"top_k": 2, "distill": 0.5, "augment": True}, "augment: false"),
        ({"layers": {"a": "b"}, "distill": 0.5}, "of hidden states"),
        ({"teacher": {"id": "x"}}, "nothing is followed"),
    ],
)
def test_what_does_not_go_together_is_refused(keys, told):
    with pytest.raises(ValueError, match=told):
        config(**keys)


def test_a_layer_map_that_does_not_fit_is_refused():
    with pytest.raises(ModelError, match=r"finetune.layers: the teacher has no module 'layers\.9'"):
        layer_pairs(Net(), Net(), {"layers.0": "layers.9"})
    with pytest.raises(ModelError, match="has no stack of layers"):
        layer_pairs(nn.Linear(2, 2), nn.Linear(2, 2), None)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ModelError, match=r"finetune.teacher: its outputs .* \(16, 1, 7\)"):
        train_model(Net(), Points(), config(distill=0.5), teacher=Net(classes=7))


def test_places_that_differ_are_refused(tmp_path):
    class Ragged(Points):
        def __getitems__(self, indices):
            length = 2 + indices[0] // 16
            tokens = torch.zeros(len(indices), length, 4)
            return tokens, torch.zeros(len(indices), length, dtype=torch.long)

    def loss_fn(outputs, targets):
        from sosp_hub.tasks import softmax

        return softmax(outputs, targets)

    with pytest.raises(DataError, match="samples have different lengths"):
        StoredOutputs.make(Net(), Ragged(), config(distill=1.0, top_k=2), tmp_path, loss_fn=loss_fn)


def test_batches_come_with_their_numbers():
    numbers, (points, _) = Numbered(Points()).__getitems__([3, 1])
    assert numbers.tolist() == [3, 1]
    assert torch.equal(points, Points().points[[3, 1]])
    assert F.mse_loss(points, points) == 0
