"""Resizes the vocabulary of a model: adds or removes rows of its embedding and its output head."""

import json
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fledge.errors import UserError
from fledge.models import embedding_of, head_of
from fledge.tokenizers.fast import characters_of_bytes, merges_of


def add_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Gives `model` a row for each token that only `tokenizer` has, and returns how many it added.

    New rows of the embedding, of an untied head and of the head's bias are the mean of the old rows, so that a new
    token is as likely as an average one. A row near zero is often far more likely than the rest
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Rows that no token uses do not change.
    """
    old = embedding_of(model).num_embeddings
    added = max(0, max(tokenizer.get_vocab().values()) + 1 - old)
    if added:
        model.resize_token_embeddings(old + added, mean_resizing=False)
        head = head_of(model)
        with torch.no_grad():
            for rows in {embedding_of(model).weight, head.weight, head.bias} - {None}:
                rows[old:] = rows[:old].mean(0)
    return added


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, used: Iterable[int]
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A BPE tokenizer with only the `used` tokens, and the old id of each of its tokens, in ascending order.

    It also keeps all 256 bytes, so that it can encode any text, added tokens, and the tokens that kept ones are merged
    from. A text of used tokens keeps its tokens: all merges that lead to them are kept in the old order, and the
    removed merges never applied to it.

    Raises:
        UserError: the tokenizer is no BPE that writes any text with its bytes.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    vocabulary = model["vocab"]
    # SentencePiece writes a space as "▁", and characters without a token as their bytes.
    falls_back = model["type"] == "BPE" and model["byte_fallback"]
    all_bytes = {"▁", *(f"<0x{byte:02X}>" for byte in range(256))} if falls_back else characters_of_bytes().keys()
    if model["type"] != "BPE" or not all_bytes <= vocabulary.keys():
        raise UserError("The tokenizer is no BPE with a token for each of the 256 bytes; no other kind can be trimmed.")
    merges = merges_of(model)
    parts_of: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        parts_of.setdefault(left + right, []).append((left, right))
    name_of = {i: token for token, i in vocabulary.items()}
    added = {token["id"] for token in description["added_tokens"]}
    kept = {*all_bytes, *([model["unk_token"]] if model["unk_token"] else [])}
    waiting = [name_of[i] for i in used if i in name_of]
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting += [part for pair in parts_of.get(token, ()) for part in pair]

    old_ids = sorted(added | {vocabulary[token] for token in kept})
    new_id = {old: new for new, old in enumerate(old_ids)}
    model["vocab"] = {token: new_id[i] for token, i in vocabulary.items() if i in new_id}
    model["merges"] = [[left, right] for left, right in merges if {left, right, left + right} <= model["vocab"].keys()]
    for token in description["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber(description["post_processor"], new_id)
    roles = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        **{role: token for role, token in roles.items() if token is not None},
    )
    return trimmed, old_ids


def _renumber(processor: dict | None, new_id: dict[int, int]) -> None:
    """Renumbers the ids that a post-processor of the tokenizers library adds around a text."""
    for part in (processor or {}).get("processors", [processor] if processor else []):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new_id[i] for i in token["ids"]]
        for role in ("sep", "cls"):
            if role in part:
                part[role][1] = new_id[part[role][1]]


def keep_rows(model: PreTrainedModel, old_ids: list[int]) -> None:
    """Keeps only the rows `old_ids` of the embedding and the head of `model`, tied or not, in this order."""
    embedding, head = embedding_of(model), head_of(model)
    is_tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight.detach()[old_ids].clone())
    head.weight = embedding.weight if is_tied else nn.Parameter(head.weight.detach()[old_ids].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[old_ids].clone())
    embedding.num_embeddings = head.out_features = model.config.vocab_size = len(old_ids)
    embedding.padding_idx = None
    new_id = {old: new for new, old in enumerate(old_ids)}
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            old = getattr(config, name)
            new = [new_id[i] for i in old if i in new_id] if isinstance(old, list) else new_id.get(old)
            setattr(config, name, new)


@torch.no_grad()
def compare_trimmed(
    before: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    after: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    old_ids: list[int],
    texts: list[str],
) -> dict[str, float]:
    """Compares the bits per byte of `texts`, each of which must fit the context, before and after trimming.

    If a text keeps its tokens, a probability p becomes p / (1 − r), where r is the probability of the removed tokens.
    `removed` is the mean of r, and `largest_error` the largest deviation of a log-probability from this.
    """
    rows, is_same = torch.tensor(old_ids), []
    nats, tokens, removed, largest_error = [0.0, 0.0], [0, 0], [], 0.0
    for text in texts:
        scored = []
        for model, tokenizer in (before, after):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids = torch.tensor([([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]) + ids])
            log_probs = F.log_softmax(model(ids[:, :-1]).logits[0].double(), -1)
            scored.append((ids[0], log_probs))
        for which, (ids, log_probs) in enumerate(scored):
            nats[which] -= log_probs.gather(1, ids[1:, None]).sum().item()
            tokens[which] += len(ids) - 1
        (old, of_old), (new, of_new) = scored
        is_same.append(torch.equal(rows[new], old))
        if is_same[-1]:
            kept = of_old[:, rows].logsumexp(-1)
            removed += (1 - kept.exp()).tolist()
            largest_error = max(largest_error, (of_old[:, rows] - kept[:, None] - of_new).abs().max().item())
    size = sum(len(text.encode()) for text in texts)
    return {
        "texts": len(texts),
        "same_tokens": sum(is_same) / len(texts),
        "bits_per_byte_before": nats[0] / math.log(2) / size,
        "bits_per_byte_after": nats[1] / math.log(2) / size,
        "bytes_per_token_before": size / tokens[0],
        "bytes_per_token_after": size / tokens[1],
        "removed": sum(removed) / max(1, len(removed)),
        "largest_removed": max(removed, default=0.0),
        "largest_error": largest_error,
    }
