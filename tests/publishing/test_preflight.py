"""What is refused before anything leaves the machine."""

import contextlib
import json
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fledge.errors import UserError
from fledge.publishing.preflight import check_card, check_folder, check_model, check_text, is_pickle

CARD = "---\nlicense: mit\nbase_model: someone/base\n---\n\n# A model\n"
QUESTION = [{"role": "user", "content": "Write a story about: a cat.\nWith: sad ending"}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    return tmp_path


def test_a_clean_folder_passes(folder):
    (folder / "run.json").write_text('{"steps": 3}', encoding="utf-8")
    save_file({"weight": torch.zeros(640)}, folder / "model.safetensors")
    check_folder("model", folder)


@pytest.mark.parametrize("start", [2, 4])
@pytest.mark.parametrize("name", ["training_args", "optimizer.data"])
def test_a_pickle_is_refused_whatever_it_is_called(start, name, folder):
    (folder / name).write_bytes(pickle.dumps({"lr": [0.1] * 9}, protocol=start))
    with pytest.raises(UserError, match=f"{name} is a pickle"):
        check_folder("model", folder)


def test_what_torch_saves_is_a_pickle_and_safetensors_never_is(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights")
    assert is_pickle(tmp_path / "weights")
    starts = set()
    for length in range(500, 700, 8):  # some headers' lengths begin like a pickle of protocol 2
        save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"pad": "x" * length})
        starts.add((tmp_path / "w.safetensors").read_bytes()[:2])
        assert not is_pickle(tmp_path / "w.safetensors")
    assert b"\x80\x02" in starts


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 12,
        "sk-proj-" + "x1" * 20,
        "ghp_" + "a" * 36,
        "AKIA" + "Q" * 16,
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("name", ["run.json", "README.md", "app.py"])
def test_a_secret_is_refused_and_not_repeated(secret, name, folder):
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(f'\n"{secret}"\n')
    with pytest.raises(UserError, match=f"{name} holds what looks like an access token") as raised:
        check_folder("model", folder)
    assert secret not in str(raised.value)


def test_the_token_in_use_is_refused_whatever_it_looks_like(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unusual-but-mine")
    (folder / "notes.txt").write_text("unusual-but-mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"notes.txt holds what looks like an access token"):
        check_folder("model", folder)


@pytest.mark.parametrize("path", ["/home/somebody/data", "/Users/anna/x.txt", "C:\\Users\\anna"])
def test_a_local_path_in_a_record_is_refused(path, folder):
    (folder / "run.json").write_text(json.dumps({"data": path}), encoding="utf-8")
    with pytest.raises(UserError, match=r"run.json names .*, a path of this machine"):
        check_folder("model", folder)


def test_the_home_folder_is_refused_in_any_text(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/somebody")
    with pytest.raises(UserError, match=r"README.md names /srv/somebody"):
        check_text("README.md", "see /srv/somebody/x")
    check_text("README.md", "see /srv/somebody-else/x and /home/anybody/x, of which a story may speak")


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: [mit\n---\n", "not valid"),
        ("---\n- a\n- b\n---\n", "not valid"),
        ("---\nbase_model: runs/base/model\n---\n", "runs/base/model as base_model"),
        ("---\ndatasets:\n- ./data\n---\n", "./data as datasets"),
        ("---\nlicense: mit\n---\n\nLoss None.\n", "None"),
        ("---\nlicense: mit\n---\n\n| loss | nan |\n", "nan"),
    ],
)
def test_an_invalid_card_is_refused(card, said):
    with pytest.raises(UserError, match=said):
        check_card(card)


def test_answers_on_a_card_may_say_what_they_like():
    check_card(CARD + "\n```text\nNone of them came.\n```\n\n````text\n```\nnan\n```\n````\n")


def test_a_file_beyond_the_limits_is_refused(folder):
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(51 * 10**9)  # sparse: takes no room
    with pytest.raises(UserError, match=r"model.safetensors has 51 GB, more than the Hub takes"):
        check_folder("model", folder)


@given(st.text())
def test_no_text_crashes_the_look(text):
    with contextlib.suppress(UserError):
        check_text("run.json", text)
    with contextlib.suppress(UserError):
        check_card(text)


@pytest.fixture
def model(tiny, tmp_path):
    return shutil.copytree(tiny.repository / "model", tmp_path / "model")


def test_a_published_model_reloads_and_answers(model):
    assert isinstance(check_model(model, QUESTION), str)


def test_a_damaged_or_foreign_model_is_refused(model):
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "ln_f" in name)
    save_file(weights | {name: weights[name] * float("nan")}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or infinity in transformer\.ln_f"):
        check_model(model, QUESTION)
    (model / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="no causal model that opens"):
        check_model(model, QUESTION)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}), encoding="utf-8")
    with pytest.raises(UserError, match="needs code of its own"):
        check_model(model, QUESTION)


def test_a_model_without_a_template_is_refused(model):
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        check_model(model, QUESTION)
