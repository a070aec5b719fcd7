"""The two lines around the generated part of a card, and what lies outside of them."""

import json
import re
from typing import Any

import yaml
from huggingface_hub import ModelCard

from sosp_hub.errors import HubError
from sosp_hub.untrusted import UnreadableError, front_matter

BEGIN = "<!-- sosp_hub: generated from here; write outside these two lines -->"
END = "<!-- sosp_hub: generated up to here -->"
_ADDRESS = re.compile(r"<!-- sosp_hub: address (.*?) -->")


def quoted(address: str) -> str:
    """An address as a string of Python, which also stands in the marker."""
    text = json.dumps(address, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def fence(body: str, address: str) -> str:
    """The generated part between its markers; it remembers the address that its snippet loads."""
    body = body.replace("<!-- sosp_hub", "<! -- sosp_hub").strip()
    return f"{BEGIN}\n<!-- sosp_hub: address {quoted(address)[1:-1]} -->\n{body}\n\n{END}"


def split_card(old: str | None) -> tuple[str, str, dict[str, Any]]:
    """Text before and after the generated part, and the metadata, of the present card.

    Raises:
        HubError: Metadata that cannot be read, or markers that are not there once each.
    """
    if old is None or not old.strip():
        return "\n", "\n", {}
    kept, text = read_card(old)
    begins, ends = text.count(BEGIN), text.count(END)
    if (begins, ends) == (0, 0):
        return f"{text.rstrip()}\n\n", "\n", kept
    if (begins, ends) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise HubError(
            f"README.md: expected the lines {BEGIN!r} and {END!r} once each and in this order, "
            f"found {begins} and {ends}; restore them, or delete both and the card is appended"
        )
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :], kept


def read_card(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card.

    Raises:
        HubError: Metadata that cannot be read, or that the hub's own classes do not take.
    """
    try:
        front_matter(card)
        parsed = ModelCard(card, ignore_metadata_errors=True)
    except UnreadableError as error:
        raise HubError(f"README.md: the metadata at the top: {error}; repair them") from error
    except (AttributeError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise HubError(
            f"README.md: the metadata at the top are none of a model card ({error}); repair them"
        ) from error
    return dict(parsed.data.__dict__), parsed.text


def readdress(text: str, repo_id: str) -> str:
    """A card whose load snippet names ``repo_id``; anything a person wrote is left alone."""
    address = _ADDRESS.search(text)
    if address is None:
        return text
    begin = text.index(address.group())
    end = text.find(END, begin)
    if end < 0:
        return text
    block = text[begin:end].replace(f'"{address.group(1)}"', quoted(repo_id))
    block = block.replace(f'hf-hub:{address.group(1)}"', f"hf-hub:{quoted(repo_id)[1:]}")
    block = block.replace(address.group(), f"<!-- sosp_hub: address {repo_id} -->")
    return text[:begin] + block + text[end:]
