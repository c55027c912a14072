"""Chat templates for programs other than transformers."""

import contextlib
import json
import re

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.encoding import prompt_text
from fledge.errors import UserError
from fledge.messages import Messages
from fledge.models import context_of

# The marks of answers for training; only transformers knows them.
GENERATION_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Placeholders for the contents of messages, to find them in a rendered template.
SYSTEM, FIRST, ANSWER, SECOND = "\ue000", "\ue001", "\ue002", "\ue003"


def served_template(tokenizer: PreTrainedTokenizerBase, system: Messages) -> str | None:
    """The chat template without the marks that only training needs and the white space that they trim.

    If the model was trained with a system message, `system`, the template adds it to conversations that have none.
    """
    template = tokenizer.chat_template
    if not template:
        return None
    template = re.sub(r"\s*(?=\{%-\s*(?:end)?generation)", "", template)
    template = re.sub(r"((?:end)?generation\s*-%\})\s*", r"\1", template)
    template = GENERATION_MARKS.sub("", template)
    if system:
        default = json.dumps(system, ensure_ascii=False)
        template = (
            "{%- if messages and messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = {default} + messages -%}}{{%- endif -%}}" + template
        )
    return template


def modelfile(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str, system: Messages) -> str:
    """Ollama's Modelfile for a GGUF `file`: the template in Go's language, the system message, and the decoding.

    Go's template cannot replace `INPUT_MARK`, so a text to work on reaches the model with the mark.
    """
    settings = model.generation_config
    greedy = not settings.do_sample
    parameters = {
        "num_ctx": context_of(model.config),
        "temperature": 0 if greedy else settings.temperature,
        "top_k": 0 if greedy else settings.top_k,
        "top_p": 1 if greedy else settings.top_p,
        "min_p": 0,
        "repeat_penalty": settings.repetition_penalty or 1.0,  # Ollama's default is another
    }
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template:
        lines.append(f'TEMPLATE """{go_template(tokenizer)}"""')
    lines += [f'SYSTEM """{message["content"]}"""' for message in system]
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items() if value is not None]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template in the language of Go's text/template, with the variables of Ollama.

    It is derived from rendered conversations: the text around the content of each message.
    """

    def written(*contents: str, asks: bool = False) -> str:
        roles = {SYSTEM: "system", FIRST: "user", ANSWER: "assistant", SECOND: "user"}
        messages = [{"role": roles[content], "content": content} for content in contents]
        return prompt_text(tokenizer, messages, asks)

    def after(before: str, text: str, content: str) -> str:
        """The text that follows `before` in `text`, with `content` replaced by a mark."""
        return text.removeprefix(before).replace(content, "{{ $m.Content }}")

    asked = written(FIRST)
    answered = written(FIRST, ANSWER)
    by_role = {}
    with contextlib.suppress(UserError):  # some templates take no system message
        by_role['eq $m.Role "system"'] = after("", written(SYSTEM), SYSTEM)
    by_role |= {
        'eq $m.Role "assistant"': after(asked, answered, ANSWER),
        "eq $i 0": after("", asked, FIRST),
        'eq $m.Role "user"': after(answered, written(FIRST, ANSWER, SECOND), SECOND),
    }
    cases = "{{ else ".join(f"if {test} }}}}{text}" for test, text in by_role.items())
    question = written(FIRST, asks=True).removeprefix(asked)
    return f"{{{{ range $i, $m := .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{question}"
