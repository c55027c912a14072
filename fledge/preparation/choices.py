"""What the keys of prepare_dataset.py mean for a task and a model."""

from transformers import PreTrainedTokenizerBase

from fledge.cli import read_json
from fledge.encoding import condition_of
from fledge.errors import UserError
from fledge.hub import find_tokenizer
from fledge.models import CONTEXTS
from fledge.tasks import Task

NOT_KNOWN = 10**30  # tokens; transformers writes int(1e30) for a context length that it does not know


def check_conditions(only: list[str], task: Task) -> None:
    """Checks `--only` against the task's columns and their labels.

    Raises:
        UserError: a condition is not COLUMN=VALUE, or no row of the task can meet it.
    """
    for condition in only:
        column, value = condition_of(condition, task.columns, f"{task.name} has the columns")
        if column in task.classes and value not in task.classes[column]:
            raise UserError(f"No row can meet --only {condition}; {column} is {', '.join(task.classes[column])}.")


def choose_length(model: str, max_length: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """The maximum length of a row in tokens. Sets `model_max_length` of the tokenizer to the model's context length.

    Args:
        model: what --tokenizer names, whose config says how long the context is.
        max_length: what --max_length says.
        tokenizer: the tokenizer, opened.

    Raises:
        UserError: `max_length` exceeds the context length, or neither is known.
    """
    config = find_tokenizer(model) / "config.json"
    settings = read_json(config, "convert_checkpoint.py") if config.exists() else {}
    of_model = next((settings[key] for key in CONTEXTS if settings.get(key)), NOT_KNOWN)
    context = min(of_model, tokenizer.model_max_length)
    if context >= NOT_KNOWN:
        if max_length is None:
            raise UserError(
                f"--tokenizer {model} does not say how many tokens the model sees at once; name the folder of the "
                "model, or give --max_length."
            )
        context = max_length
    chosen = max_length or context
    if chosen > context:
        raise UserError(f"--max_length {chosen} is outside 1 to {context}, the model's context.")
    tokenizer.model_max_length = context
    return chosen
