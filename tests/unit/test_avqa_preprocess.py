"""avqa.py: both input layouts to parquet, what is left out and reported, and that a failed run changes nothing."""

import csv
import json
import math
import os
import resource
import sys
from collections import Counter
from pathlib import Path

import avqa
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import run_code, run_command

from aqa.common.lock import lock
from aqa.data.rows import AvqaError
from aqa.data.tables import records_of

R1_ROW = {
    "id": 183,
    "video_name": "-HG3Omg_89c_000030",
    "video_id": 341,
    "question_text": "What happened in the video?",
    "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"],
    "answer": 1,
    "question_relation": "View",
    "question_type": "Happening",
    "dataset_name": "AVQA",
    "audio_path": "wavs/-HG3Omg_89c_30.wav",
}
PROMPT = (
    "What happened in the audio? Please choose the answer from the following options: ['motorboat', "
    "'Yacht consignment', 'Sailboat set sail', 'Consignment car']. Output the final answer in <answer> </answer>."
)


def row(number: int, **changes) -> dict:
    """A raw AVQA row of its own clip; a change to None removes the field."""
    names = ("id", "video_name", "question_text", "multi_choice", "answer")
    fields = {**{name: R1_ROW[name] for name in names}, "id": number, "video_name": f"clip{number:07d}_{number:06d}"}
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def wav_of(number: int) -> str:
    return f"clip{number:07d}_{number}.wav"


def write_wav(path: Path, seconds: float, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(seconds * rate), 0.1), rate)


@pytest.fixture
def run(tmp_path):
    """Run main on rows (dicts, or lines as they are); returns the exit status. Output is in tmp_path/out."""
    (tmp_path / "audio").mkdir()

    def call(rows: list | bytes, *flags: str) -> int:
        source = tmp_path / "in.jsonl"
        lines = [line if isinstance(line, str) else json.dumps(line) for line in rows if not isinstance(rows, bytes)]
        source.write_bytes(rows if isinstance(rows, bytes) else "\n".join(lines).encode())
        paths = ["--input_jsonl", source, "--audio_dir", tmp_path / "audio", "--local_save_dir", tmp_path / "out"]
        return avqa.main([str(argument) for argument in [*paths, *flags]])

    call.out, call.audio = tmp_path / "out", tmp_path / "audio"
    call.rows = lambda name="train": pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()
    call.report = lambda: json.loads((tmp_path / "out" / "report.json").read_text())
    return call


@pytest.mark.parametrize("think", [False, True])
def test_row_as_r1_aqa_has_it(run, think):
    assert run([R1_ROW], "--no_check_audio", *(["--enable_think"] if think else [])) == 0
    path = str(run.audio / "-HG3Omg_89c_30.wav")
    text = PROMPT.replace("final", "thinking process in <think> </think> and final") if think else PROMPT
    parts = [{"type": "audio", "audio_url": path, "text": None}, {"type": "text", "audio_url": None, "text": text}]
    assert run.rows() == [
        {
            "data_source": "r1-aqa-avqa",
            "prompt": [{"role": "user", "content": parts}],
            "reference": "Yacht consignment",
            "label": "avqa_think_rule" if think else "avqa_rule",
            "audio_path": path,
            "dataset_name": "AVQA",
            "question_type": "Happening",
            "reward_model": {"ground_truth": "Yacht consignment"},
            "extra_info": {
                "id": 183,
                "index": 0,
                "question_text": "What happened in the video?",
                "multi_choice": R1_ROW["multi_choice"],
                "answer_idx": 1,
                "dataset_name": "AVQA",
                "audio_path": path,
                "solution": "<answer>Yacht consignment</answer>",
            },
        }
    ]


CHOICES = ["duck", "Frog", "cow", "bee", "cow"]
ANIMAL = "Which animal?"
CHOICE_FIELDS = {f"choice_{letter}": choice for letter, choice in zip("abcd", [*CHOICES[:3], "cow"], strict=True)}
KIND = {"source_dataset": "AudioSet", "question_type": "sound", "gemini_cot": "..."}
FORMATS = {  # rows as the data sets publish them, and the names of question, choices, answer and recording
    "dcase": {"question_text": ANIMAL, "multi_choice": CHOICES, "answer": "Frog", "audio_path": "a.ogg"} | KIND,
    "audiomcq": {"question": ANIMAL, "choices": CHOICES, "answer": "Frog", "audio_path": "a.ogg"} | KIND,
    "mmsu": {"question": ANIMAL, **CHOICE_FIELDS, "answer_gt": "Frog", "audio_path": "a.ogg"}
    | {"task_name": "AudioSet", "category": "sound"},
    "mmau": {"question": ANIMAL, "choices": CHOICES, "answer": "Frog", "audio_id": "a.ogg"}
    | {"dataset": "AudioSet", "task": "sound"},
}
FORMATS = {name: {"id": "1"} | row for name, row in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_other_data_sets(run, name):
    good = FORMATS[name]
    question, choices, answer, audio = (
        next(field for field in good if field.startswith(start))
        for start in ("question", ("multi", "ch"), "ans", "aud")
    )
    wrong = [
        ({answer: "horse"}, "bad_answer: answer is 'horse', which is no choice of ['duck', 'Frog', 'cow',"),
        ({answer: "cow"}, "bad_answer: answer is 'cow', which is the text of choices 2 and "),
        ({answer: 1}, "bad_answer: answer is 1, expected the text of a choice, one of ['duck', 'Frog', 'cow',"),
        ({answer: None}, f"missing_field: no {answer}"),
        ({choices: None}, f"missing_field: no {choices}"),
        ({question: " "}, f"bad_question: {question} is ' '"),
        ({audio: "a/"}, f"bad_{audio}: {audio} is 'a/'"),
        ({audio: None}, f"missing_field: no {audio}"),
        ({"id": "2"}, "duplicate_id: id '2' was used before, on line 2"),
    ]
    spelled = good | {"id": "2", answer: " frog"}
    rows = [good, spelled, *(good | {"id": str(number)} | change for number, (change, _) in enumerate(wrong, 3))]
    assert run(rows, "--no_check_audio") == 0
    for problem, (_, says) in zip(run.report()["problems"], wrong, strict=True):
        assert f"{problem['kind']}: {problem['reason']}".startswith(says)
    assert [written["reference"] for written in run.rows()] == ["Frog", "Frog"]
    written = run.rows()[0]
    info = written["extra_info"]
    assert (info["id"], info["question_text"], info["answer_idx"]) == ("1", "Which animal?", 1)
    assert info["multi_choice"][:3] == CHOICES[:3]
    assert (written["audio_path"], written["question_type"]) == (str(run.audio / "a.ogg"), "sound")
    assert written["dataset_name"] == "AudioSet"


def table_of(kind: str, rows: list[dict], folder: Path, sound: bytes | None = None) -> Path:
    """A table of rows, with a recording inside each where ``sound`` is given."""
    path = folder / f"table.{kind}"
    if kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerow(rows[0])
            for number, each in enumerate(rows):  # lists as JSON, or as pandas writes them
                write = (json.dumps, repr)[number % 2]
                writer.writerow([write(v) if isinstance(v, list) else v for v in each.values()])
        return path
    if sound is not None:
        rows = [{k: v for k, v in r.items() if k != "audio_path"} for r in rows]
        rows = [r | {"sound": {"bytes": sound, "path": "/there/a.ogg"}} for r in rows]
    dataset = datasets.Dataset.from_list(rows)
    dataset = dataset.cast_column("sound", datasets.Audio()) if sound is not None else dataset
    dataset.to_parquet(path) if kind == "parquet" else dataset.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "saved"])
@pytest.mark.parametrize("name", ["dcase", "audiomcq", "mmsu"])
def test_tables_hold_the_same_rows(tmp_path, name, kind):
    rows = [FORMATS[name] | {"id": str(number)} for number in range(3)]
    rows[1]["question" if "question" in rows[1] else "question_text"] = 'Two lines,\n"and" a tab\t?'
    path = table_of(kind, rows, tmp_path)
    assert [record.value for record in records_of(path)] == rows
    assert [record.error for record in records_of(path)] == [None] * 3
    without_id = [{field: value for field, value in row.items() if field != "id"} for row in rows]
    (tmp_path / "more").mkdir()
    found = records_of(table_of(kind, without_id, tmp_path / "more"))
    assert [record.value for record in found] == [row | {"id": number} for number, row in enumerate(without_id, 1)]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_sound_inside_a_dataset_becomes_files(run, tmp_path, kind):
    write_wav(tmp_path / "a.wav", 0.5)
    sound = (tmp_path / "a.wav").read_bytes()
    rows = [FORMATS["audiomcq"] | {"id": f"{n}", "answer": a} for n, a in enumerate(("duck", "horse", "cow", "bee"))]
    path = table_of(kind, rows, tmp_path, sound)
    assert run([], "--input_jsonl", str(path)) == 0
    bad = [f"{problem['line']} {problem['reason']}"[:40] for problem in run.report()["problems"]]
    assert bad == ["2 answer is 'horse', which is no choice ", "3 answer is 'cow', which is the text of "]
    written = run.rows()
    assert [row["reference"] for row in written] == ["duck", "bee"]
    (file,) = {Path(row["audio_path"]) for row in written}  # one recording is one clip, however often it occurs
    assert file.parent == run.audio / "embedded" and file.suffix == ".ogg" and file.read_bytes() == sound
    with pytest.raises(AvqaError, match=r"row 1 has sound inside \(sound\)"):
        records_of(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("question_text;multi_choice;answer\nq;[1, 2];0\n", [{"multi_choice": [1, 2], "answer": 0}]),
        ("question_text;multi_choice;answer\nq;[1, 2];1\n", [{"multi_choice": [1, 2], "answer": "1"}]),  # either
        ("question,choices,answer\nq,a|b,\n", [{"choices": "a|b", "answer": None}]),
        ("\ufeffquestion,choices\nq\n\nq,[]\n", ["1 cells, but the header has 2", {"choices": []}]),
        # as pandas writes an index, and NumPy a list, of which Python would make one text
        ("\n\tquestion\tchoices\n0\tq\t['a', 'b']\n1\tq", [{"choices": ["a", "b"]}, "2 cells, but the header has 3"]),
        ("question,choices\nq,['a' 'b']\n", [{"choices": "['a' 'b']"}]),
        # no name is known: the rows' messages list them
        ("sound,q,answers\na.wav,?,a|b\n", [{"sound": "a.wav", "answers": "a|b"}]),
        ("question,question\nq,q\n", "the column 'question' occurs twice"),
        ('question,choices\nq,[]\n"q,x\n', "line 3: unexpected end of data, after 1 whole rows"),
    ],
)
def test_cells(tmp_path, text, expected):
    (tmp_path / "t").write_text(text, encoding="utf-8")
    if isinstance(expected, str):
        with pytest.raises(AvqaError, match=expected):
            records_of(tmp_path / "t")
        return
    for record, wanted in zip(records_of(tmp_path / "t"), expected, strict=True):
        assert record.error == wanted if isinstance(wanted, str) else record.value.items() >= wanted.items()


def test_what_is_no_whole_dataset_is_said(tmp_path):
    rows = [FORMATS["dcase"]]
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(AvqaError, match=r"splits: has splits; name the folder of one: .*splits/dev"):
        records_of(tmp_path / "splits")
    (part,) = (tmp_path / "splits/dev").glob("*.arrow")
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(AvqaError, match=r"arrow: cannot be read .*; copy or download it again"):
        records_of(tmp_path / "splits/dev")
    part.write_bytes(b"PAR1x")
    with pytest.raises(AvqaError, match=r"arrow: cannot be read .*Parquet"):
        records_of(tmp_path / "splits/dev")
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    with pytest.raises(AvqaError, match="has the parts test, train; name one file"):
        records_of(tmp_path)
    (tmp_path / "splits/dev/state.json").write_text("[]")
    with pytest.raises(AvqaError, match=r"state\.json: names no data files"):
        records_of(tmp_path / "splits/dev")
    (tmp_path / "splits/dev/state.json").unlink()
    with pytest.raises(AvqaError, match="name the folder of one: none is there"):
        records_of(tmp_path / "splits")


@pytest.mark.parametrize(
    ("answers", "golds"),
    [
        ([0, 1, "12"], "12 7"),  # numbers of choices: text is refused, even where it is a choice's
        (["12", "7", "1"], ""),  # digits could be either, so they are no numbers and no texts
        (["none", "12", "none", 1], "none 12 none"),  # texts: what looks like a number is one, and a number is refused
        (["none", 1, 1], "7 7"),
    ],
)
def test_a_file_has_numbers_or_texts_as_answers(run, answers, golds):
    rows = [row(i, answer=answer, multi_choice=["12", "7", "none"]) for i, answer in enumerate(answers)]
    assert run(rows, "--no_check_audio") == (0 if golds else 2)
    if golds:
        assert " ".join(written["reference"] for written in run.rows()) == golds


@pytest.mark.parametrize(
    ("answers", "flags", "golds"),
    [
        ([1, 4, 4, 2], (), None),  # no 0, and two are the number of choices
        ([1.0, 4.0, 4.0, 2.0], (), None),
        ([1, 4, 4, 2], ("--answers_from", "1"), "addb"),
        ([1, 4, 4, 2], ("--answers_from", "0"), "bc"),
        ([1, 3, 0, 2], (), "bdac"),
        ([1, 4, 0, 4], (), "ba"),  # a 0: these count from 0, and two are out of range
        ([1, 3, 3, 2], (), "bddc"),
        ([1, 4, 3, 2], (), "bdc"),  # one alone is a slip
        ([1, 0, -1, 2], ("--answers_from", "1"), "ab"),
        ([1, "2", "B", True], (), "b"),  # text and booleans are no numbers
    ],
)
def test_answers_that_count_from_one(run, capsys, answers, flags, golds):
    rows = [row(i, answer=answer, multi_choice=["a", "b", "c", "d"]) for i, answer in enumerate(answers)]
    status = run(rows, "--no_check_audio", *flags)
    if golds is None:
        assert status == 2 and not run.out.exists()
        message = capsys.readouterr().err
        assert "no answer of 4 is 0, and 2 equal the number of their choices" in message
        assert "--answers_from 1" in message
        return
    assert status == 0
    assert "".join(written["reference"] for written in run.rows()) == golds
    assert [written["extra_info"]["answer_idx"] for written in run.rows()] == ["abcd".index(gold) for gold in golds]


@pytest.mark.parametrize(
    ("choices", "answer", "printed", "gold"),
    [
        ([3, None, 2.5, True], 0, "[3, None, 2.5, True]", "3"),
        ([3, None, 2.5, True], 1, "[3, None, 2.5, True]", "None"),
        (["it's", 'a "b"', "狗"], 2.0, "[\"it's\", 'a \"b\"', '狗']", "狗"),
    ],
)
def test_choices_are_printed_as_python_prints_the_list(run, choices, answer, printed, gold):
    assert run([row(1, multi_choice=choices, answer=answer)], "--no_check_audio") == 0
    [written] = run.rows()
    assert f"following options: {printed}. Output" in written["prompt"][0]["content"][1]["text"]
    assert written["reference"] == written["reward_model"]["ground_truth"] == gold
    info = written["extra_info"]
    assert info["multi_choice"] == [str(choice) for choice in choices]
    assert info["multi_choice"][info["answer_idx"]] == gold


def test_both_layouts_and_disguises_give_the_same_rows(run):
    rows = [row(number, question_text="Which video,\u2028 said the 狗?") for number in range(3)]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    inputs = {
        "lines": lines.encode(),
        "bom, crlf and blank lines": b"\xef\xbb\xbf\r\n" + lines.replace("\n", "\r\n \r\n").encode() + b"\r\n\r\n",
        "array": json.dumps(rows).encode(),
        "indented array with bom": b"\xef\xbb\xbf " + json.dumps(rows, indent=2).encode() + b"\n",
    }
    results = {}
    for name, data in inputs.items():
        assert run(data, "--no_check_audio") == 0, name
        results[name] = run.rows()
    assert [r["audio_path"] for r in results["lines"]] == [str(run.audio / wav_of(n)) for n in range(3)]
    assert all(result == results["lines"] for result in results.values())


@pytest.mark.parametrize(
    ("tail", "says"),
    [
        ("", "line 4: the array is not closed, after 2 whole rows"),
        (",", "line 4: '' is no JSON value"),
        ("\n]\n]", "line 6: ']' follows the array's end"),
        ('\n{"id": 3}]', "line 5: ',' or ']' expected at '{'"),
    ],
)
def test_broken_array_is_an_error(run, capsys, tail, says):
    assert run(("[\n" + json.dumps(row(1)) + ",\n\n" + json.dumps(row(2)) + tail).encode()) == 2
    error = capsys.readouterr().err
    assert f"in.jsonl, {says}" in error and "Traceback" not in error
    assert not run.out.exists()


BAD_ROWS = [
    ("malformed_json", '{"id": 1, "question'),
    ("malformed_json", "[" * 5000),
    ("malformed_json", '{"id": ' + "9" * 5000 + "}"),
    *[("not_an_object", "[1, 2]")] * 10,
    ("not_an_object", "NaN"),
    *[("missing_field", row(1, **{name: None})) for name in row(1) if name != "id"],
    ("missing_field", {**row(1), "answer": None}),
    ("bad_id", row(1, id=True)),
    ("bad_id", row(1, id=float("nan"))),
    ("bad_question", row(1, question_text=" ")),
    ("bad_question", row(1, question_text=5)),
    ("too_few_choices", row(1, multi_choice=[])),
    ("too_few_choices", row(1, multi_choice=["a"], answer=0)),  # always right
    ("bad_choice", row(1, multi_choice="abc")),
    ("bad_choice", row(1, multi_choice=["a", float("nan")])),
    ("bad_choice", row(1, multi_choice=["a", ["b"]])),
    ("bad_choice", row(1, multi_choice=["a", " "])),
    ("answer_out_of_range", row(1, answer=4)),
    ("answer_out_of_range", row(1, answer=-1)),
    ("bad_answer", row(1, answer=True)),
    ("bad_answer", row(1, answer="1")),
    ("bad_answer", row(1, answer=0.5)),
    ("bad_answer", row(1, answer=float("nan"))),
    ("bad_video_name", row(1, video_name="../x_000030")),
    ("bad_video_name", row(1, video_name="noseconds")),
    ("bad_video_name", row(1, video_name=7)),
    ("bad_audio_path", row(1, audio_path="folder/")),
    ("bad_audio_path", row(1, audio_path="a\0.wav")),
    ("bad_audio_path", row(1, audio_path=False)),
    ("bad_dataset_name", row(1, dataset_name=3)),
    ("bad_question_type", row(1, question_type=["Where"])),
    ("bad_text", row(1, question_text="\ud800?")),
    ("bad_text", row(1, question_type="\ud800")),
    ("bad_text", row(1, multi_choice=["a", "\udfff"])),
    ("missing_field", {name: value for name, value in row(1).items() if name != "id"}),  # others have one
    ("duplicate_id", row(1000)),
    ("duplicate_id", row(1, id="1000")),
]


def test_every_bad_row_is_left_out_and_reported(run, capsys):
    rows = ["", row(1000), *[bad for _, bad in BAD_ROWS], row(1001)]
    assert run(rows, "--no_check_audio") == 0
    report = run.report()
    assert [problem["kind"] for problem in report["problems"]] == [kind for kind, _ in BAD_ROWS]
    assert [problem["line"] for problem in report["problems"]] == list(range(3, 3 + len(BAD_ROWS)))
    assert "was used before, on line 2" in report["problems"][-1]["reason"]
    assert [r["extra_info"]["index"] for r in run.rows()] == [0, len(BAD_ROWS) + 1]
    assert report["rows"]["read"] == len(BAD_ROWS) + 2 and report["rows"]["bad"] == len(BAD_ROWS)
    shown = capsys.readouterr().err
    counts = Counter(kind for kind, _ in BAD_ROWS)
    shown_rows = sum(min(10, count) for count in counts.values())  # ten of each kind
    assert shown.count("\n  line ") == shown_rows and f"... and {len(BAD_ROWS) - shown_rows} more" in shown
    assert "line 3: malformed_json: " in shown
    assert run(rows, "--no_check_audio", "--strict") == 2


def test_rows_without_ids_have_their_numbers(run):
    without = {field: value for field, value in row(1).items() if field != "id"}
    assert run(["{", without, without], "--no_check_audio") == 0
    assert [r["extra_info"]["id"] for r in run.rows()] == [2, 3]


def test_ids_that_are_not_all_numbers_become_text(run):
    assert run([row(1), row(2, id="a"), row(3, id=2**70)], "--no_check_audio") == 0
    assert [r["extra_info"]["id"] for r in run.rows()] == ["1", "a", str(2**70)]


def test_audio_path_resolution(run, tmp_path):
    write_wav(run.audio / "sub" / "nested.wav", 1)
    (run.audio / "folder.wav").mkdir()
    absolute = str(tmp_path / "else" / "where.wav")
    names = [absolute, "sub/nested.wav", "./sub/../sub/nested.wav", "lost/flat.wav", "./flat.wav"]
    names += ["sub/gone.wav", "sub/here.wav", r"sub\nested.wav", r"C:\x\here.wav", r"a\b.wav"]
    for name in ("here.wav", r"a\b.wav"):
        write_wav(run.audio / name, 1)
    resolve = avqa.make_resolver(os.path.relpath(run.audio))
    nested, flat = str(run.audio / "sub" / "nested.wav"), str(run.audio / "flat.wav")
    gone, here, odd = (str(run.audio / name) for name in ("sub/gone.wav", "here.wav", r"a\b.wav"))
    assert [resolve(name) for name in names] == [absolute, nested, nested, flat, flat, gone, here, nested, here, odd]


def make_audio(folder: Path) -> list[dict]:
    """Five clips for rows 0 to 4: two are fine; then no file, no sound, no audio. Row 5 hears clip 0 again."""
    write_wav(folder / wav_of(0), 1.0)
    write_wav(folder / wav_of(1), 3.0, rate=8000)
    write_wav(folder / wav_of(3), 0.0)
    (folder / wav_of(4)).write_bytes(b"no sound")
    return [*map(row, range(5)), row(5, video_name=row(0)["video_name"])]


def test_rows_without_audio_stay_in_and_are_reported(run, capsys):
    assert run(make_audio(run.audio)) == 0
    report = run.report()
    assert [r["extra_info"]["id"] for r in run.rows()] == list(range(6))
    kinds = [(problem["line"], problem["kind"]) for problem in report["problems"]]
    assert kinds == [(3, "audio_missing"), (4, "audio_unreadable"), (5, "audio_unreadable")]
    assert report["clips"] == {
        "checked": True,
        "train": 5,
        "validation": 0,
        "in_both_parts": 0,
        "missing": 1,
        "unreadable": 2,
        "silent": 0,
        "readable": 2,
        "hours": round(4 / 3600, 6),
        "seconds_min": 1.0,
        "seconds_median": 2.0,
        "seconds_max": 3.0,
        "longer_than_audio_seconds": 0,
        "sampling_rates": {"8000": 1, "16000": 1},
    }
    assert f"line 3: audio_missing: no such file: {run.audio / wav_of(2)}\n" in capsys.readouterr().err


def test_a_clip_that_begins_with_silence_is_judged_by_what_training_hears(run, capsys):
    write_wav(run.audio / wav_of(1), 1)
    soundfile.write(run.audio / wav_of(2), np.concatenate([np.zeros(32 * 8000), np.ones(8000)]), 8000)
    assert run([row(1), row(2)], "--skip_bad") == 0
    assert "zero; of its 33.0 s the first 30 are heard (--audio_seconds)\n" in capsys.readouterr().err
    assert run.report()["rows"]["audio_silent"] == run.report()["clips"]["silent"] == 1
    assert run([row(1), row(2)], "--skip_bad", "--audio_seconds", "32.5") == 0
    assert "longer than 32.5 s: 1, of which the first 32.5 s are heard (--audio_seconds)\n" in capsys.readouterr().err
    assert len(run.rows()) == 2


def test_messages_show_what_the_row_has(run, capsys):
    rows = [row(1, audio_path="kit/a.wav", question_type="drum"), row(2, question_text=None, qestion_text="?")]
    write_wav(run.audio / wav_of(3), 1)
    assert run([*rows, row(3, question_type=None, question_typ="drum")]) == 0
    shown = capsys.readouterr().err
    assert "  question types: drum 1, none 1\n" in shown
    assert f"no such file: {run.audio / 'a.wav'}, nor 'kit/a.wav' in --audio_dir" in shown
    assert "no question_text; the row has 'video_name'" in shown and "'qestion_text'; rename its fields, or" in shown


def test_skip_bad_and_strict(run, capsys):
    rows = make_audio(run.audio)
    assert run(rows, "--skip_bad") == 0
    assert [r["extra_info"]["id"] for r in run.rows()] == [0, 1, 5]
    counts = run.report()["rows"]
    assert (counts["read"], counts["written"], counts["left_out_for_audio"]) == (6, 3, 3)
    before = {path.name: path.read_bytes() for path in run.out.iterdir()}
    assert run(rows, "--strict") == 2
    assert run(rows[2:5], "--skip_bad") == 2  # none is left
    assert {path.name: path.read_bytes() for path in run.out.iterdir()} == before
    assert "--strict: 0 unusable rows, 3 rows without audio" in capsys.readouterr().err
    assert run([*rows[:2], rows[5]], "--strict") == 0


def test_failed_write_leaves_the_old_files(run, monkeypatch, capsys):
    rows = [row(number) for number in range(10)]
    assert run(rows, "--no_check_audio", "--val_ratio", "0.2") == 0
    before = {path.name: path.read_bytes() for path in run.out.iterdir()}
    assert sorted(before) == ["report.json", "train.parquet", "validation.json", "validation.parquet"]

    def disk_full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aqa.data.prepare_avqa.dump_json", disk_full)  # the last of the files to be written
    assert run(rows[:5], "--no_check_audio") == 2
    assert {path.name: path.read_bytes() for path in run.out.iterdir()} == before
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(rows[:5], "--no_check_audio") == 0
    assert sorted(path.name for path in run.out.iterdir()) == ["report.json", "train.parquet"]
    assert "validation.parquet of an earlier run was removed" in capsys.readouterr().err


def test_split_shares_no_clip_and_follows_the_seed(run):
    rows = [row(number, video_name=row(number // 3)["video_name"]) for number in range(60)]
    parts = {}
    for seed in ("1", "1", "2"):
        assert run(rows, "--no_check_audio", "--val_ratio", "0.27", "--seed", seed) == 0
        train, validation = run.rows("train"), run.rows("validation")
        ids = [r["extra_info"]["id"] for r in validation]
        assert len(ids) == 15 and len(train) == 45  # of 16 wanted, since clips of three rows are not cut
        assert not {r["audio_path"] for r in train} & {r["audio_path"] for r in validation}
        assert run.report()["clips"]["in_both_parts"] == 0
        assert parts.setdefault(seed, ids) == ids
        questions = json.loads((run.out / "validation.json").read_text())
        assert [question["id"] for question in questions] == list(map(str, ids))
        for question, held_out in zip(questions, validation, strict=True):
            asked = held_out["extra_info"]
            assert (question["question"], question["choices"]) == (asked["question_text"], asked["multi_choice"])
            assert (question["audio_id"], question["answer"]) == (held_out["audio_path"], held_out["reference"])
    assert parts["1"] != parts["2"]


def test_split_is_that_of_the_clips_wherever_they_lie():
    clips = [f"/a/{number % 20}.wav" for number in range(40)]
    _, validation = avqa.split_by_clip(clips, 0.3, 7)
    _, moved = avqa.split_by_clip([clip.replace("/a/", "/b/./") for clip in reversed(clips)], 0.3, 7)
    assert {clips[i] for i in validation} == {clips[39 - i] for i in moved} and len(validation) == 12
    for ratio, empty in ((0.01, "validation"), (0.99, "training")):
        with pytest.raises(avqa.AvqaError, match=f"leaves the {empty} part empty"):
            avqa.split_by_clip(clips[:20], ratio, 7)


def test_the_thinking_of_a_field_is_kept(run, capsys):
    rows = [row(n, cot=text) for n, text in enumerate((" a dog barks ", "half \ud800"))]
    flags = ("--no_check_audio", "--thinking_field", "cot")
    assert run(rows, *flags, "--enable_think") == 0
    assert [r["thinking"] for r in run.rows()] == ["a dog barks", "half ?"]
    assert run(rows, *flags) == 2 and "add --enable_think" in capsys.readouterr().err
    assert run([row(1)], *flags, "--enable_think") == 2
    assert "--thinking_field cot: 1 of 1 rows have no text" in capsys.readouterr().err


def test_split_by_a_field_keeps_whole_groups(run, capsys):
    """Ten speakers of four clips each; one recording of s0 is also s1's, byte for byte, under another name."""
    rows = [row(n, audio_path=f"{n}.wav", speaker=f"s{n % 10}") for n in range(40)]
    for number in range(40):
        (run.audio / f"{number}.wav").write_bytes(b"no sound, but a file " + bytes([number if number != 1 else 0]))
    seen = []
    for ratio, speakers in ((0.3, (3,)), (0.05, (1, 2)), (0.3, (3,))):  # 2 rows of 40: half a speaker's
        assert run(rows, "--val_ratio", str(ratio), "--split_by", "speaker") == 0
        held_out = {r["extra_info"]["id"] % 10 for r in run.rows("validation")}
        assert not held_out & {r["extra_info"]["id"] % 10 for r in run.rows("train")}
        assert len(held_out) in speakers and (0 in held_out) == (1 in held_out)
        seen.append(held_out)
    assert seen[0] == seen[2]
    assert "validation: 30.0% of the rows were asked for, 30.0% are in it" in capsys.readouterr().err
    lack = [*rows[:-2], *(row(n, audio_path=f"{n}.wav", speaker=s) for n, s in ((38, math.nan), (39, " ")))]
    all_alike = [r | {"speaker": (1, 1.0, "1 ")[n % 3]} for n, r in enumerate(rows)]
    for wrong, says in ((lack, "2 of 40 rows have no text or number there"), (all_alike, "all 40 rows are one")):
        assert run(wrong, "--val_ratio", "0.3", "--split_by", "speaker") == 2
        assert says in capsys.readouterr().err


def test_second_file_is_the_validation_part(run, tmp_path, capsys):
    rows = [row(n, audio_path=f"{n}.wav", speaker=f"s{n}") for n in range(6)]
    for number in range(7):
        (run.audio / f"{number}.wav").write_bytes(b"sound " + bytes([number % 6]))  # 6.wav is 0.wav again
    other = tmp_path / "other.jsonl"
    for n, speaker, flags, says in (
        (5, "s5", [], None),
        (5, "s0", [], None),
        (0, "s5", [], "0.wav: the same file as"),
        (6, "s5", [], "6.wav: the same content as"),
        (5, "s0", ["--split_by", "speaker"], "5.wav: the same speaker as"),
        (6, "s6", ["--split_by", "speaker"], "6.wav: the same content as"),
        (5, "s5", [], None),
    ):
        other.write_text(json.dumps(row(n, audio_path=f"{n}.wav", speaker=speaker)))
        assert run(rows[:5], "--val_file", str(other), *flags) == (2 if says else 0)
        assert (says or "validation.parquet: 1 rows") in capsys.readouterr().err
    assert [r["extra_info"]["id"] for r in run.rows("validation")] == [5] and len(run.rows("train")) == 5


def test_types_that_held_out_rows_cannot_measure_are_said(run, tmp_path, capsys):
    def rows(first: int, kinds: str, answers: tuple[int, ...]) -> list[dict]:
        numbered = enumerate(zip(kinds.split(), answers, strict=True), first)
        return [row(n, question_type=kind, answer=answer) for n, (kind, answer) in numbered]

    held_out = rows(10, "kit kit room room echo hall", (1, 1, 0, 1, 0, 2))
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    flags = ("--val_file", str(tmp_path / "other.jsonl"), "--no_check_audio")
    assert run(rows(0, "kit kit room room voice hall", (0, 1, 1, 0, 0, 2)), *flags) == 0
    assert capsys.readouterr().err.partition("WARNING: ")[2] == (
        "held-out rows cannot show what is learned of these question types:\n"
        "  kit: 2 rows in training, 2 in validation, which all have the answer 'Yacht consignment'\n"
        "  voice: 1 rows in training, 0 in validation\n"
        "  echo: 0 rows in training, 1 in validation\n"
    )


@pytest.mark.parametrize(("count", "choices", "warned"), [(20, 4, True), (19, 4, False), (20, 2, False)])
def test_an_answer_that_is_right_in_most_rows_is_warned_of(run, capsys, count, choices, warned):
    rows = [row(n, multi_choice=list("abcd")[:choices], answer=int(n < 9), question_type="kit") for n in range(count)]
    assert run(rows, "--no_check_audio") == 0
    assert capsys.readouterr().err.count("WARNING: one answer is right in most training rows") == warned


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--input_jsonl", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--input_jsonl", "."], "a folder; name the file in it"),
        (["--input_jsonl", sys.executable], "is no text, but perhaps a recording"),
        (["--audio_dir", __file__], "not a folder; name the one that holds the .wav files"),
        (["--local_save_dir", __file__], "is no folder that can be written to"),
        (["--val_ratio", "nan"], "--val_ratio nan: expected 0 <= ratio < 1"),
        (["--val_ratio", "1"], "--val_ratio 1.0: expected"),
        (["--val_ratio", "-0.1"], "--val_ratio -0.1: expected"),
        (["--num_workers", "0"], "--num_workers 0: expected at least 1"),
        (["--skip_bad", "--no_check_audio"], "drop one"),
    ],
)
def test_settings_are_checked_before_anything_is_read(run, capsys, flags, says):
    assert run([row(1)], *flags) == 2
    assert says in capsys.readouterr().err
    assert not run.out.exists()


@pytest.mark.parametrize("data", [b"", b"\n\n", b"[]", b"\xff\xfe[\0", b"garbage", b"[1]", b"\xff\n[\xff", b"[\xff"])
def test_no_usable_row_is_an_error(run, data):
    assert run(data) == 2
    assert not run.out.exists()


def test_a_folder_without_any_of_the_recordings_is_refused(run, capsys):
    assert run([row(1), row(2)]) == 2 and not run.out.exists()
    assert f"--audio_dir {run.audio}: holds none of the recordings: no such file" in capsys.readouterr().err
    run.audio.rmdir()
    assert run([row(1), row(2)]) == 2 and not run.out.exists()
    assert f"--audio_dir {run.audio}: no such folder. Correct it" in capsys.readouterr().err


def test_what_a_killed_run_left_is_removed_and_a_running_one_is_not_disturbed(run):
    run.out.mkdir()
    left = [".train.parquet.0123abcd.tmp", ".report.json.89abcdef.part"]  # of an earlier version, of this one
    kept = [".train.parquet.tmp", "notes.part", ".bashrc"]
    for name in left + kept:
        (run.out / name).write_text("x")
    with lock(run.out / ".lock", "the first"):
        assert run([row(0)], "--no_check_audio") == 2
    assert sorted(os.listdir(run.out)) == sorted(left + kept)
    assert run([row(0)], "--no_check_audio") == 0
    assert sorted(os.listdir(run.out)) == sorted(["train.parquet", "report.json", *kept])


PATHS = ("--input_jsonl", "in.jsonl", "--audio_dir", ".", "--local_save_dir", "out", "--no_check_audio")


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_38000_rows_take_seconds(tmp_path):
    with open(tmp_path / "in.jsonl", "w") as file:
        file.writelines(json.dumps({**R1_ROW, "id": n, "audio_path": f"wavs/{n}.wav"}) + "\n" for n in range(38000))
    cpu = cpu_of_children()
    run_command(sys.executable, avqa.__file__, *PATHS, cwd=tmp_path)
    assert pq.read_metadata(tmp_path / "out" / "train.parquet").num_rows == 38000
    # processor time, which other jobs on the machine lengthen less than the time on the clock
    assert cpu_of_children() - cpu < 4


def test_runtime_needs_neither_datasets_nor_torch(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(R1_ROW))
    code = "import sys, avqa; status = avqa.main(sys.argv[1:]); "
    code += "print(status, sorted({'datasets', 'torch', 'soundfile', 'tqdm'} & set(sys.modules)))"
    assert run_code(code, *PATHS, path=[Path(avqa.__file__).parent], cwd=tmp_path).stdout == "0 []\n"
