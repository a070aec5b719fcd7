"""A comparison is a set of recipes; what cannot be one of them is said with its place."""

import pytest

from sosp_hub.errors import RecipeError
from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.recipe.load import dump_recipe, load_recipe, parse_recipe
from sosp_hub.recipe.study_grid import cells_of
from tests.recipe.test_recipe import MINIMAL, write

SURGEON = {"name": "sosp_i", "selection": "surgeon"}
DEPTH = {"name": "block_influence", "kinds": ["layer"]}


def load(folder, compare, overrides=(), **sections):
    return load_recipe(write(folder, {**MINIMAL, **sections, "compare": compare}), overrides)


def faults(folder, compare, **sections):
    with pytest.raises(RecipeError) as caught:
        load(folder, compare, **sections)
    return caught.value.faults


def test_a_cell_for_each_criterion_budget_and_seed(tmp_path):
    recipe = load(
        tmp_path,
        {
            "criteria": ["random", SURGEON, DEPTH],
            "budgets": [{"macs": 0.5}, {"params": 0.8, "round_to": 2}],
            "seeds": [3, 5],
        },
        criterion={"num_samples": 7},
        budget={"keep_at_least": 0.2, "macs": 0.9},
        structure={"exclude": ["head"]},
    )
    cells, none = cells_of(recipe)
    assert none == []
    assert [(cell.criterion, cell.budget, cell.seed) for cell in cells] == [
        (criterion, budget, seed)
        for criterion in ("random", "sosp_i surgeon", "block_influence layer")
        for budget in ("macs 0.5", "params 0.8 round_to=2")
        for seed in (3, 5)
    ]
    for cell in cells:
        assert cell.recipe.seed == cell.seed
        assert cell.recipe.compare is None
        assert cell.recipe.criterion.num_samples == 7
        assert cell.recipe.budget.keep_at_least == 0.2
        assert cell.recipe.structure.exclude == ("head",)
    assert cells[6].recipe.criterion.selection == "surgeon"
    assert cells[6].recipe.budget.targets() == {"params": 0.8}
    assert cells[6].recipe.budget.round_to == 2
    assert cells[6].recipe.structure.kinds == recipe.structure.kinds
    assert cells[8].recipe.structure.kinds == ("layer",)


@pytest.mark.parametrize(
    ("compare", "labels"),
    [
        (
            {"criteria": [{"name": "eap"}, {"name": "eap", "set_size": None}, "random"]},
            ["eap", "eap set_size=null", "random"],
        ),
        (
            {"criteria": ["random"], "budgets": [{"macs": 0.5}, {"macs": 0.50000001}]},
            ["macs=0.5", "macs=0.50000001"],
        ),
    ],
    ids=["a null", "a number"],
)
def test_no_two_are_called_the_same(tmp_path, compare, labels):
    cells, _ = cells_of(load(tmp_path, {"seeds": [0], **compare}))
    budgets = "budgets" in compare
    assert [cell.budget if budgets else cell.criterion for cell in cells] == labels


def test_what_is_left_out_is_the_recipes_own(tmp_path):
    cells, _ = cells_of(load(tmp_path, {"criteria": ["lamp"]}, budget={"params": 0.3}))
    assert [(cell.budget, cell.seed) for cell in cells] == [("params 0.3", s) for s in range(3)]
    sglp = {"name": "sglp", "kinds": ["layer"]}  # which decides for itself, in a run of its own
    cells, _ = cells_of(load(tmp_path, {"criteria": ["lamp", sglp], "seeds": [0]}))
    assert [(cell.budget, cell.recipe.budget.targets()) for cell in cells] == [
        ("macs 0.5", {"macs": 0.5})
    ] * 2
    only = load(tmp_path, {"criteria": ["lamp"]}, ["compare.seeds=[4]", "compare.criteria=[eap]"])
    assert [(c.criterion, c.seed) for c in cells_of(only)[0]] == [("eap", 4)]
    assert cells_of(load_recipe(write(tmp_path, MINIMAL))) == ([], [])


def test_a_comparison_survives_being_written(tmp_path):
    compare = {"criteria": ["random", SURGEON], "budgets": [{"macs": 0.5}], "seeds": [1]}
    recipe = load(tmp_path, compare)
    for whole in (True, False):
        again = parse_recipe(dump_recipe(recipe, whole=whole), "again")
        assert again == recipe
        assert cells_of(again) == cells_of(recipe)


@pytest.mark.parametrize(
    ("compare", "words"),
    [
        ({"criteria": ["scp", "lamp"]}, ["compare.criteria.0", "scp_score", "sosp_hub.prune"]),
        ({"criteria": ["tailor"]}, ["compare.criteria.0.name", "'tailor'", "`taylor`"]),
        ({"criteria": [3]}, ["compare.criteria.0", "got 3", "keys"]),
        ({"criteria": []}, ["compare.criteria", "at least one"]),
        ({"criterion": ["random"], "criteria": ["lamp"]}, ["compare.criterion", "`criteria`"]),
        ({"criteria": [{"name": "random", "mode": "exact"}]}, ["criteria.0.mode", "not have"]),
        ({"criteria": [{**SURGEON, "damping": 0}]}, ["criteria.0.damping", "more than 0"]),
        (
            {"criteria": ["lamp", "block_influence"]},
            ["criteria.1.name", "block_influence", "channel", "write kinds: [layer]"],
        ),
        ({"criteria": [{"name": "taylor", "kinds": ["layer"]}]}, ["criteria.0.name", "layer"]),
        ({"criteria": [{"name": "taylor", "kinds": "head"}]}, ["criteria.0.kinds", "[head]"]),
        ({"criteria": ["lamp", "lamp"]}, ["criteria.1", "lamp", "criteria.0", "leave one"]),
        (
            {"criteria": [{"name": "taylor", "form": "abs"}, "taylor"]},
            ["criteria.1", "same as criteria.0"],
        ),
        ({"criteria": [SURGEON, {**SURGEON, "compensate": True}]}, ["criteria.1", "criteria.0"]),
        ({"criteria": [{**DEPTH, "compensate": True}]}, ["criteria.0.compensate", "layer"]),
        ({"criteria": ["lamp"], "seeds": [1, 1]}, ["seeds.1", "same as seeds.0"]),
        ({"criteria": ["lamp"], "seeds": [-1]}, ["seeds.0", "got -1", "at least 0"]),
        ({"criteria": ["lamp"], "seeds": []}, ["seeds", "at least one"]),
        ({"criteria": ["lamp"], "budgets": [{"mac": 0.5}]}, ["budgets.0.mac", "`macs`"]),
        ({"criteria": ["lamp"], "budgets": [{"macs": 40}]}, ["budgets.0.macs", "write 0.4"]),
        (
            {"criteria": ["lamp"], "budgets": [{"macs": 0.5}, {"macs": 0.5}]},
            ["budgets.1", "same as budgets.0"],
        ),
        (
            {"criteria": ["lamp", DEPTH], "budgets": [{"macs": 0.5}, {"structures": 0.5}]},
            ["budgets.1", "layers for block_influence", "write macs"],
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_fault_names_its_place_in_the_comparison(tmp_path, compare, words):
    (fault,) = faults(tmp_path, compare)
    for word in words:
        assert word in fault, fault


def test_all_faults_of_a_comparison_come_at_once(tmp_path):
    compare = {"criteria": ["tailor", "lamp"], "budgets": [{"macs": 7}], "seeds": [2, 2]}
    found = faults(tmp_path, compare, push={"repo_id": "me/small"})
    assert [fault.split(":")[0] for fault in found] == [
        "push",
        "compare.criteria.0.name",
        "compare.budgets.0.macs",
        "compare.seeds.1",
    ]


def test_a_recipe_is_for_the_verb_that_reads_it(tmp_path):
    path = write(tmp_path, {**MINIMAL, "compare": {"criteria": ["lamp"]}})
    with pytest.raises(RecipeError, match=r"run python -m sosp_hub\.compare.*compare=null"):
        load_recipe(path, (), "prune")
    assert load_recipe(path, ["compare=null"], "prune").compare is None
    with pytest.raises(RecipeError, match="compare: missing; write compare:"):
        load_recipe(write(tmp_path, MINIMAL), (), "compare")


def test_words_of_a_label_belong_to_one_option():
    """A label shows words without their keys, so no two options may share one."""
    for section in CRITERIA.known().values():
        words = [
            word
            for field in section.model_fields.values()
            for word in getattr(field.annotation, "__args__", ())
            if isinstance(word, str)
        ]
        assert len(words) == len(set(words)), section
