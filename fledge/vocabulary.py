"""The rows a model keeps for its vocabulary: those of its embedding, and those of its output head."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Gives `model` a row for each token that only `tokenizer` has, and returns how many it added.

    A new row of the embedding, of an untied head and of the head's bias is the mean of the old ones, so that a new
    token starts as an average one: never far likelier than the rest, which a row near zero often is
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Rows that no token uses stay as they are.
    """
    old = model.get_input_embeddings().num_embeddings
    added = max(0, max(tokenizer.get_vocab().values()) + 1 - old)
    if added:
        model.resize_token_embeddings(old + added, mean_resizing=False)
        head = model.get_output_embeddings()
        with torch.no_grad():
            for rows in {model.get_input_embeddings().weight, head.weight, head.bias} - {None}:
                rows[old:] = rows[:old].mean(0)
    return added
