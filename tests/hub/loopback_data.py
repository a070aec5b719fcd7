"""What a loopback hub holds and says: commits, users, faults, answers."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

LARGE_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".png")


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes lie in the store under the sha256."""

    sha256: str
    size: int
    git_oid: str
    large: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    message: str
    author: str
    files: dict[str, Blob]


@dataclass
class Repo:
    repo_id: str
    private: bool
    refs: dict[str, list[Commit]] = field(default_factory=dict)
    pulls: list[dict] = field(default_factory=list)

    def find(self, revision):
        """History of a branch or pull request up to the named commit; None if there is none."""
        if revision in self.refs:
            return self.refs[revision]
        for history in self.refs.values():
            for i, commit in enumerate(history):
                if commit.oid.startswith(revision) and len(revision) >= 7:
                    return history[: i + 1]
        return None


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose ``METHOD /path`` matches.

    Attributes:
        request: Regular expression, searched in ``METHOD /path``.
        status: Answer with this status; None without ``drop`` means: answer as usual (slow, race).
        drop: Cut the connection instead of answering.
        after_work: The work is done first; only its answer is lost.
        delay_s: Wait before answering.
        headers: Headers of the answer, such as ``Retry-After``.
        first: Called before the request is looked at, such as somebody else's commit.
        body: Body of the answer, for a gateway that answers with a page.
        stream: Gives the body in pieces, as slow or as long as it likes.
    """

    request: str
    status: int | None = None
    times: int = 1
    drop: bool = False
    after_work: bool = False
    delay_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    first: Callable[[], None] | None = None
    body: bytes | None = None
    stream: Callable[[], Iterable[bytes]] | None = None


@dataclass
class Answer:
    status: int = 200
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data, status=200, **headers):
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        return cls(
            status, json.dumps(data).encode(), {"Content-Type": "application/json", **headers}
        )

    @classmethod
    def error(cls, status, message, code=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        return cls.of({"error": message}, status, **headers)
