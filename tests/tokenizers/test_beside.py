import json
import pickle
from pathlib import Path

import pytest
from conftest import ROOT

from fledge.errors import UserError
from fledge.tokenizers import load_tokenizer
from fledge.tokenizers.beside import find_beside

TEXT = "the cat\nsat: on a mat"  # 12 different characters
CHARACTERS = sorted(set(TEXT))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint among what lies in such folders."""
    (tmp_path / "model.pt").write_bytes(b"weights")
    (tmp_path / "train.py").write_text("code")
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 2}))
    (tmp_path / "losses.json").write_text(json.dumps([1.5, 0.2]))
    (tmp_path / "requirements.txt").write_text("torch")
    (tmp_path / "scan.txt").write_bytes(b"\xff\xfe")
    return tmp_path


def write(file: Path, content) -> None:
    file.parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    else:
        file.write_bytes(json.dumps(content).encode() if file.suffix == ".json" else pickle.dumps(content))


STOI = {character: i for i, character in enumerate(CHARACTERS)}


@pytest.mark.parametrize(
    ("name", "content", "is_guess"),
    [
        ("vocab.json", STOI, False),
        ("chars.json", CHARACTERS, False),
        ("stoi.pkl", STOI, False),
        ("meta.pkl", {"stoi": STOI, "itos": {i: c for c, i in STOI.items()}, "vocab_size": 12}, False),
        ("data/input.txt", TEXT, True),
    ],
)
@pytest.mark.parametrize("by", ["folder", "file"])
def test_a_vocabulary_beside_a_checkpoint_is_found_by_its_size(folder, name, content, is_guess, by):
    write(folder / name, content)
    checkpoint = str(folder if by == "folder" else folder / "model.pt")

    assert find_beside(checkpoint, len(STOI)) == (str(folder / name), is_guess)
    tokenizer = load_tokenizer(str(folder / name), 8)
    assert tokenizer("the cat")["input_ids"] == [STOI[c] for c in "the cat"]
    with pytest.raises(UserError, match="lies no vocabulary of 11 tokens"):
        find_beside(checkpoint, 11)


def test_what_was_saved_goes_before_a_guess(folder):
    write(folder / "input.txt", TEXT)
    write(folder / "chars.json", CHARACTERS)

    assert find_beside(str(folder), 12) == (str(folder / "chars.json"), False)


def test_a_tokenizer_may_be_smaller_than_a_padded_embedding():
    shipped = ROOT / "examples" / "scratch_gpt"

    assert find_beside(str(shipped / "checkpoint.pt"), 4224) == (str(shipped / "tokenizer.json"), False)


def test_two_texts_that_differ_are_not_chosen_between(folder):
    write(folder / "input.txt", TEXT)
    write(folder / "same.txt", TEXT * 2)
    assert find_beside(str(folder), 12) == (str(folder / "input.txt"), True)
    write(folder / "other.txt", TEXT.replace("c", "k"))

    with pytest.raises(UserError, match=r"input\.txt, .*other\.txt, .*same\.txt all fit the 12 rows .* and differ"):
        find_beside(str(folder), 12)


def test_nothing_is_run_from_a_pickle(folder):
    class Danger:
        def __reduce__(self):
            return (print, ("run",))

    (folder / "vocab.pkl").write_bytes(pickle.dumps(Danger()))
    with pytest.raises(UserError, match="pass --tokenizer"):
        find_beside(str(folder), 12)
