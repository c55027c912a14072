"""From a checkpoint of characters, as the lecture's gpt.py trains it, to a model that takes instructions."""

import json
import random
import sys
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from hand_written import lecture

from fledge.encoding import open_rows
from fledge.text.stories import sentences

pytestmark = pytest.mark.slow

NAMES, WORDS = (
    ("ROMEO", "JULIET"),
    ("love", "the", "moon", "is", "my", "and", "sun", "Speak", "one", "two", "sentences"),
)


def play() -> str:
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(4, 7))).capitalize() + rng.choice(".!")

    return "\n\n".join(
        f"{rng.choice(NAMES)}:\n{sentence()}\n{sentence()}" if n % 2 else f"MODEL USER:\n{sentence()}"
        for n in range(400)
    )


def run(script: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        import_module(f"fledge.scripts.{script}").main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the lecture leaves it: model.pt and input.txt."""
    folder, text = tmp_path_factory.mktemp("lecture"), play()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    torch.manual_seed(0)
    model = lecture(len(characters), 96, 32, 2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        begins = torch.randint(len(ids) - 97, (8,))
        batch = torch.stack([ids[begin : begin + 97] for begin in begins])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "input.txt").write_text(text, encoding="utf-8")
    return folder


def test_the_lectures_folder_becomes_a_model_that_is_asked_and_answers(folder, tmp_path, capsys):
    base, data, model, records = (tmp_path / name for name in ("base", "data", "model", "records.jsonl"))
    run(
        "convert_checkpoint",
        "--checkpoint",
        folder,
        "--output_dir",
        base,
        "--activation",
        "relu",
        "--attention_scale",
        0.25,
        "--accept_assumptions",
    )
    assert "characters, sorted: a guess at the vocabulary, which reading a text checks" in capsys.readouterr().out
    few = ("--most_characters", 50)
    run_script("examples/lecture_records.py", "--text", folder / "input.txt", "--out", records, *few)
    with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "Speak in one sentence.", "response": "It is #1 of the café."}) + "\n")
    columns = "instruction=instruction,response=response,group=response"
    arguments = ("--source", "columns", "--columns", columns, "--data", records, "--task", "instructions")
    run("prepare_dataset", *arguments, "--template", "play", "--tokenizer", base, "--output_dir", data, "--num_proc", 1)
    assert json.loads((data / "budget.json").read_text())["rejected"] == {
        "the vocabulary lacks something in it: '#', '1', 'f', 'é'": 1
    }
    for split in open_rows(data).values():
        for row in split:
            asked, answer = (message["content"] for message in row["messages"])
            assert asked == f"Speak in {'one sentence' if len(sentences(answer)) == 1 else 'two sentences'}."

    run("train_sft", "--model_name_or_path", base, "--dataset", data, "--output_dir", model, "--max_steps", 1)
    capsys.readouterr()
    run("generate", "--model", model, "--prompt", "Speak in two sentences.", "--max_new_tokens", 20)
    assert capsys.readouterr().out.strip()
