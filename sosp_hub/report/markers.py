"""The two lines around the generated part of a card, and what lies outside of them."""

import re
from typing import Any

from huggingface_hub import ModelCard

from sosp_hub.errors import HubError

BEGIN = "<!-- sosp_hub: generated from here; write outside these two lines -->"
END = "<!-- sosp_hub: generated up to here -->"
_ADDRESS = re.compile(r"<!-- sosp_hub: address (.*?) -->")


def fence(body: str, address: str) -> str:
    """The generated part between its markers; it remembers the address that its snippet loads."""
    return f"{BEGIN}\n<!-- sosp_hub: address {address} -->\n{body.strip()}\n\n{END}"


def split_card(old: str | None) -> tuple[str, str, dict[str, Any]]:
    """Text before and after the generated part, and the metadata, of the present card."""
    if old is None or not old.strip():
        return "\n", "\n", {}
    card = ModelCard(old, ignore_metadata_errors=True)
    text, kept = card.text, dict(card.data.__dict__)
    begins, ends = text.count(BEGIN), text.count(END)
    if (begins, ends) == (0, 0):
        return f"{text.rstrip()}\n\n", "\n", kept
    if (begins, ends) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise HubError(
            f"README.md: expected the lines {BEGIN!r} and {END!r} once each and in this order, "
            f"found {begins} and {ends}; restore them, or delete both and the card is appended"
        )
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :], kept


def readdress(text: str, repo_id: str) -> str:
    """A card whose load snippet names ``repo_id``; anything a person wrote is left alone."""
    found = _ADDRESS.search(text)
    if found is None or END not in text:
        return text
    begin, end = text.index(found.group()), text.index(END)
    block = text[begin:end].replace(f'"{found.group(1)}"', f'"{repo_id}"')
    block = block.replace(f'hf-hub:{found.group(1)}"', f'hf-hub:{repo_id}"')
    block = block.replace(found.group(), f"<!-- sosp_hub: address {repo_id} -->")
    return text[:begin] + block + text[end:]
