"""Groups chosen by name in a recipe."""

import json

import pytest

from sosp_hub.prune import main


@pytest.mark.slow
def test_groups_are_left_out_and_given_shares_by_name(recipe, tmp_path):
    keys = [
        "structure.exclude=['layer1*', 'conv1*']",
        "budget.groups={'layer2.*': 0.5}",
        "budget.keep_at_least={'layer3.0*': 0.875}",
    ]
    assert main([str(recipe), *keys]) == 0
    plan = json.loads((tmp_path / "out" / "sosp_report.json").read_text())["plan"]
    shares = {name: len(kept) / plan["sizes"][name] for name, kept in plan["kept"].items()}
    assert not [name for name in shares if name.startswith(("layer1", "conv1"))]
    assert {share for name, share in shares.items() if name.startswith("layer2.")} == {0.5}
    assert min(share for name, share in shares.items() if name.startswith("layer3.0")) >= 0.875
    assert len([name for name in shares if name.startswith("layer2.")]) == 4
    assert plan["provenance"]["groups"] == {"layer2.*": 0.5}


@pytest.mark.slow
def test_shares_by_name_alone_leave_the_others_whole(recipe, tmp_path):
    keys = ["budget={groups: {'layer2.*': 0.5}}", "criterion.name=magnitude"]
    assert main([str(recipe), *keys]) == 0
    plan = json.loads((tmp_path / "out" / "sosp_report.json").read_text())["plan"]
    assert {name.partition(".")[0] for name in plan["kept"]} == {"layer2"}
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("structure.exclude=['layer9*']", "structure.exclude: 'layer9*' is no group"),
        ("structure.exclude=['*']", "structure.exclude: nothing to cut: ['*'] leaves none of"),
        ("structure.only=['layer1*', 'layer9*']", "structure.only: 'layer9*' is no group"),
        ("budget.groups={'layer9*': 0.5}", "budget.groups: 'layer9*' is no group"),
        ("budget.groups={'layer2*': 5}", "budget.groups.layer2*"),
        ("budget.keep_at_least={'layer9*': 0.5}", "budget.keep_at_least: 'layer9*' is no group"),
    ],
)
def test_names_of_nothing_are_refused(recipe, capsys, key, words):
    assert main([str(recipe), key]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("target", ["deci", "mlx", "gguf"])
def test_a_target_that_has_no_form_for_the_model_is_refused_before_anything_runs(
    recipe, tmp_path, capsys, target
):
    """The plan was made for it, and its export refused the result of the run."""
    assert main([str(recipe), f"budget.target={target}"]) == 2
    assert "error: budget.target: " in (told := capsys.readouterr().err)
    assert "for causal language models of llama" in told
    assert "train dense" not in told
