"""Text from a model, through its own prompt template: one prompt, a conversation, or a file of prompts.

python generate.py --model model --topic "A cat who was afraid of the sea." --ending sad
python generate.py --model model --interactive
python generate.py --model model --prompts_file prompts.txt --output_file answers.jsonl
python generate.py --model base --prompt "Once upon a time"
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fledge.cli import parse, writing
from fledge.errors import UserError
from fledge.folders import check_inputs
from fledge.hub import find_model
from fledge.locks import locked
from fledge.ranges import AT_LEAST_ONE, check_ranges
from fledge.reading.values import is_visible
from fledge.sampling import Sampling
from fledge.terminal import in_columns, quiet
from fledge.trained import Trained, read_trained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fledge.messages import Answer, Messages
    from fledge.models import ModelAndTokenizer

RANGES = {"num_samples": AT_LEAST_ONE, "batch_size": AT_LEAST_ONE}
WAYS = ("prompt", "topic", "words", "constraints", "ask", "interactive", "prompts_file")


@dataclass
class GenerateArguments:
    GROUPS: ClassVar = {"prompt": "what to ask", "prompts_file": "a file of prompts", "dtype": "how to answer"}

    model: str = field(metadata={"help": "a model folder, or a model on the Hub (user/name)"})
    prompt: str | None = field(
        default=None, metadata={"help": "an instruction, or for a base model a text to continue"}
    )
    topic: str | None = field(default=None, metadata={"help": "the topic of a story"})
    ending: str = field(default="happy", metadata={"help": "its ending: happy or sad (default happy)"})
    words: str | None = field(default=None, metadata={"help": "words that a story should use: 'boat, brave, laugh'"})
    constraints: list[str] | None = field(
        default=None, metadata={"help": "constraints of a story: 'words: boat, brave' 'sentences: 12' 'question: yes'"}
    )
    story: str | None = field(default=None, metadata={"help": "a text file with a story, for --ask"})
    ask: str | None = field(default=None, metadata={"help": "a question, about --story if given"})
    interactive: bool = field(
        default=False, metadata={"help": "a conversation, or the prompts of the model's task, in the terminal"}
    )
    prompts_file: str | None = field(
        default=None,
        metadata={
            "help": "a prompt a line; or .jsonl, .json, .csv or .parquet with `prompt` or `messages` in each row",
        },
    )
    output_file: str | None = field(
        default=None, metadata={"help": "the .jsonl file to write the answers to --prompts_file to"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier output_file"})
    batch_size: int = field(default=64, metadata={"help": "prompts answered together (default 64)"})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "float32 (default), or bfloat16: half the memory, slightly other answers",
        },
    )
    compare: str | None = field(default=None, metadata={"help": "another model, shown beside the first"})
    num_samples: int = field(default=1, metadata={"help": "answers to sample (default 1)"})
    stats: bool = field(
        default=False, metadata={"help": "print tokens per second, and how many answers stopped by themselves"}
    )


def main() -> list[str]:
    """Returns the answers that it printed or wrote."""
    args, sampling = parse(sys.argv[1:], GenerateArguments, Sampling, description=__doc__)
    sampling.check()
    check(args)
    folder = find_model(args.model)
    if args.compare:
        find_model(args.compare)
    with contextlib.ExitStack() as stack:
        if args.output_file:
            inputs = {"--prompts_file": args.prompts_file, "--model": args.model}
            check_inputs(args.output_file, "--output_file", inputs)
            stack.enter_context(locked(Path(args.output_file).resolve(), "--output_file"))
            check_output_file(Path(args.output_file), args.overwrite)
        return answer(args, sampling, folder)


def check_output_file(file: Path, overwrite: bool) -> None:
    """Checks that the file of answers may be written.

    Raises:
        UserError: it exists and --overwrite is not given, or it is not a file of generate.py.
    """
    if not file.exists():
        return
    if not overwrite:
        raise UserError(f"{file} is already there; name another --output_file or pass --overwrite.")
    with writing(file), file.open("rb") as answers:
        first = answers.readline()
    try:
        is_ours = {"messages", "sample", "text", "tokens", "stopped"} <= set(json.loads(first))
    except (ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{file} was not written by generate.py and will not be replaced; name another --output_file.")


def answer(args: GenerateArguments, sampling: Sampling, folder: Path) -> list[str]:
    """Prints the answers, or writes them to --output_file, and returns them; of a conversation it returns none."""
    from fledge.generation.conversation import converse
    from fledge.models import load_model

    quiet()
    names = [name for name in (args.model, args.compare) if name]
    models = [load_model(name, args.dtype) for name in names]
    for name, (_, tokenizer) in zip(names, models, strict=True):
        if not tokenizer.chat_template and (args.interactive or args.ask or args.words or args.constraints):
            raise UserError(f"{name} is a base model without a chat template; give it a --prompt.")
    trained = read_trained(folder)
    if args.interactive:
        converse(*models[0], trained, sampling, lambda: stats(args.stats))
        return []
    warn_of_task(args, trained)
    system = trained.system if trained else []
    if args.prompts_file:
        return answer_prompts(args, sampling, models[0], system)
    messages = [*system, {"role": "user", "content": question(args)}]
    if args.compare:
        return compare(args, sampling, models, messages)
    return answer_one(args, sampling, models[0], messages)


def answer_one(
    args: GenerateArguments, sampling: Sampling, model: "ModelAndTokenizer", messages: "Messages"
) -> list[str]:
    """Prints the answers to one prompt; a single answer is streamed."""
    from transformers import TextStreamer

    from fledge.generation.answers import answer_batch

    ids = prompt_ids(*model, messages, sampling.max_new_tokens)
    streamer = TextStreamer(model[1], skip_special_tokens=True) if args.num_samples == 1 else None
    with stats(args.stats) as answers:
        answers += answer_batch(*model, [ids] * args.num_samples, sampling, sampling.seed, streamer)
    if not streamer:
        for number, answer in enumerate(answers, 1):
            print(f"--- {number}\n{answer.text}\n")
    return [answer.text for answer in answers]


def answer_prompts(
    args: GenerateArguments, sampling: Sampling, model: "ModelAndTokenizer", system: "Messages"
) -> list[str]:
    """Writes the answers to --prompts_file, and continues an interrupted run."""
    from fledge.generation.prompts_file import answer_file

    def ids_for(asked: "Messages") -> list[int]:
        own = asked[0]["role"] == "system"  # it replaces the system message of the task
        return prompt_ids(*model, asked if own else [*system, *asked], sampling.max_new_tokens)

    with stats(args.stats) as answers:
        answers += answer_file(args, *model, sampling, ids_for)
    with Path(str(args.output_file)).open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def compare(
    args: GenerateArguments, sampling: Sampling, models: list["ModelAndTokenizer"], messages: "Messages"
) -> list[str]:
    """Prints the answers of two models to one prompt side by side."""
    from fledge.generation.answers import answer_batch
    from fledge.resizing import add_rows

    # A base model has no template; it gets that of the other model.
    (_, one), (_, other) = models
    columns = []
    for model, own in models:
        tokenizer = own if own.chat_template else other if own is one else one
        add_rows(model, tokenizer)
        ids = prompt_ids(model, tokenizer, messages, sampling.max_new_tokens)
        with stats(args.stats) as answers:
            answers += answer_batch(model, tokenizer, [ids] * args.num_samples, sampling, sampling.seed)
        columns.append([answer.text for answer in answers])
    for texts in zip(*columns, strict=True):
        print(in_columns((args.model, str(args.compare)), texts))
    return [text for texts in columns for text in texts]


def prompt_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", messages: "Messages", max_new_tokens: int
) -> list[int]:
    """The ids of a prompt that fits the context; prints what was left out to standard error."""
    from fledge.generation.fitting import fit_beginning, fit_prompt
    from fledge.models import context_of

    context = context_of(model.config)
    if tokenizer.chat_template:
        ids, said = fit_prompt(tokenizer, messages, context, max_new_tokens)
    else:  # a base model continues the text itself, as the beginning of a document
        ids, said = fit_beginning(tokenizer, messages[-1]["content"], context, max_new_tokens)
    if said:
        print(said, file=sys.stderr)
    return ids


def check(args: GenerateArguments) -> None:
    """Checks every value, and that keys go together.

    Raises:
        UserError: keys that contradict each other.
    """
    given = [f"--{way}" for way in WAYS if getattr(args, way)]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "Nothing is asked"
        raise UserError(f"{found}; give one of {', '.join('--' + way for way in WAYS)}.")
    if args.ending not in ("happy", "sad"):
        raise UserError(f"--ending {args.ending} is unknown; choose happy or sad.")
    if args.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {args.dtype} is unknown; choose float32 or bfloat16.")
    check_ranges(args, RANGES)
    if args.constraints:
        question(args)  # a constraint that cannot be read stops the run before a model is loaded
    for way in ("topic", "words", "ask"):
        text = getattr(args, way)
        if text and not is_visible(text.replace(",", "")):
            raise UserError(f"--{way} holds no word; say what is asked.")
    if args.story and not args.ask:
        raise UserError("--story needs a question; add --ask 'Who is the main character?'.")
    if bool(args.prompts_file) != bool(args.output_file):
        raise UserError("--prompts_file and --output_file go together; one of them is missing.")
    if args.interactive and args.num_samples > 1:
        raise UserError("--num_samples goes with a prompt; --interactive has /retry for another answer.")
    if args.compare and (args.interactive or args.prompts_file):
        raise UserError("--compare answers a single prompt; it goes with neither --interactive nor --prompts_file.")


def warn_of_task(args: GenerateArguments, trained: Trained | None) -> None:
    """Warns on standard error if the prompt belongs to another task than the model was trained on."""
    asks = {"topic_ending": args.topic, "story_chat": args.words, "constraints": args.constraints}
    wanted = next((task for task, is_asked in asks.items() if is_asked), None)
    if wanted and trained and trained.task != wanted:
        print(f"{args.model} was trained on the task {trained.task}, and this asks for {wanted}.", file=sys.stderr)


def question(args: GenerateArguments) -> str:
    """The instruction, in the wording of the task that the keys belong to."""
    from fledge.messages import INPUT_MARK
    from fledge.reading.files import decoded
    from fledge.tasks import constraints, topic_ending
    from fledge.tasks.story_chat import PHRASINGS

    if args.topic:
        return topic_ending.instruction(" ".join(args.topic.split()), args.ending)
    if args.constraints:
        return constraints.instruction(args.constraints)
    if args.words:
        words = ", ".join(word.strip() for word in args.words.split(",") if word.strip())
        return PHRASINGS["words"][0].format(words=words)
    if args.story:
        return f"{args.ask}{INPUT_MARK}" + "".join(decoded(Path(args.story), "\n")).strip()
    return args.ask or args.prompt or ""


@contextlib.contextmanager
def stats(shown: bool) -> "Iterator[list[Answer]]":
    """Yields a list to collect answers in; afterwards prints their speed to standard error, if `shown`."""
    answers: list[Answer] = []
    start = time.perf_counter()
    yield answers
    if shown:
        tokens, stopped = sum(answer.tokens for answer in answers), sum(answer.stopped for answer in answers)
        rate = tokens / (time.perf_counter() - start)
        ended = f"{stopped} of {len(answers)} stopped by end-of-text"
        print(f"[{tokens:,} tokens, {rate:,.0f} tokens/s, {ended}]", file=sys.stderr)
