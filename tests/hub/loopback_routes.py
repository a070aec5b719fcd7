"""The endpoints of a loopback hub, as the real client uses them."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs

from tests.hub.loopback_data import LARGE_SUFFIXES, Answer, Blob


@dataclass
class Call:
    hub: object
    headers: dict
    query: dict
    body: Path | bytes

    @property
    def json(self):
        return json.loads(self.body or b"{}")

    @property
    def token(self):
        given = self.headers.get("Authorization", "")
        return given.removeprefix("Bearer ").strip() or None

    @property
    def user(self):
        return self.hub.users.get(self.token) if self.token else None

    def refused(self, repo_id, write=False):
        """The answer to somebody who may not see or change the repo; None for one who may."""
        if self.token and self.user is None:
            return Answer.error(401, "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.partition("/")[0]
        mine = self.user is not None and owner in (self.user.name, *self.user.orgs)
        if repo is None or (repo.private and not mine):
            return Answer.error(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            return Answer.error(401, "Invalid username or password.")
        if write and (not mine or self.user.role == "read"):
            return Answer.error(403, f'you must use a write token to change "{repo_id}"')
        return None


def _create(hub, call):
    if call.user is None:
        return Answer.error(401, "Invalid username or password.")
    given = call.json
    owner = given.get("organization") or call.user.name
    repo_id = f"{owner}/{given['name']}"
    if owner not in (call.user.name, *call.user.orgs) or call.user.role == "read":
        return Answer.error(
            403, f'You don\'t have the rights to create a model under the namespace "{owner}"'
        )
    url = f"{hub.endpoint}/{repo_id}"
    if repo_id in hub.repos:
        return Answer.of({"error": "You already created this model repo", "url": url}, 409)
    private = given.get("private") or given.get("visibility") == "private"
    hub.add_repo(repo_id, private=bool(private))
    return Answer.of({"url": url, "name": repo_id})


def _delete(hub, call):
    given = call.json
    repo_id = f"{given.get('organization') or call.user.name}/{given['name']}"
    if refused := call.refused(repo_id, write=True):
        return refused
    del hub.repos[repo_id]
    return Answer.of({})


def _whoami(hub, call):
    if call.user is None:
        return Answer.error(401, "Invalid username or password.")
    user = call.user
    orgs = [{"name": org, "type": "org"} for org in user.orgs]
    auth = {"accessToken": {"displayName": "test", "role": user.role}, "type": "access_token"}
    return Answer.of({"type": "user", "name": user.name, "orgs": orgs, "auth": auth})


def _validate(hub, call):
    text = call.json["content"]
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    errors = []
    for key, value in re.findall(
        r"^(base_model|license):[ ]*(.*)$", found.group(1) if found else "", re.M
    ):
        value = value.strip("'\"")
        if key == "base_model" and value and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            errors.append(
                f'"base_model" with value "{value}" is not valid. Use a model id from the hub.'
            )
        if key == "license" and value == "no-such-licence":
            errors.append('"license" must be one of [apache-2.0, mit, ...]')
    warnings = [] if found else ["empty or missing yaml metadata in repo card"]
    said = {
        "errors": [{"message": e} for e in errors],
        "warnings": [{"message": w} for w in warnings],
    }
    return Answer.of(said, 400 if errors else 200)


def _history(hub, call, repo_id, revision):
    if refused := call.refused(repo_id):
        return refused, None
    history = hub.repos[repo_id].find(revision)
    if history is None:
        return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound"), None
    return None, history


def _info(hub, call, repo, rev="main"):
    refused, history = _history(hub, call, repo, rev)
    if refused:
        return refused
    siblings = [{"rfilename": name} for name in sorted(history[-1].files)]
    private = hub.repos[repo].private
    return Answer.of(
        {
            "id": repo,
            "sha": history[-1].oid,
            "private": private,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
    )


def _file_entry(name, blob):
    entry = {"type": "file", "path": name, "size": blob.size, "oid": blob.git_oid}
    lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}}
    return entry | (lfs if blob.large else {})


def _tree(hub, call, repo, rev, path=""):
    refused, history = _history(hub, call, repo, rev)
    if refused:
        return refused
    inside = f"{path}/" if path else ""
    files = {k: v for k, v in sorted(history[-1].files.items()) if k.startswith(inside)}
    folders = sorted({str(p) for k in files for p in Path(k).parents if str(p) != "."})
    entries = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in folders]
    return Answer.of(entries + [_file_entry(k, v) for k, v in files.items()])


def _paths_info(hub, call, repo, rev):
    refused, history = _history(hub, call, repo, rev)
    if refused:
        return refused
    given = call.body.decode()
    paths = json.loads(given)["paths"] if given.startswith("{") else parse_qs(given)["paths"]
    return Answer.of(
        [_file_entry(p, history[-1].files[p]) for p in paths if p in history[-1].files]
    )


def _commits(hub, call, repo, rev):
    refused, history = _history(hub, call, repo, rev)
    if refused:
        return refused
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return Answer.of(
        [
            {
                "id": c.oid,
                "title": c.title,
                "message": c.message,
                "date": now,
                "authors": [{"user": c.author}],
            }
            for c in reversed(history)
        ]
    )


def _branch(hub, call, repo, rev):
    if refused := call.refused(repo, write=True):
        return refused
    refs = hub.repos[repo].refs
    if rev in refs:
        return Answer.error(409, "Reference already exists")
    refs[rev] = list(hub.repos[repo].find(call.json.get("startingPoint", "main")))
    return Answer.of({})


def _refs(hub, call, repo):
    if refused := call.refused(repo):
        return refused
    names = {name: history[-1].oid for name, history in hub.repos[repo].refs.items()}
    branches = [
        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid}
        for n, oid in names.items()
        if not n.startswith("refs/")
    ]
    return Answer.of({"branches": branches, "converts": [], "tags": []})


def _discussions(hub, call, repo):
    if refused := call.refused(repo):
        return refused
    pulls = hub.repos[repo].pulls
    return Answer.of({"discussions": pulls[::-1], "count": len(pulls), "start": 0})


def _status(hub, call, repo, num):
    if refused := call.refused(repo):
        return refused
    pull = next(pull for pull in hub.repos[repo].pulls if pull["num"] == int(num))
    if call.user is None or pull["author"]["name"] != call.user.name:
        return Answer.error(403, "Only the author may do this")
    pull["status"] = call.json["status"]
    event = {"id": "1", "type": "status-change", "createdAt": pull["createdAt"]}
    return Answer.of({"newStatus": {**event, "data": {"status": pull["status"]}}})


def _preupload(hub, call, repo, rev):
    pull = "create_pr" in call.query
    if refused := call.refused(repo, write=not pull):
        return refused
    refused, history = _history(hub, call, repo, "main" if pull else rev)
    if refused:
        return refused
    modes = []
    for file in call.json["files"]:
        large = file["path"].endswith(LARGE_SUFFIXES) or file["size"] > 10_000_000
        present = history[-1].files.get(file["path"])
        mode = {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
        }
        if present:
            mode["oid"] = present.sha256 if present.large else present.git_oid
        modes.append(mode)
    return Answer.of({"files": modes})


def _lfs_batch(hub, call, repo):
    if refused := call.refused(repo, write=False):
        return refused
    objects = []
    for wanted in call.json["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if not (hub.store / wanted["oid"]).is_file():
            href = f"{hub.endpoint}/lfs/{wanted['oid']}"
            upload = {"href": href, "header": {}}
            if hub.part_bytes and wanted["size"] > hub.part_bytes:
                number = -(-wanted["size"] // hub.part_bytes)
                upload["header"] = {str(i + 1): f"{href}/{i + 1}" for i in range(number)}
                upload["header"]["chunk_size"] = str(hub.part_bytes)
            entry["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
        objects.append(entry)
    return Answer.of(
        {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json"
    )


def _lfs_put(hub, call, oid, part=None):
    if part is None and _sha256(call.body) != oid:
        return Answer.error(400, "the bytes do not have this hash")
    shutil.move(call.body, hub.store / (oid if part is None else f"{oid}.{part}"))
    return Answer(200, b"", {"ETag": f'"{oid[:8]}-{part}"'})


def _lfs_join(hub, call, oid):
    parts = [hub.store / f"{oid}.{part['partNumber']}" for part in call.json["parts"]]
    draft = hub.store / f"{oid}.draft"
    with draft.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
            part.unlink()
    if _sha256(draft) != oid:
        return Answer.error(400, "the parts do not have this hash")
    draft.rename(hub.store / oid)
    return Answer.of({})


def _lfs_verify(hub, call, oid):
    there = (hub.store / oid).is_file() and (hub.store / oid).stat().st_size == call.json["size"]
    return Answer.of({}) if there else Answer.error(404, "Object not found")


def _commit(hub, call, repo, rev):
    pull = "create_pr" in call.query
    if refused := call.refused(repo, write=not pull):
        return refused
    if call.user is None:
        return Answer.error(401, "Invalid username or password.")
    refused, history = _history(hub, call, repo, rev)
    if refused:
        return refused
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    parent = header.get("parentCommit")
    if pull and parent:
        history = hub.repos[repo].find(parent)
    elif parent and not history[-1].oid.startswith(parent):
        return Answer.error(412, "A commit has happened since. Please refresh and try again.")
    files = dict(history[-1].files)
    for line in lines[1:]:
        key, value = line["key"], line["value"]
        if key == "file":
            files[value["path"]] = hub.blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            stored = hub.store / value["oid"]
            if not stored.is_file():
                return Answer.error(
                    400, f"LFS pointer pointed to a file that does not exist: {value['path']}"
                )
            blob = Blob(
                value["oid"],
                stored.stat().st_size,
                hashlib.sha1(value["oid"].encode()).hexdigest(),
                True,
            )
            files[value["path"]] = blob
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                return Answer.error(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            return Answer.error(400, f"unknown operation {key}")
    commit = hub.make(history[-1], files, header["summary"], header["description"], call.user.name)
    said = {
        "success": True,
        "commitOid": commit.oid,
        "commitUrl": f"{hub.endpoint}/{repo}/commit/{commit.oid}",
        "hookOutput": "",
    }
    if pull:
        pulls = hub.repos[repo].pulls
        num = len(pulls) + 1
        hub.repos[repo].refs[f"refs/pr/{num}"] = [*history, commit]
        pulls.append(
            {
                "num": num,
                "title": header["summary"],
                "status": "open",
                "isPullRequest": True,
                "author": {"name": call.user.name},
                "createdAt": "2025-01-01T00:00:00.000Z",
                "repo": {"name": repo, "type": "model"},
            }
        )
        said["pullRequestUrl"] = f"{hub.endpoint}/{repo}/discussions/{num}"
    else:
        hub.repos[repo].refs[rev].append(commit)
    return Answer.of(said)


def _resolve(hub, call, repo, rev, path):
    refused, history = _history(hub, call, repo, rev)
    if refused:
        return refused
    commit = history[-1]
    blob = commit.files.get(path)
    if blob is None:
        answer = Answer.error(404, "Entry not found", "EntryNotFound")
        answer.headers["X-Repo-Commit"] = commit.oid
        return answer
    etag = blob.sha256 if blob.large else blob.git_oid
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if blob.large:
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(blob.size)}
    return Answer(200, hub.store / blob.sha256, headers)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REV = r"(?P<rev>[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", _create),
    (r"DELETE /api/repos/delete", _delete),
    (r"GET /api/whoami-v2", _whoami),
    (r"POST /api/validate-yaml", _validate),
    (rf"GET /api/models/{_REPO}", _info),
    (rf"GET /api/models/{_REPO}/revision/{_REV}", _info),
    (rf"GET /api/models/{_REPO}/tree/{_REV}(/(?P<path>.+))?", _tree),
    (rf"POST /api/models/{_REPO}/paths-info/{_REV}", _paths_info),
    (rf"GET /api/models/{_REPO}/commits/{_REV}", _commits),
    (rf"GET /api/models/{_REPO}/refs", _refs),
    (rf"POST /api/models/{_REPO}/branch/{_REV}", _branch),
    (rf"GET /api/models/{_REPO}/discussions", _discussions),
    (rf"POST /api/models/{_REPO}/discussions/(?P<num>\d+)/status", _status),
    (rf"POST /api/models/{_REPO}/preupload/{_REV}", _preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    (r"PUT /lfs/(?P<oid>\w+)(/(?P<part>\d+))?", _lfs_put),
    (r"POST /lfs/(?P<oid>\w+)", _lfs_join),
    (r"POST /lfs/(?P<oid>\w+)/verify", _lfs_verify),
    (rf"POST /api/models/{_REPO}/commit/{_REV}", _commit),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/{_REV}/(?P<path>.+)", _resolve),
]


def _sha256(path):
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
