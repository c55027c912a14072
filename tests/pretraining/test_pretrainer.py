import contextlib
import copy
import io
import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import fork_two, variables_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from fledge.cli import run
from fledge.encoding import IGNORED
from fledge.errors import UserError
from fledge.pretraining.pretrainer import flops_per_token, new_gpt2, score_in_cache
from fledge.pretraining.tokens import Corpus, TokenWriter, Windows, open_tokens
from fledge.reading.documents import END, pieces
from fledge.scripts import pretrain as script
from fledge.training.run_record import Progress

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

SIZES = ("--n_layer", 2, "--n_head", 2, "--n_embd", 32, "--context_length", 16)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return AutoTokenizer.from_pretrained(corpus.tokenizer)


def corpus_of(*data, held_out=(), share=0.1) -> Corpus:
    return Corpus([str(file) for file in data], "text", None, [str(file) for file in held_out], share)


EIGHT_STEPS = ("--max_steps", 8, "--learning_rate", 0.01)


def command(corpus, output_dir, *arguments) -> list[str]:
    given = [
        "--data", corpus.file, "--tokenizer", corpus.tokenizer, "--output_dir", output_dir, *SIZES, "--bf16", "False",
        "--per_device_train_batch_size", 4, "--eval_strategy", "no", "--save_strategy", "no", *arguments,
    ]  # fmt: skip
    return list(map(str, given))


def pretrain(*arguments) -> None:
    """In this process: a process of its own takes seconds to import."""
    before = sys.argv
    sys.argv = ["pretrain.py", *command(*arguments)]
    try:
        run(script.main)
    finally:
        sys.argv = before


def test_chunks_hold_every_token_once(corpus, tokenizer, tmp_path):
    tokens = open_tokens(tmp_path / "tokens", corpus_of(corpus.file), tokenizer)
    documents = [text for text, _ in pieces([str(corpus.file)])]
    for split, chosen in (
        ("train", [text for n, text in enumerate(documents, 1) if n % 10]),
        ("validation", documents[9::10]),
    ):
        row = [0] + [i for text in chosen for i in [*tokenizer.encode(text, split_special_tokens=True), 0]]
        size = len("".join(chosen).encode())
        assert tokens["splits"][split] == {"documents": len(chosen), "tokens": len(row), "bytes": size}
        for context in (1, 7, 16, len(row) - 1, len(row), 3 * len(row)):
            windows = Windows(tmp_path / "tokens", split, tokens, context)
            read = [windows[k] for k in range(len(windows))]
            assert all(window["input_ids"].shape == window["labels"].shape == (context,) for window in read[:2])
            labels = torch.cat([window["labels"] for window in read])
            inputs = torch.cat([window["input_ids"] for window in read])
            assert labels[labels != IGNORED].tolist() == row[1:]
            assert inputs[labels != IGNORED].tolist() == row[:-1]
            assert windows.bytes_per_token == size / (len(row) - 1)
            with pytest.raises(IndexError):
                windows[len(windows)]


def test_a_corpus_without_marks_holds_its_end_out(tokenizer, tmp_path):
    text = "Lily had a ball. " * 200 + "café"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokens = open_tokens(tmp_path / "tokens", corpus_of(tmp_path / "a.txt", share=0.01), tokenizer)
    row = [0, *tokenizer.encode(text), 0]
    ids = {split: np.fromfile(tmp_path / "tokens" / f"{split}.bin", "uint16") for split in ("train", "validation")}
    assert [*ids["train"], *ids["validation"]] == row
    held_out = round(0.01 * len(row))
    assert len(ids["validation"]) == tokens["splits"]["validation"]["tokens"] == held_out
    assert sum(split["bytes"] for split in tokens["splits"].values()) == len(text.encode())


def test_each_document_begins_with_the_token_for_it(tokenizer, tmp_path, monkeypatch):
    """Also where it is read in pieces, and end-of-text where there is no such token."""
    monkeypatch.setattr("fledge.reading.documents.pieces.__defaults__", ("text", None, 8))
    tokenizer = copy.deepcopy(tokenizer)
    (tmp_path / "a.txt").write_text(f"Lily had a ball.{END}Tim ran home.", encoding="utf-8")
    written = {}
    for begin in ("!", END):
        tokenizer.bos_token = begin
        tokens = open_tokens(tmp_path / "t", corpus_of(tmp_path / "a.txt", held_out=[tmp_path / "a.txt"]), tokenizer)
        written[begin] = np.fromfile(tmp_path / "t" / "train.bin", "uint16").tolist()
        assert tokens["splits"]["train"]["tokens"] == len(written[begin])
    one, two = (tokenizer.encode(text) for text in ("Lily had a ball.", "Tim ran home."))
    start = tokenizer.convert_tokens_to_ids("!")
    assert written == {"!": [start, *one, 0, start, *two, 0], END: [0, *one, 0, *two, 0]}


def test_end_of_text_stands_in_for_the_tokens_that_a_tokenizer_lacks(corpus, tmp_path, capsys):
    """As GPT-2's on the Hub has no token to pad with."""
    bare = PreTrainedTokenizerFast(tokenizer_file=str(corpus.tokenizer / "tokenizer.json"), eos_token=END)
    bare.save_pretrained(tmp_path / "bare")
    pretrain(corpus, tmp_path / "m", "--tokenizer", tmp_path / "bare", "--max_steps", 1)

    said = capsys.readouterr()
    assert "failed" not in said.out + said.err
    saved = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (saved.bos_token, saved.pad_token, saved.eos_token) == (END, END, END)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.bos_token_id == saved.eos_token_id


def test_validation_text_of_its_own(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(f"Lily{END}Tim", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Ben", encoding="utf-8")
    tokens = open_tokens(tmp_path / "t", corpus_of(tmp_path / "a.txt", held_out=[tmp_path / "b.txt"]), tokenizer)
    assert [split["documents"] for split in tokens["splits"].values()] == [2, 1]
    assert np.fromfile(tmp_path / "t" / "validation.bin", "uint16").tolist() == [0, *tokenizer.encode("Ben"), 0]


def test_tokens_are_written_once_and_again_when_the_corpus_changed(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("Lily had a ball. " * 9, encoding="utf-8")
    first = open_tokens(tmp_path / "tokens", corpus_of(file), tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr(TokenWriter, "write", None)  # not called
        assert open_tokens(tmp_path / "tokens", corpus_of(file), tokenizer) == first
    file.write_text("Lily had a ball. " * 10, encoding="utf-8")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fledge.pretraining.tokens.write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_tokens(tmp_path / "tokens", corpus_of(file), tokenizer)
    assert json.loads((tmp_path / "tokens" / "tokens.json").read_text()) == first
    again = open_tokens(tmp_path / "tokens", corpus_of(file), tokenizer)
    assert again["fingerprint"] != first["fingerprint"]
    assert sum(s["bytes"] for s in again["splits"].values()) == len(("Lily had a ball. " * 10).strip())
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "tokens"}


def test_the_loss_begins_where_every_token_is_as_likely(tokenizer):
    for seed in range(3):
        set_seed(seed)
        model = new_gpt2(tokenizer, 4, 4, 128, 32)
        ids = torch.randint(400, (8, 33))
        targets = ids[:, 1:].contiguous()
        loss = model(input_ids=ids[:, :-1], labels=targets, shift_labels=targets).loss
        assert loss.item() == pytest.approx(math.log(400), rel=0.02)


def test_loss_and_gradients_of_blocks_equal_the_definition(tokenizer):
    set_seed(1)
    plain = new_gpt2(tokenizer, 2, 2, 32, 16)
    fast = copy.deepcopy(plain)
    score_in_cache(fast)
    ids, labels = torch.randint(400, (3, 16)), torch.randint(400, (3, 16))
    labels[2, 9:] = IGNORED
    for count in (None, 100):
        by_hand = F.cross_entropy(plain(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum") / (count or 41)
        found = fast(input_ids=ids, labels=labels, shift_labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(found, by_hand)
        wanted, got = (torch.autograd.grad(loss, list(m.parameters())) for m, loss in ((plain, by_hand), (fast, found)))
        for expected, gradient in zip(wanted, got, strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits)


def test_floating_point_operations_counted_by_hand(tokenizer):
    model = new_gpt2(tokenizer, 3, 4, 64, 32)
    layer = 3 * 64 * 64 + 64 * 64 + 2 * 4 * 64 * 64
    small = 3 * (3 * 64 + 64 + 4 * 64 + 64 + 4 * 64)  # biases and norms
    assert flops_per_token(model) == 6 * (3 * layer + small + 400 * 64) + 12 * 3 * 64 * 32


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("straight") / "straight", io.StringIO()
    with contextlib.redirect_stdout(said):
        pretrain(
            corpus, folder, *EIGHT_STEPS, "--logging_steps", 1, "--sample_prompts", "Lily had",
            "--eval_strategy", "steps", "--eval_steps", 4,
        )  # fmt: skip
    return folder, said.getvalue()


def test_a_base_is_written_that_transformers_opens(straight, tokenizer):
    folder, said = straight
    model, opened = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.config.n_positions, model.config.n_ctx, opened.model_max_length) == (16, 16, 16)
    assert model.config.use_cache is True
    assert opened.get_vocab() == tokenizer.get_vocab()
    assert {file.name for file in folder.iterdir()} == {
        ".fledge.json",
        "config.json",
        "generation_config.json",
        "loss_curve.png",
        "model.safetensors",
        "pretraining.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.jsonl",
    }
    for part in ("8 steps of 4 x 16 tokens, 512 in all", "tokens a parameter", "FLOPs", "s a step", "| Lily had"):
        assert part in said


def test_the_record_tells_the_run(straight):
    folder, _ = straight
    record = json.loads((folder / "pretraining.json").read_text())
    logged = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert record["first_loss"] == pytest.approx(math.log(400), rel=0.02)
    assert record["last_loss"] < record["first_loss"] - 0.2
    assert record["uniform_loss"] == pytest.approx(math.log(400))
    assert (record["steps"], record["tokens"], record["effective_batch_size"]) == (8, 512, 4)
    assert record["estimate"]["tokens"] == 512
    assert [entry["step"] for entry in logged if "eval_loss" in entry] == [4, 8]
    assert str(folder.parent) not in json.dumps(record)


@torch.no_grad()
def test_bits_per_byte_by_hand(straight):
    folder, _ = straight
    model, record = AutoModelForCausalLM.from_pretrained(folder), json.loads((folder / "pretraining.json").read_text())
    ids = np.fromfile(folder.with_name("straight-tokens") / "validation.bin", "uint16").astype(np.int64)
    nats = 0.0
    for begin in range(0, len(ids) - 1, 16):
        window = torch.from_numpy(ids[begin : begin + 17])[None]
        nats += F.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:], reduction="sum").item()
    assert record["validation_loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / record["corpus"]["validation"]["bytes"], 1e-5)


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("way", ["killed", "terminated"])
def test_stopped_and_resumed_equals_straight(straight, corpus, tmp_path, monkeypatch, capsys, way):
    steps = (*EIGHT_STEPS, "--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            if way == "killed":
                sys.exit(9)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_end", stop)
        with pytest.raises(SystemExit) as stopped:
            pretrain(corpus, tmp_path / "m", *steps)
    said = capsys.readouterr().out
    if way == "terminated":
        assert stopped.value.code == 143
        assert "Stopped by SIGTERM at step 3, saved; go on with --resume auto." in said
    assert not (tmp_path / "m" / "pretraining.json").exists()
    with pytest.raises(SystemExit):
        pretrain(corpus, tmp_path / "m", *steps)
    assert "go on with --resume auto or start anew with --overwrite" in capsys.readouterr().err
    pretrain(corpus, tmp_path / "m", *steps, "--resume", "auto")
    expected, found = weights(straight[0]), weights(tmp_path / "m")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "m" / "checkpoints").exists()


def test_nothing_beside_the_weights_stops_their_saving(corpus, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        assert (tmp_path / "m" / "model.safetensors").exists()
        raise RuntimeError("of no use")

    for name in ("save_log", "save_curve"):
        monkeypatch.setattr(f"fledge.training.run_record.{name}", fail)
    monkeypatch.setattr("fledge.pretraining.pretrainer.PretrainTrainer.evaluate", fail)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    pretrain(corpus, tmp_path / "m", "--max_steps", 1, "--eval_strategy", "no", "--save_strategy", "no")
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" failed")[0].rpartition("/")[2] for line in said] == [
        "The last evaluation", "training_log.jsonl", "The record of the run", "loss_curve.png",
    ]  # fmt: skip
    assert weights(tmp_path / "m")
    assert not (tmp_path / "m" / "checkpoints").exists()


def test_tokens_of_others_and_tokens_inside_are_refused(corpus, tmp_path, capsys):
    (tmp_path / "m-tokens").mkdir()
    (tmp_path / "m-tokens" / "thesis.tex").write_text("mine")
    for arguments, message in [
        ((), "m-tokens holds thesis.tex and no mark of pretrain.py (tokens)"),
        (("--tokens_dir", tmp_path / "m" / "tokens"), "holds --tokens_dir"),
        (("--tokens_dir", corpus.tokenizer), "is --tokenizer"),
    ]:
        (tmp_path / "m" / "tokens").mkdir(parents=True, exist_ok=True)
        with pytest.raises(SystemExit):
            pretrain(corpus, tmp_path / "m", "--max_steps", 1, *arguments)
        assert message in capsys.readouterr().err
    assert (tmp_path / "m-tokens" / "thesis.tex").read_text() == "mine"


def test_accumulated_and_two_processes_equal_one_big_batch(straight, corpus, tmp_path):
    half = ("--per_device_train_batch_size", 2)
    pretrain(corpus, tmp_path / "accumulated", *EIGHT_STEPS, *half, "--gradient_accumulation_steps", 2)
    two = command(corpus, tmp_path / "two", *EIGHT_STEPS, *half)
    fork_two("pretrain.py", *two)
    expected = weights(straight[0])
    of_straight = json.loads((straight[0] / "pretraining.json").read_text())
    for name in ("accumulated", "two"):
        found, record = weights(tmp_path / name), json.loads((tmp_path / name / "pretraining.json").read_text())
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=2e-4, rtol=0)
        assert record["validation_loss"] == pytest.approx(of_straight["validation_loss"], abs=1e-4)
        assert (record["effective_batch_size"], record["tokens"]) == (4, 512)
    assert record["processes"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n_head", 5], "--n_embd 32 is not divisible by --n_head 5"),
        (["--context_length", 0], "--context_length 0 is out of range"),
        (["--context_length", 100_000], "--context_length 100000 is longer than the training text of"),
        (["--sample_prompts", "A cat", "a b " * 20], "which leaves no room in the context of 16; shorten it"),
        (["--data", "nowhere.txt"], "There is no data file"),
        (["--tokenizer", "nowhere"], "There is no tokenizer at nowhere"),
        (["--validation_share", 0.9], "--validation_share"),
        (["--learning_raet", 1], "--learning_raet"),
    ],
)
def test_a_mistake_is_one_sentence(corpus, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        pretrain(corpus, tmp_path / "m", *arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "m").exists()


def test_a_corpus_too_short_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    tokens = open_tokens(tmp_path / "t", corpus_of(tmp_path / "a.txt", share=0.5), tokenizer)
    with pytest.raises(UserError, match="The train split has 1 tokens, and none to predict; give more text"):
        Windows(tmp_path / "t", "train", tokens, 8)


def test_two_processes_that_share_the_weights_evaluate_and_save_a_base(corpus, tmp_path):
    steps = ("--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1, "--use_cpu")
    given = command(corpus, tmp_path / "base", *steps)
    first, second = fork_two("pretrain.py", *given, **variables_of("recipes/accelerate/fsdp2.yaml"))
    assert first.stdout.count("bits per byte\n") == 2
    assert "Trained 2 steps" in first.stdout
    assert "Trained" not in second.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")
