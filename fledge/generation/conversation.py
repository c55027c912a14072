"""What is asked of a model: made to fit its context by rule, and a conversation in the terminal."""

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from fledge.cli import UserError
from fledge.encoding import encode_prompt, fitting_words
from fledge.generation.answers import answer_batch
from fledge.messages import INPUT_MARK, Answer, Messages
from fledge.models import context_of
from fledge.sampling import Sampling
from fledge.templates import contents
from fledge.tokenizers import encoding_of
from fledge.tokenizers.spelling import Spelling, named

HELP = """\
/retry      another answer to the last message
/reset      forget the conversation
/save FILE  add the conversation to FILE as one line of JSON
/help       this text
/quit       leave (Ctrl-D does, too); Ctrl-C stops an answer"""


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, context: int, max_new_tokens: int
) -> tuple[list[int], str]:
    """Ids that ask for the next answer and leave room for it, and a sentence about what was left out ("" if nothing).

    A quarter of the context is kept for the answer, less if `max_new_tokens` is less. The oldest turns go first, whole.
    Then the text that the question is about (after `INPUT_MARK`) loses its end, as in preparation. The question never
    loses a word, nor does the system message.

    Raises:
        UserError: the question alone does not fit, or has a character that the tokenizer lacks.
    """
    room = context - min(max_new_tokens, context // 4)
    kept, left_out = list(messages), []
    _check_spelling(tokenizer, contents(messages))
    with encoding_of("The prompt"):
        ids = encode_prompt(tokenizer, kept)
        turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
        for dropped, begin in enumerate(turns[1:], 1):
            if len(ids) <= room:
                break
            kept = [*messages[: turns[0]], *messages[begin:]]
            ids = encode_prompt(tokenizer, kept)
            left_out = [f"the oldest {dropped} of {len(turns)} turns"]
        question, mark, text = kept[-1]["content"].rpartition(INPUT_MARK)
        if len(ids) > room and mark:

            def with_text(text: str) -> list[int]:
                return encode_prompt(tokenizer, [*kept[:-1], {**kept[-1], "content": question + mark + text}])

            fitting, count, words = fitting_words(text, room, lambda text: len(with_text(text)))
            ids = with_text(fitting)
            left_out.append(f"the last {words - count:,} of the {words:,} words of the text")
    if len(ids) >= context:
        raise UserError(
            f"A prompt of {len(ids)} tokens leaves no room in the model's context of {context}; shorten it."
        )
    return (
        ids,
        f"To fit the model's context of {context} tokens, {' and '.join(left_out)} were left out." if left_out else "",
    )


def _check_spelling(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    if missing := Spelling(tokenizer).missing(text):
        raise UserError(f"The prompt has {named(Counter(missing))}, which the model's vocabulary lacks; leave it out.")


def fit_beginning(
    tokenizer: PreTrainedTokenizerBase, text: str, context: int, max_new_tokens: int
) -> tuple[list[int], str]:
    """The same for a base model, which has no template and goes on from the text's end: it loses its beginning.

    Raises:
        UserError: the text is empty, or has a character that the tokenizer lacks.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    _check_spelling(tokenizer, text)
    with encoding_of("The prompt"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("The prompt is empty.")
    excess = len(begin) + len(ids) - (context - min(max_new_tokens, context // 4))
    if excess <= 0:
        return begin + ids, ""
    said = f"To fit the model's context of {context} tokens, the first {excess:,} of {len(ids):,} tokens were left out."
    return begin + ids[excess:], said


def converse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    system: Messages,
    sampling: Sampling,
    show_stats: Callable[[], AbstractContextManager[list[Answer]]],
) -> None:
    """Reads messages from standard input until it ends or says /quit, and streams the answers to them.

    `show_stats` yields a list for the answers, of which it may tell something at its end.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  the keys of a terminal: history, arrows; Windows has them without it

    messages, asked = list(system), 0
    print("Write a message, or /help.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        retried = command == "/retry"
        if command == "/quit":
            return
        if not line:
            continue
        if command == "/reset":
            messages = list(system)
            print("Forgotten.")
        elif command == "/save":
            print(save(messages, argument.strip()))
        elif retried and len(messages) == len(system):
            print("There is no message yet to answer again.")
        elif line.startswith("/") and not retried:
            print(HELP if command == "/help" else f"{command} is unknown; /help lists the commands.")
        else:
            turn = messages[:-1] if retried else [*messages, {"role": "user", "content": line}]
            try:
                ids, said = fit_prompt(tokenizer, turn, context_of(model.config), sampling.max_new_tokens)
                if said:
                    print(f"({said})", file=sys.stderr)
                streamer = TextStreamer(tokenizer, skip_special_tokens=True)
                with show_stats() as answers:
                    answers += answer_batch(model, tokenizer, [ids], sampling, sampling.seed + asked, streamer)
                messages = [*turn, {"role": "assistant", "content": answers[0].text}]
                asked += 1
            except UserError as error:
                print(error, file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(stopped; the message is not part of the conversation)")


def save(messages: Messages, file: str) -> str:
    """Adds the conversation to a file as one line; says what it did."""
    if not file:
        return "/save needs a file's name."
    try:
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"{file} cannot be written: {error.strerror}."
    return f"Saved to {file}."
