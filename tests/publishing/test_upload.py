"""Sending a folder to the Hub: one commit of what changed, and what happens when something fails on the way."""

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from hub import TOKEN, Fault, Hub
from huggingface_hub import HfApi
from huggingface_hub.utils import close_session

import fledge.publishing.upload
from fledge.errors import UserError
from fledge.publishing.upload import Repository, send

pytestmark = pytest.mark.network

CARD = b"---\nlicense: mit\nsdk: static\n---\n\n# A model\n"
WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def hub(monkeypatch):
    """A Hub, real requests to it alone, and no time lost in waiting: `hub.waits` lists what would have been slept."""
    server = Hub()
    server.waits = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    for module in (fledge.publishing.upload, huggingface_hub.utils._http):
        monkeypatch.setattr(module.time, "sleep", server.waits.append)
    yield server
    server.shutdown()
    server.server_close()
    close_session()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "f" / "data").mkdir(parents=True)
    (tmp_path / "f" / "README.md").write_bytes(CARD)
    (tmp_path / "f" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "f" / "data" / "part.parquet").write_bytes(WEIGHTS[::-1])
    return tmp_path / "f"


def to(hub: Hub, folder, kind="model", token=TOKEN, **keys):
    repository = Repository(kind, "someone/thing", **keys)
    return send(folder, repository, HfApi(endpoint=hub.url, token=token))


CONTENT = {"README.md": CARD, "model.safetensors": WEIGHTS, "data/part.parquet": WEIGHTS[::-1]}


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_a_new_repository_holds_the_folder_after_one_commit(kind, hub, folder):
    sent = to(hub, folder, kind, private=True)
    repo = hub.repos[kind, "someone/thing"]
    assert {name: repo.files[name] for name in CONTENT} == CONTENT
    assert repo.messages == ["Publish with Fledge"]
    assert repo.private
    assert repo.sdk == ("static" if kind == "space" else None)
    assert sorted(sent.changed) == sorted(CONTENT)
    assert sent.url == f"{hub.url}/{'' if kind == 'model' else kind + 's/'}someone/thing"


def test_nothing_changed_is_nothing_sent_and_a_change_is_sent_alone(hub, folder):
    to(hub, folder)
    hub.requests.clear()
    assert to(hub, folder).changed == []
    assert hub.uploads == []
    (folder / "README.md").write_bytes(CARD + b"more")
    assert to(hub, folder).changed == ["README.md"]
    assert hub.uploads == ["POST /api/models/someone/thing/commit/main"]
    assert hub.repos["model", "someone/thing"].files["README.md"] == CARD + b"more"


def test_what_fledge_no_longer_writes_goes_and_what_others_added_stays(hub, folder):
    to(hub, folder, "dataset")
    repo = hub.repos["dataset", "someone/thing"]
    repo.files["NOTES.md"] = b"by hand"
    (folder / "data" / "part.parquet").rename(folder / "data" / "other.parquet")
    sent = to(hub, folder, "dataset")
    assert (sent.changed, sent.deleted) == (["data/other.parquet"], ["data/part.parquet"])
    assert {"NOTES.md", "data/other.parquet", ".gitattributes"} <= set(repo.files)
    assert "data/part.parquet" not in repo.files


def test_a_branch_and_a_pull_request_leave_main_as_it_was(hub, folder):
    to(hub, folder)
    repo = hub.repos["model", "someone/thing"]
    before = repo.refs["main"]
    (folder / "README.md").write_bytes(CARD + b"second")
    to(hub, folder, revision="v2")
    sent = to(hub, folder, create_pr=True)
    assert repo.refs["main"] == before
    assert repo.tree("v2")["README.md"] == repo.tree("refs/pr/1")["README.md"] == CARD + b"second"
    assert sent.url == f"{hub.url}/someone/thing/discussions/1"


COMMIT = "/commit/main"


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (Fault("PUT /lfs", 500), [1]),
        (Fault("PUT /lfs", "drop"), [1]),
        (Fault("/preupload/", 503), [1]),
        (Fault("/repos/create", "drop"), [2]),
        (Fault("/repos/create", 502), [2]),
        (Fault("/tree/", 429, 1, {"Retry-After": "7"}), [8]),
        (Fault(COMMIT, 500, 2), [2, 4]),
        (Fault(COMMIT, "drop"), [2]),
        (Fault(COMMIT, 429, 1, {"Retry-After": "9"}), [9]),
        (Fault("validate-yaml", 500), [2]),
    ],
)
def test_a_passing_failure_is_waited_out_and_ends_in_one_commit(fault, waits, hub, folder):
    hub.faults.append(fault)
    to(hub, folder)
    repo = hub.repos["model", "someone/thing"]
    assert {name: repo.files[name] for name in CONTENT} == CONTENT
    assert len(repo.messages) == 1
    # huggingface_hub 2 waits a second longer than the header of a 429 says, 1 does not.
    assert hub.waits in (waits, [wait - 1 for wait in waits] if fault.where == "/tree/" else waits)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, folder):
    hub.faults.append(Fault(COMMIT, "drop", after=True))
    assert to(hub, folder).changed == []
    assert len(hub.repos["model", "someone/thing"].messages) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(COMMIT, 500, 99), "run the same command again"),
        (Fault(COMMIT, "drop", 99), "run the same command again"),
        (Fault(COMMIT, 429, 99, {"Retry-After": "1"}), "run the same command again"),
        (Fault(COMMIT, 401, 99), "hf auth login"),
        (Fault(COMMIT, 403, 99), "must be allowed to write to someone"),
        (Fault("PUT /lfs", 403, 99), "must be allowed to write"),
        (Fault("PUT /lfs", 500, 99), "run the same command again"),
    ],
)
def test_a_failure_that_stays_changes_nothing_and_a_rerun_completes_it(fault, said, hub, folder):
    to(hub, folder)
    repo = hub.repos["model", "someone/thing"]
    before = dict(repo.refs), dict(repo.files)
    (folder / "model.safetensors").write_bytes(WEIGHTS * 2)
    (folder / "README.md").write_bytes(CARD + b"new")
    hub.faults.append(fault)
    with pytest.raises(UserError, match=said) as raised:
        to(hub, folder)
    assert TOKEN not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (dict(repo.refs), dict(repo.files)) == before
    hub.faults.clear()
    assert sorted(to(hub, folder).changed) == ["README.md", "model.safetensors"]
    assert repo.files["model.safetensors"] == WEIGHTS * 2


def test_no_second_pull_request_after_a_failure(hub, folder):
    to(hub, folder)
    (folder / "README.md").write_bytes(CARD + b"second")
    hub.faults.append(Fault(COMMIT, "drop", after=True))
    with pytest.raises(UserError):
        to(hub, folder, create_pr=True)
    assert [ref for ref in hub.repos["model", "someone/thing"].refs if "pr" in ref] == ["refs/pr/1"]


@pytest.mark.parametrize("token", ["hf_" + "w" * 34, False])
def test_without_a_valid_token_nothing_is_created(token, hub, folder):
    with pytest.raises(UserError, match="hf auth login"):
        to(hub, folder, token=token)
    assert hub.repos == {}


def test_a_token_of_somebody_else_is_refused(hub, folder):
    with pytest.raises(UserError, match="must be allowed to write to someone"):
        to(hub, folder, token="hf_" + "o" * 34)


def test_what_the_hub_says_about_a_card_reaches_the_user(hub, folder):
    (folder / "README.md").write_bytes(b"---\nlicense: Apache 2\n---\n")
    with pytest.raises(UserError, match='"license" must be one of the list'):
        to(hub, folder)
    assert hub.repos["model", "someone/thing"].messages == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub, folder):
    to(hub, folder)
    (folder / "README.md").write_bytes(CARD + b"secret plans")
    with pytest.raises(UserError, match="exists and is public"):
        to(hub, folder, private=True)
    assert hub.repos["model", "someone/thing"].files["README.md"] == CARD


def test_a_token_that_the_server_repeats_is_not_shown(hub, folder):
    hub.faults.append(Fault(COMMIT, 400, 1, {"X-Error-Message": f"bad token {TOKEN}"}))
    with pytest.raises(UserError, match="bad token <token>") as raised:
        to(hub, folder)
    assert TOKEN not in str(raised.value)
