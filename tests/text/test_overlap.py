import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from fledge.text.overlap import exact_match, f1, rouge, translation

PAIRS = [
    ("The cat sat on the mat.", "A cat was sitting on the mat."),
    ("Tom lost his red ball in the park.", "Tom lost his red ball in the park."),
    ("She was happy.", "It rained all day and nobody came."),
    ("The moral of the story is to share.", ""),
    ("Yes.", "Yes"),
    ("Two cats jumped.", "A cat jumps."),
]


@pytest.mark.parametrize(("reference", "answer"), PAIRS)
def test_the_scores_are_those_of_the_libraries(reference, answer):
    direct = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, answer)
    assert rouge(reference, answer) == {name: direct[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")}

    bleu = sacrebleu.BLEU(effective_order=True).sentence_score(answer, [reference]).score
    chrf = sacrebleu.CHRF().sentence_score(answer, [reference]).score
    assert translation(reference, answer) == pytest.approx({"bleu": bleu / 100, "chrf": chrf / 100})


def test_rouge_by_hand():
    """Three of four words shared, one of three pairs, and two of them in order with "cat" and "sat" swapped."""
    scores = rouge("one cat sat down", "one sat cat up")
    assert scores == pytest.approx({"rouge1": 3 / 4, "rouge2": 0, "rougeL": 2 / 4})


@pytest.mark.parametrize(("reference", "answer"), [pair for pair in PAIRS if pair[1]])
def test_every_score_lies_between_0_and_1(reference, answer):
    scores = rouge(reference, answer) | translation(reference, answer) | {"f1": f1(reference, answer)}
    assert all(0 <= value <= 1 + 1e-9 for value in scores.values())


@pytest.mark.parametrize(
    ("reference", "answer", "exact", "shared"),
    [
        ("Lily.", "lily", 1, 1),
        ("The cat.", "A cat!", 1, 1),
        ("Tom and Anna.", "Tom", 0, 0.5),
        ("Tom and Anna.", "Anna and Tom.", 0, 1),
        ("the red ball", "a big red ball", 0, 0.8),
        ("go go go", "go", 0, 0.5),
        ("Yes.", "No.", 0, 0),
        ("Yes.", "", 0, 0),
        ("The", "a", 1, 1),
    ],
)
def test_exact_match_and_f1(reference, answer, exact, shared):
    assert exact_match(reference, answer) == exact
    assert f1(reference, answer) == pytest.approx(shared)
