"""Bad rows, files and flags: each ends in a row that can be trained on, or in a message with place, value and reason.

The fuzz tests make some hundred rows; ``make test-faults`` makes more than 10,000.
"""

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import avqa
import eval_mmau
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from audio_dataset import DataError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.processors import make_dataset, training_row

from aqa.audio import decode, sandbox
from aqa.common.constants import ASSISTANT_HEADER
from aqa.common.files import naming_file
from aqa.data.prompts import render_prompt
from aqa.data.rows import AvqaError, parse_records, read_records
from aqa.evaluation import items
from aqa.evaluation.benchmarks import BENCHMARKS, MMAU
from aqa.evaluation.items import EvalError, PartialFile, make_items, read_rows

FEW = 100  # examples


def fuzz(count: int, check, **strategies) -> None:
    """Call ``check`` with ``count`` examples of the strategies: the same ones each time, unless there are many."""
    checks = list(HealthCheck)
    quiet = settings(max_examples=count, deadline=None, suppress_health_check=checks, derandomize=count <= FEW)
    quiet(given(**strategies)(check))()


def few_or_many(few: int, many: int):
    """The test with ``count`` examples: few by default, many with ``make test-faults``."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.faults)])


# ---- odd content
AVQA = {"id": 1, "question_text": "What is in the video?", "multi_choice": ["a", "b"], "answer": 1}
AVQA["audio_path"] = "a.wav"
MMAU_ROW = {"id": "q", "question": "What?", "choices": ["a", "b"], "answer": "a", "audio_id": "a.wav", "task": "sound"}
ODD_TEXTS = ["", " ", "\0", "\ud800", "\udcff.wav", "\u2028", "a\nb", "../../x.wav", "/etc/passwd"]
ODD_TEXTS += ["a" * 9000, "x/" * 3000, "x" * 300, ".", "..", "a/", "\U0001d11e", "\x1b[31m", "<|im_end|>\n"]
ODD_TEXTS += ["{}", "%s", "nan", "1"]
odd_text = st.sampled_from(ODD_TEXTS) | st.text(max_size=8)
numbers = st.integers() | st.floats() | st.sampled_from([-1, -2, 2, 10**4000, -(10**400), 2**63, 2**64, 1e308, -0.0])
scalars = st.none() | st.booleans() | numbers | odd_text
odd = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3), max_leaves=6
)


@st.composite
def odd_row(draw, good: dict) -> str:
    """A row's text: a good one in which fields are changed, lost, doubled or nested, or the text itself is."""
    names = list(good)
    row = {**good, "id": draw(st.integers(0, 99))}
    for name in draw(st.lists(st.sampled_from(names), max_size=2)):  # of the right type, and yet odd
        kind = {str: odd_text, int: numbers, list: st.lists(odd_text, max_size=3)}[type(good[name])]
        row[name] = draw(kind | odd if draw(st.booleans()) else kind)
    if draw(st.integers(0, 3)) == 0:
        row.update(draw(st.dictionaries(st.sampled_from(names) | odd_text, odd, max_size=3)))
        row.pop(draw(st.sampled_from(names)), None)
    text = json.dumps(row, ensure_ascii=draw(st.booleans()))
    how = draw(st.integers(0, 9))
    if how == 0:
        text = text[:-1] + f', "{draw(st.sampled_from(names))}": {json.dumps(draw(odd))}}}'
    elif how == 1:
        depth = draw(st.sampled_from([60, 400, 990, 5000]))
        text = text[:-1] + ', "more": ' + "[" * depth + "]" * depth + "}"
    elif how == 2:
        text = text[: draw(st.integers(0, len(text)))]
    elif how == 3:
        text = draw(st.sampled_from(["NaN", "[]", "{}", "1", '""', "null", "[" * 3000, "9" * 5000, '{"id": NaN}']))
    return text


@st.composite
def odd_file(draw, good: dict) -> bytes:
    """A file's bytes: JSON lines or an array of odd rows, sometimes with a byte changed."""
    rows = [json.dumps(good), *draw(st.lists(odd_row(good), max_size=4))]
    as_array = draw(st.booleans())
    text = "[" + ",\n".join(rows) + "]" if as_array else draw(st.sampled_from(["\n", "\r\n", "\n\n \n"])).join(rows)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    how = draw(st.integers(0, 9))
    if how == 0 and data:
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    elif how == 1:
        data[:0] = draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\n\n", b"PK\x03\x04"]))
    elif how == 2:
        data[draw(st.integers(0, len(data))) :] = draw(st.binary(max_size=30))
    return bytes(data)


def check_message(message: str, limit: int = 20_000) -> None:
    """A message is for people: some lines, of a length that a screen can show, without a raw control character."""
    assert message.strip()
    assert len(message) < limit
    assert all(line.isprintable() for line in message.splitlines()), ascii(message[:400])


# ---- AVQA's two forms
@few_or_many(80, 1500)
def test_every_avqa_row_is_good_or_explained(count):
    accepted, refused = [], []

    def check(data):
        try:
            records = read_records(data, "in.jsonl")
        except AvqaError as error:
            check_message(str(error))
            assert "in.jsonl" in str(error)
            return
        lines = len(data.splitlines()) + data.count(b"\r")
        rows, problems = parse_records(records, enable_think=False)
        assert sorted([r.index for r in rows] + [p.index for p in problems]) == list(range(len(records)))
        assert len({str(row.id) for row in rows}) == len(rows)
        accepted.extend(rows)
        refused.extend(problems)
        for problem in problems:
            check_message(problem.reason, 600)
            assert problem.kind
            assert 1 <= problem.line <= lines
        for row in rows:
            assert isinstance(row.id, (int, str)) and not isinstance(row.id, bool) and row.id != ""
            assert row.question.strip() and row.gold.strip()
            assert 0 <= row.answer_idx < len(row.choices) and row.gold == row.choices[row.answer_idx]
            assert all(isinstance(choice, str) for choice in row.choices)
            assert row.question.replace("video", "audio") in row.prompt
            assert "\0" not in row.audio_name and os.path.basename(row.audio_name) not in ("", ".", "..")
            source = records[row.index].value
            expected = source["question_text"], str(source["multi_choice"][int(source["answer"])])
            assert (row.question, row.gold) == expected
            assert 1 <= row.line <= lines
        if rows:
            table = avqa.build_table(rows, [f"/x/{row.audio_name}" for row in rows], "avqa_rule")
            table.validate(full=True)
            assert table["reference"].to_pylist() == [row.gold for row in rows]

    fuzz(count, check, data=odd_file(AVQA) | st.binary(max_size=60))
    assert min(len(accepted), len(refused)) > count / 8  # what is always refused, or never, shows nothing


@pytest.mark.parametrize("array", [False, True])
def test_a_key_that_occurs_twice_makes_the_row_ambiguous(array):
    text = json.dumps(AVQA)
    twice = text.replace('"answer": 1', '"answer": 0, "answer": 1')
    source = f"[{text},\n{twice}]" if array else f"{text}\n{twice}"
    rows, problems = parse_records(read_records(source.encode(), "in"), False)
    assert [row.line for row in rows] == [1]
    assert [(p.line, p.kind) for p in problems] == [(2, "malformed_json")]
    assert "the key 'answer' occurs twice" in problems[0].reason


@few_or_many(20, 150)
def test_avqa_ends_with_a_documented_status_and_a_message(tmp_path, capsys, count):
    audio, out = tmp_path / "audio", tmp_path / "out"
    audio.mkdir()
    soundfile.write(audio / "a.wav", np.ones(800) / 2, 16_000)

    def check(data, flags):
        if {"--skip_bad", "--strict"} <= flags:
            flags = flags - {"--strict"}
        (tmp_path / "in.jsonl").write_bytes(data)
        for path in out.glob("*"):
            path.unlink()
        paths = ["--input_jsonl", tmp_path / "in.jsonl", "--audio_dir", audio, "--local_save_dir", out]
        status = avqa.main([*map(str, paths), *flags])
        said = capsys.readouterr().err
        assert status in (0, 2)
        assert "Traceback" not in said
        assert ("avqa.py: error: " in said) == (status == 2)
        assert (out / "train.parquet").exists() == (status == 0)
        if status == 0:
            report = json.loads((out / "report.json").read_text())
            rows = pq.read_table(out / "train.parquet").to_pylist()
            left_out = report["rows"]["bad"] + report["rows"]["left_out_for_audio"]
            assert len(rows) + left_out == report["rows"]["read"]
            if "--confine_audio" in flags:
                assert all(os.path.realpath(row["audio_path"]).startswith(f"{audio}/") for row in rows)
            if "--skip_bad" in flags:
                assert all(os.path.realpath(row["audio_path"]) == str(audio / "a.wav") for row in rows)

    flags = st.sets(st.sampled_from(["--confine_audio", "--skip_bad", "--strict", "--enable_think"]))
    fuzz(count, check, data=odd_file(AVQA), flags=flags)


# ---- benchmarks' questions
@few_or_many(80, 800)
def test_every_question_is_good_or_explained(tmp_path, count):
    path, accepted = tmp_path / "q.json", []

    def check(data, benchmark, confine):
        path.write_bytes(data)
        try:
            kind, rows = read_rows(path, benchmark)
            questions = make_items(rows, kind, tmp_path, False, confine)
        except EvalError as error:
            check_message(str(error).replace(str(tmp_path), ""))
            assert any(word in str(error) for word in ("q.json", "item "))
            return
        assert len(questions) == len(rows) > 0
        accepted.extend(questions)
        for item, row in zip(questions, rows, strict=True):
            assert item.prompt == render_prompt(row["question"], row["choices"], False)
            item.prompt.encode("utf-8")
            assert item.row == (row if item.gold is None else row | {"answer": item.gold})
            if confine:
                assert str(item.audio.resolve()).startswith(f"{tmp_path.resolve()}{os.sep}")
        results = items.result_rows(questions, [("a", "raw")] * len(questions), kind, False)
        for name in ("out.json", "out.jsonl"):
            items.write_rows(results, tmp_path / name)
            assert repr(read_rows(tmp_path / name, kind.name)[1]) == repr(results)

    data = odd_file(MMAU_ROW) | st.binary(max_size=60)
    # half as MMAU's own, so that some are accepted: to most other benchmarks a row of MMAU lacks fields
    benchmark = st.just("mmau") | st.sampled_from(["auto", *BENCHMARKS])
    fuzz(count, check, data=data, benchmark=benchmark, confine=st.booleans())
    assert accepted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "what\ud800?"}, r"item 2 \(id q\): half a surrogate pair in 'what\\ud800\?'"),
        ({"choices": ["a", "\udfff"]}, "item 2 .*half a surrogate pair"),
        ({"audio_id": "\ud800.wav"}, "item 2 .*half a surrogate pair"),
        ({"audio_id": "a\0.wav"}, r"item 2 .*audio_id is 'a\\x00.wav', expected the path of a file"),
        ({"id": "\x1b[2J"}, None),
        ({"audio_id": "x" * 300}, None),  # a file that is missing, which is found later
        ({"audio_id": "x/" * 3000}, None),
    ],
)
def test_questions_that_would_fail_later_are_refused_at_once(tmp_path, change, message):
    rows = [MMAU_ROW, MMAU_ROW | change]
    if message is None:
        assert len(make_items(rows, MMAU, tmp_path, False)) == 2
        return
    with pytest.raises(EvalError, match=message) as error:
        make_items(rows, MMAU, tmp_path, False)
    check_message(str(error.value))


@pytest.mark.parametrize("depth", [60, 400, 900])
def test_a_row_nested_deeper_than_can_be_written_is_refused(tmp_path, depth):
    (tmp_path / "q.json").write_text(json.dumps(MMAU_ROW)[:-1] + ', "more": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(EvalError, match="line 1: nested"):
        read_rows(tmp_path / "q.json")


@few_or_many(30, 200)
def test_an_odd_partial_file_is_continued_or_refused(tmp_path, count):
    identity = {"model": "m"}
    partial = PartialFile(tmp_path / "p.jsonl", identity)

    def check(data):
        partial.path.write_bytes((json.dumps(identity) + "\n" + data + "\n").encode("utf-8", "surrogatepass"))
        try:
            done = partial.load()
        except EvalError as error:
            assert "damaged" in str(error) and "--overwrite" in str(error)
            return
        assert all(isinstance(key, int) and isinstance(value, str) for key, value in done.items())

    lines = st.lists(odd.map(json.dumps) | st.text(max_size=9), max_size=4).map("\n".join)
    fuzz(count, check, data=lines | st.text(max_size=40))


# ---- training's parquet
@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clip") / "a.wav"
    soundfile.write(path, np.ones(800) / 2, 16_000)
    return str(path)


@st.composite
def odd_columns(draw, clip: str) -> dict:
    part = {"type": "audio", "audio_url": clip, "text": None}
    odd_paths = [None, "", "gone.wav", 7, b"x", "/dev/zero", "a\0b", "\ud800"]

    def row() -> dict:
        text = {"type": "text", "audio_url": None, "text": draw(st.just("What?") | odd_text)}
        contents = [[part, text]] * 40 + [[text], [text, part, part], [], None, "What?", [None], [{}], 5]
        message = {"role": "user", "content": draw(st.sampled_from(contents))}
        message = draw(st.sampled_from([message] * 20 + [{}, None, {"role": 1, "content": "x"}]))
        return {
            "prompt": draw(st.sampled_from([[message]] * 30 + [[], None, "text", 5, message, [message] * 2])),
            "audio_path": draw(st.sampled_from([clip] * 40 + odd_paths)),
            "reference": draw(odd) if draw(st.integers(0, 5)) == 5 else "dog",
            "label": draw(st.just("x") | scalars),
        }

    rows = [row() for _ in range(draw(st.integers(0, 3)))]
    names = ["prompt", "audio_path", "reference", "label"]
    columns = {name: [row[name] for row in rows] for name in names}
    if draw(st.integers(0, 9)) == 0:
        columns.pop(draw(st.sampled_from(names)))
    return columns


NAMED = ("row ", "no row", ".wav", "no column", "/dev/zero", "a\\x00b", ": is relative")  # one is in each message


def check_dataset(columns, count: int) -> int:
    """How many rows were accepted."""
    try:
        dataset = make_dataset(columns)
    except DataError as error:
        check_message(str(error))
        assert any(word in str(error) for word in NAMED) and "avqa.py" in str(error)
        return 0
    assert len(dataset) == count > 0
    for prompt, audio, reference, label in map(dataset.__getitem__, range(count)):
        assert prompt.endswith(ASSISTANT_HEADER) and prompt.count(ASSISTANT_HEADER) == 1
        assert prompt.count("<|AUDIO|>") == (audio is not None)
        assert audio is None or audio[0].any()
        assert reference.strip() and reference.encode("utf-8")
        assert label is None or isinstance(label, str)
    return count


@few_or_many(100, 2500)
def test_every_training_row_is_good_or_named(clip, count):
    accepted = []

    def check(columns):
        accepted.append(check_dataset(columns, max(map(len, columns.values()), default=0)))

    fuzz(count, check, columns=odd_columns(clip))
    assert 0 < sum(map(bool, accepted)) < count


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", 5, "row 1: --label_key: 5 is no text"),
        ("reference", "\ud800", r"row 1: --reference_key: '\\ud800' cannot be stored"),
        ("audio_path", 7, "row 1: --images_key: 7 is no path"),
        ("prompt", "What?", r"row 1: --input_key: 'What\?' is no list of chat messages"),
        ("prompt", [{"role": "user", "content": [{"type": "image"}]}], "row 1: --input_key: .* is no part of type"),
        ("prompt", [{"role": "user", "content": "\ud800"}], "row 1: --input_key: content is"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_row_and_flag(clip, column, value, message):
    row = training_row(clip)
    with pytest.raises(DataError, match=message):
        make_dataset({name: [good, value if name == column else good] for name, good in row.items()})
    assert len(make_dataset({name: [good] for name, good in row.items()})) == 1


def test_a_missing_column_is_named_with_its_flag():
    with pytest.raises(DataError, match=r"no column 'audio_path', which --images_key names; its columns are prompt, "):
        make_dataset({"prompt": [], "reference": [], "label": []})


# ---- status, --debug, umask


AVQA_FLAGS = "--input_jsonl {0}/in --audio_dir {0} --local_save_dir {0}/out"
EVAL_FLAGS = "--data_file {0}/in --audio_dir {0} --model_path none --out_file {0}/out.json"


@pytest.mark.parametrize(
    ("main", "command", "message"),
    [
        (avqa.main, AVQA_FLAGS, "no usable row"),
        (avqa.main, AVQA_FLAGS + " --input_jsonl none", "no such file"),
        (eval_mmau.main, EVAL_FLAGS, "1 of 1 rows cannot be read"),
        (eval_mmau.main, EVAL_FLAGS + " --data_file {0}", "a folder; name the file in it"),
        (eval_mmau.main, "score {0}/in", "1 of 1 rows cannot be read"),
        (eval_mmau.main, "compare {0}/none {0}/none", "No such file"),
    ],
)
def test_a_mistake_ends_with_2_and_debug_shows_where(tmp_path, capsys, main, command, message):
    (tmp_path / "in").write_text("{")
    command = command.format(tmp_path).split()
    for flags, traced in (([], False), (["--debug"], True)):
        assert main([*command, *flags]) == 2
        said = capsys.readouterr().err
        assert message in said and ("Traceback (most recent call last)" in said) is traced


def test_a_folder_that_cannot_be_written_ends_with_a_message(tmp_path, capsys, monkeypatch):
    def full(*_):
        with naming_file(tmp_path / "out.json"):  # a write to a full disk does not know whose it is
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(eval_mmau, "evaluate", full)
    assert eval_mmau.main(EVAL_FLAGS.format(tmp_path).split()) == 2
    assert "out.json: No space left on device; make room there" in capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path, umask):
    (tmp_path / "in").write_text(json.dumps(AVQA))
    (tmp_path / "result.json").write_text(json.dumps([MMAU_ROW | {"model_output": "a"}]))
    before = os.umask(umask)
    try:
        assert avqa.main(f"{AVQA_FLAGS}/deep --no_check_audio".format(tmp_path).split()) == 0
        assert eval_mmau.main(["score", f"{tmp_path}/result.json", "--out_file", f"{tmp_path}/score.json"]) == 0
        items.write_rows([MMAU_ROW], tmp_path / "rows.json")
        PartialFile(tmp_path / "p.jsonl", {}).append([(0, "x")])
    finally:
        os.umask(before)
    made = [tmp_path / name for name in ("out", "out/deep", "score.json", "rows.json", "p.jsonl")]
    made += list((tmp_path / "out/deep").iterdir())
    assert len(made) == 7
    for path in made:
        rights = stat.S_IMODE(path.stat().st_mode)
        assert rights == (0o777 if path.is_dir() else 0o666) & ~umask, path


# ---- --confine_audio, --sandbox_audio
@pytest.fixture
def hostile(tmp_path) -> Path:
    """audio/ with a clip, a damaged and a silent one, links that lead out, and a secret beside it."""
    (tmp_path / "audio/sub").mkdir(parents=True)
    soundfile.write(tmp_path / "secret.wav", np.ones(800) / 2, 16_000)
    soundfile.write(tmp_path / "audio/good.wav", np.ones(800) / 2, 16_000)
    soundfile.write(tmp_path / "audio/silent.wav", np.zeros(800), 16_000)
    soundfile.write(tmp_path / "audio/nan.wav", np.full(800, np.nan), 16_000, subtype="FLOAT")
    (tmp_path / "audio/link.wav").symlink_to("../secret.wav")
    (tmp_path / "audio/inside.wav").symlink_to("good.wav")
    return tmp_path


NAMES = ["good.wav", "inside.wav", "../secret.wav", "{}/secret.wav", "link.wav", "sub/../../secret.wav"]


def test_avqa_confines_audio(hostile, capsys):
    names = [name.format(hostile) for name in NAMES]
    rows = [AVQA | {"id": i, "audio_path": name} for i, name in enumerate(names)]
    (hostile / "in").write_text("\n".join(map(json.dumps, rows)))
    args = ["--input_jsonl", hostile / "in", "--audio_dir", hostile / "audio", "--local_save_dir", hostile / "out"]
    assert avqa.main([*map(str, args)]) == 0
    assert pq.read_metadata(hostile / "out/train.parquet").num_rows == 6
    capsys.readouterr()
    assert avqa.main([*map(str, args), "--confine_audio", "--skip_bad"]) == 0
    said = capsys.readouterr().err
    assert [row["extra_info"]["id"] for row in pq.read_table(hostile / "out/train.parquet").to_pylist()] == [0, 1]
    report = json.loads((hostile / "out/report.json").read_text())
    assert report["rows"]["bad_by_reason"] == {"audio_outside": 4}
    assert (
        f"line 3: audio_outside: audio_path '../secret.wav' leads to {hostile}/secret.wav, outside --audio_dir" in said
    )
    assert avqa.main([*map(str, args), "--confine_audio", "--strict"]) == 2
    (hostile / "in").write_text(json.dumps(rows[3]))
    assert avqa.main([*map(str, args), "--confine_audio"]) == 2


def test_the_evaluation_confines_audio(hostile):
    rows = [MMAU_ROW | {"id": i, "audio_id": name.format(hostile)} for i, name in enumerate(NAMES)]
    assert len(make_items(rows, MMAU, hostile / "audio", False)) == 6
    with pytest.raises(EvalError) as error:
        make_items(rows, MMAU, hostile / "audio", False, confine=True)
    assert str(error.value).startswith("4 of 6 questions")
    assert f"item 3 (id 2): audio_id '../secret.wav' leads to {hostile}/secret.wav, outside --audio_dir" in str(
        error.value
    )
    assert len(make_items(rows[:2], MMAU, hostile / "audio", False, confine=True)) == 2


@pytest.mark.parametrize("sandbox", [(), ("--sandbox_audio",)])
def test_avqa_decodes_what_the_model_will_hear(hostile, sandbox):
    rows = [AVQA | {"id": i, "audio_path": f"{n}.wav"} for i, n in enumerate(["good", "silent", "nan", "gone"])]
    (hostile / "in").write_text("\n".join(map(json.dumps, rows)))
    args = ["--input_jsonl", hostile / "in", "--audio_dir", hostile / "audio", "--local_save_dir", hostile / "out"]

    assert avqa.main([*map(str, args), *sandbox]) == 0
    found = json.loads((hostile / "out/report.json").read_text())["problems"]
    assert [problem["id"] for problem in found] == [1, 2, 3]
    assert "digital silence" in found[0]["reason"] and "NaN" in found[1]["reason"]
    assert avqa.main([*map(str, args), "--no_check_audio", *sandbox]) == (2 if sandbox else 0)


def test_the_evaluation_decodes_in_the_sandbox_and_reports_silence(hostile, monkeypatch, capsys):
    rows = [MMAU_ROW | {"id": name, "audio_id": f"{name}.wav"} for name in ("good", "silent")]
    (hostile / "q.json").write_text(json.dumps(rows))
    used = []
    load = sandbox.Sandbox.load
    monkeypatch.setattr(sandbox.Sandbox, "load", lambda box, *a, **k: used.append(a) or load(box, *a, **k))
    monkeypatch.setattr(decode.soundfile, "SoundFile", lambda *_: pytest.fail("decoded in this process"))
    monkeypatch.setattr(
        "eval_mmau.resolve_model", lambda *_: SimpleNamespace(note="", identity=dict, path="", adapter="")
    )

    class Engine:
        def __init__(self, *_) -> None:
            pass

        def answer(self, jobs, finished):
            for job in jobs:
                assert [len(wave) for wave in job.load()] == [800]
                yield [(job.index, ["a"])]

    processor = SimpleNamespace(tokenizer=lambda texts, **_: {"input_ids": texts})
    stubs = {"load_processor": lambda _: processor, "longest_sequence": lambda *_: 0, "render": lambda *_: "?"}
    for name, stub in (stubs | {"HFEngine": Engine}).items():
        monkeypatch.setattr(f"aqa.evaluation.engines.{name}", stub)
    base = ["--model_path", "m", "--data_file", hostile / "q.json", "--audio_dir", hostile / "audio"]
    assert eval_mmau.main([*map(str, base), "--out_file", str(hostile / "o.json"), "--sandbox_audio"]) == 0
    assert len(used) == 4
    assert "1 of 2 items are digital silence" in capsys.readouterr().err
    assert json.loads((hostile / "o.score.json").read_text())["digital_silence"] == ["silent"]
