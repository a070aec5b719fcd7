"""What Python saves can be published as it is; words that a person wrote stay."""

import pytest

import sosp_hub
from sosp_hub.report.markers import BEGIN, END
from tests.checkpoint import cuts


@pytest.fixture
def folder(tmp_path):
    return sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "model")


@pytest.mark.slow
def test_a_saved_model_can_be_pushed(folder):
    result = sosp_hub.push_to_hub(folder, "me/small", dry_run=True)
    assert {"README.md", "config.json", "model.safetensors"} <= set(result.added)


def test_a_card_is_renewed_between_its_marks(folder):
    card = folder / "README.md"
    text = card.read_text("utf-8")
    assert "quality was not measured" in text
    card.write_text(text.replace(END, f"{END}\n\nMy own words.") + "\nmore", "utf-8")
    report = {"metrics": {"dense": {"accuracy": {"value": 0.5, "n": 10, "stderr": 0.1}}}}
    report["metrics"]["final"] = report["metrics"]["dense"]
    sosp_hub.save_pretrained(cuts.pruned("llama"), folder, report=report)
    renewed = card.read_text("utf-8")
    assert "quality was not measured" not in renewed
    assert "My own words." in renewed
    assert renewed.count(BEGIN) == 1


@pytest.mark.parametrize("text", ["mine alone", f"{BEGIN}\nno end"])
def test_a_card_that_is_not_ours_stays_and_the_model_is_saved(text, folder):
    (folder / "README.md").write_text(text, "utf-8")
    (folder / "model.safetensors").unlink()
    sosp_hub.save_pretrained(cuts.pruned("llama"), folder)
    assert (folder / "README.md").read_text("utf-8") == text
    assert (folder / "model.safetensors").is_file()
