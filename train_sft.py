"""A converted base and a prepared dataset → an instruct model, through TRL's SFTTrainer, on completions only.

    accelerate launch train_sft.py --config recipes/quickstart/train.yaml
    python train_sft.py --model_name_or_path base --dataset data --output_dir model --num_train_epochs 3

Besides the keys below, every key of TRL's SFTConfig and ModelConfig works under its own name, among them
--learning_rate, --num_train_epochs, --max_steps, --per_device_train_batch_size, --gradient_accumulation_steps,
--save_strategy, --report_to, --use_peft; --help_all lists them.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from fledge.cli import check_output_dir, parse, run, staged, write_json


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
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoModelForCausalLM
    from transformers.trainer_callback import PrinterCallback
    from trl import ModelConfig, SFTTrainer, get_peft_config

    from fledge.encoding import open_prepared
    from fledge.tokenizers import open_tokenizer
    from fledge.training import (
        Progress,
        SmallModelConfig,
        check_fit,
        find_checkpoint,
        finished_model,
        prepare_model,
        run_record,
        save_loss_curve,
        use_all_threads,
    )
    from fledge.vocabulary import add_rows

    args, config, model_args = parse(arguments, RunArguments, SmallModelConfig, ModelConfig, description=__doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()
    output_dir, base, data = Path(config.output_dir), Path(model_args.model_name_or_path or ""), Path(args.dataset)
    # Checkpoints of an unfinished run lie in a folder of their own, so a finished model is never half-written.
    config.output_dir = str(output_dir / "checkpoints")
    checkpoint = find_checkpoint(config, args.resume, args.overwrite)
    if not checkpoint and config.process_index == 0:
        check_output_dir(output_dir, args.overwrite, "run.json", "checkpoints")
    threads = use_all_threads(config)
    # Where the base came from: one of these two, or neither for a model that another tool made.
    provenance = [base / f"{name}.json" for name in ("conversion", "pretraining") if (base / f"{name}.json").exists()]
    budget, tokenizer, rows = open_prepared(data)

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    longest = max(split["lengths"]["total"]["1"] for split in budget["splits"].values())
    check_fit(model, open_tokenizer(base), tokenizer, longest)
    new_tokens = add_rows(model, tokenizer)
    if config.process_index == 0:
        if not checkpoint and Path(config.output_dir).exists():
            shutil.rmtree(config.output_dir)  # only now, when all of the input is known to be good
        precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"
        print(f"{model.num_parameters():,} parameters; processes: {config.world_size}")
        if new_tokens:
            print(f"New tokens {new_tokens}: the dataset's template has them, and the model learns them")
        print(f"Precision {precision}: {config.precision_reason}", flush=True)
        if threads:
            print(threads, flush=True)

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
    loss = prepare_model(trainer)
    if config.process_index == 0:
        print(loss, flush=True)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    record = run_record(trainer, time.monotonic() - start, rows)

    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        with staged(output_dir, True, "run.json", "checkpoints") as folder:
            finished_model(trainer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            with (folder / "training_log.jsonl").open("w", encoding="utf-8") as log:
                log.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
            save_loss_curve(trainer.state.log_history, folder / "loss_curve.png")
            for file in provenance:
                shutil.copy(file, folder)
            write_json(folder / "budget.json", budget)
            write_json(folder / "run.json", record)
        print(
            f"Trained {record['steps']} steps in {record['seconds']:.0f} s, {record['tokens_per_second']:,} tokens/s."
        )
        print(
            f"Loss {record['first_loss']:.3f} to {record['last_loss']:.3f}: {output_dir}/loss_curve.png shows the way."
        )
        print("Next: evaluate_model.py")
    trainer.end()


if __name__ == "__main__":
    run(main)
