"""Caption metrics by hand, and what the tokenizer does."""

from __future__ import annotations

import math

import pytest

from imglish.evaluation.caption_metrics import bleu, caption_scores, cider_d, rouge_l
from imglish.evaluation.ngrams import NgramCounts
from imglish.evaluation.ptb import tokenized


def test_bleu_by_hand() -> None:
    corpus, [item] = bleu(NgramCounts.of(["the the the cat"], [["the cat sat", "a cat"]]))
    assert item.tolist() == corpus.tolist()
    assert corpus[0] == pytest.approx(2 / 4)  # "the" counts once, as in the best reference
    assert corpus[1] == pytest.approx(math.sqrt(2 / 4 * 1 / 3))
    short, _ = bleu(NgramCounts.of(["the cat"], [["the cat sat down there"]]))
    assert short[0] == pytest.approx(math.exp(1 - 5 / 2))
    tie, _ = bleu(NgramCounts.of(["a b c"], [["a b", "a b c d"]]))  # of two equally close lengths the shorter one
    assert tie[0] == pytest.approx(1)


def test_rouge_takes_the_best_of_each() -> None:
    assert rouge_l("a b c d", ["a x b", "a b c d e f g h"]) == pytest.approx(
        (1 + 1.44) * 1.0 * (2 / 3) / (2 / 3 + 1.44 * 1.0)
    )
    assert rouge_l("a", ["b"]) == 0
    assert rouge_l("a b a c a", ["a a a x"]) == pytest.approx((1 + 1.44) * 0.6 * 0.75 / (0.75 + 1.44 * 0.6))


def test_texts_without_words() -> None:
    """An empty caption or reference, and references shorter than n: what has no part in it is 0, nothing fails."""
    found = caption_scores(["", "a dog runs home", ""], [["a dog"], ["a cat"], [""]])
    assert found.items[0]["cider"] == found.items[2]["cider"] == 0
    assert found.items[0]["bleu4"] == 0
    assert found.items[1]["bleu1"] == pytest.approx(1 / 4)


def test_cider_by_hand() -> None:
    # "dog" occurs in both items' references: no weight; the pair of words is in one of them
    scores = cider_d(NgramCounts.of(["a dog", "a cat"], [["a dog"], ["the dog"]]))
    idf = math.log(2)
    unigram = idf**2 / idf**2  # "a", in one of two
    assert scores[0] == pytest.approx(10 * (unigram + 1) / 4)  # n = 1, 2 agree; 3, 4 do not exist
    assert scores[1] == 0
    assert cider_d(NgramCounts.of(["a dog"], [["a dog"]])).tolist() == [0]


def test_cider_punishes_length_by_gauss() -> None:
    references = [["a dog runs"], ["something else entirely"]]
    same = cider_d(NgramCounts.of(["a dog runs", "x"], references))[0]
    longer = cider_d(NgramCounts.of(["a dog runs a dog runs", "x"], references))[0]
    assert same == pytest.approx(7.5)
    assert longer < same * math.exp(-9 / 72) + 1e-9


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="1 captions, 2 lists"):
        caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="a reference for each"):
        caption_scores(["a"], [[]])


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ("A man's dog isn't here!", "a man 's dog is n't here"),
        ("They’re 3.5 miles (about) off, at 6:30 p.m.", "they 're 3.5 miles -lrb- about -rrb- off at 6:30 p.m."),
        ('a well-known "STOP" sign -- on Charlton St.', "a well-known stop sign on charlton st."),
        ("I cannot; 'tis black/white...", "i can not 't is black/white"),
        ("Two dogs.  One cat", "two dogs one cat"),
        ("", ""),
        ("...", ""),
        ("1,000 people & $5", "1,000 people & $ 5"),
        ("une fille à l'école", "une fille à l'école"),
    ],
)
def test_tokens(raw: str, tokens: str) -> None:
    assert tokenized(raw) == tokens
