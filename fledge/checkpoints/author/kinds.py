"""What a constructor's arguments mean, by the words of their names, and the numbers that shapes propose for them.

Vocabulary, width, heads, layers and context have a hundred names.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

KINDS = {
    "vocabulary itself": r"^(vocab|vocabulary|stoi|itos|tokenizer|tok|chars|enc)$",
    "device": r"device",
    "dropout": r"drop|(^|_)p$|(^|_)rate$|prob",
    "padding": r"pad",
    "epsilon": r"(^|_)eps",
    "theta": r"theta|(^|_)base$",
    "flag": r"bias|(^|_)ti(e|ed|ying)|flash|causal|verbose|checkpointing|^(use|is)_",
    "activation": r"(^|_)act(ivation)?",
    "vocabulary": r"vocab|n_?tokens?$|num_tokens|token_size|n_?chars|num_embeddings|(char|alphabet|dict)\w*_(size|len)",
    "context": r"block_?size|context|ctx|max_?(seq|len|pos|tok|t$)|seq|position|window|length|^t$|chunk",
    "key heads": r"kv|groups?$",
    "head width": r"head_?(size|dim|width)|(size|dim|width)_?(per_)?head|^d_?[kqvh]$|d_head|d_key|key_dim",
    "heads": r"head|^h$",
    "layers": r"layer|block|depth|^n$|^l$|stack",
    "inner width": r"ff|inner|intermediate|mlp|feed|expan|mult|ratio|hidden_dim|fwd",
    "width": r"emb|dim|d_?model|hidden|width|channel|units|size|state|^c$|^d$",
}
"""What a name's words mean, in the order in which they are tried."""

SAME = {"activation": ("gelu", "relu", "silu"), "flag": (False, True), "epsilon": (1e-5, 1e-6, 1e-8)}
SAME |= {"device": ("cpu",), "dropout": (0.0,), "padding": (0,), "theta": (10_000.0,)}

HEADS = ("heads", "key heads")

LONG = 2048
"""The context length to try if no tensor shows it."""


def kind_of(name: str) -> str | None:
    """The kind (of `KINDS`) of an argument, a global or a config field by the words of its name, if they show it."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, words)), None)


class Vocabulary(dict):
    """A vocabulary of the right length, for code that only asks how many tokens there are."""

    def __init__(self, size: int):
        super().__init__({str(number): number for number in range(size)})
        self.vocab_size = self.n_vocab = size

    def get_vocab_size(self) -> int:
        return len(self)

    def __hash__(self) -> int:  # type: ignore[override]  # it never changes
        return len(self)

    def __repr__(self) -> str:
        return f"with {len(self)} tokens"


@dataclass
class Shapes:
    """Numbers that a checkpoint's tensors show, by kind, most likely first."""

    by_kind: dict[str, list]
    everything: list[int]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Shapes":
        matrices = {name: tuple(t.shape) for name, t in tensors.items() if t.dim() == 2}
        dims = sorted({dim for tensor in tensors.values() for dim in tensor.shape}, reverse=True)
        words = re.compile(r"pos|pe\b|wpe")
        tables = [s for n, s in matrices.items() if re.search("emb|tok|wte|vocab|lookup", n) and not words.search(n)]
        outer = Counter(s for n, s in matrices.items() if not re.search(r"(^|\.)\d+\.", n) and not words.search(n))
        tables += [shape for shape, _ in outer.most_common(1)]
        vocabulary, width = next(iter(tables), max(matrices.values(), default=(1, 1)))
        context = [dim for name, t in tensors.items() if words.search(name) for dim in t.shape if dim not in (1, width)]
        stacks: dict[str, int] = {}
        for name in tensors:
            for match in re.finditer(r"\.(\d+)(?=\.)", "." + name):
                stack = re.sub(r"\d+", "#", name[: match.start()])
                stacks[stack] = max(stacks.get(stack, 0), int(match[1]) + 1)
        layers = [count for stack, count in stacks.items() if "#" not in stack]
        inner = [count for stack, count in stacks.items() if "#" in stack]
        divisors = [n for n in range(1, width + 1) if width % n == 0 and width // n > 1]
        usual = sorted(divisors, key=lambda n: (width // n not in (64, 32, 128, 16), abs(width // n - 64)))
        wide = [dim for dim in dims if dim != vocabulary and dim > width]
        ratios = [dim // width for dim in wide if dim % width == 0]
        heads = [n for n in inner if n in divisors] + usual
        by_kind: dict[str, list] = {
            "vocabulary": [vocabulary], "width": [width], "context": context or [LONG], "layers": layers + inner,
            "heads": heads, "key heads": heads, "head width": [width // n for n in heads],
            "vocabulary itself": [Vocabulary(vocabulary), vocabulary],
            "inner width": [*sorted(wide, key=lambda dim: dim == 3 * width), *ratios],
        }  # fmt: skip
        return cls({kind: list(dict.fromkeys(values)) for kind, values in by_kind.items()}, dims)

    def propose(self, name: str) -> list:
        kind = kind_of(name) or ""
        return [*SAME.get(kind, ()), *self.by_kind.get(kind, ())]
