"""Which files are a model's weights, for everything that cleans, publishes or lists a folder."""

import re

_VARIANT = r"(\.[A-Za-z0-9_]+)?"
_SHARD = r"(-\d+-of-\d+)?"
_KINDS = {
    "model": "safetensors|pth",
    "pytorch_model": "bin|pth",
    "tf_model": "h5",
    "flax_model": "msgpack",
    "open_clip(_pytorch)?_model": "safetensors|bin|pth",
}
_NAMES = re.compile(
    "|".join(
        rf"{stem}({_VARIANT}{_SHARD}|{_SHARD}{_VARIANT})\.({ends})(\.index{_VARIANT}\.json)?"
        for stem, ends in _KINDS.items()
    )
)


def is_weight_file(name: str) -> bool:
    """Whether transformers or timm takes a file of this name, in a model's folder, for its weights.

    That is so of single files, shards, their index, variants (``model.fp16.safetensors``) and the
    formats of other frameworks; of averaged weights, adapters or scores beside them it is not.
    """
    return _NAMES.fullmatch(name) is not None
