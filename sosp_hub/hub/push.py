"""Publishing a folder as one commit, on a hub that may fail at any moment.

The commit names its parent, so it is made once or not at all; its description carries a number by
which a commit whose answer was lost is recognised.
"""

import logging
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError, validate_repo_id

from sosp_hub.checkpoint.format.weight_files import is_weight_file
from sosp_hub.compat.huggingface_hub import git_hash
from sosp_hub.errors import HubError, shortened
from sosp_hub.hub.attempts import (
    CONFLICT,
    Patience,
    caused_by,
    check_token,
    explain,
    is_passing,
    is_understood,
    lacks,
    no_token,
    persistently,
    status_of,
)
from sosp_hub.hub.contents import (
    check_card,
    check_folder,
    check_weights,
    check_with_hub,
    local_files,
)
from sosp_hub.report.markers import readdress

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

_BATCH_BYTES = 5_000_000_000
_BATCH_FILES = 100


@dataclass(frozen=True)
class PushResult:
    """What a push did, or would do.

    Attributes:
        repo_id: Where.
        url: Page of the commit, or of the pull request; of the repository where nothing was made.
        commit: The commit that holds the folder; None for a dry run.
        added: Files that are new or changed.
        unchanged: Files that the hub has already.
        deleted: Stale weights that the commit takes away.
        num_bytes: Size of the added files.
        compared: Whether the hub could be asked what it has (a dry run needs no network).
    """

    repo_id: str
    url: str
    commit: str | None
    added: tuple[str, ...]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    num_bytes: int
    compared: bool = True

    def __str__(self) -> str:
        return self.url


def push_to_hub(
    folder_or_model: "str | Path | nn.Module",
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    patience: Patience | None = None,
) -> PushResult:
    """Publishes a saved model as one commit.

    Files that the hub has already are not sent again, so a push that was cut off continues when
    it is repeated. Weights of an earlier push that are not in the folder are deleted in the same
    commit.

    Args:
        folder_or_model: A folder with a model and its report or card; or a model.
        repo_id: ``NAMESPACE/NAME``; made if it does not exist.
        private: Of a repository that is made; None = as the namespace's default is.
        revision: Branch, made from main if it does not exist; None = main.
        create_pr: Open a pull request instead of writing to the branch.
        commit_message: First line of the commit.
        token: None = the one of ``hf auth login`` or HF_TOKEN.
        dry_run: Check everything and say what would be sent, but write nothing.
        patience: How often to try again, and how long to wait.

    Raises:
        HubError: With what to do. Unless it says otherwise, the repository is as it was.

    Example:
        >>> sosp_hub.push_to_hub("runs/quickstart", "me/small-digits")  # doctest: +SKIP
    """
    check_target(repo_id, revision, create_pr)
    check_token(token)
    if not isinstance(folder_or_model, str | Path):
        with tempfile.TemporaryDirectory(prefix="sosp_hub-push-") as temporary:
            from sosp_hub.report.saved import save_pretrained  # here: it brings torch, matplotlib

            save_pretrained(folder_or_model, temporary)
            return push_to_hub(
                temporary,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
                dry_run=dry_run,
                patience=patience,
            )
    check_token(token or get_token())
    folder = Path(folder_or_model)
    check_folder(folder, secret=token or get_token())
    check_card(folder)
    check_weights(folder)
    if not dry_run and not (token or get_token()):
        raise HubError(no_token(repo_id))
    push = _Push(folder, repo_id, revision, create_pr, HfApi(token=token), patience or Patience())
    if dry_run:
        return push.rehearse()
    return push.run(private, commit_message or f"Upload {folder.resolve().name} with sosp_hub")


def check_target(repo_id: str, revision: str | None, create_pr: bool) -> None:
    """Refuses an address that no hub has.

    Raises:
        HubError: With the form that is expected.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        shown = shortened(repr(repo_id))
        raise HubError(
            f"repo_id {shown}: no hub has such an address; write NAMESPACE/NAME"
        ) from None
    if "/" not in repo_id:
        raise HubError(
            f"repo_id {repo_id!r}: write NAMESPACE/NAME, with your user name or an organisation"
        )
    if create_pr and revision not in (None, "main"):
        raise HubError(
            f"revision {revision!r} with create_pr: a pull request is made against main; "
            "leave one of the two out"
        )


def check_access(
    repo_id: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    patience: Patience | None = None,
) -> None:
    """Finds out beforehand what would keep a push from working; writes nothing.

    A hub that cannot be reached now may be back when there is something to push: that is only
    logged.

    Args:
        repo_id: As for `push_to_hub`, like the others.
        revision: Branch.
        create_pr: Open a pull request, which strangers may too.
        token: None = the one of ``hf auth login`` or HF_TOKEN.
        patience: How often to try, and how long to wait.

    Raises:
        HubError: With what to do.
    """
    check_target(repo_id, revision, create_pr)
    check_token(token or get_token())
    if not (token or get_token()):
        raise HubError(no_token(repo_id))
    api = HfApi(token=token)
    try:
        me = persistently(
            lambda: _whoami(api), f"{repo_id}: ask whose token it is", patience or _BRIEF
        )
    except Exception as error:  # noqa: BLE001 - told in words that say what to do
        if not _is_out_of_reach(error):
            why = explain(error, repo_id, api)
            raise why from why.__cause__
        log.warning("%s", explain(error, repo_id, api))
        log.warning("it is pushed when the run is done, and the folder stays if that fails")
        return
    if not create_pr and (why := lacks(me, repo_id)):
        raise HubError(f"{repo_id}: {why}")


def _whoami(api: HfApi) -> dict[str, Any]:
    """The user that the token belongs to; a response without a name is no answer."""
    me = api.whoami()
    orgs = me.get("orgs") or []
    if not isinstance(me["name"], str) or not all(isinstance(org["name"], str) for org in orgs):
        raise TypeError("whoami gives no name")
    return me


_BRIEF = Patience(attempts=2, longest_silence_s=20.0)


class _Push:
    """One push: compare, upload, commit."""

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        revision: str | None,
        create_pr: bool,
        api: HfApi,
        patience: Patience,
    ) -> None:
        self._repo_id = repo_id
        self._revision = revision or "main"
        self._create_pr = create_pr
        self._api = api
        self._patience = patience
        self._id = f"sosp_hub push {uuid.uuid4().hex}"
        self._card = _card(folder, repo_id)
        self._additions = [
            CommitOperationAdd(name, self._card.encode() if name == "README.md" else folder / name)
            for name in local_files(folder)
        ]

    def rehearse(self) -> PushResult:
        """What ``run`` would do (dry run), checked with the hub where it can be reached."""
        remote: dict[str, RepoFile] = {}
        compared = True
        try:
            head = self._patience.call(self._ask_head)
            remote = self._patience.call(lambda: self._remote_files(head))
            self._patience.call(lambda: check_with_hub(self._card, self._api.endpoint))
        except HubError:
            raise
        except Exception as error:  # noqa: BLE001 - told in words that say what to do
            if status_of(error) not in (401, 404) and not _is_out_of_reach(error):
                why = explain(error, self._repo_id, self._api)
                raise why from why.__cause__
            compared = status_of(error) is not None
        changed = self._changed(remote)
        return self._result(None, changed, self._stale(remote), self._page(), compared)

    def run(self, private: bool | None, message: str) -> PushResult:
        """Makes the commit."""
        try:
            self._try(lambda: check_with_hub(self._card, self._api.endpoint), "check card")
            self._make_place(private)
            head = self._head()
            remote = self._try(lambda: self._remote_files(head), "list files")
            changed, stale = self._changed(remote), self._stale(remote)
            if not changed and not stale:
                return self._result(head, changed, stale, self._page())
            for batch in _batches(changed):
                num_bytes = sum(add.upload_info.size for add in batch)
                self._try(lambda batch=batch: self._upload(batch), "upload", num_bytes)
            operations = [*(CommitOperationDelete(name) for name in stale), *changed]
            commit, url = self._commit(operations, head, message)
        except HubError:
            raise
        except Exception as error:  # noqa: BLE001 - told in words that say what to do
            why = explain(error, self._repo_id, self._api)
            raise why from why.__cause__
        return self._result(commit, changed, stale, url)

    def _try(self, call, operation: str, num_bytes: int = 0):  # noqa: ANN001, ANN202 - as `persistently`
        return persistently(call, f"{self._repo_id}: {operation}", self._patience, num_bytes)

    @property
    def _num_bytes(self) -> int:
        """Of what may go with the commit itself."""
        return sum(add.upload_info.size for add in self._additions)

    def _make_place(self, private: bool | None) -> None:
        api, repo_id = self._api, self._repo_id
        self._try(
            lambda: api.create_repo(repo_id, private=private, exist_ok=True), "create repository"
        )
        if self._revision != "main" and not self._revision.startswith("refs/"):
            self._try(
                lambda: api.create_branch(repo_id, branch=self._revision, exist_ok=True),
                "create branch",
            )

    def _head(self) -> str:
        return self._try(self._ask_head, "read head")

    def _ask_head(self) -> str:
        limit = self._patience.longest_silence_s  # the client overrides its own with None here
        info = self._api.model_info(self._repo_id, revision=self._revision, timeout=limit)
        return info.sha or ""

    def _remote_files(self, revision: str) -> dict[str, RepoFile]:
        tree = self._api.list_repo_tree(self._repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _changed(self, remote: dict[str, RepoFile]) -> list[CommitOperationAdd]:
        return [add for add in self._additions if not _same(add, remote.get(add.path_in_repo))]

    def _stale(self, remote: dict[str, RepoFile]) -> list[str]:
        mine = {add.path_in_repo for add in self._additions}
        return [name for name in sorted(remote.keys() - mine) if is_weight_file(name)]

    def _upload(self, batch: Sequence[CommitOperationAdd]) -> None:
        """Uploads the large files of a batch, without those that arrived already."""
        self._api.preupload_lfs_files(
            self._repo_id,
            additions=batch,
            revision=self._revision,
            create_pr=self._create_pr,
        )

    def _commit(
        self,
        operations: list[CommitOperationAdd | CommitOperationDelete],
        head: str,
        message: str,
    ) -> tuple[str, str]:
        """Commits on top of ``head``, exactly once; returns commit and page."""
        for attempt in range(1, self._patience.attempts + 1):
            try:
                made = self._patience.call(
                    lambda: self._api.create_commit(
                        self._repo_id,
                        operations=operations,
                        commit_message=message,
                        commit_description=self._id,
                        revision=self._revision,
                        parent_commit=head,
                        create_pr=self._create_pr,
                    ),
                    self._num_bytes,
                )
            except Exception as error:
                status = status_of(error)
                passing, conflict = is_passing(error), status in CONFLICT
                if not passing and not conflict and is_understood(error):
                    raise
                if commit := self._find_ours(head, message, error):
                    log.info("%s: the answer was lost, but the commit is there", self._repo_id)
                    return commit
                if conflict:
                    words = (
                        f"{self._repo_id}: somebody else pushed to {self._revision!r} in the "
                        "meantime; nothing was written. Look at their commit and push again"
                    )
                    why = caused_by(error, words, self._api)
                    raise why from why.__cause__
                if attempt == self._patience.attempts or not is_understood(error):
                    raise
                self._patience.wait(attempt, error, f"{self._repo_id}: commit")
                if self._create_pr and (commit := self._find_ours(head, message, error)):
                    return commit  # nothing on the hub stands against a second one
            else:
                if made.pr_num and attempt > 1:
                    self._close_late_ones(message, made.pr_num)
                return made.oid, made.pr_url or made.commit_url
        raise AssertionError("unreachable")

    def _find_ours(self, head: str, message: str, lost: Exception) -> tuple[str, str] | None:
        """The commit of this push, if it was made although the response was lost."""
        try:
            if self._create_pr:
                return self._find_our_pull_request(message)
            if self._head() == head:
                return None
            commit = self._ours_on(self._revision)
        except Exception as error:  # noqa: BLE001 - told in words that say what to do
            words = (
                f"{self._repo_id}: the hub stopped answering while it was committing "
                f"({type(lost).__name__}, then {type(error).__name__}), so it is not known whether "
                "the commit was made; it was made completely or not at all. Push again: what is "
                "there already is not sent twice"
            )
            why = caused_by(error, words, self._api)
            raise why from why.__cause__
        return (commit, f"{self._page()}/commit/{commit}") if commit else None

    def _find_our_pull_request(self, message: str) -> tuple[str, str] | None:
        for num, commit in self._our_pull_requests(message):
            return commit, f"{self._page()}/discussions/{num}"
        return None

    def _our_pull_requests(self, message: str) -> Iterator[tuple[int, str]]:
        pulls = self._try(
            lambda: list(
                self._api.get_repo_discussions(self._repo_id, discussion_type="pull_request")
            ),
            "list pull requests",
        )
        for pull_request in pulls:
            if pull_request.title == message and (
                commit := self._ours_on(f"refs/pr/{pull_request.num}")
            ):
                yield pull_request.num, commit

    def _close_late_ones(self, message: str, kept: int) -> None:
        """Closes what an attempt opened that was given up and arrived all the same."""
        for num, _ in self._our_pull_requests(message):
            if num != kept:
                self._try(
                    lambda num=num: self._api.change_discussion_status(
                        self._repo_id,
                        num,
                        "closed",
                        comment=f"Opened twice by mistake: see #{kept}",
                    ),
                    "close pull request",
                )

    def _ours_on(self, revision: str) -> str | None:
        commits = self._try(
            lambda: self._api.list_repo_commits(self._repo_id, revision=revision), "list commits"
        )
        return next((c.commit_id for c in commits if self._id in c.message), None)

    def _page(self) -> str:
        return f"{self._api.endpoint}/{self._repo_id}"

    def _result(
        self,
        commit: str | None,
        changed: list[CommitOperationAdd],
        stale: list[str],
        url: str,
        compared: bool = True,
    ) -> PushResult:
        added = {add.path_in_repo for add in changed}
        return PushResult(
            repo_id=self._repo_id,
            url=url,
            commit=commit,
            added=tuple(sorted(added)),
            unchanged=tuple(
                add.path_in_repo for add in self._additions if add.path_in_repo not in added
            ),
            deleted=tuple(stale),
            num_bytes=sum(add.upload_info.size for add in changed),
            compared=compared,
        )


def _card(folder: Path, repo_id: str) -> str:
    path = folder / "README.md"
    return readdress(path.read_text(encoding="utf-8"), repo_id) if path.is_file() else ""


def _same(add: CommitOperationAdd, remote: RepoFile | None) -> bool:
    """Whether the hub has these bytes; the file is hashed only where size and name agree."""
    if remote is None or remote.size != add.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == add.upload_info.sha256.hex()
    with add.as_file() as file:
        return remote.blob_id == git_hash(file.read())


def _batches(additions: list[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    batch: list[CommitOperationAdd] = []
    size = 0
    for add in additions:
        if batch and (len(batch) == _BATCH_FILES or size + add.upload_info.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(add)
        size += add.upload_info.size
    if batch:
        yield batch


def _is_out_of_reach(error: Exception) -> bool:
    return is_passing(error) or "offline" in type(error).__name__.lower()
