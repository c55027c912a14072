"""Overlap of an answer with a reference. Every value is in [0, 1].

ROUGE (Lin 2004) is rouge-score's F-measure with stemming; BLEU (Papineni et al. 2002) and chrF (Popović 2015) are
sacreBLEU's sentence scores; exact match and F1 are those of SQuAD (Rajpurkar et al. 2016): case, punctuation and
articles do not count.
"""

import re
import string
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


@cache
def _rouge_scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(reference: str, answer: str) -> dict[str, float]:
    """`rouge1`, `rouge2` and `rougeL`."""
    return {name: score.fmeasure for name, score in _rouge_scorer().score(reference, answer).items()}


def translation(reference: str, answer: str) -> dict[str, float]:
    """`bleu`, with a short answer's missing n-gram orders left out of the mean, and `chrf`."""
    import sacrebleu

    return {
        "bleu": min(1.0, sacrebleu.sentence_bleu(answer, [reference], use_effective_order=True).score / 100),
        "chrf": min(1.0, sacrebleu.sentence_chrf(answer, [reference]).score / 100),
    }


def plain(text: str) -> str:
    """A text as exact match sees it.

    >>> plain("The  cat, Tom!")
    'cat tom'
    """
    kept = "".join(c for c in text.lower() if c not in string.punctuation + "“”‘’…")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(reference: str, answer: str) -> float:
    return float(plain(reference) == plain(answer))


def f1(reference: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the answer's tokens; 1 when both have none."""
    wanted, given = Counter(plain(reference).split()), Counter(plain(answer).split())
    if not wanted or not given:
        return float(wanted == given)
    shared = (wanted & given).total()
    return 2 * shared / (wanted.total() + given.total())
