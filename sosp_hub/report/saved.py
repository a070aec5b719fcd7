"""Saving a model with a card, so that the folder can be published as it is."""

import functools
import logging
from pathlib import Path
from typing import Any

from sosp_hub.checkpoint import io
from sosp_hub.errors import HubError
from sosp_hub.report.card import render_card
from sosp_hub.report.listing import CARD
from sosp_hub.report.markers import BEGIN

log = logging.getLogger("sosp_hub")


@functools.wraps(io.save_pretrained)
def save_pretrained(model: Any, folder: str | Path, **options: Any) -> Path:
    """As `sosp_hub.checkpoint.io.save_pretrained`, and writes or renews the card."""
    saved = io.save_pretrained(model, folder, **options)
    card = saved / CARD
    if not card.is_file() or BEGIN in card.read_text("utf-8", errors="replace"):
        try:
            render_card(saved, report=options.get("report") or {}, figures=False, run=False)
        except HubError as error:  # the model is saved; a card that somebody has changed stays
            log.warning("%s: the card is not written: %s", saved, error)
    return saved
