"""Shortens a prompt so that it fits the model's context."""

from collections import Counter

from transformers import PreTrainedTokenizerBase

from fledge.encoding import encode_prompt, fitting_words
from fledge.errors import UserError
from fledge.messages import INPUT_MARK, Messages
from fledge.reading.values import is_visible
from fledge.templates import contents
from fledge.tokenizers import encoding_of
from fledge.tokenizers.spelling import Spelling, named, unknown_id


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, context: int, max_new_tokens: int
) -> tuple[list[int], str]:
    """The ids of a prompt that leaves room for an answer, and a sentence about what was left out ("" if nothing was).

    A quarter of the context is reserved for the answer, or `max_new_tokens` if that is less. The oldest turns are
    dropped first; the text of the first question (after `INPUT_MARK`) moves to the oldest question that is left. Then
    the end of that text is cut, as in preparation. The question and the system message are never shortened.

    Raises:
        UserError: the question is empty, alone does not fit, or has a character that the tokenizer lacks.
    """
    if not is_visible(messages[-1]["content"]):
        raise UserError("The prompt is empty.")
    room = context - min(max_new_tokens, context // 4)
    kept, left_out = list(messages), []
    _check_spelling(tokenizer, contents(messages))
    with encoding_of("The prompt"):
        ids = encode_prompt(tokenizer, kept)
        turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
        for dropped, begin in enumerate(turns[1:], 1):
            if len(ids) <= room:
                break
            _, mark, text = messages[turns[0]]["content"].partition(INPUT_MARK)
            oldest = messages[begin]
            if mark and INPUT_MARK not in oldest["content"]:
                oldest = oldest | {"content": oldest["content"] + mark + text}
            kept = [*messages[: turns[0]], oldest, *messages[begin + 1 :]]
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
    said = (
        f"To fit the model's context of {context} tokens, {' and '.join(left_out)} were left out." if left_out else ""
    )
    return ids, with_unknown(said, tokenizer, ids)


def _check_spelling(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    if missing := Spelling(tokenizer).missing(text):
        raise UserError(f"The prompt has {named(Counter(missing))}, which the model's vocabulary lacks; leave it out.")


def with_unknown(said: str, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What was `said`, and that the model sees the token for unknown text, if it is in a prompt's `ids`."""
    if unknown_id(tokenizer) not in ids:
        return said
    return f"{said} The vocabulary lacks a part of the prompt, which the model sees as {tokenizer.unk_token}.".strip()


def fit_beginning(
    tokenizer: PreTrainedTokenizerBase, text: str, context: int, max_new_tokens: int
) -> tuple[list[int], str]:
    """The same for a base model, which has no template and continues a text: the beginning of the text is cut.

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
        return begin + ids, with_unknown("", tokenizer, ids)
    said = f"To fit the model's context of {context} tokens, the first {excess:,} of {len(ids):,} tokens were left out."
    return begin + ids[excess:], with_unknown(said, tokenizer, ids[excess:])
