"""A hub on this machine: what the real client of `huggingface_hub` talks to, able to fail.

Standard library only. Contents and large files lie in a folder; a commit is atomic under one lock.
"""

import contextlib
import hashlib
import json
import re
import shutil
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.loopback_data import LARGE_SUFFIXES, Answer, Blob, Commit, Fault, Repo, User
from tests.hub.loopback_routes import ROUTES, Call

__all__ = ["Fault", "Hub", "User"]

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Hub:
    """The hub's contents and its server; use it as a context manager.

    Attributes:
        endpoint: Address for ``HF_ENDPOINT``.
        users: Token to user.
        repos: Repo id to repo.
        faults: What goes wrong next; looked through in order.
        log: Every request with its status (0 = connection cut).
    """

    def __init__(self, folder: Path, port: int = 0):
        self.store = Path(folder)
        self.store.mkdir(parents=True, exist_ok=True)
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, int]] = []
        self.part_bytes: int | None = None
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    # ------------------------------------------------------------------------------- for tests
    def add_repo(self, repo_id, private=False, files=None):
        repo = Repo(repo_id, private)
        commit = self.make(
            None, {".gitattributes": self.blob(_ATTRIBUTES)}, "initial commit", "", "system"
        )
        repo.refs["main"] = [commit]
        self.repos[repo_id] = repo
        if files:
            self.commit(repo_id, files)
        return repo

    def commit(self, repo_id, files, revision="main", title="by hand", delete=()):
        """A commit that somebody else makes."""
        with self.lock:
            history = self.repos[repo_id].refs[revision]
            kept = {k: v for k, v in history[-1].files.items() if k not in delete}
            new = {k: self.blob(v, k.endswith(LARGE_SUFFIXES)) for k, v in files.items()}
            history.append(self.make(history[-1], {**kept, **new}, title, "", "somebody"))

    def contents(self, repo_id, revision="main"):
        """Bytes of every file but ``.gitattributes``."""
        files = self.repos[repo_id].find(revision)[-1].files
        return {
            k: (self.store / b.sha256).read_bytes()
            for k, b in files.items()
            if k != ".gitattributes"
        }

    def blob(self, data: bytes, large=False):
        sha = hashlib.sha256(data).hexdigest()
        draft = self.store / f"{sha}.{threading.get_ident()}"
        draft.write_bytes(data)
        draft.replace(self.store / sha)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Blob(sha, len(data), git, large)

    def make(self, parent, files, title, message, author):
        salt = (
            f"{parent.oid if parent else ''}{title}{message}{time.time_ns()}{sorted(files.items())}"
        )
        return Commit(hashlib.sha1(salt.encode()).hexdigest(), title, message, author, files)

    def take_fault(self, request):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.request, request):
                    fault.times -= 1
                    return fault
        return None

    # --------------------------------------------------------------------------------- answers
    def answer(self, method, path, query, headers, body: Path | bytes) -> Answer:
        path = re.sub("^/api/datasets/", "/api/models/", path).removeprefix("/datasets")
        for pattern, handler in ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                parts = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                with contextlib.nullcontext() if method == "PUT" else self.lock:
                    return handler(self, Call(self, headers, query, body), **parts)
        return Answer.error(404, f"no route for {method} {path}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_):
        pass

    def _serve(self):
        url = urlsplit(self.path)
        request = f"{self.command} {unquote(url.path)}"
        fault = self.hub.take_fault(request) or Fault("")
        try:
            if fault.first:
                fault.first()
            if fault.delay_s:
                time.sleep(fault.delay_s)
            if fault.drop and not fault.after_work:
                return self._cut(request)
            body = self._read()
            wrong = fault.status is not None or fault.drop
            answer = Answer()
            if not wrong or fault.after_work:
                answer = self.hub.answer(
                    self.command, url.path, parse_qs(url.query), self.headers, body
                )
            if fault.drop:
                return self._cut(request)
            if fault.status is not None:
                if fault.stream:
                    return self._pour(request, fault)
                text = json.dumps({"error": f"fault {fault.status}"}).encode()
                text = text if fault.body is None else fault.body
                answer = replace(Answer(fault.status, text), headers=dict(fault.headers))
            self.hub.log.append((request, answer.status))
            self._write(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the library's names

    def _read(self):
        if self.command == "PUT":
            path = self.hub.store / f"incoming-{threading.get_ident()}-{time.monotonic_ns()}"
            with path.open("wb") as file:
                for chunk in self._chunks():
                    file.write(chunk)
            return path
        return b"".join(self._chunks())

    def _chunks(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (chunk := self.rfile.read(min(left, 1 << 20))):
            left -= len(chunk)
            yield chunk

    def _write(self, answer):
        large = isinstance(answer.body, Path)
        size = answer.body.stat().st_size if large else len(answer.body)
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if large and asked:
            start = int(asked.group(1))
            answer.status = 206
            answer.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if large:
            with answer.body.open("rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, self.wfile, 1 << 20)
        else:
            self.wfile.write(answer.body)

    def _pour(self, request, fault):
        self.hub.log.append((request, fault.status))
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in fault.stream():
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _cut(self, request):
        self.hub.log.append((request, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
