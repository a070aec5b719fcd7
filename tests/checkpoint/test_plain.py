"""Models of no library: cut, saved, built again by their own code, and loaded."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sosp_hub
from sosp_hub.checkpoint.torch.skeleton import SKELETON
from sosp_hub.errors import CheckpointError, ModelError, PlanError
from sosp_hub.hub.verify import verify
from sosp_hub.inspect import main as inspect
from sosp_hub.inspection.examine import examine
from tests.checkpoint.plain import (
    TOKENS,
    VALUES,
    Exact,
    Inside,
    Mixed,
    MixedWithAll,
    MixedWithout,
    Net,
    Stack,
)

MODELS = {
    "tied": (Net, TOKENS, None),
    "layers": (Stack, TOKENS, ["layer"]),
    "inside": (Inside, TOKENS, None),
    "mixin": (Mixed, TOKENS, None),
    "mixin without a config": (MixedWithout, TOKENS, None),
    "half": (Exact, VALUES, None),
}


def dense(build, **kwargs):
    torch.manual_seed(0)
    return build(**kwargs).eval()


def cut(model, inputs=TOKENS, kinds=None, macs=0.6, verb=None):
    graph = sosp_hub.trace(model, inputs)
    criterion = "random" if kinds else "magnitude"
    scores = sosp_hub.score(model, graph, [], criterion, kinds=kinds)
    plan = sosp_hub.allocate(graph, scores, macs=macs, **({"kinds": kinds} if kinds else {}))
    assert any(len(kept) < plan.sizes[name] for name, kept in plan.kept.items())
    return (verb or sosp_hub.apply)(model, graph, plan)


@pytest.fixture(scope="module")
def small():
    return cut(dense(Net))


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    return sosp_hub.save_pretrained(small, tmp_path_factory.mktemp("plain") / "small")


@pytest.mark.parametrize("verb", [sosp_hub.apply, sosp_hub.apply_], ids=["apply", "apply_"])
@pytest.mark.parametrize("case", MODELS)
def test_a_cut_model_loads_as_it_was_saved(case, verb, tmp_path):
    build, inputs, kinds = MODELS[case]
    small = cut(dense(build), inputs, kinds, verb=verb).train()
    saved = sosp_hub.save_pretrained(small, tmp_path / "small")
    assert small.training
    given = build()
    before = copy.deepcopy(given.state_dict())
    loaded = sosp_hub.from_pretrained(saved, model=given)
    assert not loaded.training
    assert torch.equal(loaded(*inputs), small.eval()(*inputs))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in given.parameters())
    ours, theirs = loaded.state_dict(), small.state_dict()
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    for name, tensor in given.state_dict().items():  # what the caller built stays as it was
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("case", MODELS)
def test_cut_twice_and_loaded_between(case, tmp_path):
    build, inputs, kinds = MODELS[case]
    once = cut(dense(build), inputs, kinds, macs=0.8)
    twice = cut(once, inputs, kinds)
    saved = sosp_hub.save_pretrained(once, tmp_path / "once")
    loaded = cut(sosp_hub.from_pretrained(saved, model=build()), inputs, kinds)
    for name, model in (("twice", twice), ("loaded", loaded)):
        saved = sosp_hub.save_pretrained(model, tmp_path / name)
        again = sosp_hub.from_pretrained(saved, model=build())
        assert torch.equal(again(*inputs), twice(*inputs)), name


def test_tied_tensors_stay_tied_and_are_stored_once(folder):
    loaded = sosp_hub.from_pretrained(folder, model=Net())
    assert loaded.head.weight is loaded.table.weight
    stored = load_file(folder / "model.safetensors")
    assert {"head.weight", "table.weight"} - stored.keys()
    assert "scale" in stored  # its values cannot be computed from a size
    assert "order" not in stored


def test_what_the_given_model_has_frozen_is_frozen_when_loaded(folder):
    given = Net()
    given.table.requires_grad_(False)
    loaded = sosp_hub.from_pretrained(folder, model=given)
    expected = {name: parameter.requires_grad for name, parameter in given.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == expected
    assert len(set(expected.values())) == 2


def test_a_model_that_was_not_cut_has_no_delta(tmp_path):
    model = dense(Net)
    saved = sosp_hub.save_pretrained(model, tmp_path / "dense")
    record = json.loads((saved / "config.json").read_text())["sosp_hub"]
    assert record["library"] == "torch"
    assert record["base"] == {"class": "Net"}
    assert torch.equal(sosp_hub.from_pretrained(saved, model=Net())(*TOKENS), model(*TOKENS))


def test_a_trained_head_of_another_size_and_shards(small, tmp_path):
    model = copy.deepcopy(small)
    model.down = nn.Linear(model.norm.num_features, model.down.out_features)
    saved = sosp_hub.save_pretrained(model, tmp_path / "small", max_shard_size=2000)
    assert (saved / "model.safetensors.index.json").is_file()
    loaded = sosp_hub.from_pretrained(saved, model=Net())
    assert torch.equal(loaded(*TOKENS), model(*TOKENS))


def test_a_cut_model_inside_another(small, tmp_path):
    model = Inside(copy.deepcopy(small)).eval()
    saved = sosp_hub.save_pretrained(model, tmp_path / "inside")
    assert torch.equal(sosp_hub.from_pretrained(saved, model=Inside())(*TOKENS), model(*TOKENS))


def test_a_copy_of_a_cut_model_can_be_saved(small, tmp_path):
    saved = sosp_hub.save_pretrained(copy.deepcopy(small), tmp_path / "copy")
    assert torch.equal(sosp_hub.from_pretrained(saved, model=Net())(*TOKENS), small(*TOKENS))


def test_another_dtype_and_a_model_without_data(folder, small):
    with torch.device("meta"):
        model = Net()
    model.scale, model.order = torch.linspace(1, 2, 24), torch.arange(7)
    assert torch.equal(sosp_hub.from_pretrained(folder, model=model)(*TOKENS), small(*TOKENS))
    half = sosp_hub.from_pretrained(folder, model=Net(), dtype=torch.bfloat16)
    assert half.conv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_what_timm_makes_with_features_only(name, tmp_path):
    """No config builds it: it is saved as a model of no library."""
    timm = pytest.importorskip("timm")
    images = (torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)),)
    small = cut(dense(timm.create_model, model_name=name, features_only=True), images, macs=0.8)
    saved = sosp_hub.save_pretrained(small, tmp_path / "small")
    built = timm.create_model(name, features_only=True)
    loaded = sosp_hub.from_pretrained(saved, model=built)
    for ours, theirs in zip(loaded(*images), small(*images), strict=True):
        assert torch.equal(ours, theirs)


class Backbone(nn.Module):
    """A library's model with its head taken off, and another head."""

    def __init__(self):
        super().__init__()
        timm = pytest.importorskip("timm")
        self.body = timm.create_model("test_resnet")
        size, self.body.fc = self.body.fc.in_features, nn.Identity()
        self.head = nn.Linear(size, 3)

    def forward(self, images):
        return self.head(self.body(images))


@pytest.mark.slow
def test_a_librarys_model_inside_with_a_part_taken_out(tmp_path):
    images = (torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)
    small = cut(dense(Backbone), images, macs=0.7)
    assert type(small.body.fc) is nn.Identity
    saved = sosp_hub.save_pretrained(small, tmp_path / "small")
    assert torch.equal(sosp_hub.from_pretrained(saved, model=Backbone())(*images), small(*images))


# PyTorchModelHubMixin ---------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Mixed, MixedWithout, MixedWithAll])
def test_the_mixins_own_ways(build, tmp_path):
    small = cut(dense(build))
    small.save_pretrained(tmp_path / "own")
    sosp_hub.save_pretrained(small, tmp_path / "ours")
    for name in ("own", "ours"):
        for loaded in (
            build.from_pretrained(tmp_path / name),
            sosp_hub.from_pretrained(tmp_path / name, model=build()),
            sosp_hub.from_pretrained(tmp_path / name, model=build),
        ):
            assert torch.equal(loaded(*TOKENS), small(*TOKENS))
    loaded = build.from_pretrained(tmp_path / "own")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(build.from_pretrained(tmp_path / "again")(*TOKENS), small(*TOKENS))


def test_mixin_models_that_were_not_cut_are_left_alone(tmp_path):
    model = dense(Mixed, width=12)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"width": 12}
    assert torch.equal(Mixed.from_pretrained(tmp_path)(*TOKENS), model(*TOKENS))
    MixedWithout().save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / "config.json").exists()


def test_without_hooks_the_mixin_stops(tmp_path):
    small = cut(dense(Mixed))
    small.save_pretrained(tmp_path)
    sosp_hub.disable()
    try:
        assert "sosp_hub" not in Mixed.save_pretrained.__module__
        with pytest.raises(RuntimeError, match="size mismatch"):
            Mixed.from_pretrained(tmp_path)
    finally:
        sosp_hub.enable()
    assert torch.equal(Mixed.from_pretrained(tmp_path)(*TOKENS), small(*TOKENS))


# What is refused --------------------------------------------------------------------------------

REFUSED = {
    "no model": ({}, r"sosp_hub.from_pretrained\('.*', model=Net\(\.\.\.\)\)"),
    "the class itself": ({"model": Net}, "model= is Net itself"),
    "text": ({"model": "Net"}, "a str"),
    "another class": ({"model": Stack()}, "model= is a Stack, the folder holds a Net"),
    "another width": ({"model": Net(8)}, "with the arguments that it had"),
    "another activation": ({"model": Net(activation=nn.GELU)}, "of other modules"),
    "an argument of a library": ({"model": Net(), "num_classes": 3}, "num_classes"),
    "other sizes": ({"model": Net(), "ignore_mismatched_sizes": True}, "random numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_of_the_folder(case, folder):
    kwargs, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words):
        sosp_hub.from_pretrained(folder, **kwargs)


def test_a_larger_model_than_the_one_that_was_saved(folder):
    """A layer that was not cut keeps the width of what the caller built."""
    model = Net()
    model.conv = nn.Conv1d(16, 24, 5, padding=2)
    with pytest.raises(CheckpointError, match=r"'conv.weight': .* holds \[.* 3\], the cut model"):
        sosp_hub.from_pretrained(folder, model=model)


def test_model_is_for_models_of_no_library(tmp_path):
    from tests.checkpoint import cuts

    saved = sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"transformers builds the model .* leave model= out"):
        sosp_hub.from_pretrained(saved, model=Net())


def test_state_that_is_no_tensor(tmp_path):
    class Counting(Net):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            del state

    with pytest.raises(CheckpointError, match="get_extra_state"):
        sosp_hub.save_pretrained(Counting(), tmp_path / "small")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft asks deprecated properties
def test_adapters_have_to_be_merged(tmp_path):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(dense(Stack), peft.LoraConfig(r=2, target_modules=["last"]))
    small = cut(tuned)
    with pytest.raises(ModelError, match="merge_and_unload"):
        sosp_hub.save_pretrained(small, tmp_path / "small")
    merged = small.merge_and_unload()
    saved = sosp_hub.save_pretrained(cut(merged), tmp_path / "small")
    assert sosp_hub.from_pretrained(saved, model=Stack())(*TOKENS).shape == (2, 7, 3)


# Hostile files ----------------------------------------------------------------------------------

CONV = ("base", "modules", "conv")
HOSTILE = {
    "grows": ((*CONV, "out_channels"), 25, "sizes from 0 to the skeleton's"),
    "10^12": ((*CONV, "out_channels"), 10**12, "1000000000000"),
    "another size than the files": ((*CONV, "out_channels"), 3, "the cut model"),
    "method": ((*CONV, "forward"), 3, "forward"),
    "state of torch": ((*CONV, "_parameters"), 1, "_parameters"),
    "not a number": ((*CONV, "out_channels"), "24", "'24'"),
    "unknown module": (("base", "modules", "evil"), {"a": 1}, "no such module"),
    "dunder": (("base", "modules", "conv.__init__"), {"a": 1}, "__init__"),
    "unknown key": (("base", "code"), "import os", "unknown key 'code'"),
    "another outline": (("outline",), "0" * 64, "of other modules"),
    "outline that is none": (("outline",), "../../x", "SHA-256"),
    "growth": (("base", "growth"), 5, "expected 1 to 4"),
    "class": (("base", "class"), "os.system('x')", "name of a class"),
    "later version": (("schema_version",), 9, "pip install -U"),
    "buffer that is not there": (("base", "buffers"), ["nothing"], "no buffer"),
    "buffer without values": (("base", "buffers"), ["scale", "order"], "'order'.*no file holds it"),
    "taken out": (("base", "replaced", "norm"), {"as": "identity"}, "takes this module out"),
}


def changed(folder, tmp_path, change):
    copied = tmp_path / "copy"
    copied.mkdir()
    record = json.loads((folder / "config.json").read_text())
    change(record["sosp_hub"])
    (copied / "config.json").write_text(json.dumps(record))
    (copied / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return copied


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_delta_names_its_place(case, folder, tmp_path):
    path, value, words = HOSTILE[case]

    def change(record):
        *ahead, last = path
        for key in ahead:
            record = record.setdefault(key, {})
        record[last] = value

    with pytest.raises(CheckpointError, match=words):
        sosp_hub.from_pretrained(changed(folder, tmp_path, change), model=Net())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("norm.bias"), "'norm.bias': the model has .* no file holds it"),
        (lambda state: state.update(extra=torch.zeros(2)), "'extra'.*the model has none"),
        (lambda s: s.update({"norm.bias": s["norm.bias"].long()}), "holds I64, the model float32"),
        (lambda s: s.update({"norm.num_batches_tracked": torch.tensor(0.5)}), "holds F32"),
    ],
)
def test_weights_that_are_not_the_models(change, words, folder, tmp_path):
    copied = changed(folder, tmp_path, lambda record: None)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        sosp_hub.from_pretrained(copied, model=Net())


# Plans, cards, inspection -----------------------------------------------------------------------


def test_a_plan_alone(tmp_path):
    model = dense(Net)
    graph = sosp_hub.trace(model, TOKENS)
    scores = sosp_hub.score(model, graph, [], "magnitude")
    plan = sosp_hub.allocate(graph, scores, macs=0.6)
    with pytest.raises(CheckpointError, match="names no base model"):
        sosp_hub.save_plan(plan, tmp_path / "plan")
    saved = sosp_hub.save_plan(dataclasses.replace(plan, base_model="Net"), tmp_path / "plan")
    small = sosp_hub.from_pretrained(saved, model=model, example_inputs=TOKENS)
    assert torch.equal(small(*TOKENS), sosp_hub.apply(model, graph, plan)(*TOKENS))
    with pytest.raises(CheckpointError, match="pass example_inputs="):
        sosp_hub.from_pretrained(saved, model=model)
    with pytest.raises(PlanError):
        sosp_hub.from_pretrained(saved, model=Stack(), example_inputs=TOKENS)


def test_inspection_of_the_files_alone_and_with_the_model(folder, small, capsys):
    alone, told = examine(folder), examine(folder, model=Net())
    assert (alone.library, alone.tier, alone.architecture) == ("torch", "delta", "Net")
    assert alone.faults == told.faults == []
    (conv,) = (layer for layer in told.layers if layer.name == "conv")
    assert conv.shape == tuple(small.conv.weight.shape)
    assert conv.dense_shape == (24, 16, 3)
    assert told.totals["params"] == sum(p.numel() for p in small.parameters())
    assert inspect([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "Net (torch), delta" in printed
    assert "model=Net(...)" in printed


def test_inspection_finds_a_delta_that_is_not_the_files(folder, tmp_path):
    def change(record):
        record["base"]["tensors"]["scale"] = [3]

    (fault,) = examine(changed(folder, tmp_path, change)).faults
    assert "'scale'" in fault


def test_a_card_and_a_push_say_how_it_loads(small, tmp_path):
    report = {"cost": {"before": {"params": 10}, "after": {"params": 5}}}
    saved = sosp_hub.save_pretrained(small, tmp_path / "small", report=report)
    from sosp_hub.report.card import render_card

    text = render_card(saved, figures=False).read_text()
    assert 'sosp_hub.from_pretrained("small", model=model)' in text
    assert "model = Net(...)  # your own class" in text
    assert "library_name: sosp_hub" in text
    result = sosp_hub.push_to_hub(small, "me/small", dry_run=True)
    assert {"config.json", "model.safetensors", "README.md"} <= set(result.added)
    checks = {check.name: check for check in verify(str(saved)).checks}
    assert checks["weights"].holds is None
    report["cost"]["after"]["params"] = sum(p.numel() for p in small.parameters())
    (saved / "sosp_report.json").write_text(json.dumps(report))
    checks = {check.name: check for check in verify(str(saved), model=Net()).checks}
    assert checks["weights"].holds


def test_a_cut_that_its_delta_does_not_say(monkeypatch, tmp_path):
    """What cannot be saved right is refused when it is saved; the cut itself holds."""
    from sosp_hub.checkpoint.torch import own_save

    monkeypatch.setattr(own_save, "same_output", lambda *_: False)
    small = cut(dense(Mixed))
    assert SKELETON in vars(small)
    with pytest.raises(CheckpointError, match="cannot be saved: what the delta builds"):
        sosp_hub.save_pretrained(small, tmp_path / "small")
    with pytest.raises(CheckpointError, match="cannot be saved"):
        small.save_pretrained(tmp_path / "small")
