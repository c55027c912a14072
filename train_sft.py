"""A converted base and a prepared dataset → an instruct model, through TRL's SFTTrainer, on completions only.

    accelerate launch train_sft.py --config recipes/quickstart/train.yaml
    python train_sft.py --model_name_or_path base --dataset data --output_dir model --num_train_epochs 3

Besides the keys below, every key of TRL's SFTConfig and ModelConfig works under its own name, among them
--learning_rate, --num_train_epochs, --max_steps, --per_device_train_batch_size, --gradient_accumulation_steps,
--save_strategy, --report_to, --use_peft; --help_all lists them.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from fledge.cli import check_output_dir, parse, read_json, run, staged, write_json


@dataclass
class RunArguments:
    dataset: str = field(metadata={"help": "the folder that prepare_dataset.py wrote"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in output_dir"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier model in output_dir"})


def main():
    if {"-h", "--help"} & set(sys.argv):  # TRL's own keys take seconds to import
        parse(sys.argv[1:], RunArguments, description=__doc__)
    arguments = ["--help" if argument == "--help_all" else argument for argument in sys.argv[1:]]

    import transformers
    from datasets import load_from_disk
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl import ModelConfig, SFTTrainer, get_peft_config

    from fledge.tokenizers import open_tokenizer
    from fledge.training import (
        Progress,
        SmallModelConfig,
        check_fit,
        run_record,
        save_loss_curve,
        score_supervised_only,
    )

    args, config, model_args = parse(arguments, RunArguments, SmallModelConfig, ModelConfig, description=__doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()
    output_dir, base, data = Path(config.output_dir), Path(model_args.model_name_or_path or ""), Path(args.dataset)
    # Checkpoints of an unfinished run lie in a folder of their own, so a finished model is never half-written.
    config.output_dir = str(output_dir / "checkpoints")
    checkpoint = get_last_checkpoint(config.output_dir) if args.resume and Path(config.output_dir).exists() else None
    if not checkpoint and config.process_index == 0:
        check_output_dir(output_dir, args.overwrite, "run.json")
    conversion = read_json(base / "conversion.json", "convert_checkpoint.py")
    budget = read_json(data / "budget.json", "prepare_dataset.py")

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    tokenizer = open_tokenizer(data / "tokenizer")
    rows = load_from_disk(str(data / "tokenized"))
    check_fit(model, tokenizer, max(split["lengths"]["total"]["1"] for split in budget["splits"].values()))
    if config.process_index == 0:
        precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"
        print(
            f"{model.num_parameters():,} parameters; {precision}, {config.precision_reason}; processes: {config.world_size}"
        )

    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"] if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    if config.device.type in ("cpu", "mps"):
        score_supervised_only(model)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - start

    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model)
        trained = trained.merge_and_unload() if model_args.use_peft else trained
        # TRL switches the cache off for training; a served model wants it.
        trained.config.use_cache = True
        end = tokenizer.eos_token_id
        # Greedy decoding makes a small model repeat itself, so a pipeline that is told nothing samples.
        trained.generation_config = GenerationConfig(
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
        )
        record = run_record(
            trainer, seconds, {name: len(split) for name, split in rows.items()}, rows["train"]._fingerprint
        )
        with staged(output_dir, args.overwrite or output_dir.exists(), "run.json") as folder:
            trained.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            with (folder / "training_log.jsonl").open("w", encoding="utf-8") as log:
                log.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
            save_loss_curve(trainer.state.log_history, folder / "loss_curve.png")
            write_json(folder / "conversion.json", conversion)
            write_json(folder / "budget.json", budget)
            write_json(folder / "run.json", record)
        print(
            f"Trained {record['steps']} steps in {seconds:.0f} s ({record['tokens_per_second']:,} tokens/s); "
            f"loss {record['first_loss']:.3f} to {record['last_loss']:.3f}."
        )
        print(f"{output_dir} is ready (loss_curve.png shows the way). Next: evaluate_model.py")
    trainer.end()


if __name__ == "__main__":
    run(main)
