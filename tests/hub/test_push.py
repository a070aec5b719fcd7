"""Pushing with the real client: what arrives, and what stays away."""

import json
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, constants

import sosp_hub
from sosp_hub.errors import HubError
from sosp_hub.hub.push import check_access, push_to_hub
from sosp_hub.report.card import render_card
from sosp_hub.report.listing import DENSE, RECIPE
from tests.checkpoint import cuts
from tests.hub.conftest import NOW, READER, STRANGER, TOKEN, made_weights, make_folder
from tests.hub.loopback import Fault

pytestmark = pytest.mark.slow

REPO = "me/resnet18-small"


def push(folder, repo_id=REPO, **options):
    return push_to_hub(folder, repo_id, **{"patience": NOW, **options})


def local(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def writes(hub):
    return [request for request, _ in hub.log if not request.startswith(("GET", "HEAD"))]


def test_a_push_is_one_commit_with_every_byte(hub, folder):
    result = push(folder)
    assert hub.contents(REPO) == local(folder)
    history = hub.repos[REPO].refs["main"]
    assert [commit.oid for commit in history[1:]] == [result.commit]
    assert set(result.added) == set(local(folder))


def test_what_was_pushed_downloads_again(hub, folder, tmp_path, client_env):
    push(folder, private=True)
    there = tmp_path / "there"
    script = (
        "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, REPO, str(there)], env=client_env, check=True)
    for name, data in local(folder).items():
        assert (there / name).read_bytes() == data, name


def test_pushing_the_same_folder_again_makes_no_commit(hub, folder):
    first = push(folder)
    second = push(folder)
    assert second.commit == first.commit
    assert second.added == ()
    assert len(hub.repos[REPO].refs["main"]) == 2


def test_only_changed_files_are_sent_again(hub, folder):
    push(folder)
    (folder / "config.json").write_text('{"architecture": "my_resnet18", "num_classes": 3}')
    result = push(folder)
    assert result.added == ("config.json",)
    assert result.num_bytes == (folder / "config.json").stat().st_size
    assert hub.contents(REPO) == local(folder)


def test_stale_weights_go_in_the_same_commit_and_other_files_stay(hub, folder):
    old = {"model-00001-of-00002.safetensors": b"a", "model.safetensors.index.json": b"{}"}
    kept = {"adapters/model.safetensors": b"mine", "notes.txt": b"mine", "model.gguf": b"mine"}
    kept |= {"model_ema.safetensors": b"mine", "pytorch_model_ema.bin": b"mine"}
    hub.add_repo(REPO, files={**old, **kept, "pytorch_model.bin": b"b"})
    result = push(folder)
    assert set(result.deleted) == {*old, "pytorch_model.bin"}
    assert hub.contents(REPO) == {**local(folder), **kept}
    assert len(hub.repos[REPO].refs["main"]) == 3


def test_private_repository_and_a_namespace_of_an_organisation(hub, folder):
    push(folder, "lab/small", private=True)
    assert hub.repos["lab/small"].private
    with pytest.raises(Exception, match=r"404|401"):
        HfApi(token=STRANGER).model_info("lab/small")


def test_a_model_in_memory_is_private_where_a_folder_is(hub):
    push(cuts.pruned_timm("test_resnet"), private=True)
    assert hub.repos[REPO].private


def test_a_branch_is_made_where_there_is_none(hub, folder):
    push(folder)
    make_folder(folder)
    push(folder, revision="half")
    assert hub.contents(REPO, "half") == local(folder)
    assert len(hub.repos[REPO].refs["main"]) == 2


def test_a_pull_request_leaves_main_alone(hub, folder):
    hub.add_repo(REPO, files={"notes.txt": b"mine", "pytorch_model.bin": b"old"})
    result = push(folder, create_pr=True)
    assert hub.contents(REPO) == {"notes.txt": b"mine", "pytorch_model.bin": b"old"}
    assert hub.contents(REPO, "refs/pr/1") == {**local(folder), "notes.txt": b"mine"}
    assert result.url.endswith(f"/{REPO}/discussions/1")


def test_a_stranger_may_open_a_pull_request(hub, folder):
    hub.add_repo(REPO)
    push(folder, create_pr=True, token=STRANGER)
    assert hub.contents(REPO) == {}
    assert hub.contents(REPO, "refs/pr/1") == local(folder)


def test_large_files_are_sent_in_parts(hub, folder):
    hub.part_bytes = 20_000
    (folder / "model.safetensors").write_bytes(made_weights(76_800))
    push(folder)
    assert hub.contents(REPO) == local(folder)
    assert (
        sum(request.startswith("PUT /lfs") and request.count("/") == 3 for request in writes(hub))
        == 4
    )


def test_a_push_that_was_cut_off_does_not_send_its_shards_twice(hub, folder):
    hub.faults = [Fault("POST .*/commit/", status=403)]
    with pytest.raises(HubError):
        push(folder)
    sent = sum(request.startswith("PUT") for request in writes(hub))
    push(folder)
    assert hub.contents(REPO) == local(folder)
    assert sum(request.startswith("PUT") for request in writes(hub)) == sent


def test_hidden_unfinished_and_private_files_stay_here(hub, folder):
    private = [".cache/state", "README.md.part", f"{DENSE}/model.safetensors", RECIPE]
    for name in private:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    push(folder)
    assert not {*private} & hub.contents(REPO).keys()


def test_the_published_card_names_the_repository(hub, folder):
    (folder / "README.md").unlink()
    render_card(folder, run=False, figures=False)
    here = (folder / "README.md").read_text()
    push(folder)
    there = hub.contents(REPO)["README.md"].decode()
    assert 'from_pretrained("resnet18-small")' in here
    assert f'from_pretrained("{REPO}")' in there
    assert (folder / "README.md").read_text() == here


def test_a_dry_run_lists_and_writes_nothing(hub, folder):
    hub.add_repo(
        REPO,
        files={"pytorch_model.bin": b"old", "config.json": (folder / "config.json").read_bytes()},
    )
    before = hub.repos[REPO].refs["main"][-1].oid
    result = push(folder, dry_run=True)
    assert result.commit is None
    assert result.deleted == ("pytorch_model.bin",)
    assert result.unchanged == ("config.json",)
    assert "model.safetensors" in result.added
    assert hub.repos[REPO].refs["main"][-1].oid == before
    assert writes(hub) == ["POST /api/validate-yaml"]


def test_a_dry_run_needs_neither_token_nor_network(folder):
    result = push(folder, dry_run=True)
    assert not result.compared
    assert "model.safetensors" in result.added


def test_the_command_pushes(hub, folder, client_env):
    command = [sys.executable, "-m", "sosp_hub.push", str(folder), REPO, "--private"]
    done = subprocess.run(command, env=client_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{hub.endpoint}/{REPO}/commit/" in done.stdout
    assert "+ model.safetensors" in done.stdout
    assert hub.contents(REPO) == local(folder)


def test_the_command_says_what_is_wrong_and_exits_with_2(folder, client_env, hub):
    command = [sys.executable, "-m", "sosp_hub.push", str(folder), "no-namespace"]
    done = subprocess.run(command, env=client_env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'no-namespace': write NAMESPACE/NAME" in done.stderr
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------- bad input
def test_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(HubError, match=r"no token was found.*hf auth login"):
        push(folder)
    assert writes(hub) == []


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, REPO, r"no token was found.*hf auth login"),
        (READER, REPO, "token of 'me' only reads"),
        ("hf_unknownunknown04", REPO, "wrong, expired or was revoked"),
        (TOKEN, "them/small", r"belongs to 'me', who may not write to 'them'.*me/small"),
        (TOKEN, "small", "NAMESPACE/NAME"),
    ],
)
def test_what_keeps_a_push_from_working_is_told_beforehand(hub, monkeypatch, token, repo_id, words):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=words):
        check_access(repo_id, patience=NOW)
    assert writes(hub) == []


@pytest.mark.parametrize("repo_id", [REPO, "lab/small"])
def test_who_may_push_is_not_kept_from_it(hub, repo_id):
    check_access(repo_id, patience=NOW)
    check_access("them/small", create_pr=True, patience=NOW)  # which strangers may open
    assert writes(hub) == []


def test_a_hub_that_is_out_of_reach_beforehand_is_only_told(hub, caplog):
    hub.faults = [Fault("whoami", status=503, times=99)]
    check_access(REPO, patience=NOW)
    assert "pushed when the run is done" in caplog.text


def test_a_token_that_only_reads(hub, folder):
    hub.add_repo(REPO)
    with pytest.raises(HubError, match="token of 'me' only reads"):
        push(folder, token=READER)
    assert hub.contents(REPO) == {}


def test_a_token_that_nobody_knows(hub, folder):
    with pytest.raises(HubError, match="wrong, expired or was revoked"):
        push(folder, token="hf_unknownunknown04")


def test_somebody_elses_namespace(hub, folder):
    with pytest.raises(HubError, match=r"belongs to 'me', who may not write to 'them'.*me/small"):
        push(folder, "them/small")


@pytest.mark.parametrize("repo_id", ["small", "a/b/c", "me/sm all", "me/--", ""])
def test_an_address_that_no_hub_has(folder, repo_id):
    with pytest.raises(HubError, match="NAMESPACE/NAME"):
        push(folder, repo_id)


def test_a_revision_and_a_pull_request(folder):
    with pytest.raises(HubError, match="revision 'half' with create_pr"):
        push(folder, revision="half", create_pr=True)


def test_a_base_model_that_is_a_local_path(hub, folder):
    (folder / "README.md").write_text("---\nbase_model: /data/models/llama\n---\n# x\n")
    with pytest.raises(HubError, match="base_model: '/data/models/llama' is a local path"):
        push(folder)
    assert writes(hub) == []


def test_metadata_that_the_hub_refuses(hub, folder):
    (folder / "README.md").write_text("---\nlicense: no-such-licence\n---\n# x\n")
    with pytest.raises(HubError, match=r"(?s)the hub refuses the metadata.*license"):
        push(folder)
    assert REPO not in hub.repos


def test_metadata_that_is_no_yaml(folder):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n# x\n")
    with pytest.raises(HubError, match="not valid YAML"):
        push(folder)


@pytest.mark.parametrize(
    ("missing", "said"),
    [("config.json", "no config.json"), ("model.safetensors", "there are no weights")],
)
def test_a_folder_that_is_no_model(folder, missing, said):
    (folder / missing).unlink()
    with pytest.raises(HubError, match=f"{said}.*save_pretrained"):
        push(folder)


@pytest.mark.parametrize(
    ("cut", "change"),
    [
        (cuts.pruned("llama"), {"sosp_hub": None}),  # a delta that was lost
        (cuts.pruned_timm("test_resnet"), {"num_classes": 9}),
    ],
    ids=["transformers", "timm"],
)
def test_weights_that_are_not_those_of_the_config_stay_here(cut, change, hub, tmp_path):
    folder = sosp_hub.save_pretrained(cut, tmp_path / "small")
    push(folder, dry_run=True)
    config = {**json.loads((folder / "config.json").read_text()), **change}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    words = r"weights disagree[\s\S]*\n  - tensor '[\s\S]*\nsave the model again"
    with pytest.raises(HubError, match=words):
        push(folder)
    assert not writes(hub)


def test_weights_that_are_not_those_of_a_delta_stay_here(hub, tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned_plain(), tmp_path / "small")
    push(folder, dry_run=True)
    config = json.loads((folder / "config.json").read_text())
    config["sosp_hub"]["base"]["tensors"] = {"last.weight": [3, 5]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match=r"weights disagree[\s\S]*\[3, 5\].*holds \[3, 6\]"):
        push(folder)
    assert not writes(hub)


def test_damaged_weights_stay_here(hub, folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(HubError, match=r"model.safetensors: .*save the model again"):
        push(folder)
    assert not writes(hub)


def test_a_folder_that_says_nothing_about_its_model(folder):
    (folder / "README.md").unlink()
    (folder / "sosp_report.json").unlink()
    with pytest.raises(HubError, match=r"neither sosp_report.json nor README.md"):
        push(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(HubError, match="no such folder"):
        push(tmp_path / "nowhere")


def test_offline_mode_says_how_to_leave_it(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        push(folder)


# ------------------------------------------------------------------------------------- secrets
@pytest.mark.parametrize("secret", [TOKEN, "hf_anothertokenofmine"])
def test_a_file_with_a_token_is_not_published(hub, folder, secret):
    (folder / "notes.txt").write_text(f"use {secret}")
    with pytest.raises(HubError, match=r"notes.txt: holds an access token") as caught:
        push(folder)
    assert secret not in str(caught.value)
    assert writes(hub) == []
