"""``schedule`` in recipes: cut, train, cut; told round by round, and continued in the middle."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sosp_hub import scoring
from sosp_hub.checkpoint.io import from_pretrained
from sosp_hub.cost import cost
from sosp_hub.errors import PlanError
from sosp_hub.pipeline import planning, rounds
from sosp_hub.plan import PruningPlan
from sosp_hub.prune import main
from sosp_hub.recipe.load import load_recipe
from sosp_hub.structure.trace import trace

pytestmark = pytest.mark.slow

TEXTS = Path(__file__).parents[2] / "recipes" / "smollm2_135m.yaml"
ROUNDS = ["budget={macs: 0.6}", "schedule={rounds: 3}", "finetune.epochs=1", "data.num_train=48"]


def report_of(recipe, name="out"):
    return json.loads((recipe.parent / name / "sosp_report.json").read_text())


def test_rounds_lead_to_the_budget_and_are_told(recipe, capsys):
    assert main([str(recipe), *ROUNDS]) == 0
    report = report_of(recipe)
    kept = [one["kept"]["macs"] for one in report["rounds"]]
    assert len(kept) == 2
    assert 0.6 < kept[1] < kept[0] < 1
    share = report["cost"]["after"]["macs"] / report["cost"]["before"]["macs"]
    assert 0.55 < share <= 0.6
    assert report["plan"]["provenance"]["rounds"] == 3
    card = (recipe.parent / "out" / "README.md").read_text()
    assert "## Rounds before the last" in card
    assert not (recipe.parent / "out" / "saliency.safetensors").exists()  # it would hold no score
    model = from_pretrained(recipe.parent / "out")
    assert sum(p.numel() for p in model.parameters()) == report["cost"]["after"]["params"]
    again = ["--from-scores", str(recipe.parent / "out"), "budget.macs=0.5"]
    assert main(again) == 2
    assert "of models that were cut before" in capsys.readouterr().err


def test_a_schedule_that_was_killed_goes_on_in_the_middle(recipe, monkeypatch):
    assert main([str(recipe), *ROUNDS]) == 0
    done, follow_up = [], rounds.follow_up

    def dying(context, plan, pruned):
        done.append(cost(context.graph).macs)
        if len(done) == 2:
            raise KeyboardInterrupt
        return follow_up(context, plan, pruned)

    monkeypatch.setattr(rounds, "follow_up", dying)
    again = [str(recipe), *ROUNDS, f"output.dir={recipe.parent / 'again'}"]
    assert main(again) == 130
    assert main(again) == 0
    first, second = report_of(recipe), report_of(recipe, "again")
    for key in ("rounds", "metrics", "plan"):
        assert first[key] == second[key]


def test_rounds_without_training_score_what_was_rebuilt(recipe):
    given = [
        "schedule={rounds: 2, epochs: 0, share: linear}",
        "rebuild.method=ridge",
        "finetune.epochs=0",
    ]
    assert main([str(recipe), *ROUNDS, *given]) == 0
    report = report_of(recipe)
    (first,) = report["rounds"]
    assert "rebuilt" in first["metrics"]
    assert "final" not in first["metrics"]
    assert report["recovery"] is None or not report["recovery"]
    at_once = [
        "rebuild.method=ridge",
        f"output.dir={recipe.parent / 'once'}",
        "schedule=null",
        "finetune.epochs=0",
    ]
    assert main([str(recipe), *ROUNDS, *at_once]) == 0
    assert report["plan"]["kept"] != report_of(recipe, "once")["plan"]["kept"]


def test_a_round_trains_by_its_own_epochs():
    """A number of tokens is of the last training alone."""
    given = [*ROUNDS, "finetune.tokens=1000"]
    context = SimpleNamespace(recipe=load_recipe(TEXTS, given), graph=(graph := _graph()))
    one, last = (rounds._recipe_of(context, SimpleNamespace(graph=graph), n) for n in (1, 3))
    assert (one.finetune.epochs, one.finetune.tokens) == (1, None)
    assert last.finetune.tokens == 1000


def _graph():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    return trace(net, (torch.randn(1, 4),))


def test_floors_are_shares_of_the_dense_groups_in_every_round(recipe):
    given = ["budget={macs: 0.55, keep_at_least: 0.5}", "schedule={rounds: 3, epochs: 0}"]
    assert main([str(recipe), *given]) == 0
    plan = report_of(recipe)["plan"]
    shares = {name: len(kept) / plan["sizes"][name] for name, kept in plan["kept"].items()}
    assert min(shares.values()) == 0.5


def test_layers_and_their_insides_do_not_go_in_rounds_together(recipe, capsys):
    given = ["structure.kinds=[layer, neuron]", "criterion={name: random}"]
    assert main([str(recipe), *ROUNDS, *given]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "write structure.kinds: [layer], or leave layer out of it" in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("budget={structures: 0.5}", "rounds lead to a share of macs"),
        ("budget={max_drop: {accuracy: 1}}", "rounds lead to a share of macs"),
        ("criterion={name: taylor, compensate_bias: true}", "shift biases"),
        ("schedule={rounds: 1}", "schedule.rounds"),
    ],
)
def test_what_does_not_go_in_rounds_is_refused(given, told, recipe, capsys):
    assert main([str(recipe), *ROUNDS, given]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList([make() for _ in range(3)])

    def forward(self, x):
        streamed = x
        for layer in self.layers:
            streamed = layer(streamed)
        return x + streamed


def test_a_stack_inside_a_stack_is_refused_before_the_first_round(recipe, monkeypatch, capsys):
    """Their plans cannot be put together, which was told after all rounds."""
    torch.manual_seed(0)
    nested = Stack(lambda: Stack(Layer))
    graph = trace(nested, (torch.randn(2, 4),))
    groups = {name: group for name, group in graph.groups.items() if group.kind == "layer"}
    assert "layers:layer" in groups
    assert len(groups) > 1
    first, second = (
        PruningPlan({name: (0, 2)}, {name: 3}) for name in ("layers:layer", "layers.1.layers:layer")
    )
    with pytest.raises(PlanError, match="is of another layer than before"):
        first.compose(second)
    monkeypatch.setattr(scoring, "scorable_groups", lambda *_: groups)
    monkeypatch.setattr(rounds, "in_rounds", None)
    assert main([str(recipe), *ROUNDS]) == 2
    assert "'layers.0.layers' is a stack of layers inside one of" in capsys.readouterr().err
    planning.check_stacks({name: groups[name] for name in groups if name != "layers:layer"})
