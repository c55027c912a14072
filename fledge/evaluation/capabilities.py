"""Answers to the fixed prompts of the task story_chat, printed one below the other."""

import sys
import textwrap

from fledge.encoding import encode_prompt
from fledge.errors import UserError
from fledge.generation.answers import answer_all
from fledge.models import load_model
from fledge.resizing import add_rows
from fledge.sampling import Sampling
from fledge.tasks.story_chat import CAPABILITIES
from fledge.terminal import has_colours


def show_capabilities(model: str, base: str | None, sampling: Sampling) -> None:
    """Prints the answers of a model, and of its `base` if that is given.

    Raises:
        UserError: the model has no chat template, or a model cannot be opened.
    """
    trained, tokenizer = load_model(model)
    if not tokenizer.chat_template:
        raise UserError(f"{model} has no chat template, so it takes no instructions; name a trained model.")
    models = {"instruct": trained}
    if base is not None:
        models = {"base": load_model(base)[0], **models}
        add_rows(models["base"], tokenizer)
    prompts = [encode_prompt(tokenizer, messages) for messages in CAPABILITIES.values()]
    answers = {
        who: answer_all(one, tokenizer, prompts, sampling, len(prompts), lambda done: None)
        for who, one in models.items()
    }
    bold, plain = ("\033[1m", "\033[0m") if has_colours(sys.stdout) else ("", "")
    for number, (name, messages) in enumerate(CAPABILITIES.items()):
        print(f"\n{bold}{name}{plain}\n{textwrap.indent(messages[-1]['content'], '  > ')}")
        for who, made in answers.items():
            ended = "" if made[number].stopped else " (did not stop)"
            print(f"  {who}: {textwrap.indent(made[number].text, '  ').strip()}{ended}")
