"""Only `sosp_hub.compat` touches what torch, transformers, timm and the others do not promise."""

import ast
from pathlib import Path

import pytest

import sosp_hub

ROOT = Path(sosp_hub.__file__).parent
LIBRARIES = {"torch", "torchvision", "transformers", "timm", "huggingface_hub", "accelerate"}
DOCUMENTED = {  # modules whose pages say what is in them
    *LIBRARIES,
    *("accelerate.utils", "timm.data", "timm.models", "timm.models.resnet"),
    *("huggingface_hub.errors", "huggingface_hub.hf_api", "huggingface_hub.utils"),
    *("torch.autograd", "torch.autograd.function", "torch.distributed"),
    *("torch.distributed.fsdp", "torch.distributed.tensor"),
    *("torch.nn", "torch.nn.attention", "torch.nn.modules.module"),
    *("torch.nn.functional", "torch.optim", "torch.overrides", "torch.profiler"),
    *("torch.utils.data", "torch.utils.flop_counter", "torch.utils.hooks"),
    *("torchvision.ops", "transformers.modeling_utils"),
}
PYTHONS_OWN = {"_fields", "_initializing", "_lru_cache_wrapper"}
ASKING = {"getattr", "hasattr", "setattr", "delattr"}
FILES = sorted(path for path in ROOT.rglob("*.py") if "compat" not in path.relative_to(ROOT).parts)


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name not in PYTHONS_OWN


def is_theirs(module):
    return module.partition(".")[0] in LIBRARIES


def names_of(tree):
    """What a module defines itself: functions, classes, variables, attributes of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if getattr(node.value, "id", "") in ("self", "cls") else []


def private_names(source):
    """Lines and names of what no library promises, in the source of one module."""
    tree = ast.parse(source)
    own = set(names_of(tree))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            names = [name for name in names if is_theirs(name) and name not in DOCUMENTED]
        elif isinstance(node, ast.ImportFrom) and is_theirs(node.module or ""):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = node.module in DOCUMENTED
            names = [n for n in names if not known or is_private(n.rpartition(".")[2])]
        elif isinstance(node, ast.Attribute):
            if (is_private(node.attr) and node.attr not in own) or ast.unparse(node) == "torch.ops":
                names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ASKING:
            value = getattr(node.args[1], "value", None)
            names = [value] if isinstance(value, str) and is_private(value) else []
        yield from ((node.lineno, name) for name in names)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from torch._prims import add", "torch._prims.add"),
        ("from torch.nn.modules.conv import _ConvNd", "torch.nn.modules.conv._ConvNd"),
        ("import transformers.core_model_loading", "transformers.core_model_loading"),
        ("from timm.models import _hub", "timm.models._hub"),
        ("module._parameters['weight']", "_parameters"),
        ("torch._softmax_backward_data(x)", "_softmax_backward_data"),
        ("nn.modules.conv._ConvNd", "_ConvNd"),
        ("torch.ops.aten.add", "ops"),
        ("getattr(config, '_commit_hash', None)", "_commit_hash"),
        ("hasattr(model, '_hf_hook')", "_hf_hook"),
    ],
)
def test_a_private_name_is_found(line, name):
    source = f"class _Own:\n    def _method(self): self._own = 1\nif True:\n    {line}\n"
    assert [found for _, found in private_names(source)] == [name]


def test_own_names_are_no_ones_business():
    source = "class A:\n    def _f(self):\n        self._x = 1\n        other._f(), self._x\n"
    assert list(private_names(source)) == []


@pytest.mark.slow
def test_no_other_file_touches_a_private_name():
    assert len(FILES) > 100
    found = {
        f"{path.relative_to(ROOT)}:{line}": name
        for path in FILES
        for line, name in private_names(path.read_text())
    }
    assert found == {}
