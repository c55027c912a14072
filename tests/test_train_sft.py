import json
import shutil

import torch
from conftest import run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def train(tiny, output_dir, *arguments, check=True):
    return run_script(
        "train_sft.py", "--model_name_or_path", tiny.base, "--dataset", tiny.data, "--output_dir", output_dir,
        "--per_device_train_batch_size", 8, "--bf16", "False", *arguments, check=check,
    )  # fmt: skip


def test_accelerate_launch_wrote_a_finished_model(tiny):
    names = {file.name for file in tiny.model.iterdir()}
    assert names == {
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
    assert any("num_tokens" in entry for entry in logged)
    assert any("eval_loss" in entry for entry in logged)
    assert "tokens/s" in tiny.trained
    assert "Precision" in tiny.trained


def test_resumed_equals_straight(tiny, tmp_path):
    steps = ["--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3, "--eval_strategy", "no"]
    train(tiny, tmp_path / "straight", *steps, "--save_total_limit", 5)
    straight = load_file(tmp_path / "straight" / "model.safetensors")

    interrupted = tmp_path / "interrupted"
    script = tmp_path / "killed.py"
    script.write_text(
        "import sys, fledge.training as training\n"
        "def kill(self, args, state, control, **kwargs):\n"
        "    if state.global_step == 4:\n"
        "        sys.exit(1)\n"
        "training.Progress.on_step_end = kill\n"
        "import train_sft\n"
        "train_sft.main()\n",
        encoding="utf-8",
    )
    killed = run_script(
        script, "--model_name_or_path", tiny.base, "--dataset", tiny.data, "--output_dir", interrupted,
        "--per_device_train_batch_size", 8, "--bf16", "False", *steps, check=False,
    )  # fmt: skip
    assert killed.returncode == 1
    assert not (interrupted / "run.json").exists()
    refused = train(tiny, interrupted, *steps, check=False)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    train(tiny, interrupted, *steps, "--resume")
    resumed = load_file(interrupted / "model.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_an_adapter_is_merged_into_a_plain_model(tiny, tmp_path):
    done = train(
        tiny, tmp_path / "lora", "--max_steps", 3, "--use_peft", "--eval_strategy", "no", "--learning_rate", 0.05
    )
    assert "Trained 3 steps" in done.stdout
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny.base, tmp_path / "lora"))
    changed = {name for name in merged if not torch.equal(base[name], merged[name])}
    assert changed == {f"transformer.h.{n}.attn.c_attn.weight" for n in range(2)}


def test_two_processes_train_together(tiny, tmp_path):
    done = run_script(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "train_sft.py", "--model_name_or_path", tiny.base,
        "--dataset", tiny.data, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 4, "--bf16", "False",
        "--max_steps", 3, "--eval_strategy", "no",
    )  # fmt: skip
    record = json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))
    assert (record["processes"], record["effective_batch_size"]) == (2, 8)
    assert done.stdout.count("Trained 3 steps") == 1


def test_overwrite_deletes_an_unfinished_run_only_once_the_input_is_known_to_be_good(tiny, tmp_path):
    checkpoint = tmp_path / "m" / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
    refused = train(tiny, tmp_path / "m", check=False)
    assert refused.returncode == 2
    assert "unfinished run" in refused.stderr
    mistyped = train(tiny, tmp_path / "m", "--overwrite", "--dataset", tmp_path, check=False)
    assert mistyped.returncode == 2
    assert (checkpoint / "trainer_state.json").exists()
    train(tiny, tmp_path / "m", "--overwrite", "--max_steps", 1, "--eval_strategy", "no")
    assert (tmp_path / "m" / "model.safetensors").exists()
    assert not checkpoint.exists()


def test_data_prepared_for_another_model_is_refused_in_one_sentence(tiny, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(tiny.data, other)
    shutil.rmtree(other / "tokenized")
    missing = run_script(
        "train_sft.py",
        "--model_name_or_path",
        tiny.base,
        "--dataset",
        other,
        "--output_dir",
        tmp_path / "m",
        check=False,
    )
    no_data = run_script(
        "train_sft.py",
        "--model_name_or_path",
        tiny.base,
        "--dataset",
        tmp_path,
        "--output_dir",
        tmp_path / "m",
        check=False,
    )
    unknown = train(tiny, tmp_path / "m", "--learning_rat", 1, check=False)
    for done in (missing, no_data, unknown):
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "m").exists()
