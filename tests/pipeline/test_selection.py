"""Groups chosen by name in a recipe."""

import json

import pytest
import transformers

import sosp_hub
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


def test_a_part_that_the_loss_does_not_read_stays_whole_where_curvature_is_measured(tmp_path):
    """SigLIP's pooling head, which its classifier does not read: such models were refused."""
    config = transformers.SiglipConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
        num_labels=10,
    )  # fmt: skip
    own = transformers.SiglipForImageClassification(config)
    own.save_pretrained(tmp_path / "model")
    size = {"height": 16, "width": 16}
    transformers.SiglipImageProcessor(size=size).save_pretrained(tmp_path / "model")
    sections = {
        "model": {
            "library": "transformers",
            "id": str(tmp_path / "model"),
            "task": "image-classification",
        },
        "data": {"id": "sklearn/digits", "num_train": 64, "num_test": 32},
        "criterion": {"name": "sosp_i", "selection": "signed", "num_samples": 24},
        "budget": {"structures": 0.6},
        "rebuild": {"method": None},
        "finetune": {"epochs": 0},
        "evaluate": {"metrics": ["loss"], "latency": False},
        "output": {"dir": str(tmp_path / "out"), "figures": False},
    }
    report = sosp_hub.prune(sections)
    kept = report["plan"]["kept"]
    assert any(name.startswith("vision_model.encoder") for name in kept)
    assert not any(name.startswith("vision_model.head") for name in kept)
