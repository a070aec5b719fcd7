"""Code beside the weights, for people who have transformers but not this package.

The few files that read a delta are copied as they are; ``auto_map`` in ``config.json`` names
classes that use them. transformers runs them only where the reader says ``trust_remote_code=True``.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.compat.transformers import auto_classes

_FILES = {
    "sosp_hub.errors": "sosp_hub_errors",
    "sosp_hub.compat.torch": "sosp_hub_compat_torch",
    "sosp_hub.standard_layers": "sosp_hub_standard_layers",
    "sosp_hub.compat.transformers": "sosp_hub_compat_transformers",
    "sosp_hub.checkpoint.format.record": "sosp_hub_record",
    "sosp_hub.checkpoint.format.modules": "sosp_hub_modules",
    "sosp_hub.checkpoint.format.standins": "sosp_hub_standins",
    "sosp_hub.checkpoint.format.delta": "sosp_hub_delta",
    "sosp_hub.checkpoint.format.shrink": "sosp_hub_shrink",
}
_MODELING = "modeling_sosp_hub"
_HEAD = '''"""Pruned model classes: the library's own, with layers as small as config.json says."""

import transformers
from transformers.modeling_utils import PreTrainedModel

from .sosp_hub_record import Delta
from .sosp_hub_shrink import shrink


class _Pruned:
    def __init__(self, config, *args, **kwargs):
        original = PreTrainedModel.post_init

        def post_init(model):
            shrink(model, lambda record, _: Delta.from_json(record))
            original(model)

        PreTrainedModel.post_init = post_init
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            PreTrainedModel.post_init = original
'''
_CLASS = """

class {name}(_Pruned, transformers.{name}):
    pass
"""


def ship(model: PreTrainedModel, folder: Path) -> None:
    """Writes the code and names it in the config that is already in the folder."""
    for module, name in _FILES.items():
        package, _, leaf = module.rpartition(".")
        text = resources.files(package).joinpath(f"{leaf}.py").read_text(encoding="utf-8")
        for other, target in _FILES.items():
            text = text.replace(f"from {other} import", f"from .{target} import")
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    base = adapter.base_name(model)
    classes = {type(model), type(model.get_submodule(base))}
    code = _HEAD + "".join(_CLASS.format(name=name) for name in sorted(c.__name__ for c in classes))
    (folder / f"{_MODELING}.py").write_text(code, encoding="utf-8")
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {
        auto: f"{_MODELING}.{cls.__name__}" for cls in classes for auto in auto_classes(cls)
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
