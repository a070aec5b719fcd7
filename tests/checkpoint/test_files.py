"""Folders and files in ordinary trouble: no permission, no room, odd names, strange code."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from timm.models import _hub

import sosp_hub
from sosp_hub.atomic import draft_folder, put_in_place, write_text
from sosp_hub.checkpoint.format.folder import replaced_folder
from sosp_hub.checkpoint.format.weight_files import is_weight_file
from sosp_hub.errors import CheckpointError, OutputError
from sosp_hub.inspection.examine import examine
from sosp_hub.plan import PruningPlan
from tests.checkpoint import cuts

LONG = "a" * 5000


@pytest.fixture(scope="module")
def model():
    return cuts.pruned_timm("test_vit")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    return sosp_hub.save_pretrained(cuts.pruned("llama"), root / "llama")


# ------------------------------------------------------------------------------------ weight files

WEIGHTS = [
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors",
    "model-00001-of-00002.fp16.safetensors", "model.safetensors.index.fp16.json",
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "pytorch_model.fp16.bin", "tf_model.h5", "flax_model.msgpack", "flax_model.msgpack.index.json",
    *_hub._PREFERRED_FILES,
]  # fmt: skip
OTHERS = [
    "model_ema.safetensors", "pytorch_model_ema.bin", "adapter_model.safetensors", "model_card.md",
    "saliency.safetensors", "curvature.safetensors", "model.onnx", "modelmodel.safetensors",
    "model.safetensors.bak", "old/model.safetensors", "model.txt", "open_clip_config.json",
    "my.index.json", "training_args.bin", "optimizer.bin", "model.safetensors\n",
]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_a_loader_takes_for_the_weights(name):
    assert is_weight_file(name)


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_loader_takes_for_the_weights(name):
    assert not is_weight_file(name)


def test_a_save_takes_away_exactly_the_old_weights(model, tmp_path):
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    beside = [name for name in OTHERS if "/" not in name and "\n" not in name]
    for name in {*WEIGHTS, *beside} - {"model.safetensors"}:
        (folder / name).write_bytes(b"{}")
    sosp_hub.save_pretrained(model, folder)
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors"),
        *beside,
    }


# ----------------------------------------------------------------------------------------- writing


def no_permission(*_, **__):
    raise PermissionError(13, "Permission denied")


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "fails", "words"),
    [
        ("tempfile.mkdtemp", no_permission, "Permission denied; write to a folder of your own"),
        ("pathlib.Path.write_text", no_room, "No space left on device; make room"),
        ("pathlib.Path.rename", no_permission, "Permission denied"),
    ],
)
def test_a_save_that_fails_is_typed_and_changes_nothing(place, fails, words, model, tmp_path):
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, fails)
        with pytest.raises(OutputError, match=words):
            sosp_hub.save_pretrained(model, folder)
        with pytest.raises(OutputError, match=words):
            sosp_hub.save_plan(PruningPlan({}, {}, base_model="a/b"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    """A limit of the system on the size of a file, met inside the writer of safetensors."""
    code = f"""
import resource, signal, sosp_hub
from sosp_hub.errors import OutputError
from tests.checkpoint import cuts
model = cuts.pruned_timm("test_vit")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    sosp_hub.save_pretrained(model, {str(tmp_path / "small")!r})
except OutputError as error:
    print("typed", "too large" in str(error))
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert answer.stdout.split() == ["typed", "True"], answer.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [(LONG, "File name too long"), ("a\0b", "null byte"), ("file/inside", "a part of this path")],
)
def test_a_name_that_no_folder_can_have(name, words, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=words) as caught:
        sosp_hub.save_pretrained(model, tmp_path / name)
    assert len(str(caught.value)) < 500


def test_the_longest_name_that_a_folder_can_have(model, tmp_path):
    folder = sosp_hub.save_pretrained(model, tmp_path / ("ä" * 127))
    assert sosp_hub.from_pretrained(folder)


def test_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    real, done = Path.rename, []

    def second_fails(self, target):
        done.append(self)
        return no_room() if len(done) == 2 else real(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="No space"):
        put_in_place(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["old"]


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "first")
    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(OutputError, match="make room"):
        write_text(path, "second")
    assert path.read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of Unix")
def test_what_is_saved_everybody_may_read_who_may_read_other_new_files(model, tmp_path):
    before = os.umask(0o022)
    try:
        folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*")} == {0o644}


@pytest.mark.parametrize("make", [draft_folder, replaced_folder])
def test_a_file_in_the_place_of_a_folder_is_refused(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"), make(tmp_path / "file"):
        pass


# ----------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("read", [sosp_hub.from_pretrained, examine, sosp_hub.apply_plan_file])
@pytest.mark.parametrize("name", [LONG, f"b/{LONG}"])
def test_long_names_are_no_folders(read, name):
    with pytest.raises(CheckpointError) as caught:
        read(name)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("place", ["pathlib.Path.is_dir", "pathlib.Path.open", "pathlib.Path.stat"])
@pytest.mark.parametrize("read", [sosp_hub.from_pretrained, examine])
def test_files_that_must_not_be_read(read, place, llama, monkeypatch):
    monkeypatch.setattr(place, no_permission)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        read(llama)


def test_a_plan_whose_base_is_a_plan_is_refused(tmp_path):
    bases = {"one": "two", "two": "one", "own": "own"}
    for name, base in bases.items():
        plan = PruningPlan({"a": (0,)}, {"a": 4}, base_model=str(tmp_path / base))
        sosp_hub.save_plan(plan, tmp_path / name)
    for name in bases:
        with pytest.raises(CheckpointError, match="holds a plan and no weights"):
            sosp_hub.from_pretrained(tmp_path / name)


# -------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize(
    "key",
    [
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
    ],
)
@pytest.mark.parametrize(
    "value",
    ["evil/kernel", "evil/kernel@main:f", {"": "evil/kernel"}, "flash_attention_2", ["sdpa"]],
)
@pytest.mark.parametrize("read", [sosp_hub.from_pretrained, examine])
def test_a_config_must_not_choose_code(read, key, value, llama, tmp_path, monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("asked for a kernel")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    for record in ({**config, key: value}, {**config, "text_config": {"a": [{key: value}]}}):
        (tmp_path / "config.json").write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match=f"{re.escape(key)}: .*must not choose code"):
            read(tmp_path)


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_implementations_of_the_library_may_be_named(value, llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": value}))
    assert sosp_hub.from_pretrained(tmp_path, attn_implementation="eager")


ODD = ["x", -1, 0, 1e308, 10**400, True, None, [1], [3, -4, 5], [3, 10**6, 10**6], {"a": 1}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", ["num_classes", "input_size", "fixed_input_size", "pool_size", "crop_pct", "classifier"]
)
def test_odd_values_of_a_pretrained_cfg(key, model, tmp_path):
    folder = sosp_hub.save_pretrained(model, tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    for value in ODD:
        config["pretrained_cfg"][key] = value
        (folder / "config.json").write_text(json.dumps(config))
        with contextlib.suppress(CheckpointError):
            examine(folder)
        with contextlib.suppress(CheckpointError):
            sosp_hub.save_pretrained(sosp_hub.from_pretrained(folder), tmp_path / "again")
