"""What the package uses of transformers and transformers does not promise."""

from collections.abc import Iterable, Mapping
from typing import Any


def find_cache(values: Iterable[Any]) -> Any:
    """The key-value cache among the arguments of an attention, whatever the argument is called.

    ``past_key_values`` until transformers 5.23, ``cache`` from 5.24 on. Of an encoder-decoder's
    pair it is the decoder's own.
    """
    for value in values:
        value = getattr(value, "self_attention_cache", value)
        if callable(getattr(value, "update", None)) and hasattr(value, "get_seq_length"):
            return value
    return None


def cache_in(output: Mapping[str, Any]) -> dict[str, Any]:
    """The cache that a model's output holds, under the name by which the next call takes it."""
    return {name: value for name, value in output.items() if find_cache([value]) is not None}
