"""The delta of a model against its skeleton, and back.

A *skeleton* is what the library builds from a plain config; it may live on the meta device. Nothing
here knows how the pruned model came about: ``diff`` finds every difference, ``apply_section`` makes
it again, and both refuse what the closed format cannot say.
"""

import contextlib
import copy
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.checkpoint.format.modules import (
    as_plain,
    is_plain,
    join,
    natural_shapes,
    own_config,
    own_tensors,
    plain_attributes,
    set_like,
)
from sosp_hub.checkpoint.format.record import (
    LARGEST_GROWTH,
    Delta,
    Plain,
    Replacement,
    Section,
    Shape,
)
from sosp_hub.checkpoint.format.standins import build_standin, describe_standin
from sosp_hub.compat.torch import (
    buffer_table,
    child_table,
    parameter_table,
    put_in,
    save_buffer,
    with_marks,
)
from sosp_hub.compat.transformers import CONFIG_STATE
from sosp_hub.errors import CheckpointError

_CONFIG_STATE = CONFIG_STATE | {"sosp_hub"}


def diff(
    skeleton: nn.Module,
    model: nn.Module,
    *,
    belongs: Callable[[str], bool] = lambda _: True,
    shared_configs: frozenset[int] = frozenset(),
    original: nn.Module | None = None,
    rewritten: frozenset[tuple[str, Any]] = frozenset(),
) -> Section:
    """All that has to change in ``skeleton`` to make it ``model``; no values of tensors.

    Args:
        skeleton: What the plain config builds.
        model: The pruned model.
        belongs: Whether a module, by its name, is part of this section and of no other.
        shared_configs: ``id`` of the configs that belong to the whole model; a module whose config
            is another object has its own copy, and only such copies are compared.
        original: What the config built before the skeleton's was rewritten. Numbers that are still
            as they were there, because nothing reads them, do not count.
        rewritten: Keys, with their old values, that the skeleton's config says differently.

    Raises:
        CheckpointError: A difference that the format cannot say; names the module.
    """
    differences = _Found(original, shared_configs, rewritten, belongs)
    differences.walk(skeleton, model, "")
    return Section(
        cls=type(model).__name__,
        modules=differences.modules,
        configs=differences.configs,
        tensors=differences.tensors,
        biases=tuple(differences.biases),
        replaced=differences.replaced,
        dropped=tuple(differences.dropped),
        growth=differences.growth,
    )


def apply_section(model: nn.Module, section: Section, path: str, *, part: bool = False) -> None:
    """Turns a skeleton into the pruned model, in place, after everything was checked.

    Tensors keep their leading slices, or stay without data on the meta device. Names
    below a child that this model does not have (a head without a pooler) are left out.

    Args:
        model: The skeleton.
        section: Its part of the delta.
        path: Place of the section in the file, for messages.
        part: The model has a part of the skeleton's children and attributes: others are left out.

    Raises:
        CheckpointError: A name that the model lacks, a value of another type, or a size that grows
            by more than the section declares.
    """
    plan = _Applied(model, _there(section, model) if part else section, path)
    plan.check()
    plan.apply()


def store_in_state(model: nn.Module, section: Section) -> None:
    """Has the state of a pruned model hold all that its files must: buffers and tombstones.

    Args:
        model: What the section is about, as pruned.
        section: Its part of the delta.
    """
    for name in section.buffers:
        owner, _, key = name.rpartition(".")
        save_buffer(model.get_submodule(owner), key)
    for name, one in section.replaced.items():
        owner, _, key = name.rpartition(".")
        children = child_table(model.get_submodule(owner))
        if getattr(children[key], "tombstone", None) != one.tombstone:
            children[key] = build_standin(one).train(model.training)


@contextlib.contextmanager
def versions_said(delta: Delta, installed: str) -> Iterator[None]:
    """Adds to an error that the checkpoint was written with another version of its library."""
    try:
        yield
    except CheckpointError as error:
        if delta.library_version == installed:
            raise
        raise CheckpointError(
            f"{error}; the checkpoint was written with {delta.library} {delta.library_version}, "
            f"this is {installed}"
        ) from None


class _Found:
    """The differences collected so far."""

    def __init__(
        self,
        original: nn.Module | None,
        shared: frozenset[int],
        rewritten: frozenset[tuple[str, Any]],
        belongs: Callable[[str], bool],
    ) -> None:
        self.belongs = belongs
        self.original, self.shared, self.rewritten = original, shared, rewritten
        self.modules: dict[str, dict[str, Plain]] = {}
        self.configs: dict[str, dict[str, Plain]] = {}
        self.tensors: dict[str, Shape] = {}
        self.biases: list[str] = []
        self.replaced: dict[str, Replacement] = {}
        self.dropped: list[str] = []
        self.growth = 1
        self.seen: set[int] = set()

    def walk(self, skeleton: nn.Module, model: nn.Module, name: str) -> None:
        if id(model) in self.seen:
            return
        self.seen.add(id(model))
        if self.belongs(name):
            self.compare(skeleton, model, name)
        for child, original in child_table(skeleton).items():
            if original is None:
                continue
            full, theirs = join(name, child), child_table(model).get(child)
            one = None if theirs is None else describe_standin(theirs, original)
            if theirs is not None and one is None:
                self.walk(original, theirs, full)
            elif self.belongs(full):
                if one is None:
                    self.dropped.append(full)
                else:
                    self.replaced[full] = one

    def compare(self, skeleton: nn.Module, model: nn.Module, name: str) -> None:
        if type(skeleton) is not type(model) and type(skeleton).__name__ != type(model).__name__:
            raise CheckpointError(
                f"module {name!r} is a {type(model).__name__} where the config builds a "
                f"{type(skeleton).__name__}: merge or unwrap adapters and the like before saving"
            )
        self.attributes(skeleton, model, name)
        self.config(skeleton, model, name)
        self.sizes(skeleton, model, name)
        ours = child_table(skeleton)
        for child, theirs in child_table(model).items():
            if theirs is not None and ours.get(child) is None:
                raise CheckpointError(
                    f"module {join(name, child)!r} is not in what the config builds"
                )

    def attributes(self, skeleton: nn.Module, model: nn.Module, name: str) -> None:
        before, after = plain_attributes(skeleton), plain_attributes(model)
        stale = plain_attributes(self.original.get_submodule(name)) if self.original else {}
        changed = {
            key: as_plain(after[key])
            for key, value in before.items()
            if key in after
            and as_plain(after[key]) != as_plain(value)
            and not (key in stale and as_plain(stale[key]) == as_plain(after[key]))
        }
        if changed:
            self.modules[name] = changed

    def config(self, skeleton: nn.Module, model: nn.Module, name: str) -> None:
        before, after = own_config(skeleton), own_config(model)
        if before is None or after is None or id(after) in self.shared:
            return
        changed = {
            key: as_plain(value)
            for key, value in vars(after).items()
            if key in vars(before)
            and key not in _CONFIG_STATE
            and is_plain(value)
            and (vars(before)[key] is None or is_plain(vars(before)[key]))
            and vars(before)[key] != value
            and (key, as_plain(value)) not in self.rewritten
        }
        if changed:
            self.configs[name] = changed

    def sizes(self, skeleton: nn.Module, model: nn.Module, name: str) -> None:
        before, after = dict(own_tensors(skeleton)), dict(own_tensors(model))
        old = natural_shapes(skeleton, vars(skeleton))
        changes = dict(self.modules.get(name, {}))  # all that a reader will know
        new = natural_shapes(skeleton, ChainMap(changes, vars(skeleton)))
        for key, tensor in after.items():
            if key not in before:
                if key == "bias" and new.get(key) == tuple(tensor.shape):
                    self.biases.append(name)
                    continue
                raise CheckpointError(
                    f"tensor {join(name, key)!r} is not in what the config builds"
                )
            was, now = tuple(before[key].shape), tuple(tensor.shape)
            self.growth = max(self.growth, _growth(now, was, f"tensor {join(name, key)!r}"))
            if now == (new[key] if key in new and old[key] == was else was):
                continue
            self.tensors[join(name, key)] = tuple(
                None if n == w else n for n, w in zip(now, was, strict=True)
            )
        for key in before.keys() - after.keys():
            raise CheckpointError(f"tensor {join(name, key)!r} is missing from the model")


def _there(section: Section, model: nn.Module) -> Section:
    """What a section says of the children and attributes that a model has."""

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {n: value for n, value in values.items() if hasattr(model, n.partition(".")[0])}

    modules = named(section.modules)
    known = plain_attributes(model)
    if own := {key: v for key, v in section.modules.get("", {}).items() if key in known}:
        modules[""] = own
    return replace(
        section,
        modules=modules,
        configs=named(section.configs),
        tensors=named(section.tensors),
        replaced=named(section.replaced),
        buffers=tuple(named(dict.fromkeys(section.buffers))),
        biases=tuple(named(dict.fromkeys(section.biases))),
        dropped=tuple(named(dict.fromkeys(section.dropped))),
    )


class _Applied:
    """One section on its way into one model."""

    def __init__(self, model: nn.Module, section: Section, path: str) -> None:
        self.model, self.section, self.path = model, section, path
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.resized: list[tuple[nn.Module, str, tuple[int, ...]]] = []

    def check(self) -> None:
        section = self.section
        gone = (*section.replaced, *section.dropped)
        for name in gone:
            self.module(name, "replaced" if name in section.replaced else "dropped")
        for name, part in self.named_parts():
            if any(name == other or name.startswith(other + ".") for other in gone):
                raise CheckpointError(
                    f"{self.path}.{part}[{name!r}]: the delta takes this module out"
                )
        for name, values in section.modules.items():
            if (module := self.module(name, "modules")) is not None:
                where = f"{self.path}.modules[{name!r}]"
                known = plain_attributes(module)
                for key, value in values.items():
                    _check_like(known.get(key), value, key, where)
        for name, values in section.configs.items():
            if (module := self.module(name, "configs")) is not None:
                where = f"{self.path}.configs[{name!r}]"
                if (config := own_config(module)) is None:
                    raise CheckpointError(f"{where}: a {type(module).__name__} has no config")
                for key, value in values.items():
                    if key in _CONFIG_STATE or key not in vars(config):
                        raise CheckpointError(f"{where}.{key}: the config has no such number")
                    if vars(config)[key] is not None:
                        _check_like(vars(config)[key], value, key, where)
        for name in section.biases:
            if (module := self.module(name, "biases")) is not None and (
                "bias" not in natural_shapes(module, vars(module))
                or parameter_table(module).get("bias") is not None
            ):
                raise CheckpointError(f"{self.path}.biases: {name!r} cannot take a bias")
        for name in section.buffers:
            owner, _, key = name.rpartition(".")
            module = self.module(owner, "buffers")
            if module is not None and buffer_table(module).get(key) is None:
                raise CheckpointError(f"{self.path}.buffers: there is no buffer {name!r}")
        self.check_dropped()
        self.check_sizes()

    def named_parts(self) -> Iterator[tuple[str, str]]:
        section = self.section
        yield from ((name, "modules") for name in section.modules)
        yield from ((name, "configs") for name in section.configs)
        yield from ((name, "tensors") for name in section.tensors)
        yield from ((name, "buffers") for name in section.buffers)
        yield from ((name, "biases") for name in section.biases)

    def module(self, name: str, part: str) -> nn.Module | None:
        """The named module; None if it hangs below a child that this model leaves out."""
        if name in self.modules:
            return self.modules[name]
        reached = self.model
        for child in name.split("."):
            if child in vars(reached) or child in child_table(reached):
                reached = child_table(reached).get(child)
                if reached is None:
                    return None
            else:
                break
        raise CheckpointError(
            f"{self.path}.{part}[{name!r}]: {type(self.model).__name__} has no such module; "
            f"names of modules can differ between versions of the library"
        )

    def check_dropped(self) -> None:
        left: dict[str, set[str]] = {}
        for name in self.section.dropped:
            parent, _, child = name.rpartition(".")
            if self.modules.get(name) is not None:
                left.setdefault(parent, set()).add(child)
        for parent, children in left.items():
            container = self.modules[parent]
            if isinstance(container, nn.ModuleList | nn.Sequential):
                names = list(child_table(container))
                if set(names[len(names) - len(children) :]) != children:
                    raise CheckpointError(
                        f"{self.path}.dropped: of {parent!r} only the last modules can go, "
                        f"not {sorted(children)}"
                    )

    def check_sizes(self) -> None:
        todo: dict[str, set[str]] = {name: set() for name in self.section.modules}
        for name in self.section.tensors:
            owner, _, key = name.rpartition(".")
            todo.setdefault(owner, set()).add(key)
        for name, listed in todo.items():
            if (module := self.module(name, "tensors")) is None:
                continue
            changes = self.section.modules.get(name, {})
            old = natural_shapes(module, vars(module))
            new = natural_shapes(module, ChainMap(dict(changes), vars(module)))
            tensors = dict(own_tensors(module))
            for key in listed - tensors.keys():
                raise CheckpointError(
                    f"{self.path}.tensors[{join(name, key)!r}]: there is no such tensor"
                )
            for key, tensor in tensors.items():
                was = tuple(tensor.shape)
                where = f"{self.path}.modules[{name!r}]"
                now = new[key] if key in new and old[key] == was else was
                if key in listed:
                    where = f"{self.path}.tensors[{join(name, key)!r}]"
                    now = self.listed_shape(join(name, key), was, where)
                if now != was:
                    _check_size(now, was, self.section.growth, f"{where} ({key})")
                    self.resized.append((module, key, now))

    def listed_shape(self, name: str, was: tuple[int, ...], where: str) -> tuple[int, ...]:
        shape = self.section.tensors[name]
        if len(shape) != len(was):
            raise CheckpointError(
                f"{where}: {len(shape)} sizes, the tensor has {len(was)} dimensions"
            )
        return tuple(w if n is None else n for n, w in zip(shape, was, strict=True))

    def apply(self) -> None:
        section, done = self.section, {}
        for name, one in section.replaced.items():
            self.put(name, build_standin(one))
        for name in sorted(section.dropped, key=_trailing, reverse=True):
            self.put(name, None)
        for name, values in section.modules.items():
            if (module := self.module(name, "modules")) is not None:
                for key, value in values.items():
                    set_like(module.__dict__, key, value)
        for name, values in section.configs.items():
            if (module := self.module(name, "configs")) is not None:
                config = copy.copy(own_config(module))
                for key, value in values.items():
                    set_like(vars(config), key, value)
                module.__dict__["config"] = config
        for module, key, shape in self.resized:
            _resize(module, key, shape, done)
        for name in section.biases:
            if (module := self.module(name, "biases")) is not None:
                weight: Any = parameter_table(module)["weight"]
                size = natural_shapes(module, vars(module))["bias"]
                parameter_table(module)["bias"] = nn.Parameter(weight.new_zeros(size))
        for name in section.buffers:
            owner, _, key = name.rpartition(".")
            if (module := self.module(owner, "buffers")) is not None:
                save_buffer(module, key)

    def put(self, name: str, module: nn.Module | None) -> None:
        parent, _, child = name.rpartition(".")
        if (holder := self.modules.get(parent)) is None or child_table(holder).get(child) is None:
            return
        if module is None and isinstance(holder, nn.ModuleList | nn.Sequential):
            del child_table(holder)[child]
        else:
            child_table(holder)[child] = module


def _resize(module: nn.Module, key: str, shape: tuple[int, ...], done: dict[int, Tensor]) -> None:
    is_parameter = parameter_table(module).get(key) is not None
    table = parameter_table(module) if is_parameter else buffer_table(module)
    old: Tensor = table[key]
    if id(old) not in done:
        if old.is_meta:
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
        else:
            common = tuple(slice(min(pair)) for pair in zip(shape, old.shape, strict=True))
            new = old.detach().new_zeros(shape)
            new[common] = old.detach()[common]
        done[id(old)] = (
            with_marks(nn.Parameter(new, old.requires_grad), old) if is_parameter else new
        )
    put_in(module, key, done[id(old)])


def _growth(now: tuple[int, ...], was: tuple[int, ...], where: str) -> int:
    """The smallest whole number that no size exceeds times the skeleton's."""
    ratios = [-(-n // max(w, 1)) for n, w in zip(now, was, strict=False)]
    growth = max((1, *ratios))
    if len(now) != len(was) or growth > LARGEST_GROWTH:
        raise CheckpointError(
            f"{where} is {list(now)} where the config builds {list(was)}: "
            f"sizes from 1 to {LARGEST_GROWTH} times these can be saved"
        )
    return growth


def _check_size(now: tuple[int, ...], was: tuple[int, ...], growth: int, where: str) -> None:
    if len(now) != len(was) or any(not 0 <= n <= w * growth for n, w in zip(now, was, strict=True)):
        times = f" times its growth of {growth}" if growth > 1 else ""
        raise CheckpointError(
            f"{where}: {list(now)}, expected sizes from 0 to the skeleton's {list(was)}{times}"
        )


def _check_like(known: Any, value: Plain, key: str, where: str) -> None:
    if not is_plain(known):
        raise CheckpointError(f"{where}.{key}: there is no such number to change")
    if isinstance(value, tuple) != isinstance(known, tuple | list) or (
        isinstance(value, tuple) and len(value) != len(known)
    ):
        raise CheckpointError(f"{where}.{key}: {value!r}, expected a value like {known!r}")
    if isinstance(value, float) and not isinstance(known, float):
        raise CheckpointError(f"{where}.{key}: {value!r}, expected a whole number like {known!r}")


def _trailing(name: str) -> tuple[str, int]:
    parent, _, child = name.rpartition(".")
    return parent, int(child) if child.isdigit() else 0
