"""The scorer gives the official scripts' numbers, and its statistics are those of the textbooks."""

import json
import random
import re
from pathlib import Path

import avqa
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from eval_mmau import title_of

from aqa.audio.reader import AudioReader
from aqa.data.prompts import choices_in
from aqa.evaluation import asking
from aqa.evaluation.answers import extract_answer
from aqa.evaluation.benchmarks import ADQA, MMAR, MMAU, MMAU_PRO, MMSU
from aqa.evaluation.items import EvalError, make_items, read_rows, result_rows, write_rows
from aqa.evaluation.scoring import (
    Said,
    compare,
    comparison_table,
    find_collapsed,
    judge,
    judge_file,
    mcnemar_p,
    paired,
    score,
    score_table,
    wilson_interval,
)
from aqa.evaluation.variants import ask_again, describe_orders, further_answers
from aqa.rewards.choices import is_right, rotated

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


# ------------------------------------------------------------------------------------------------------------- the rule
def stated_rule(answer: str, prediction: str, choices: list[str]) -> bool:
    """The rule as ``shared/data/README.md`` states it, word by word instead of by sets."""

    def tokens(text: str) -> list[str]:
        return re.findall(r"\b\w+\b", text.lower())

    predicted = tokens(prediction)
    for word in tokens(answer):
        if word not in predicted:
            return False
    for word in predicted:
        if word not in tokens(answer) and any(word in tokens(choice) for choice in choices):
            return False
    return len(predicted) > 0


def stated_totals(rows: list[dict], key: str, fields: tuple[str, ...]) -> dict:
    """Counts of right and of all, as the official scripts keep them: rows without the key are passed over."""
    counts = {"overall": [0, 0]}
    for row in rows:
        if key in row:
            right = stated_rule(row["answer"], row[key], row["choices"])
            for name in ["overall", *((field, row[field]) for field in fields if row.get(field) is not None)]:
                counts.setdefault(name, [0, 0])
                counts[name][0] += right
                counts[name][1] += 1
    return counts


VOCABULARY = [
    "",
    *["dog", "Dog", "a", "the", "big", "cat", "CAT", "don't", "x_y", "Ärger", "İ", "ß", "犬", "3", "3.5", "-", "é"],
]


def random_text(rng: random.Random) -> str:
    return rng.choice([" ", ", ", "-", "\n"]).join(rng.choices(VOCABULARY, k=rng.choice((0, 1, 1, 2, 3))))


def random_result(rng: random.Random, benchmark) -> list[dict]:
    """A result file of 1 to 12 rows, at least one of them with a prediction."""
    rows = []
    for i in range(rng.randint(1, 12)):
        choices = [random_text(rng) for _ in range(rng.randint(1, 5))]
        answer = rng.choice([*choices, random_text(rng)])
        if not rows:  # a file without any real answer is refused
            choices[0] = answer = "dog"
        prediction = rng.choice([answer, answer.upper(), f"it is {answer}", "", random_text(rng), " ".join(choices)])
        row = {"id": i, "choices": choices, "answer": answer}
        for field in benchmark.breakdowns:
            row[field] = rng.choice(["sound", "music", "speech"])
        if rng.random() < 0.2:
            row[benchmark.breakdowns[2]] = None
        if rng.random() < 0.9 or not rows:
            row[benchmark.prediction_keys[0]] = prediction
        rows.append(row)
    return rows


@pytest.mark.parametrize("benchmark", [MMAU, MMAR], ids=lambda b: b.name)
def test_scores_equal_the_stated_rule_on_random_result_files(benchmark):
    rng = random.Random(0)
    shares = []
    for _ in range(2000):
        rows = random_result(rng, benchmark)
        scores = score(judge(rows, benchmark))
        expected = stated_totals(rows, benchmark.prediction_keys[0], benchmark.breakdowns)
        got = {"overall": [scores["correct"], scores["total"]]}
        for field, values in scores["by"].items():
            got |= {(field, value): [entry["correct"], entry["total"]] for value, entry in values.items()}
        assert got == expected
        assert scores["accuracy"] == expected["overall"][0] / expected["overall"][1]
        assert scores["without_prediction"] == len(rows) - expected["overall"][1]
        shares.append(scores["accuracy"])
    assert 0.2 < sum(shares) / len(shares) < 0.8  # both verdicts occur often


RULE = [
    ("Woman", "Woman", True, "the text itself"),
    ("Woman", "it is a WOMAN.", True, "case, punctuation and more words do not matter"),
    ("Woman", "woman or man", False, "a word of another choice does"),
    ("Woman", "wo man", False, "words are compared whole"),
    ("a dog", "dog", False, "every word of the answer is needed"),
    ("a dog", "a dog and a cat", False, "'cat' is another choice's"),
    ("a dog", "dog a", True, "order is not"),
    ("a dog", "a dog a horse", True, "'horse' is in no choice"),
    ("a dog", "", False, "nothing said"),
    ("a dog", "!?", False, "no word said"),
    ("?", "", False, "even where the answer has no word"),
    ("?", "horse", True, "then any word that no choice has is right"),
]


@pytest.mark.parametrize(("answer", "prediction", "expected", "why"), RULE, ids=[row[3] for row in RULE])
def test_rule(answer, prediction, expected, why):
    choices = ["Woman", "Man"] if answer == "Woman" else ["a dog", "a cat", answer]
    assert is_right(prediction, answer, choices) is expected, why


@pytest.mark.parametrize(
    ("name", "benchmark"), [("mmau/mmau-test-mini.json", MMAU), ("mmar/MMAR-meta.jsonl", MMAR)], ids=["mmau", "mmar"]
)
def test_real_gold_answers(name, benchmark, tmp_path):
    """Gold answers score 1000 of 1000; MMAU's letters and "(B) text" as the README of the data measured them."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]

    def scored(predict):
        out = tmp_path / Path(name).name
        results = [{**row, benchmark.prediction_keys[0]: predict(row)} for row in rows]
        lines = json.dumps(results) if name.endswith(".json") else "\n".join(map(json.dumps, results))
        out.write_text(lines, encoding="utf-8")
        return score(judge_file(out))

    def letter(row):
        return "ABCDEFGH"[row["choices"].index(row["answer"])]

    gold = scored(lambda row: row["answer"])
    assert (gold["benchmark"], gold["correct"], gold["total"]) == (benchmark.name, 1000, 1000)
    assert sum(entry["total"] for entry in gold["by"][benchmark.breakdowns[0]].values()) == 1000
    if benchmark is MMAU:
        assert scored(letter)["correct"] <= 3
        assert scored(lambda row: f"({letter(row)}) {row['answer']}")["correct"] == 1000 - 33


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        *((text, True) for text in ("B", " B\n", "Bee", "B. dog", "The answer is B.", "(B)", "Is it B?", "A or B")),
        *((text, False) for text in ("A", "D", "Cat", "", " ", "None", "The answer is C.", "All of these")),
        *((text, None) for text in ("b", "dog", "x", "The answer is B", "None.", "1", "**dog**", None, 1, ["B"])),
        ("D. no, B.", False),  # the first character comes first
        ("\nB\n", True),
    ],
)
def test_mmsu_reads_the_first_letter_else_the_last_but_one(response, verdict):
    """Worked out by hand from what its script does; "A or B" begins with A, whose text is also the right one here."""
    options = {"choice_a": "dog" if response == "A or B" else "cat", "choice_b": "dog", "choice_c": "", "choice_d": "x"}
    rows = [{"id": i, "answer_gt": "dog", "category": "P", "sub-category": "S", **options} for i in range(3)]
    rows = [MMSU.as_question(row | {"response": said}) for row, said in zip(rows, (response, "B", "C"), strict=True)]
    del rows[2]["response"]  # wrong, not left out
    verdicts = judge(rows, MMSU)
    assert verdicts.right == [*([] if verdict is None else [verdict]), True, False]
    scores = score(verdicts)
    right, total = 1 + bool(verdict), 2 + (verdict is not None)
    assert (scores["correct"], scores["total"], scores["without_prediction"]) == (right, total, 3 - total)
    assert scores["of_all"] == {"accuracy": right / 3, "correct": right, "total": 3}
    assert scores["by"]["category / sub-category"]["P / S"]["total"] == total
    if verdict is None:  # its script prints 0.0000 of 0 where it can read nothing
        scores = score(judge(rows[:1], MMSU))
        assert (scores["accuracy"], scores["total"], scores["of_all"]["total"]) == (0, 0, 1)
        assert "overall        0       0     0.00 %   0.0 to 100.0\n" in score_table(scores, "title")
    assert score(judge(rows, MMSU, leave_out=False))["total"] == 3  # while training all count


def test_what_mmar_rubrics_judges_is_written(tmp_path):
    row = {"id": 1, "question": "?", "choices": ["a", "b"], "answer": "a", "audio_path": "x.wav"}
    items = make_items([row], MMAR, tmp_path, True)
    for raw, thinking in (
        ("<think> It\nbarks. </think> <answer>a</answer>", "It\nbarks."),
        ("<think>cut off", "cut off"),
        ("It barks. <answer>a</answer>", "It barks."),
        ("<answer>a</answer>", ""),
    ):
        assert result_rows(items, [("a", raw)], MMAR, False)[0]["thinking_prediction"] == thinking


def test_closed_questions_of_mmau_pro(tmp_path):
    """Only they are asked, about all of their recordings; a long one is refused, and counts as wrong."""
    choices = ["dog", "a cat", "rain"]
    whole = {"question": "?", "answer": "a cat", "choices": choices, "category": "sound", "kwargs": {}}
    rows = [whole | {"id": f"{i}", "audio_path": [f"{i}.wav"]} for i in range(4)]
    rows[1]["audio_path"] = ["0.wav", "1.wav"]
    others = [{"category": "open"}, {"category": "instruction following"}, {"choices": None}, {"choices": ["dog"]}]
    rows += [rows[0] | {"id": f"o{i}"} | other for i, other in enumerate(others)]
    for i, seconds in enumerate((1, 1, 31, 30.02)):  # the last 20 ms make no audio token
        soundfile.write(tmp_path / f"{i}.wav", np.full(int(16_000 * seconds), 0.1), 16_000)
    pq.write_table(pa.Table.from_pylist([row | {"kwargs": None} for row in rows]), tmp_path / "test.parquet")
    benchmark, questions = read_rows(tmp_path / "test.parquet")
    assert (benchmark, [row["id"] for row in questions]) == (MMAU_PRO, ["0", "1", "2", "3"])
    items = make_items(questions, benchmark, tmp_path, False)
    lengths, bad, _ = asking.check_audio(items, AudioReader(), benchmark.is_whole)
    assert lengths == {0: [16_000], 1: [16_000] * 2, 3: [480_000]} and "item 3 (id 2): 31.00 s of sound" in bad[2]
    said = [("a cat", "a cat"), ("", ""), ("", ""), ("A cat", "A cat")]  # the last is nobody's text
    rows = [row | {"kwargs": {}} for row in result_rows(items, said, benchmark, False)]
    rows[3]["option_orders"] = [{"order": [0, 1, 2], "prediction": "", "raw_output": ""}]  # a field of one row alone
    write_rows(rows, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["option_orders"].to_pylist() == [None] * 3 + [
        rows[3]["option_orders"]
    ]
    scores = score(judge_file(tmp_path / "out.parquet"))
    assert (scores["correct"], scores["total"], scores["by"]["category"]["sound"]["total"]) == (1, 4, 4)


# --------------------------------------------------------------------------------------------------------- result files
def rows_of(*predictions: str | None, key: str = "model_output", **fields) -> list[dict]:
    """Rows whose right answer is "dog"; None leaves the key out."""
    return [
        {"id": f"q{i}", "audio_id": "x.wav", "choices": ["dog", "cat"], "answer": "dog", "task": "sound", **fields}
        | ({} if prediction is None else {key: prediction})
        for i, prediction in enumerate(predictions)
    ]


def test_the_key_that_the_official_script_reads_comes_first():
    both = [row | {"model_prediction": "cat"} for row in rows_of("dog", "dog")]
    assert score(judge(both, MMAU))["correct"] == 2
    verdicts = judge(rows_of("dog", "cat", key="model_prediction"), MMAU)
    assert (verdicts.key, verdicts.right) == ("model_prediction", [True, False])
    with pytest.raises(EvalError, match="model_output or model_prediction"):
        judge(rows_of(None, None), MMAU)


def test_rows_that_cannot_be_scored_are_named():
    rows = rows_of("dog", "dog")
    rows[1]["model_output"] = None
    rows[0]["choices"] = "dog"
    with pytest.raises(EvalError, match=r"2 fields(?s:.*)id q0: choices is 'dog'(?s:.*)id q1: model_output is None"):
        judge(rows, MMAU)


def test_table():
    rows = rows_of("dog", "dog", "cat", None, difficulty="easy")
    scores = score(judge(rows, MMAU))
    table = score_table(scores, "title")
    assert re.search(r"overall +2 +3 +66\.67 % +20\.8 to 93\.9", table)  # Wilson, worked out below
    assert re.search(r"\n  easy +2 +3 +66\.67 %", table)
    assert "1 items without a prediction that it reads; of all 4 items 50.00 %" in table
    assert "ABLATION" not in table
    # 43 / 160 = 0.26875: MMAU's script prints 26.88 %, MMSU's 0.2687
    many = [MMSU.as_question(MMSU_ROW | {"id": i, "response": "AB"[i < 43]}) for i in range(160)]
    assert " 26.87 % " in score_table(score(judge(many, MMSU)), "title")
    assert " 26.88 % " in score_table(score(judge(rows_of(*["dog"] * 43, *["cat"] * 117), MMAU)), "title")
    silent = score(judge([row | {"silent_audio": True} for row in rows], MMAU))
    assert "ABLATION: silence" in score_table(silent, "title")


# ----------------------------------------------------------------------------------------------------------- statistics
def test_wilson_interval():
    # 2 of 3: z = 1.96, z^2 = 3.8415; centre (2 + 1.9207) / (3 + 3.8415) = 0.57308;
    # half width 1.96 * sqrt(3 * 2/9 + 3.8415/4) / 6.8415 = 1.96 * sqrt(0.66667 + 0.96036) / 6.8415 = 0.36543
    assert wilson_interval(2, 3) == pytest.approx((0.20765, 0.93851), abs=2e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)  # z^2 / (n + z^2)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(1000, 1000)[1] == 1.0
    assert wilson_interval(645, 1000) == pytest.approx(
        (0.614839, 0.674052), abs=1e-6
    )  # scipy's proportion_ci("wilson")


def test_mcnemar():
    # 1 against 5: P(at most 1 head of 6) = (1 + 6) / 64, twice
    assert mcnemar_p(1, 5) == mcnemar_p(5, 1) == pytest.approx(14 / 64)
    assert mcnemar_p(3, 3) == mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(0, 10) == pytest.approx(2 / 1024)
    assert 0 < mcnemar_p(3, 900) < 1e-200  # no overflow on the way


def test_paired():
    first = [True] * 4 + [False] * 6
    second = [True] * 3 + [False] + [True] * 5 + [False]
    result = paired(first, second)
    assert result["accuracy"] == [0.4, 0.8]
    assert (result["only_first"], result["only_second"], result["total"]) == (1, 5, 10)
    assert result["difference"] == pytest.approx(0.4)
    # variance of the differences: (1 + 5) / 10 - 0.4^2 = 0.44; 1.96 * sqrt(0.044) = 0.41113
    assert result["interval_95"] == pytest.approx([0.4 - 0.41113, 0.4 + 0.41113], abs=1e-5)
    assert result["mcnemar_p"] == pytest.approx(14 / 64)


# ----------------------------------------------------------------------------------------------------------- comparison
def test_compare_pairs_by_id_and_breaks_down_by_task():
    first = judge(rows_of("dog", "cat", "cat"), MMAU)
    rows = rows_of("dog", "dog", "cat", "dog")[::-1]  # another order, and one item more
    rows[0]["task"] = "music"
    first.rows[0]["task"] = "mix-sound-music-speech"
    result = compare(first, judge(rows, MMAU))
    assert (result["total"], result["only_first"], result["only_second"]) == (3, 0, 1)
    assert result["not_shared"] == [0, 1]
    assert sorted(result["by"]["task"]) == ["mix-sound-music-speech", "sound"]
    table = comparison_table(result, ("before.json", "after.json"))
    assert re.search(r"overall +3 +33\.33 +66\.67 +\+33\.33 +\S+ to \S+ +0:1 +1\n", table)
    assert "\n  mix-sound-music-speech\n" in table
    assert max(map(len, table.splitlines())) <= 80
    assert "1 of the second" in table


def test_compare_refuses_what_cannot_be_paired():
    rows = rows_of("dog", "cat")
    first = judge(rows, MMAU)
    with pytest.raises(EvalError, match="occurs twice"):
        compare(first, judge([*rows, rows[0]], MMAU))
    unread = judge([MMSU.as_question(MMSU_ROW | {"response": "I"})], MMSU)
    with pytest.raises(EvalError, match="the second file has no prediction that MMSU's script can read"):
        compare(judge([MMSU.as_question(MMSU_ROW | {"response": "A"})], MMSU), unread)
    with pytest.raises(EvalError, match="share no item"):
        compare(first, judge([row | {"id": "z" + row["id"]} for row in rows], MMAU))
    with pytest.raises(EvalError, match=r"have other questions(?s:.*)id q0: 'dog' and 'cat'"):
        compare(first, judge([row | {"answer": "cat"} for row in rows], MMAU))
    with pytest.raises(EvalError, match=r"of MMAU, the second of MMAR, .*; evaluate both models on the same form"):
        compare(first, judge(rows_of("dog", key="answer_prediction"), MMAR))


# ------------------------------------------------------------------------------------------------- asked in other ways
@pytest.mark.parametrize(
    ("choices", "shift", "expected"),
    [
        (["a b", "c", "d"], 1, ["c", "d", "a b"]),
        (["a", "b", "c"], 2, ["c", "a", "b"]),
        (["(A) rain", "(B) bell", "(C) car"], 1, ["(A) bell", "(B) car", "(C) rain"]),
        (["1. rain", "2. bell"], 1, ["1. bell", "2. rain"]),
        (["(A) rain", "bell"], 1, ["bell", "(A) rain"]),
        (["(A) rain", "(B) bell"], 0, ["(A) rain", "(B) bell"]),
    ],
)
def test_labels_stay_in_place_when_options_go_round(choices, shift, expected):
    assert rotated(choices, shift) == expected


@pytest.mark.parametrize("benchmark", [MMAU, MMSU], ids=lambda b: b.name)
def test_orders_and_silence_in_the_scores(tmp_path, benchmark):
    """Three questions with four, four and two options, whose right one is the first, third and second. One model always
    takes the first option: right in order 0 for the first question, in order 2 for the second, in 1 (and 3) for the
    third. The other knows, but hears nothing in silence."""
    rows = [
        {"id": i, "question": "?", "choices": choices, "answer": gold, benchmark.audio_key: "x.wav", "task": "t"}
        for i, (choices, gold) in enumerate(
            [(["a", "b", "c", "d"], "a"), (["(A) e", "(B) f", "(C) g", "(D) h"], "(C) g"), (["y", "n"], "n")]
        )
    ]
    if benchmark is MMSU:
        for row in rows:
            row |= {f"choice_{letter}": choice for letter, choice in zip("abcd", row["choices"], strict=False)}
            row |= {"answer_gt": row["answer"], "category": "t", "sub-category": "s"}
    items = make_items(rows, benchmark, tmp_path, False)
    again = ask_again(items, 4, True, False, stride=3)
    assert [item.index for item in again] == [3, 4, 5, 6, 7, 9, 10, -1, -2, -3]  # n and y come round after two
    assert "['(A) f', '(B) g', '(C) h', '(D) e']" in next(item for item in again if item.index == 4).prompt

    def results(answer):
        said = {item.index: answer(item, choices_in(item.prompt)) for item in [*items, *again]}
        first = [(extract_answer(said[item.index], item.row["choices"]).text, said[item.index]) for item in items]
        ways = [further_answers(item, said, 4, True, 3) for item in items]
        return [row | way for row, way in zip(result_rows(items, first, benchmark, False), ways, strict=True)]

    scores = score(judge(results(lambda item, shown: shown[0]), benchmark))
    assert scores["option_orders"]["accuracies"] == [1 / 3, 1 / 3, 1 / 3, 1 / 3]
    assert scores["option_orders"]["agreement"] == 0 == scores["option_orders"]["std"]
    knows = ["a", "g", "n"]

    def knowing(item, shown):
        return shown[1] if item.silent else next(c for c in shown if c.endswith(knows[item.index % 3]))

    found = results(knowing)
    assert found[1]["option_orders"][3] == {"order": [3, 0, 1, 2], "prediction": "(C) g", "raw_output": "(D) g"}
    scores = score(judge(found, benchmark))
    orders = {"accuracies": [1.0] * 4, "mean": 1, "least": 1, "greatest": 1, "std": 0, "agreement": 1}
    assert (scores["accuracy"], scores["option_orders"]) == (1, orders)
    assert scores["accuracy_in_silence"] == 1 / 3  # the second option is right for the third question
    table = score_table(scores, "title")
    assert re.search(r"95 % interval +in silence\noverall +3 +3 +100.00 % +\S+ to 100.0 +33.33 %\n", table)
    assert "options in 4 orders: mean 100.00 %, 100.00 % to 100.00 %, standard deviation 0.00" in table
    uneven = describe_orders([[True, False], [True, True], [False, False]], [["a", "b"], ["a", "c"], ["b", "c"]])
    assert (uneven["mean"], uneven["least"], uneven["greatest"], uneven["std"]) == (0.5, 0, 1, 0.5)


# ---------------------------------------------------------------------------------------------------- answers all alike
@pytest.mark.parametrize(
    ("said", "golds", "choices", "found"),
    [
        ("yyyyyyyyyyyy", "ynynynynynyn", "yn", "12 of 12 answers are 'y', which is right for 6"),
        ("Y y y y y y y y y y", "nnnnnnnnnn", "yn", "10 of 10 answers are 'y', which is right for 0"),
        (
            "yyyyyyyyyyyyyyyyyyyn",
            "nnnnnnnnnnyyyyyyyyyn",
            "yn",
            "19 of 20 answers are 'y', which is right for 9",
        ),  # 95 %
        ("yyyyyyyyyyyyyyyyyynn", "nnnnnnnnnnyyyyyyyynn", "yn", None),  # 90 %
        ("yyyyyyyyy", "ynynynyny", "yn", None),  # nine tell nothing
        ("yyyyyyyyyy", "yyyyyyyyyy", "yn", None),  # and they are right
        ("yyyyyyyyyy", "yyyyyyyyyn", "yn", None),
        ("ababababab", "babababbab", "both", "10 of 10 answers are choice 1, which is right for 3"),
        ("ababababab", "ababababab", "both", None),
        ("..........", "ynynynynyn", "yn", "10 of 10 answers are '.', which is right for 0"),  # a refusal, for example
    ],
)
def test_answers_that_are_all_alike(said, golds, choices, found):
    """``both``: the choices are a and b, what is said the first of them."""
    rows = [
        Said(text, gold, sorted("ab", key=lambda choice: choice != text) if choices == "both" else list(choices))
        for text, gold in zip(said.split() if " " in said else said, golds, strict=True)
    ]
    assert find_collapsed(rows, [["kind"]] * len(rows)) == ({} if found is None else {"all questions": found})


def test_only_the_types_that_are_alike_are_named():
    said = [Said("y", gold, ["y", "n"], silent) for gold, silent in zip("yn" * 6, "yyyyyynnnnnn", strict=True)]
    rest = [Said(gold, gold, ["y", "n"], "y") for gold in "yn" * 6]
    found = find_collapsed(said + rest, [["task a", "easy"]] * 12 + [["task b", "easy"]] * 12)
    assert found == {"task a": "12 of 12 answers are 'y', which is right for 6; 6 are the same in silence"}
    rows = [
        {"id": i, "choices": s.choices, "answer": s.answer, "model_output": s.prediction, "task": "ab"[i // 12]}
        for i, s in enumerate(said + rest)
    ]
    scores = score(judge(rows, MMAU))
    assert scores["collapsed"] == {"task a": "12 of 12 answers are 'y', which is right for 6"}
    assert "WARNING: task a: 12 of 12" in score_table(scores, "title")


# -------------------------------------------------------------------------------------------------- answers of a file
LISTS = [["dog", "cat"], ["(A) rain", "(B) bell"], ["one", "two", "three"]]


@pytest.mark.parametrize(
    ("answers", "golds"),
    [
        (["dog", "(B) bell", "two"], ["dog", "(B) bell", "two"]),  # as the official scripts expect them
        (["Dog", "bell", "two."], ["Dog", "(B) bell", "two."]),  # by the official rule, no choice is right for "bell"
        (["dog", "B", "four"], ["dog", "(B) bell", "four"]),  # four: a warning, as no prediction can be right
        ([1, 0, 2], ["cat", "(A) rain", "three"]),
        ([1.0, 0, 2], ["cat", "(A) rain", "three"]),  # a table that once held a gap
        (["B", "A", "C"], ["cat", "(A) rain", "three"]),
        (["(b)", "a.", "C)"], ["cat", "(A) rain", "three"]),
        ([2, 1, 3], "no answer of 3 is 0, and 2 equal the number of their choices.*Subtract 1"),
        ([1, "(B) bell", 2], r"2 of 3.*item 1 \(id 0\): answer is 1, expected the text of a choice.*item 3"),
        ([1, 0, 7], r"3 of 3.*item 3 \(id 2\): answer is 7, expected"),
        (["dog", None, ""], r"2 of 3.*item 2 \(id 1\): answer is None, though.*item 3 \(id 2\): answer is '', though"),
        (["dog", True, ["two"]], r"2 of 3.*answer is True, expected.*answer is \['two'\], expected"),
        *((withheld, [None] * 3) for withheld in ([None] * 3, [""] * 3, ["", " ", None], ["?"] * 3, ["hidden"] * 3)),
        *((withheld, [None] * 3) for withheld in ([-1] * 3, ["N/A", None, "N/A"], ["-"] * 3, [99] * 3)),
    ],
)
def test_how_a_files_answers_are_read(tmp_path, answers, golds):
    rows = [
        {"id": i, "question": "?", "choices": choices, "audio_id": "x.wav", "answer": answer}
        for i, (choices, answer) in enumerate(zip(LISTS, answers, strict=True))
    ]
    if isinstance(golds, str):
        with pytest.raises(EvalError, match=f"(?s){golds}"):
            make_items(rows, MMAU, tmp_path, False)
        return
    items = make_items(rows, MMAU, tmp_path, False)
    assert [item.gold for item in items] == golds
    results = result_rows(items, [("dog", "dog")] * 3, MMAU, False)
    if golds[0] is not None:
        assert [row["answer"] for row in results] == golds  # what the official script compares
        return
    assert [row["answer"] for row in results] == answers  # as it was, to be submitted
    with pytest.raises(EvalError, match="none of 3 rows has an answer"):
        judge(results, MMAU)


def test_the_first_questions_are_read_as_the_whole_file_is(tmp_path):
    """The first two answers alone could count from 0."""
    rows = [
        {"id": i, "question": "?", "choices": ["a", "b", "c"], "audio_id": "x.wav", "answer": answer}
        for i, answer in enumerate([1, 2, 3, 3])
    ]
    with pytest.raises(EvalError, match="from 1"):
        make_items(rows, MMAU, tmp_path, False, limit=2)


def test_rows_of_r1_aqa_are_questions(tmp_path, capsys):
    row = {
        "id": 7,
        "question_text": "What is in the video?",
        "multi_choice": ["dog", 3, None],
        "answer": 1,
        "question_type": "Which",
    }
    path = tmp_path / "rows.jsonl"

    def read(*rows):
        path.write_text("\n".join(map(json.dumps, rows)))
        return read_rows(path)

    named, raw = row | {"audio_path": "wavs/a.wav"}, row | {"id": 8, "video_name": "b_000030"}
    benchmark, questions = read(named, raw)
    assert benchmark is MMAU
    first = {"id": "7", "audio_id": "wavs/a.wav", "question": row["question_text"], "choices": ["dog", "3", "None"]}
    assert questions[0] == first | {"answer": "3", "dataset": "own questions", "question_type": "Which"}
    assert questions[1]["audio_id"] == "b_30.wav"  # the name that avqa.py looks for
    assert questions[1]["dataset"] == "AVQA"  # only its rows name a video
    assert make_items(questions, benchmark, tmp_path, False)[0].prompt.startswith("What is in the audio? Please choose")
    # as avqa.py leaves rows out, wherever they stand
    for bad, line in (
        ([raw, {"id": 7}], 2),
        ([{"id": 9, "multi_choice": []}, raw], 1),
        ([raw | {"answer": 5}, raw], 1),
    ):
        assert read(*bad) == (MMAU, questions[1:])
        assert re.search(
            rf"1 of 2 rows cannot be used:\n  line {line}: \w+: .*\nthey are not asked", capsys.readouterr().err
        )
    with pytest.raises(EvalError, match=r"1 of 1 rows(?s:.*)line 1: answer_out_of_range"):
        read(raw | {"answer": 5})
    # and the parquet that it writes
    (tmp_path / "rows.jsonl").write_text(json.dumps(named) + "\n" + json.dumps(raw))
    places = ("--input_jsonl", path, "--audio_dir", tmp_path, "--local_save_dir", tmp_path, "--no_check_audio")
    assert avqa.main(list(map(str, places))) == 0
    there = [{"audio_id": str(tmp_path / name)} for name in ("a.wav", "b_30.wav")]
    prepared = [question | place for question, place in zip(questions, there, strict=True)]
    assert read_rows(tmp_path / "train.parquet") == (MMAU, prepared)
    with pytest.raises(EvalError, match="count the choices from 1"):
        read(*(named | {"id": i, "answer": 3} for i in range(3)))


ADQA_ROW = {"question_text": "?", "multi_choice": ["a", "b"], "answer": "b", "question_type": "music"}
ADQA_ROW |= {"source_dataset": "D"}
AUDIOMCQ_ROW = {"question": "?", "choices": ["a", "b"], "answer": "b", "source_dataset": "D", "cot": "c"}
MMSU_FIELDS = {"category": "Perception", "sub-category": "Semantics", "choice_d": ""}
MMSU_ROW = {"question": "?", "answer_gt": "b", "choice_a": "a", "choice_b": "b", "choice_c": "c"} | MMSU_FIELDS


@pytest.mark.parametrize(
    ("row", "benchmark", "kept", "written", "breakdowns"),
    [
        (ADQA_ROW, ADQA, {"question_type": "music"}, {"model_output": "b"}, ["question_type", "source_dataset"]),
        (
            *(AUDIOMCQ_ROW, MMAU, {"question_type": "D", "cot": "c"}),
            *({"model_output": "b", "model_prediction": "b"}, ["question_type"]),
        ),
        (
            *(MMSU_ROW, MMSU, {"choices": ["a", "b", "c"]} | MMSU_FIELDS, {"response": "B"}),
            ["category", "category / sub-category"],
        ),
    ],
    ids=["adqa", "audiomcq", "mmsu"],
)
def test_rows_of_other_data_sets_are_questions(tmp_path, row, benchmark, kept, written, breakdowns):
    path, answer = tmp_path / "rows.jsonl", "answer_gt" if "answer_gt" in row else "answer"
    rows = [row | {"id": i, "audio_path": f"{i}.wav", answer: text} for i, text in enumerate(("b", "a", "horse"))]

    def items(*rows):
        path.write_text("\n".join(map(json.dumps, rows)))
        found, questions = read_rows(path)
        assert found is benchmark
        return make_items(questions, benchmark, tmp_path, False)

    found = items(*rows)
    assert [item.gold for item in found] == ["b", "a", "horse"]  # the last is warned of, and no prediction matches
    assert [item.audio.name for item in found] == ["0.wav", "1.wav", "2.wav"]
    assert "following options: ['a', 'b'" in found[0].prompt
    without_ids = items(*({k: v for k, v in r.items() if k != "id"} for r in rows))
    assert [item.row["id"] for item in without_ids] == [1, 2, 3]  # by which compare pairs the answers
    results = result_rows(found, [("b", "<answer>b</answer>")] * 3, benchmark, False)
    assert results[0].items() >= {**kept, **written}.items()
    written = [benchmark.without_copies(result) for result in results]
    texts = [name for name, value in written[0].items() if value in ("?", ["a", "b"])]
    assert texts == [name for name in row if name in ("question", "question_text", "choices", "multi_choice")]
    path.write_text(json.dumps(written))
    verdicts = judge(*read_rows(path)[::-1])
    assert verdicts.right == [True, False, False]  # a result is a result, and no question again
    assert list((scores := score(verdicts))["by"]) == breakdowns
    title = "own questions, by the rule of MMAU's script" if benchmark is MMAU else f"{benchmark.title}: "
    assert title_of(benchmark, scores).startswith(title)
    assert [item.gold for item in items(*({k: v for k, v in r.items() if k != answer} for r in rows))] == [None] * 3
    for audio in ("audio_id", "audio_path"):  # MMAU's rows, and MMAR's, stay as they are
        own = {"question": "?", "choices": ["a"], "answer": "a", audio: "a.wav"}
        path.write_text(json.dumps([own]))
        assert read_rows(path)[1] == [own]
    with pytest.raises(EvalError, match=rf"1 of 2 questions(?s:.*){benchmark.audio_key} is None"):
        items(rows[0], row | {"id": 9})


def test_rows_of_ones_own_are_the_same_questions_in_both_forms(tmp_path):
    """The rows, and the validation.json that avqa.py writes of them, can be compared."""
    kinds = ["drum", "bell"] * 4
    rows = [{"question_text": f"{i}?", "multi_choice": ["ox", "cow"], "answer": ("ox", "cow")[i % 2]} for i in range(8)]
    rows = [row | {"audio_path": f"{i}.wav", "question_type": kinds[i]} for i, row in enumerate(rows)]
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text("\n".join(map(json.dumps, rows)))
    places = ("--input_jsonl", path, "--audio_dir", tmp_path, "--local_save_dir", out, "--no_check_audio")
    assert avqa.main([*map(str, places), "--val_ratio", "0.5"]) == 0
    results = []
    for file in (out / "validation.json", path):
        benchmark, questions = read_rows(file)
        items = make_items(questions, benchmark, tmp_path, False)
        results.append(tmp_path / f"result_{file.stem}.json")
        answers = [(item.gold, "") for item in items]
        results[-1].write_text(json.dumps(result_rows(items, answers, benchmark, False)))
    told = compare(*map(judge_file, results))
    assert told["accuracy"] == [1, 1] and told["not_shared"] == [0, 8 - told["total"]] and 0 < told["total"] < 8
    assert read_rows(path, "adqa")[0] is ADQA
    old = [row | {"id": 1, "model_output": "a"} for row in rows]  # an older version scored them as ADQA's
    for others in (old, [row | {"answer": "A"} for row in rows], [row | {"answer": "?"} for row in rows]):
        path.write_text(json.dumps(others))
        assert read_rows(path)[0] is ADQA


@pytest.mark.parametrize("start, what", [(b"PK\x03\x04", "zip"), (b"\x1f\x8b", "gzip")])
def test_what_is_no_json_is_said(tmp_path, start, what):
    (tmp_path / "file").write_bytes(start)
    with pytest.raises(EvalError, match=f"file: is .*{what}"):
        read_rows(tmp_path / "file")
