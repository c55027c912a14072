import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import fork_script, fork_two, variables_of
from safetensors.torch import load_file
from small import random_rows, small_gpt2, small_tokenizer, trainer_for, write_prepared
from transformers import AutoModelForCausalLM, AutoTokenizer, DefaultFlowCallback, TrainerCallback

from fledge.cli import run
from fledge.encoding import IGNORED
from fledge.errors import UserError
from fledge.folders import claimed
from fledge.hub import find_model
from fledge.marks import write_mark
from fledge.scripts import train_sft
from fledge.training.resuming import StopOnSignal
from fledge.training.run_record import Progress

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
QUIET = ("--bf16", "False", "--eval_strategy", "no", "--per_device_train_batch_size", "8", "--use_cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SimpleNamespace:
    """A base of random weights that no conversion wrote, and prepared data for it."""
    work = tmp_path_factory.mktemp("small")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    small_gpt2(n_layer=3).save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    write_prepared(work / "data", random_rows(32), tokenizer)
    return SimpleNamespace(base=work / "base", data=work / "data")


def train(small, output_dir: Path, *arguments: object, dataset: Path | None = None) -> None:
    """train_sft.py in this process, which has imported everything already."""
    given = ("--model_name_or_path", small.base, "--dataset", dataset or small.data, "--output_dir", output_dir)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_sft.py", *map(str, (*given, *QUIET, *arguments))])
        run(train_sft.main)


def refusal(capsys, *arguments, **keywords) -> str:
    """The one sentence with which training is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(*arguments, **keywords)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


FOUR_STEPS = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory) -> Path:
    """Four steps without a stop; `--resume auto` finds nothing to go on from."""
    folder = tmp_path_factory.mktemp("straight") / "model"
    train(small, folder, *FOUR_STEPS, "--resume", "auto")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_training_wrote_a_finished_model(tiny):
    names = {file.name for file in tiny.model.iterdir()}
    assert names == {
        ".fledge.json",
        "budget.json",
        "chat_template.jinja",
        "config.json",
        "conversion.json",
        "generation_config.json",
        "loss_curve.png",
        "model.safetensors",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.jsonl",
    }
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    assert model.config.use_cache is True
    assert model.config.n_ctx == 128
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tiny.model).eos_token_id
    logged = [json.loads(line) for line in (tiny.model / "training_log.jsonl").read_text().splitlines()]
    steps = [entry for entry in logged if "loss" in entry]
    assert all(
        {"num_tokens", "grad_norm", "learning_rate", "perplexity", "tokens_per_second"} <= e.keys() for e in steps
    )
    assert any({"eval_loss", "eval_perplexity"} <= entry.keys() for entry in logged)
    assert "tokens/s" in tiny.trained
    assert "precision" in tiny.trained


KILLED = """
import os, signal, sys
from fledge.training.run_record import Progress
def kill(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Progress.on_step_end = kill
from fledge.scripts import train_sft
train_sft.main()
"""


def test_killed_and_resumed_equals_straight(small, straight, tmp_path, capsys):
    cut = tmp_path / "cut"
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    given = ("--model_name_or_path", small.base, "--dataset", small.data, "--output_dir", cut)
    killed = fork_script(tmp_path / "killed.py", *given, *QUIET, *FOUR_STEPS, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (cut / "run.json").exists()
    assert "saved at checkpoint-2; go on with --resume auto" in refusal(capsys, small, cut, *FOUR_STEPS)
    # A checkpoint that was being written when the process died.
    shutil.copytree(cut / "checkpoints" / "checkpoint-2", cut / "checkpoints" / "checkpoint-3")
    (cut / "checkpoints" / "checkpoint-3" / "trainer_state.json").write_text('{"global_st', encoding="utf-8")
    train(small, cut, *FOUR_STEPS, "--resume", "auto")
    assert "Going on from" in capsys.readouterr().out
    assert changed(straight, cut) == set()
    one, other = (json.loads((folder / "run.json").read_text()) for folder in (straight, cut))
    assert (one["tokens"], one["last_loss"], one["steps"]) == (other["tokens"], other["last_loss"], other["steps"])
    assert (one["resumed"], other["resumed"]) == (False, True)
    first, second = other["parts"]
    assert (first["first_step"], second["first_step"]) == (0, 2)
    assert other["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.1)


def test_another_seed_trains_other_weights(small, straight, tmp_path):
    """The tests of stopped runs show that the same seed trains the same weights."""
    train(small, tmp_path / "other", "--max_steps", 4, "--seed", 5)
    assert changed(straight, tmp_path / "other")


def test_going_on_with_something_else_is_refused_or_recorded(small, tmp_path, capsys, monkeypatch):
    steps = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1, "--warmup_steps", 0)
    first = tmp_path / "first"
    monkeypatch.setattr(Progress, "on_step_end", lambda self, *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(small, first, *steps)
    monkeypatch.undo()
    other = tmp_path / "data"
    write_prepared(other, random_rows(31), AutoTokenizer.from_pretrained(small.base))
    for given, said in (
        (("--learning_rate", 0.001), "learning_rate 0.0005 (now 0.001)"),
        (("--per_device_train_batch_size", 4), "per_device_train_batch_size 8 (now 4)"),
        (("--weight_decay", 0.1), "weight_decay 0.0 (now 0.1)"),
        (("--freeze_layers", 1), "freeze_layers 0 (now 1)"),
        (("--seed", 5), "seed 42 (now 5)"),
        (("--use_peft",), "use_peft False (now True)"),
    ):
        refused = refusal(capsys, small, first, *steps, "--resume", "auto", *given)
        assert said in refused
        assert "--resume_with_changes true" in refused
    assert "made with other data; give" in refusal(capsys, small, first, *steps, "--resume", "auto", dataset=other)

    changes = ("--learning_rate", 0.002, "--weight_decay", 0.1, "--resume_with_changes", "true")
    without_effect = ("--logging_steps", 2, "--save_total_limit", 1, "--dataloader_num_workers", 0, "--run_name", "x")
    train(small, first, *steps, "--resume", "auto", *changes, *without_effect, dataset=other)
    record = json.loads((first / "run.json").read_text(encoding="utf-8"))
    start, went_on = record["parts"]
    assert (start["first_step"], "changed" in start, went_on["first_step"]) == (0, False, 1)
    assert went_on["changed"].keys() == {"learning_rate", "weight_decay", "data"}
    assert went_on["changed"]["learning_rate"] == [0.0005, 0.002]
    log = [json.loads(line) for line in (first / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    # The cosine falls from the new rate, of which a saved optimizer knows nothing.
    assert rates[1] == 0.0005
    assert 0.0005 < rates[2] < 0.002


def test_a_length_that_cuts_answers_is_counted_or_refused_at_none_left(small, tmp_path, capsys):
    rows = [{"input_ids": [5] * 10 + [6] * 4, "labels": [IGNORED] * 10 + [6] * 4} for _ in range(3)]
    rows += [{"input_ids": [5] * 3 + [6] * 9, "labels": [IGNORED] * 3 + [6] * 9}]
    data = spoil_data(small, tmp_path / "data", rows)
    train(small, tmp_path / "m", "--max_steps", 1, "--max_length", 8, dataset=data)
    assert "Rows cut 4 of 4 by max_length 8, with their end-of-text; 3 of them keep" in capsys.readouterr().out
    said = refusal(capsys, small, tmp_path / "n", "--max_length", 3, dataset=data)
    assert "cuts the whole answer off every row" in said


def test_a_checkpoint_that_does_not_say_how_it_was_made_needs_a_word(small, tmp_path, capsys):
    steps = ("--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1)
    # What another program leaves: the same state, and nothing of Fledge's in it.
    checkpoint = trainer_for(small_gpt2(n_layer=3), tmp_path / "trl", max_steps=2, save_strategy="steps", save_steps=1)
    checkpoint.train()
    found = tmp_path / "trl" / "checkpoint-1"
    assert "does not say what it was made with" in refusal(capsys, small, tmp_path / "n", *steps, "--resume", found)
    train(small, tmp_path / "n", *steps, "--resume", found, "--resume_with_changes", "true")
    assert json.loads((tmp_path / "n" / "run.json").read_text(encoding="utf-8"))["steps"] == 2


def test_only_the_main_thread_listens_to_sigterm():
    before, stop = signal.getsignal(signal.SIGTERM), StopOnSignal()
    thread = threading.Thread(target=stop.on_train_begin, args=(None, None, None))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    stop.on_train_begin(None, None, None)
    assert signal.getsignal(signal.SIGTERM) == stop._note
    stop.let_go()
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_saves_and_the_run_goes_on(small, straight, tmp_path, capsys, monkeypatch):
    steps = ("--max_steps", 4)
    torch.rand(7)  # what else draws in this process changes nothing

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_end", stop)
        with pytest.raises(SystemExit) as stopped:
            train(small, tmp_path / "cut", *steps)
    assert stopped.value.code == 143
    assert "Stopped by SIGTERM at step 2, saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "cut" / "run.json").exists()
    train(small, tmp_path / "cut", *steps, "--resume", "auto")
    assert changed(straight, tmp_path / "cut") == set()


def test_only_what_is_not_frozen_moves(small, straight, tmp_path, capsys):
    every = set(weights(small.base))
    steps = ("--max_steps", 2, "--warmup_steps", 0)
    assert changed(small.base, straight) == every
    train(small, tmp_path / "first", *steps, "--freeze_layers", 2)
    assert changed(small.base, tmp_path / "first") == {name for name in every if ".h.2." in name or "ln_f" in name}
    train(small, tmp_path / "last", *steps, "--freeze_layers", -1, "--freeze_modules", "wpe", "h.0.mlp")
    kept = {name for name in every if ".h.2." in name or "wpe" in name or ".h.0.mlp." in name}
    assert changed(small.base, tmp_path / "last") == every - kept
    record = json.loads((tmp_path / "last" / "run.json").read_text())["trained"]
    assert (record["freeze_layers"], record["freeze_modules"]) == (-1, ["wpe", "h.0.mlp"])
    said = refusal(capsys, small, tmp_path / "m", "--freeze_modules", "attention")
    assert "--freeze_modules attention names nothing in this model; it has act, attn," in said
    assert "the model's 3 blocks" in refusal(capsys, small, tmp_path / "m", "--freeze_layers", 4)
    assert "Everything is frozen" in refusal(capsys, small, tmp_path / "m", "--freeze_modules", "transformer")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", [(), ("--use_dora",)])
def test_an_adapter_is_merged_and_kept_beside(small, tmp_path, kind):
    from peft import PeftModel

    train(small, tmp_path / "m", "--max_steps", 3, "--use_peft", "--learning_rate", 0.05, *kind)
    expected = {name for name in weights(small.base) if name.endswith(".weight") and ("attn" in name or "mlp" in name)}
    assert changed(small.base, tmp_path / "m") == expected
    ids = torch.arange(1, 30)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids).logits
    base = AutoModelForCausalLM.from_pretrained(small.base)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "m" / "adapter")(ids).logits, merged)
    record = json.loads((tmp_path / "m" / "run.json").read_text())["trained"]["adapter"]
    assert record["kind"] == ("DoRA" if kind else "LoRA")
    assert str(small.base) not in (tmp_path / "m" / "adapter" / "adapter_config.json").read_text()
    with pytest.raises(UserError, match=f"adapter is a PEFT adapter, .*; {tmp_path}/m has it merged into its base"):
        find_model(tmp_path / "m" / "adapter")


@pytest.mark.parametrize("way", [(), ("--use_peft",), ("--freeze_layers", "3")])
def test_tokens_that_the_template_brings_are_learnt(small, tmp_path, way):
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    rows = [{key: [97, *row[key], 98] for key in ("input_ids", "labels")} for row in random_rows(16)]
    rows = [{"input_ids": row["input_ids"], "labels": [IGNORED, *row["labels"][1:]]} for row in rows]
    write_prepared(tmp_path / "data", rows, tokenizer)
    train(small, tmp_path / "m", "--max_steps", 2, "--warmup_steps", 0, *way, dataset=tmp_path / "data")
    old, new = (weights(folder)["transformer.wte.weight"] for folder in (small.base, tmp_path / "m"))
    assert new.shape == (99, 24)
    start = old.mean(0)
    assert all((row - start).abs().max() > 1e-6 for row in new[97:])
    assert torch.equal(new[:97], old) == (way == ("--use_peft",))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == 99


def test_twenty_records_are_learnt_by_heart_and_end(small, tmp_path):
    """The canary: whatever breaks masks, shifts or end-of-text keeps these answers from coming back."""
    rows = [[1 + n, 30, *[40 + (n * k) % 50 for k in range(1, 4 + n % 5)], 0] for n in range(20)]
    data = [{"input_ids": ids, "labels": [IGNORED, IGNORED, *ids[2:]]} for ids in rows]
    write_prepared(tmp_path / "data", data, AutoTokenizer.from_pretrained(small.base))
    train(
        small, tmp_path / "m", "--max_steps", 120, "--learning_rate", 0.01, "--per_device_train_batch_size", 20,
        "--logging_steps", 40, dataset=tmp_path / "data",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for ids in rows:
        answer = model.generate(torch.tensor([ids[:2]]), max_new_tokens=20, do_sample=False)
        assert answer[0].tolist() == ids


def test_the_best_model_is_kept_and_a_worsening_run_stops(small, tmp_path):
    train(
        small, tmp_path / "m", "--max_steps", 40, "--eval_strategy", "steps", "--eval_steps", 4,
        "--learning_rate", 0.03, "--lr_scheduler_type", "constant_with_warmup", "--early_stopping_patience", 1,
    )  # fmt: skip
    record = json.loads((tmp_path / "m" / "run.json").read_text())
    logged = [json.loads(line) for line in (tmp_path / "m" / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    assert record["best_validation_loss"] == min(losses) < losses[-1]
    assert record["steps"] < 40
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    rows = random_rows(32)[:4]
    nats = [
        model(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss.item()
        * sum(label != IGNORED for label in r["labels"][1:])
        for r in rows
    ]
    count = sum(label != IGNORED for r in rows for label in r["labels"][1:])
    assert sum(nats) / count == pytest.approx(min(losses), abs=1e-4)


@pytest.mark.parametrize("spoilt", ["weights", "gradient"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    small, tmp_path, capsys, monkeypatch, spoilt
):
    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            if spoilt == "weights":
                model.transformer.ln_f.weight.data[0] = float("nan")
            else:
                model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))

    monkeypatch.setattr(Progress, "on_step_end", spoil)
    steps, before = ("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 1), signal.getsignal(signal.SIGTERM)
    said = refusal(capsys, small, tmp_path / "m", *steps)
    assert signal.getsignal(signal.SIGTERM) == before
    assert ("loss is nan" if spoilt == "weights" else "gradient's norm is") in said
    assert "at step 4, on the batch with 't" in said
    assert "checkpoint-3 with --resume auto" in said
    assert not (tmp_path / "m" / "run.json").exists()


def test_a_full_disk_at_a_checkpoint_is_one_sentence(small, tmp_path, capsys, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    said = refusal(capsys, small, tmp_path / "m", "--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1)
    assert "No space left on device" in said
    assert "make room" in said


def test_curves_of_tensorboard_outlive_the_checkpoints(small, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(small, tmp_path / "m", "--max_steps", 2, "--logging_steps", 1, "--report_to", "tensorboard")
    (file,) = (tmp_path / "m" / "runs").rglob("events*")
    events = reading.EventAccumulator(str(file))
    events.Reload()
    watched = {"loss", "perplexity", "tokens_per_second", "grad_norm", "learning_rate"}
    assert watched <= {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}


def test_files_of_others_stop_a_run_before_it_changes_anything(small, tmp_path, capsys):
    steps = ("--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1)
    stopping = pytest.MonkeyPatch()
    stopping.setattr("fledge.training.running.Run.save", lambda *arguments: sys.exit(1))
    with pytest.raises(SystemExit):
        train(small, tmp_path / "other", *steps)
    stopping.undo()
    checkpoint, proj = tmp_path / "other" / "checkpoints" / "checkpoint-1", tmp_path / "proj"
    (proj / "checkpoints").mkdir(parents=True)
    for file in (proj / "thesis.tex", proj / "checkpoints" / "notes.txt"):
        file.write_text("mine")
    assert "already has content" in refusal(capsys, small, proj, *steps, "--resume", checkpoint)
    for how in (("--overwrite",), ("--overwrite", "--resume", checkpoint), ("--resume", "auto")):
        assert "thesis.tex and no mark of train_sft.py" in refusal(capsys, small, proj, *steps, *how)
    assert "--output_dir" in refusal(capsys, small, small.base, "--overwrite")
    assert "holds --dataset" in refusal(capsys, small, small.data.parent, "--overwrite")
    assert {file.read_text() for file in proj.rglob("*") if file.is_file()} == {"mine"}
    assert len(list(proj.rglob("*"))) == 3


def test_nothing_beside_the_weights_stops_their_saving(small, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **keywords):
        assert (tmp_path / "m" / "model.safetensors").exists()
        raise RuntimeError("of no use")

    class Tracker(TrainerCallback):
        def on_log(self, *arguments, **keywords):
            raise ConnectionError("the tracker is gone")

        on_train_end = on_log

    Tracker.__module__ = "transformers.integrations.of_a_test"
    monkeypatch.setattr("fledge.training.run_record.save_curve", fail)
    monkeypatch.setattr("fledge.training.running.save_log", fail)
    monkeypatch.setattr("trl.SFTTrainer.end", fail, raising=False)
    monkeypatch.setattr("fledge.training.trainer.InstructTrainer.end", fail, raising=False)
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [DefaultFlowCallback, Tracker])
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    train(small, tmp_path / "m", "--max_steps", 2, "--logging_steps", 1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "Tracker failed and is left out: the tracker is gone" in said[0]
    assert [line.split(" failed")[0].rpartition("/")[2] for line in said[1:]] == [
        "training_log.jsonl", "loss_curve.png", "The end of tracking",
    ]  # fmt: skip
    assert json.loads((tmp_path / "m" / "run.json").read_text())["commit"] is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_second_training_into_a_folder_stops_at_once(small, tmp_path, capsys):
    with claimed(tmp_path / "m", "train_sft.py"):
        said = refusal(capsys, small, tmp_path / "m", "--overwrite", dataset=tmp_path / "none")
    assert f"Another run is writing {tmp_path / 'm'} at this moment" in said
    assert f"process {os.getpid()} on" in said
    assert list(tmp_path.iterdir()) == []


def test_smoke_runs_three_steps_elsewhere(small, tmp_path):
    train(small, tmp_path / "m", "--num_train_epochs", 50, "--smoke")
    train(small, tmp_path / "m", "--num_train_epochs", 50, "--smoke")
    assert not (tmp_path / "m").exists()
    assert json.loads((tmp_path / "m-smoke" / "run.json").read_text())["steps"] == 3


def test_a_table_of_conversations_trains_by_the_base_s_template(small, tmp_path, capsys):
    words = [" ".join(f"t{2 + (3 * n + k) % 90}" for k in range(4)) for n in range(20)]
    table = [{"instruction": word, "response": word} for word in words]
    table += [{"instruction": " ".join(["t5"] * 60), "response": "t1"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    train(small, tmp_path / "m", "--max_steps", 2, dataset=tmp_path / "rows.jsonl")
    said = capsys.readouterr().out
    assert "left out 1 (longer than 40 tokens)" in said
    assert ", 1 in validation, " in said
    assert f"Next: python generate.py --model {tmp_path / 'm'} --prompt PROMPT" in said  # it has no held-out task
    assert not (tmp_path / "m" / "budget.json").exists()
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "t1", "answer": "t2"}\n', encoding="utf-8")
    said = refusal(capsys, small, tmp_path / "n", dataset=other)
    assert "has the columns question, answer; give messages, instruction and response" in said


def spoil_data(small, folder: Path, rows: list[dict]) -> Path:
    write_prepared(folder, rows, AutoTokenizer.from_pretrained(small.base))
    return folder


def test_bad_input_is_refused_in_one_sentence(small, tmp_path, capsys):
    out, rows = tmp_path / "m", random_rows(8)
    masked = spoil_data(small, tmp_path / "masked", [{**row, "labels": [IGNORED] * len(row["labels"])} for row in rows])
    assert "No token of the train split is supervised" in refusal(capsys, small, out, dataset=masked)
    without = spoil_data(small, tmp_path / "without", [{"input_ids": row["input_ids"]} for row in rows])
    assert "The train split lacks labels" in refusal(capsys, small, out, dataset=without)
    missing = spoil_data(small, tmp_path / "missing", rows)
    shutil.rmtree(missing / "tokenized")
    assert "has no tokenized/; name what prepare_dataset.py wrote" in refusal(capsys, small, out, dataset=missing)
    foreign = tmp_path / "foreign"
    write_prepared(foreign, rows, small_tokenizer(90))
    assert "encoded with 90 tokens and the model's tokenizer has 97" in refusal(capsys, small, out, dataset=foreign)
    assert "There is no data file at" in refusal(capsys, small, out, dataset=tmp_path / "none")
    assert "it has no config.json" in refusal(capsys, small, out, "--model_name_or_path", tmp_path / "masked")
    for place in (out, masked):
        assert "is no checkpoint" in refusal(capsys, small, place, "--resume", tmp_path)
    assert "--dropout 1.5 is out of range" in refusal(capsys, small, out, "--dropout", 1.5)
    assert "learning_rat" in refusal(capsys, small, out, "--learning_rat", 1)
    unknown = refusal(capsys, small, out, "--use_peft", "--lora_target_modules", "q_proj")
    assert "--lora_target_modules q_proj names nothing in this model" in unknown
    schedule = refusal(capsys, small, out, "--lr_scheduler_kwargs", '{"peak": 1}')
    assert "--lr_scheduler_type or --lr_scheduler_kwargs: " in schedule
    assert "--optim or --optim_args: " in refusal(capsys, small, out, "--optim", "rmsprop_bnb")
    assert "An adapter freezes all" in refusal(capsys, small, out, "--use_peft", "--freeze_layers", 1)
    assert not out.exists()


def test_overwrite_deletes_an_unfinished_run_only_after_input_is_good(small, tmp_path, capsys):
    checkpoint = tmp_path / "m" / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}', encoding="utf-8")
    assert "already has content" in refusal(capsys, small, tmp_path / "m")
    assert "so Fledge did not write it" in refusal(capsys, small, tmp_path / "m", "--overwrite")
    write_mark(checkpoint.parent, "train_sft.py", {})
    assert "unfinished run" in refusal(capsys, small, tmp_path / "m")
    refusal(capsys, small, tmp_path / "m", "--overwrite", dataset=tmp_path / "none")
    assert (checkpoint / "trainer_state.json").exists()
    train(small, tmp_path / "m", "--overwrite", "--max_steps", 1)
    assert (tmp_path / "m" / "model.safetensors").exists()
    assert not checkpoint.exists()


def test_two_nodes_of_one_process_equal_one_process_with_twice_the_batch(small, straight, tmp_path):
    said = fork_two(
        "train_sft.py", "--model_name_or_path", small.base, "--dataset", small.data, "--output_dir", tmp_path / "two",
        *QUIET, "--max_steps", 4, "--per_device_train_batch_size", 4, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
    )  # fmt: skip
    assert "Processes 2" in said[0].stdout
    assert "Trained 4 steps" not in said[1].stdout
    record = json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))
    assert (record["processes"], record["effective_batch_size"]) == (2, 8)
    one, two = weights(straight), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


# train_sft.py, which writes down what each process holds when training begins, and is killed at a step if told to.
# Files, because lines that two processes print at once may run into each other.
HOLDING = """
import json, os, pathlib, runpy, sys
from torch.distributed.tensor import DTensor
from fledge.training import sharding

class Holding(sharding.CheckSharded):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        parameters = list(model.parameters())
        held = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        path = pathlib.Path(os.environ["HELD"]) / os.environ["RANK"]
        path.write_text(json.dumps([held, sum(p.numel() for p in parameters)]))

    def on_step_begin(self, args, state, control, **kwargs):
        if str(state.global_step) == os.environ.get("KILL_AT"):
            os._exit(9)

sharding.CheckSharded = Holding
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_fsdp2_spreads_the_weights_over_two_processes_and_trains_the_same(small, straight, tmp_path):
    (tmp_path / "holding.py").write_text(HOLDING, encoding="utf-8")
    script = (tmp_path / "holding.py", "train_sft.py", "--model_name_or_path", small.base, "--dataset", small.data)
    script += (*QUIET, *FOUR_STEPS, "--per_device_train_batch_size", 4)
    script += ("--output_dir", tmp_path / "two")
    sharding = variables_of("recipes/accelerate/fsdp2.yaml")
    held = [tmp_path / "held_by_the_killed", tmp_path / "held_by_the_resumed"]
    for folder in held:
        folder.mkdir()
    killed = fork_two(*script, check=False, **sharding, KILL_AT="2", HELD=str(held[0]))
    assert 9 in [process.returncode for process in killed]
    assert not (tmp_path / "two" / "run.json").exists()
    assert "checkpoint-2" in fork_two(*script, "--resume", "auto", **sharding, HELD=str(held[1]))[0].stdout

    for folder in held:
        first, second = (json.loads((folder / rank).read_text()) for rank in ("0", "1"))
        assert first[0] + second[0] == first[1] == second[1]
        assert all(abs(mine / every - 0.5) < 0.05 for mine, every in (first, second))
    one, two = (
        [json.loads(line)["loss"] for line in (folder / "training_log.jsonl").open() if '"loss"' in line]
        for folder in (straight, tmp_path / "two")
    )
    assert two == pytest.approx(one, rel=1e-4)
    one, two = weights(straight), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


def test_a_run_that_is_told_to_shard_and_does_not_is_refused(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = refusal(capsys, small, tmp_path / "m")
    assert "told to shard by FSDP and holds the whole model in each of its 1 processes" in said
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("fledge.training.sharding.find_spec", lambda package: None)
    assert "DeepSpeed, which is not installed: pip install deepspeed." in refusal(capsys, small, tmp_path / "m")
