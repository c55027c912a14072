"""A folder → one commit on the Hub with only the files that changed, or none if nothing did."""

import fnmatch
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from fledge.errors import UserError

ATTEMPTS = 4
LONGEST_WAIT = 120  # seconds
# Files that a later publication may no longer have; if they stayed, stale files would be loaded.
STALE = {
    "model": ("*.safetensors", "*.safetensors.index.json", "*.gguf", "adapter/*", "onnx/*", "metrics.json"),
    "dataset": ("data/*.parquet",),
    "space": (),
}


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub, whose `kind` is model, dataset or space, and how it is updated.

    `revision` is a branch or a pull request; with `create_pr` the changes become a new pull request.
    """

    kind: str
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


@dataclass
class Sent:
    """The result for one repository: `changed` and `deleted` are paths in it, `url` is its page or pull request."""

    url: str
    changed: list[str]
    deleted: list[str]


def files_of(folder: Path) -> dict[str, Path]:
    """Path in the repository → file, in order."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def send(folder: Path, repository: Repository, api: HfApi | None = None) -> Sent:
    """Creates the repository if necessary and updates it to the folder's content in a single commit.

    `upload_folder` commits a large folder in several batches, so a failure would leave half of it behind. A temporary
    failure (a dropped connection, 429, 5xx) is retried after comparing again: a commit whose response was lost is then
    recognised. A pull request is not retried, because that would open a second one.

    Raises:
        UserError: the Hub refuses, cannot be reached, or the repository is public where a private one was asked for.
    """
    api = api or HfApi()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _commit_changes(api, folder, repository)
        except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, RuntimeError, ValueError) as error:
            # A failed LFS upload is wrapped in a RuntimeError that only names the file.
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            wait = _seconds_to_wait(cause, attempt)
            if repository.create_pr or attempt == ATTEMPTS or wait is None:
                raise UserError(_refusal(cause, repository.repo_id)) from error
            print(f"The Hub did not answer as it should ({_status(cause)}); trying again in {wait} s.", flush=True)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _commit_changes(api: HfApi, folder: Path, repository: Repository) -> Sent:
    kind, repo_id, revision = repository.kind, repository.repo_id, repository.revision
    # The card names the kind of Space to create.
    sdk = RepoCard.load(folder / "README.md").data.to_dict()["sdk"] if kind == "space" else None
    url = api.create_repo(repo_id, repo_type=kind, private=repository.private or None, exist_ok=True, space_sdk=sdk)
    if repository.private and not api.repo_info(repo_id, repo_type=kind).private:
        raise UserError(f"{repo_id} exists and is public; make it private on its settings page or drop --private.")
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
    there = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=kind)
        if isinstance(entry, RepoFile)
    }
    here = files_of(folder)
    changed = [path for path, file in here.items() if path not in there or there[path] not in _hashes(file)]
    deleted = [path for path in there if path not in here and any(fnmatch.fnmatch(path, like) for like in STALE[kind])]
    if not changed and not deleted:
        return Sent(str(url), [], [])
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, here[path]) for path in changed
    ]
    operations += [CommitOperationDelete(path) for path in deleted]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message="Publish with Fledge",
        repo_type=kind,
        revision=revision,
        create_pr=repository.create_pr,
    )
    return Sent(commit.pr_url or str(url), changed, deleted)


def _hashes(file: Path) -> tuple[str, str]:
    """SHA-256, by which the Hub identifies large files, and git's blob hash, by which it identifies all others."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            sha256.update(block)
            blob.update(block)
    return sha256.hexdigest(), blob.hexdigest()


def _seconds_to_wait(error: BaseException, attempt: int) -> float | None:
    """How long to wait before a retry; `None` if the same request would fail again."""
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code != 429 and error.response.status_code < 500:
            return None
        asked = error.response.headers.get("Retry-After", "")
        return min(int(asked) if asked.isdigit() else 2**attempt, LONGEST_WAIT)
    return 2**attempt if isinstance(error, HTTPError) else None


def _status(error: BaseException) -> str:
    return str(error.response.status_code) if isinstance(error, HfHubHTTPError) else type(error).__name__


def _refusal(error: BaseException, repo_id: str) -> str:
    reason = " ".join(str(error).split())
    if token := get_token():
        reason = reason.replace(token, "<token>")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        advice = "Sign in with `hf auth login` or set HF_TOKEN, with a token that may write."
    elif status == 403:
        advice = f"The token must be allowed to write to {repo_id.split('/')[0]}."
    elif status is None and isinstance(error, ValueError):
        advice = "Mend what it names."
    else:
        advice = "The repository is as it was; run the same command again to go on."
    return f"The Hub did not take {repo_id}: {reason} {advice}"
