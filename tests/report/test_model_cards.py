"""The shipped cards are what the present code writes for their reports."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[2] / "model_cards"
_SPEC = importlib.util.spec_from_file_location("collect_cards", HERE / "collect.py")
collect_cards = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(collect_cards)
CARDS = collect_cards.cards()


def test_there_are_cards():
    assert len(CARDS) >= 1


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_renders_again_as_it_is(card, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # licence texts of the base models
    copy = tmp_path / card.name
    shutil.copytree(card, copy)
    assert collect_cards.render(copy) == (card / "README.md").read_text(encoding="utf-8")
    drawn = {path.name for path in (copy / "figures").iterdir()}
    assert drawn == {path.name for path in (card / "figures").iterdir()}


def test_the_index_lists_them():
    assert collect_cards.index() == (HERE / "README.md").read_text(encoding="utf-8")
