"""Answers -> scores, each against cases worked out by hand and another way to compute it; and their intervals."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qft.documents.evaluation import Score
from qft.errors import DataError, RecipeError
from qft.measure.scores import SCORES, Answer, score, score_change
from qft.measure.statistics import bootstrap_interval, change_interval, interval, mean_of
from qft.plan.packages import missing_packages

LABELS = ("cat", "dog", "bird", "ant")


@pytest.fixture
def eval_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages that some scores need. A thousand F1 of scikit-learn take seconds; a hundred show the same."""
    pytest.importorskip("sklearn")
    pytest.importorskip("rouge_score")
    for drawing in (interval, change_interval):
        monkeypatch.setattr(drawing, "__kwdefaults__", {"resamples": 100})


def answers(*texts: tuple[str, str]) -> list[Answer]:
    return [
        Answer(source=0, row=row, prompt="?", expected=expected, given=given)
        for row, (expected, given) in enumerate(texts)
    ]


def value(name: str, *texts: tuple[str, str], pattern: str | None = None) -> float:
    return score(name, answers(*texts), pattern=pattern).value


def labelled(rows: int, right: float, seed: int) -> list[Answer]:
    """Answers to rows of four labels, of which about the share `right` is right."""
    draw = np.random.default_rng(seed)
    expected = draw.choice(LABELS, rows, p=(0.5, 0.3, 0.15, 0.05))
    given = np.where(draw.random(rows) < right, expected, draw.choice((*LABELS, "no idea"), rows))
    return answers(*zip(expected.tolist(), given.tolist(), strict=True))


# -------------------------------------------------------------------------------------------------- text against text

SAME: dict[str, tuple[str, str, float, float]] = {
    "the same": ("Paris", "Paris", 1, 1),
    "outer white space": ("Paris", "\n Paris ", 1, 1),
    "another case": ("Paris", "PARIS", 0, 1),
    "another case, where lower() does not do": ("Straße", "STRASSE", 0, 1),
    "white space within": ("New York", "New \n York", 0, 1),
    "no white space": ("New York", "NewYork", 0, 0),
    "more": ("Paris", "Paris.", 0, 0),
    "nothing": ("Paris", "", 0, 0),
    "both nothing": ("", " ", 1, 1),
    "another script": ("Αθήνα", "ΑΘΉΝΑ", 0, 1),
}


@pytest.mark.parametrize(("expected", "given", "exact", "accuracy"), SAME.values(), ids=SAME)
def test_exact_match_and_accuracy_of_a_row(expected: str, given: str, exact: float, accuracy: float) -> None:
    assert value("exact_match", (expected, given)) == exact
    assert value("accuracy", (expected, given)) == accuracy


def test_a_score_of_rows_is_their_mean_and_the_one_that_training_shows() -> None:
    found = answers(("a", "a"), ("b", "b "), ("c", "x"))
    assert score("exact_match", found).value == pytest.approx(2 / 3)


def test_regex_is_the_share_of_answers_with_the_pattern_anywhere() -> None:
    texts = (("", "the answer: 42"), ("", "42"), ("42", "forty-two"), ("", "ответ 7"))
    assert value("regex", *texts, pattern=r"\d+$") == 0.75
    assert value("regex", *texts, pattern=r"^\d+$") == 0.25
    assert value("regex", *texts, pattern=r"от\w+") == 0.25
    with pytest.raises(RecipeError, match="regex needs a pattern"):
        value("regex", *texts)


# --------------------------------------------------------------------------------------------------------- labels: f1


def test_f1_by_hand(eval_extra: None) -> None:
    # cat: 2 right, 1 missed, 1 too many -> 4/6. dog: 1 right, 1 too many, 1 missed -> 2/4. "cow", given once -> 0.
    texts = (("cat", "cat"), ("cat", " cat\n"), ("cat", "dog"), ("dog", "cat"), ("dog", "dog"), ("dog", "cow"))
    assert value("f1_macro", *texts) == pytest.approx((2 / 3 + 2 * 1 / (2 * 1 + 1 + 2) + 0) / 3)
    assert value("f1_micro", *texts) == pytest.approx(3 / 6)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_of_any_rows_is_that_of_the_counts(average: str, eval_extra: None) -> None:
    texts = [(answer.expected, answer.given) for answer in labelled(60, 0.6, seed=1)]
    statistic = SCORES[f"f1_{average}"](texts, None)
    for rows in (np.arange(60), np.array([3, 3, 3, 7, 50]), np.random.default_rng(2).integers(60, size=60)):
        assert statistic(rows) == pytest.approx(counted_f1([texts[row] for row in rows], average))


def counted_f1(texts: Sequence[tuple[str, str]], average: str) -> float:
    """F1 from right, missed and wrongly given ones, counted one label after the other."""
    counts = [
        (
            sum(expected == given == label for expected, given in texts),
            sum((expected == label) + (given == label) for expected, given in texts),
        )
        for label in sorted({text for pair in texts for text in pair})
    ]
    if average == "micro":
        return 2 * sum(right for right, _ in counts) / sum(both for _, both in counts)
    return sum(2 * right / both for right, both in counts) / len(counts)


def test_f1_is_scikit_learns_own_of_the_texts(eval_extra: None) -> None:
    from sklearn.metrics import f1_score

    found = labelled(200, 0.7, seed=3)
    expected, given = [answer.expected for answer in found], [answer.given for answer in found]
    for average in ("macro", "micro"):
        own = f1_score(expected, given, average=average, zero_division=0)
        assert score(f"f1_{average}", found).value == pytest.approx(own)


def test_a_label_that_a_resample_lacks_costs_nothing(eval_extra: None) -> None:
    rare = answers(("ant", "ant"), *[("cat", "cat")] * 20)
    assert score("f1_macro", rare) == (1, 1, 1)


@pytest.mark.filterwarnings("error")
def test_f1_of_free_text_warns_of_nothing(eval_extra: None) -> None:
    assert value("f1_macro", *[(f"word {i}", f"other {i}") for i in range(40)]) == 0


# --------------------------------------------------------------------------------------------------------------- json

VALID = {
    "an object": ('{"a": 1}', 1),
    "an array, white space about it": (" [1, 2]\n", 1),
    "nothing in it": ("{}", 1),
    "not ASCII": ('{"имя": "Ж"}', 1),
    "a string": ('"a"', 0),
    "a number": ("7", 0),
    "null": ("null", 0),
    "nothing": ("", 0),
    "more after it": ('{"a": 1} so be it', 0),
    "two of them": ("{} {}", 0),
    "fenced": ('```json\n{"a": 1}\n```', 0),
    "cut short": ('{"a": 1', 0),
    "Python's NaN": ('{"a": NaN}', 0),
    "Python's quotes": ("{'a': 1}", 0),
    "deeper than a parser goes": ("[" * 200_000, 0),
}


@pytest.mark.parametrize(("given", "valid"), VALID.values(), ids=VALID)
def test_json_valid_asks_for_one_object_or_array(given: str, valid: float) -> None:
    assert value("json_valid", ("does not matter", given)) == valid


FIELDS: dict[str, tuple[str, str, float]] = {
    "the same in another order": ('{"a": 1, "b": [2, 3]}', '{"b": [2, 3], "a": 1}', 1),
    "one value wrong": ('{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2, "c": 4}', 4 / 6),
    "one missing": ('{"a": 1, "b": 2}', '{"a": 1}', 2 / 3),
    "one too many": ('{"a": 1}', '{"a": 1, "b": 2}', 2 / 3),
    "nested, one level up": ('{"a": {"b": 1}}', '{"b": 1}', 0),
    "nested, one wrong": ('{"a": {"b": 1, "c": "x"}}', '{"a": {"b": 1, "c": "y"}}', 2 / 4),
    "a list shifted": ("[1, 2, 3]", "[2, 3]", 0),
    "a list cut": ("[1, 2, 3]", "[1, 2]", 4 / 5),
    "1 and 1.0": ('{"a": 1, "b": 2.50}', '{"a": 1.0, "b": 2.5}', 1),
    "1 and true": ('{"a": 1}', '{"a": true}', 0),
    "0 and false": ('{"a": false}', '{"a": 0}', 0),
    "1 and its digits": ('{"a": 1}', '{"a": "1"}', 0),
    "null and its name": ('{"a": null}', '{"a": "null"}', 0),
    "a key that looks like an index": ('{"a": {"0": 1}}', '{"a": [1]}', 0),
    "an empty list and an empty object": ('{"a": []}', '{"a": {}}', 0),
    "an empty list and null": ('{"a": []}', '{"a": null}', 0),
    "empty lists": ('{"a": [], "b": 1}', '{"a": [], "b": 2}', 2 / 4),
    "both empty": ("{}", "{}", 1),
    "empty, and something": ("{}", '{"a": 1}', 0),
    "a key twice, found once": ('{"a": 1, "a": 1}', '{"a": 1}', 2 / 3),
    "a key twice, with two values": ('{"a": 1, "a": 2}', '{"a": 2, "a": 1}', 1),
    "a key twice where once is right": ('{"a": 1}', '{"a": 1, "a": 1}', 2 / 3),
    "a key with a dot": ('{"a.b": 1}', '{"a": {"b": 1}}', 0),
    "not ASCII, and escaped": ('{"имя": "Ж"}', '{"\\u0438мя": "\\u0416"}', 1),
    "not JSON": ('{"a": 1}', "a is 1", 0),
    "a bare value": ('{"a": 1}', "1", 0),
}


@pytest.mark.parametrize(("expected", "given", "f1"), FIELDS.values(), ids=FIELDS)
def test_json_f1_of_a_row(expected: str, given: str, f1: float) -> None:
    assert value("json_f1", (expected, given)) == pytest.approx(f1)


def test_json_f1_of_deep_json_does_not_end_in_a_traceback() -> None:
    deep = "[" * 400 + "1" + "]" * 400
    assert value("json_f1", (deep, deep)) == 1
    assert value("json_f1", (deep, deep.replace("1", "2"))) == 0


def test_json_f1_is_the_mean_over_the_rows_that_expect_json() -> None:
    rows = (('{"a": 1}', '{"a": 1}'), ('{"a": 1}', "{"), ("plain text", '{"a": 1}'))
    assert value("json_f1", *rows) == 0.5


@pytest.mark.parametrize("given", ['{"a": 1}', "1"])
def test_json_f1_without_a_row_that_expects_json_is_an_error(given: str) -> None:
    with pytest.raises(DataError, match=r"eval\.metrics: json_f1 needs rows whose .* JSON object or array"):
        value("json_f1", ("1", given), ("plain text", given))


# -------------------------------------------------------------------------------------------------------------- rouge


def rouge_l(expected: Sequence[str], given: Sequence[str]) -> float:
    """F-measure of the longest of all subsequences of the given words that the expected ones have too."""
    longest = max(
        size
        for size in range(len(given) + 1)
        for part in itertools.combinations(given, size)
        if is_subsequence(part, expected)
    )
    return 2 * longest / (len(expected) + len(given))


def is_subsequence(part: Sequence[str], whole: Sequence[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


def test_rouge_l_by_hand(eval_extra: None) -> None:
    # the, cat, mat of 4 and 5 words
    assert value("rouge_l", ("The cat, the mat!", "the black cat sat mat")) == pytest.approx(2 * 3 / (4 + 5))


def test_rouge_l_is_that_of_every_subsequence_tried(eval_extra: None) -> None:
    draw = np.random.default_rng(4)
    for _ in range(40):
        expected = draw.choice(["один", "два", "три", "vier"], draw.integers(1, 9)).tolist()
        given = draw.choice(["один", "два", "три", "vier"], draw.integers(0, 9)).tolist()
        own = value("rouge_l", (" ".join(expected), " ".join(given)))
        assert own == pytest.approx(rouge_l(expected, given))


def test_rouge_l_of_english_is_that_of_the_librarys_own_tokenizer(eval_extra: None) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected, given = "Don't panic: the 2nd towel is BLUE.", "the second towel isn't blue, don't panic"
    own = RougeScorer(["rougeL"], use_stemmer=False).score(expected, given)["rougeL"].fmeasure
    assert value("rouge_l", (expected, given)) == pytest.approx(own)


WORDS: dict[str, tuple[str, str, float]] = {
    "Cyrillic, in another case": ("Кошка сидит дома", "КОШКА дома", 2 * 2 / 5),
    "Greek, its final sigma": ("ΟΔΟΣ", "οδος", 1),
    "Arabic": ("القط على السجادة", "القط السجادة", 2 * 2 / 5),
    "Hindi, apart by a vowel sign": ("की", "का", 0),
    "Hindi": ("हिन्दी भाषा", "हिन्दी", 2 * 1 / 3),
    "Chinese, by the character": ("猫坐在垫子上", "猫坐在椅子上。", 2 * 5 / 12),
    "Chinese after Latin": ("GPU很快", "gpu慢", 2 * 1 / 5),
    "an accent in one character or two": ("caf\u00e9", "cafe\u0301", 1),
    "no word given": ("Кошка", "?!", 0),
    "underscore": ("a_b", "a b", 0),
}


@pytest.mark.parametrize(("expected", "given", "f1"), WORDS.values(), ids=WORDS)
def test_rouge_l_has_words_of_any_script(expected: str, given: str, f1: float, eval_extra: None) -> None:
    assert value("rouge_l", (expected, given)) == pytest.approx(f1)


def test_rouge_l_leaves_out_rows_without_an_expected_word(eval_extra: None) -> None:
    assert value("rouge_l", ("ja", "ja"), ("!", "!")) == 1
    with pytest.raises(DataError, match=r"rouge_l needs rows whose .* a word"):
        value("rouge_l", ("!", "!"))


# ----------------------------------------------------------------------------------------------------- scores, as such


@pytest.mark.parametrize("name", SCORES)
def test_every_score_has_its_interval(name: str, eval_extra: None) -> None:
    right, wrong = '{"a": 1, "b": 2}', '{"a": 1, "b": 3'
    found = score(name, answers(*[(right, right)] * 15, *[(right, wrong)] * 15), pattern="2")
    assert 0 <= found.low < found.value < found.high <= 1
    assert Score(**found._asdict()).value == found.value
    assert score(name, answers((right, right)), pattern="2") == (1, 1, 1)


@pytest.mark.parametrize("name", SCORES)
def test_no_answers_are_an_error(name: str, eval_extra: None) -> None:
    with pytest.raises(DataError, match=rf"eval\.metrics: {name} needs rows"):
        score(name, [], pattern="2")


@pytest.mark.parametrize("name", ["exact_match", "f1_macro"])
def test_a_change_is_the_difference_and_is_surer_paired(name: str, eval_extra: None) -> None:
    reference = labelled(120, 0.7, seed=5)
    better = [
        Answer(**vars(answer) | {"given": answer.expected}) if answer.row % 10 == 0 else answer for answer in reference
    ]
    own, other, change = score(name, better), score(name, reference), score_change(name, better, reference)
    assert change.value == pytest.approx(own.value - other.value)
    assert change.value > 0
    # Independent figures: the variance of a difference is the sum of both.
    unpaired = np.hypot(own.high - own.low, other.high - other.low)
    assert change.high - change.low < unpaired / 2


def test_a_change_from_itself_is_none_at_all() -> None:
    found = labelled(30, 0.5, seed=6)
    assert score_change("exact_match", found, found) == (0, 0, 0)


def test_a_change_needs_answers_to_the_same_rows() -> None:
    found = answers(("a", "a"), ("b", "b"))
    for other in (found[:1], found[::-1]):
        with pytest.raises(ValueError, match="the same rows"):
            score_change("exact_match", found, other)


def test_a_change_of_json_is_over_the_rows_that_expect_json() -> None:
    rows = ("text", '{"a": 1}', '{"a": 1}')
    good = answers(*[(row, row) for row in rows])
    bad = answers(*[(row, "no") for row in rows])
    assert score_change("json_f1", good, bad) == (1, 1, 1)


def test_the_seed_alone_decides_the_interval() -> None:
    found = labelled(97, 0.5, seed=7)
    assert score("accuracy", found, seed=1) == score("accuracy", found, seed=1)
    assert score("accuracy", found, seed=1)[1:] != score("accuracy", found, seed=2)[1:]


def test_a_package_that_is_not_there_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(missing_packages(["exact_match", "f1_macro", "json_f1", "rouge_l"])) == [
        ("eval.metrics", "f1_macro needs scikit-learn; pip install 'qft[eval]'"),
        ("eval.metrics", "rouge_l needs rouge-score; pip install 'qft[eval]'"),
    ]
    message = "eval.metrics: f1_micro needs scikit-learn; pip install 'qft[eval]'"
    with pytest.raises(RecipeError, match=re.escape(message)):
        value("f1_micro", ("a", "a"))
    assert value("exact_match", ("a", "a")) == 1


def test_no_package_is_missing_where_all_are_there(eval_extra: None) -> None:
    assert list(missing_packages(SCORES)) == []


# ---------------------------------------------------------------------------------------------------------- intervals


def test_the_interval_is_that_of_all_resamples_there_are() -> None:
    values = [0.0, 1.13, 2.71, 4.37, 5.29, 9.61]
    means = np.array([sum(drawn) / 6 for drawn in itertools.product(values, repeat=6)])
    low, high = bootstrap_interval(mean_of(values), 6, seed=0, resamples=10_000)
    assert np.mean(means < low) == pytest.approx(0.025, abs=0.005)
    assert np.mean(means > high) == pytest.approx(0.025, abs=0.005)


def test_the_interval_of_many_rows_is_the_normal_one() -> None:
    values = np.random.default_rng(8).exponential(3, 10_000)
    found = interval(mean_of(values), len(values), seed=0)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    draw = np.random.default_rng(9)
    held = 0
    for seed in range(300):
        low, high = bootstrap_interval(mean_of((draw.random(60) < 0.7).astype(float)), 60, seed=seed, resamples=500)
        held += low <= 0.7 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_intervals_are_of_any_statistic() -> None:
    values = np.arange(101.0)
    found = interval(lambda rows: np.median(values[rows], axis=-1), 101, seed=0)
    assert found.value == 50
    assert 30 < found.low < 50 < found.high < 70


def test_a_paired_interval_is_narrower_where_figures_go_together() -> None:
    draw = np.random.default_rng(10)
    hard = draw.normal(0, 5, 200)
    own, other = hard + draw.normal(1, 0.5, 200), hard + draw.normal(0, 0.5, 200)
    paired = change_interval(mean_of(own), mean_of(other), 200, seed=0)
    alone = [interval(mean_of(values), 200, seed=0) for values in (own, other)]
    assert paired.value == pytest.approx(own.mean() - other.mean())
    assert 0 < paired.low < paired.value < paired.high
    assert paired.high - paired.low < 0.2 * min(each.high - each.low for each in alone)


def test_one_row_leaves_no_doubt_and_none_is_an_error() -> None:
    assert interval(mean_of([0.3]), 1, seed=0) == (0.3, 0.3, 0.3)
    for of_none in (bootstrap_interval, interval):
        with pytest.raises(ValueError, match="at least one row"):
            of_none(mean_of([]), 0, seed=0)


def test_figures_are_plain_numbers_that_a_report_can_hold() -> None:
    found: Any = interval(mean_of(np.array([1, 2], dtype=np.float32)), 2, seed=0)
    assert [type(part) for part in found] == [float, float, float]
    assert json.loads(json.dumps(found._asdict()))["value"] == 1.5
