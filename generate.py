"""Text from a model, through its own prompt template, shown as it is written.

python generate.py --model model --topic "A cat who was afraid of the sea." --ending sad
python generate.py --model base --prompt "Once upon a time"
"""

import sys
from dataclasses import dataclass, field

from fledge.cli import UserError, parse, run
from fledge.sampling import Sampling


@dataclass
class GenerateArguments:
    model: str = field(metadata={"help": "a model folder"})
    prompt: str | None = field(default=None, metadata={"help": "an instruction, or for a base model a beginning"})
    topic: str | None = field(default=None, metadata={"help": "what the story is about"})
    ending: str = field(default="happy", metadata={"help": "how it ends: happy or sad (default happy)"})
    num_samples: int = field(default=1, metadata={"help": "answers to draw (default 1)"})


def main():
    args, sampling = parse(sys.argv[1:], GenerateArguments, Sampling, description=__doc__)
    sampling.check()
    if (args.prompt is None) == (args.topic is None):
        raise UserError("Give either --prompt or --topic.")
    if args.ending not in ("happy", "sad"):
        raise UserError(f"--ending {args.ending} is unknown; choose happy or sad.")
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples} is out of range; ask for at least one.")

    import transformers
    from transformers import TextStreamer

    from fledge.encoding import encode_prompt
    from fledge.generation import answer_batch, load_model
    from fledge.tasks.topic_ending import instruction
    from fledge.tokenizers import encoding_of

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(args.model)
    text = instruction(" ".join(args.topic.split()), args.ending) if args.topic is not None else args.prompt
    # A base model has no template: it continues the text itself, as the beginning of a document.
    begin = [] if tokenizer.chat_template or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    with encoding_of("The prompt"):
        if tokenizer.chat_template:
            ids = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        else:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("The prompt is empty.")
    ids = begin + ids
    if args.num_samples == 1:
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        answer_batch(model, tokenizer, [ids], sampling, sampling.seed, streamer)
    else:
        for number, answer in enumerate(
            answer_batch(model, tokenizer, [ids] * args.num_samples, sampling, sampling.seed), 1
        ):
            print(f"--- {number}\n{answer.text}\n")


if __name__ == "__main__":
    run(main)
