"""Interactive generation in the terminal: the fields of a task, questions about a text, or a conversation."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from fledge.errors import UserError
from fledge.generation.answers import answer_batch
from fledge.generation.fitting import fit_prompt
from fledge.messages import INPUT_MARK, Answer, Messages
from fledge.models import context_of
from fledge.reading.files import decoded
from fledge.sampling import Sampling
from fledge.trained import Trained

COMMON = {
    "/retry": "another answer to the last prompt",
    "/save FILE": "add the prompt and its answer to FILE, or the whole conversation, as one line of JSON",
    "/help": "this text",
    "/quit": "leave (Ctrl-D does, too); Ctrl-C stops an answer or clears the line, twice it leaves",
}


def converse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trained: Trained | None,
    sampling: Sampling,
    show_stats: Callable[[], AbstractContextManager[list[Answer]]],
) -> None:
    """Reads lines from standard input until it ends or says /quit, and streams the answers.

    `trained` says what the model's task asks for. `show_stats` yields a list to collect the answers in, and may print
    statistics about them at its end.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  the keys of a terminal: history, arrows; Windows has them without it

    trained = trained or Trained("", asks_once=False, example=[])

    def answer(messages: Messages, seed: int) -> Answer:
        messages = [*trained.system, *messages]
        ids, said = fit_prompt(tokenizer, messages, context_of(model.config), sampling.max_new_tokens)
        if said:
            print(f"({said})", file=sys.stderr)
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        with show_stats() as answers:
            answers += answer_batch(model, tokenizer, [ids], sampling, sampling.seed + seed, streamer)
        return answers[0]

    session, is_leaving = Session(trained, answer), False
    print(session.greeting)
    while not session.is_over:
        try:
            line = input(session.prompt if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("" if is_leaving else "\n(Ctrl-C again leaves)")
            if is_leaving:
                return
            session.at, is_leaving = 0, True
            continue
        is_leaving = False
        try:
            session.take(line)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)")


@dataclass
class Session:
    """The state of a session. `answer` gets the messages without the system message, and the number of the answer.

    The fields of the task are asked for one by one; `at` is the index of the next. A task without fields has a
    conversation, or single prompts if it is single-turn. If the task is about a text, the text is asked for first.
    """

    trained: Trained
    answer: Callable[[Messages, int], Answer]
    at: int = 0
    asked: int = 0
    values: dict[str, str] = field(default_factory=dict)
    messages: Messages = field(default_factory=list)
    text: str | None = None
    is_over: bool = False

    @property
    def commands(self) -> dict[str, str]:
        """The commands and what they do."""
        own = {f"/{name} {'|'.join(labels)}": "the last prompt with this" for name, labels in self.classes.items()}
        if self.classes:
            own["/both"] = f"the last prompt with each {' and each '.join(self.classes)}"
        if self.trained.text:
            own[f"/{self.trained.text} FILE"] = f"another {self.trained.text}, from a file or typed here"
        if not self.trained.asks_once:
            own["/reset"] = "forget the conversation"
        return own | COMMON

    @property
    def classes(self) -> dict[str, list[str]]:
        """The fields that take one of a few labels."""
        return {name: labels for name, labels in self.trained.fields.items() if labels}

    @property
    def greeting(self) -> str:
        """The first line of a session: what to type, with an example."""
        fields = list(self.trained.fields)
        if fields:
            return f"Type {' and '.join(fields)}, or /help."
        if self.trained.text:
            return f"Name the file of a {self.trained.text} or type one; Enter goes without. Then ask, or /help."
        example = [message["content"] for message in self.trained.example if message["role"] == "user"]
        return "Write a message, or /help." + (f" For example: {json.dumps(example[-1])}" if example else "")

    @property
    def prompt(self) -> str:
        if self.trained.text and self.text is None:
            return f"{self.trained.text}> "
        if not self.trained.fields:
            return "> "
        name = list(self.trained.fields)[self.at]
        labels = self.trained.fields[name]
        return f"{name} ({', '.join(labels)}) [{self.values.get(name, labels[0])}]> " if labels else f"{name}> "

    def take(self, line: str) -> None:
        """Handles one line of input.

        Raises:
            UserError: the prompt does not fit the model, or a file cannot be read.
        """
        wants_text = self.trained.text and self.text is None
        if line.startswith("/") and not (wants_text and _is_file(line)):
            self._command(*line.partition(" ")[::2])
        elif wants_text:
            self._begin(line)
        elif self.trained.fields:
            self._fill(line)
        elif line:
            self._ask(line)

    def _command(self, command: str, argument: str) -> None:
        name, argument = command[1:], argument.strip()
        if command == "/quit":
            self.is_over = True
        elif command == "/help":
            width = max(map(len, self.commands)) + 2
            print("\n".join(f"{typed:<{width}}{does}" for typed, does in self.commands.items()))
        elif command == "/save":
            print(save([*self.trained.system, *self.messages], argument) if self.messages else "Nothing to save yet.")
        elif command == "/reset" and not self.trained.asks_once:
            self.messages, self.text = [], None
            print("Forgotten.")
        elif self.trained.text and name == self.trained.text:
            self._begin(argument)
        elif name in self.classes and argument not in self.classes[name]:
            print(f"{command} takes one of {', '.join(self.classes[name])}.")
        elif command == "/retry" or name in self.classes or (command == "/both" and self.classes):
            self._again(name, argument)
        else:
            print(f"{command} is unknown; /help lists the commands.")

    def _again(self, name: str, argument: str) -> None:
        """Answers the last prompt again: as it was, with another label, or with every label."""
        if not self.messages:
            print("There is no prompt yet to answer again.")
        elif name == "retry":
            self.asked += 1
            self._exchange(self.messages[:-1])
        elif name == "both":
            field_name, labels = next(iter(self.classes.items()))
            before = self.values
            for label in labels:
                print(f"--- {label}")
                self.values = before | {field_name: label}
                self._exchange(self._worded())
        else:
            self.values |= {name: argument}
            self._exchange(self._worded())

    def _begin(self, given: str) -> None:
        """Takes the text that questions are about, from a file or as typed; an empty line means no text."""
        self.text = "".join(decoded(Path(given), "\n")).strip() if _is_file(given) else given
        self.messages = []
        print(f"Ask about it, or /help ({len(self.text.split()):,} words)." if self.text else "Ask for something.")

    def _fill(self, line: str) -> None:
        """Takes the value of the next field; after the last one the prompt is complete."""
        names = list(self.trained.fields)
        name, labels = names[self.at], self.trained.fields[names[self.at]]
        if labels:
            line = line or self.values.get(name, labels[0])
            if line not in labels:
                print(f"{name} is one of {', '.join(labels)}.")
                return
        elif not line:
            return
        self.values[name] = " ".join(line.split())
        self.at = (self.at + 1) % len(names)
        if self.at == 0:
            self._exchange(self._worded())

    def _worded(self) -> Messages:
        return [{"role": "user", "content": self.trained.wording.format(**self.values)}]

    def _ask(self, line: str) -> None:
        before = [] if self.trained.asks_once else self.messages
        if self.text and not before:
            line += INPUT_MARK + self.text
        self._exchange([*before, {"role": "user", "content": line}])

    def _exchange(self, messages: Messages) -> None:
        made = self.answer(messages, self.asked)
        self.messages = [*messages, {"role": "assistant", "content": made.text}]
        if not self.trained.fields:
            self.asked += 1


def _is_file(given: str) -> bool:
    return os.path.isfile(given)  # noqa: PTH113  Path.is_file raises for a text that is longer than a name can be


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
