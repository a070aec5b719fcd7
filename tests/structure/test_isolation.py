"""Nothing that the caller owns differs after a verb: not its caches, classes, globals or RNGs."""

import functools
import gc
import random
import threading
from collections import OrderedDict, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sosp_hub.checkpoint.io import save_pretrained
from sosp_hub.errors import SospHubError
from sosp_hub.inspection.examine import examine
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply, apply_
from sosp_hub.surgery.widen import widen
from tests.compare import assert_close
from tests.structure.oracles import fill, half

GRIDS: dict = {}
ORDERED: OrderedDict = OrderedDict()
BY_SIZE: defaultdict = defaultdict(list)
SEEN: list = []
KINDS: set = set()
LAST = None
COUNTER = torch.zeros(1)
LOCAL = threading.local()


def ramp(h, w):
    return torch.linspace(-1, 1, int(w)).repeat(int(h), 1)


class Hostile(nn.Module):
    """A grid is added between two layers; where it is kept is what subclasses differ in."""

    fails = False

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.up(x + self.grid_of(x.shape[-2], x.shape[-1])).relu()
        if self.fails:
            raise RuntimeError("no coffee")
        return self.down(x)


class StaticMethod(Hostile):
    @staticmethod
    @functools.lru_cache
    def grid(h, w):
        return torch.linspace(-1, 1, w).repeat(h, 1)

    def grid_of(self, h, w):
        return self.grid(h, w)

    def state(self):
        return type(self).grid.cache_info()


class CachedMethod(Hostile):
    @functools.lru_cache(maxsize=2)  # noqa: B019
    def grid(self, h, w):
        return ramp(h, w)

    def grid_of(self, h, w):
        return self.grid(h, w)

    def state(self):
        return type(self).grid.cache_info()


class ClassMethod(CachedMethod):
    @classmethod
    @functools.cache
    def grid(cls, h, w):
        return ramp(h, w)


@functools.lru_cache(maxsize=1)
def module_grid(h, w):
    return ramp(h, w)


class ModuleFunction(Hostile):
    def grid_of(self, h, w):
        return module_grid(h, w)

    def state(self):
        return module_grid.cache_info()


def only_in_eager(function):
    """As transformers caches methods."""
    cached = functools.lru_cache(maxsize=4)(function)

    @functools.wraps(function)
    def wrapper(*args):
        return cached(*args)

    wrapper.cached = cached
    return wrapper


class InAClosure(Hostile):
    @only_in_eager
    def grid(self, h, w):
        return ramp(h, w)

    def grid_of(self, h, w):
        return self.grid(h, w)

    def state(self):
        return type(self).grid.cached.cache_info()


class OwnCache(Hostile):
    """The cache of a method, kept by the object that the method belongs to."""

    def __init__(self):
        super().__init__()
        self.grid = functools.lru_cache(self.make)

    def make(self, h, w):
        return ramp(h, w) * self.down.bias.sum()

    def grid_of(self, h, w):
        return self.grid(h, w)

    def state(self):
        return self.grid.cache_info()


class ClassDict(Hostile):
    grids: dict = {}  # noqa: RUF012

    def grid_of(self, h, w):
        if (h, w) not in self.grids:
            self.grids[h, w] = ramp(h, w)
        return self.grids[h, w]

    def state(self):
        return dict(ClassDict.grids)


class ClassAttribute(Hostile):
    grid = None

    def grid_of(self, h, w):
        if self.grid is None or self.grid.shape != (h, w):
            type(self).grid = ramp(h, w)
        return self.grid

    def state(self):
        return ClassAttribute.__dict__["grid"]


class GlobalDict(Hostile):
    def grid_of(self, h, w):
        KINDS.add(type(self).__name__)
        SEEN.append(w)
        BY_SIZE[int(w)].append(w)
        ORDERED["grid"] = GRIDS.setdefault((h, w), ramp(h, w))
        ORDERED.move_to_end(next(iter(ORDERED)))
        return ORDERED["grid"]

    def state(self):
        return (
            dict(GRIDS),
            list(ORDERED.items()),
            list(SEEN),
            set(KINDS),
            {key: list(value) for key, value in BY_SIZE.items()},
        )


class GlobalName(Hostile):
    def grid_of(self, h, w):
        global LAST
        if LAST is None or LAST.shape != (h, w):
            LAST = ramp(h, w)
        LOCAL.grid = LAST
        return LAST

    def state(self):
        return LAST, dict(vars(LOCAL))


def keeper():
    last = None

    def keep(grid):
        nonlocal last
        last = grid
        return last

    return keep, lambda: last


KEEP, KEPT = keeper()


class Closure(Hostile):
    def grid_of(self, h, w):
        return KEEP(ramp(h, w))

    def state(self):
        return KEPT()


class GlobalTensor(Hostile):
    def grid_of(self, h, w):
        COUNTER.add_(1)
        return ramp(h, w)

    def state(self):
        return COUNTER.tolist()


class Default(Hostile):
    def grid_of(self, h, w, grids={}):  # noqa: B006
        return grids.setdefault((h, w), ramp(h, w))

    def state(self):
        return dict(Default.grid_of.__defaults__[0])


def kept_in_attribute(h, w):
    kept_in_attribute.grid = ramp(h, w)
    return kept_in_attribute.grid


kept_in_attribute.grid = None


class FunctionAttribute(Hostile):
    def grid_of(self, h, w):
        return kept_in_attribute(h, w)

    def state(self):
        return kept_in_attribute.grid


class Recorder:
    def __init__(self):
        self.grids = {}

    def grid(self, h, w):
        self.grids[h, w] = ramp(h, w)
        return self.grids[h, w]


RECORDER = Recorder()


class GlobalObject(Hostile):
    def grid_of(self, h, w):
        return RECORDER.grid(h, w)

    def state(self):
        return dict(RECORDER.grids)


LABELS = SimpleNamespace(first=object())


class Renamed(Hostile):
    """What an object holds stays, under another name."""

    def grid_of(self, h, w):
        name, held = vars(LABELS).popitem()
        vars(LABELS)[f"{name}_"] = held
        return ramp(h, w)

    def state(self):
        return dict(vars(LABELS))


class OwnAttribute(Hostile):
    """Kept by the module, which the copies of it have for themselves."""

    def __init__(self):
        super().__init__()
        self.grids = {}
        self.register_buffer("last", torch.zeros(1))

    def grid_of(self, h, w):
        if (h, w) not in self.grids:
            self.grids[h, w] = self.last = ramp(h, w)
        return self.grids[h, w]

    def state(self):
        return dict(self.grids), self.last, self._buffers["last"]


class WithGradient(OwnAttribute):
    """What a training pass cached hangs on a graph, and refuses to be copied."""

    def grid_of(self, h, w):
        self.kept = self.up.weight.sum() * 0
        return super().grid_of(h, w) + self.kept

    def state(self):
        return getattr(self, "kept", None)


class Hooked(Hostile):
    """A hook that keeps every activation."""

    def __init__(self):
        super().__init__()
        kept = self.kept_ = {"list": []}
        self.up.register_forward_hook(lambda module, args, out: kept["list"].append(out))

    def grid_of(self, h, w):
        return ramp(h, w)

    def state(self):
        return [id(item) for item in self.kept_["list"]]


class Random(Hostile):
    def grid_of(self, h, w):
        random.random()
        np.random.rand(1)  # noqa: NPY002
        return torch.rand(int(h), int(w))

    def state(self):
        return None


class InPlace(Hostile):
    def forward(self, x):
        x.mul_(1.5)
        return super().forward(x)

    def grid_of(self, h, w):
        return ramp(h, w)

    def state(self):
        return None


class Registry(Hostile):
    """A cached function gives one object for all, which something was put into before."""

    @staticmethod
    @functools.cache
    def registry(kind):
        return {}

    def grid_of(self, h, w):
        return Registry.registry("grids")["make"](h, w)

    def state(self):
        return Registry.registry("grids"), Registry.registry.cache_info().currsize


Registry.registry("grids")["make"] = ramp

HOSTILE = [
    StaticMethod, CachedMethod, ClassMethod, ModuleFunction, InAClosure, OwnCache, ClassDict,
    ClassAttribute, GlobalDict, GlobalName, GlobalTensor, Default, FunctionAttribute, GlobalObject,
    Closure, Renamed, OwnAttribute, WithGradient, Hooked, Random, InPlace, Registry,
]  # fmt: skip


@dataclass
class Owned:
    """All that could be seen to differ."""

    model: Hostile
    inputs: tuple[torch.Tensor, ...] = field(default_factory=lambda: (torch.randn(2, 4, 5),))

    def everything(self):
        return (
            self.model.state(),
            {name: dict(vars(module)) for name, module in self.model.named_modules()},
            {name: list(vars(m)["_buffers"].items()) for name, m in self.model.named_modules()},
            torch.get_rng_state().tolist(),
            random.getstate(),
            [str(part) for part in np.random.get_state()],  # noqa: NPY002
            [tensor.clone() for tensor in self.inputs],
            gc.isenabled(),
        )


def assert_same(now, before, path="state"):
    """Identity of tensors and objects, equality of numbers."""
    assert type(now) is type(before), path
    if isinstance(now, dict):
        assert list(now) == list(before), path
        for key in now:
            assert_same(now[key], before[key], f"{path}[{key!r}]")
    elif isinstance(now, list | tuple):
        assert len(now) == len(before), path
        for i, pair in enumerate(zip(now, before, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(now, torch.Tensor) and path.startswith("state[6]"):
        assert torch.equal(now, before), path
    elif isinstance(now, int | float | str | set | bytes):
        assert now == before, path
        assert type(now) is type(before), path
    else:
        assert now is before, path


def leftovers():
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), FakeTensor)]


def verb_trace(model, inputs):
    trace(model, inputs)


def verb_trace_real(model, inputs):
    trace(model, inputs, fake=False)


def graph_of(model, inputs):
    """Traced where no test looks: a clean model of the same class."""
    graph = trace(model, inputs)
    return graph, half(graph)


def verb_apply(model, inputs):
    apply(model, *graph_of(model, inputs))


def verb_apply_fast(model, inputs):
    apply(model, *graph_of(model, inputs), verify="fast")


def verb_widen(model, inputs):
    graph = trace(model, inputs)
    widen(model, graph, {name: (2,) * group.size for name, group in graph.groups.items()})


def verb_score(criterion):
    def verb(model, inputs):
        graph = trace(model, inputs)
        score(
            model, graph, [(inputs[0], torch.zeros_like(inputs[0]))], criterion,
            loss_fn=nn.functional.mse_loss,
        )  # fmt: skip

    verb.__name__ = f"score_{criterion}"
    return verb


VERBS = [
    verb_trace, verb_trace_real, verb_apply, verb_apply_fast, verb_widen,
    *map(verb_score, ["sosp_h", "activation"]),
]  # fmt: skip


def name_of(case):
    return case.__name__


@pytest.mark.parametrize("verb", VERBS, ids=name_of)
@pytest.mark.parametrize("hostile", HOSTILE, ids=name_of)
def test_nothing_differs_after_a_verb(hostile, verb):
    owned = Owned(fill(hostile().eval()))
    owned.model(torch.randn(2, 3, 5))  # what it caches has gradients, as in training
    before = owned.everything()
    verb(owned.model, owned.inputs)
    assert_same(owned.everything(), before)


@pytest.mark.parametrize("hostile", HOSTILE, ids=name_of)
def test_a_model_that_has_not_run_does_not_look_as_if_it_had(hostile):
    owned = Owned(fill(hostile().eval()))
    before = owned.everything()
    verb_apply(owned.model, owned.inputs)
    assert_same(owned.everything(), before)


@pytest.mark.parametrize("verb", VERBS, ids=name_of)
@pytest.mark.parametrize("hostile", HOSTILE, ids=name_of)
def test_nothing_differs_after_an_exception(hostile, verb, monkeypatch):
    owned = Owned(fill(hostile().eval()))
    owned.model(torch.randn(2, 3, 5))
    monkeypatch.setattr(Hostile, "fails", True)
    before = owned.everything()
    with pytest.raises((SospHubError, RuntimeError)):
        verb(owned.model, owned.inputs)
    assert_same(owned.everything(), before)


class WithoutCollector(nn.Linear):
    """Does not run while Python collects garbage."""

    def forward(self, x):
        if gc.isenabled():
            raise RuntimeError("the collector is on")
        return super().forward(x)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("width", [5, 4])
def test_the_collector_of_garbage_is_off_during_a_trace_and_then_as_it_was(width, on):
    model, was_on = WithoutCollector(5, 3), gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with nullcontext() if width == 5 else pytest.raises(SospHubError, match="shapes cannot"):
            trace(model, (torch.randn(2, width),))
        assert gc.isenabled() is on
    finally:
        (gc.enable if was_on else gc.disable)()


@pytest.mark.slow
@pytest.mark.parametrize("hostile", HOSTILE, ids=name_of)
def test_outputs_are_what_they_were(hostile):
    """The five lines that showed it: a model after its trace, and a new one of its class."""
    model, inputs = fill(hostile().eval()), (torch.randn(2, 4, 5),)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(inputs[0].clone())
    graph = trace(model, inputs)
    pruned = apply(model, graph, half(graph))
    torch.manual_seed(0)
    with torch.no_grad():
        assert_close(model(inputs[0].clone()), expected, relative=0)
    fresh = hostile().eval()
    fresh.up.load_state_dict(model.up.state_dict())
    fresh.down.load_state_dict(model.down.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        assert_close(fresh(inputs[0].clone()), expected, relative=0)
        assert type(pruned(inputs[0].clone())) is torch.Tensor
    del graph, pruned
    assert not leftovers()


def test_a_cut_model_has_caches_of_its_own():
    model, inputs = fill(OwnCache().eval()), (torch.randn(2, 4, 5),)
    model(*inputs)
    graph = trace(model, inputs)
    pruned = apply(model, graph, half(graph))
    assert pruned.grid.__wrapped__.__self__ is pruned
    model.down.bias.data.zero_()
    assert pruned.grid(2, 4).abs().sum() > 0


def test_apply_in_place_leaves_the_rest():
    owned = Owned(fill(ClassDict().eval()))
    owned.model(torch.randn(2, 3, 5))
    before = dict(ClassDict.grids)
    graph = trace(owned.model, owned.inputs)
    apply_(owned.model, graph, half(graph))
    assert_same(dict(ClassDict.grids), before)


class HostileLlama(tf.LlamaForCausalLM):
    """Keeps what it computes, as it is built and as it runs."""

    def __init__(self, config):
        super().__init__(config)
        GRIDS["built"] = torch.zeros(3)

    def forward(self, *args, **kwargs):
        GRIDS["run"] = torch.zeros(3)
        torch.rand(1)
        return super().forward(*args, **kwargs)


def test_saving_and_looking_into_a_checkpoint_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sosp_hub.checkpoint.skeleton.model_class", lambda _: HostileLlama)
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=96,
    )  # fmt: skip
    model = fill(HostileLlama(config).eval())
    graph = trace(model, {"input_ids": torch.randint(0, 96, (2, 5))}, outputs="logits")
    pruned = apply(model, graph, half(graph, lambda group: group.kind == "neuron"))
    before = dict(GRIDS), torch.get_rng_state().tolist()
    save_pretrained(pruned, tmp_path / "small")
    assert_same((dict(GRIDS), torch.get_rng_state().tolist()), before)
    assert examine(tmp_path / "small").architecture == "HostileLlama"
    assert_same((dict(GRIDS), torch.get_rng_state().tolist()), before)


def rt_detr():
    backbone = tf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return tf.RTDetrForObjectDetection(
        tf.RTDetrConfig(
            backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8],
            d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, decoder_layers=1,
            encoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            decoder_in_channels=[16, 16, 16], num_labels=3, anchor_image_size=None,
            decoder_n_points=2, num_denoising=0,
        )
    ).eval()  # fmt: skip


@pytest.mark.slow
def test_a_detector_of_transformers_runs_after_its_trace():
    torch.manual_seed(0)
    model, inputs = rt_detr(), {"pixel_values": torch.randn(1, 3, 64, 64)}
    with torch.no_grad():
        expected = model(**inputs).logits
    for fake in (True, False):
        trace(rt_detr(), inputs, fake=fake)
    assert not leftovers()
    with torch.no_grad():
        assert_close(model(**inputs).logits, expected, relative=0)
        assert type(rt_detr()(**inputs).logits) is torch.Tensor
