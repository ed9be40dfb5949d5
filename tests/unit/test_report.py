"""What the report is made of: records, rollouts, clips, comparisons, settings. The page itself: test_report_page."""

import argparse
import base64
import csv
import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_dataset import AudioPromptDataset
from conftest import ROOT, run_script
from PIL import Image
from support.report_run import HOSTILE, PROMPT, make_result, make_run
from transformers import WhisperFeatureExtractor

from aqa.report import audio, held_out, listening, metrics, page, run_data
from aqa.training import run_config


# -------------------------------------------------------------------------------------------------------------- records
def test_metrics_of_a_killed_and_resumed_run(tmp_path):
    folder = make_run(tmp_path / "run", steps=4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x": 7.0}\n{"step": 5, "rollout/rew')
    run = run_data.read_run(folder)
    assert (run.steps, run.unread) == ([1, 2, 3, 4], 1)
    assert run.metrics["x"] == [None, None, None, 7.0]  # the later record of step 4 counts
    assert run.metrics["train/grad_norm"] == [None, 0.3, None, None]
    run_data.write_csv(run, tmp_path / "metrics.csv")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["train/grad_norm"] for row in rows] == ["", "0.3", "", ""]


@pytest.mark.parametrize("content", ["no json\n", '{"a": 1}\n'])
def test_a_folder_without_records_is_refused_by_name(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    done = run_script("report.py", tmp_path, check=False)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("question", "choices"),
    [
        ("What is it?", ["a", "b"]),
        (
            "It's \"odd\". Please choose the answer from the following options: ['x']. Output the rest?",
            ["it's", '"', "]."],
        ),
        ("Line\none", ["a\nb", "c"]),
    ],
)
def test_question_and_choices_come_back_from_the_prompt(question, choices):
    assert run_data.split_prompt(PROMPT.format(question=question, choices=choices)) == (question, choices)


def test_a_prompt_of_another_form_is_shown_whole():
    assert run_data.split_prompt("Say something.") == ("Say something.", None)
    text, choices = run_data.split_prompt(PROMPT.format(question="What?", choices="[" * 500 + "]"))
    assert choices is None and text.startswith("What? Please choose")


def test_groups_in_either_hosts_form(tmp_path):
    folder = make_run(tmp_path / "run", rollouts=True)
    path = run_data.saved_steps(folder / "trajectories", last=29)[15]
    first, second = run_data.read_groups(path, 15)
    assert (first.step, first.number, second.number) == (15, 0, 1)
    assert (first.gold, first.choices[:2]) == ("bell", ["bell", "rain"])
    assert [r["right"] for r in first.responses] == [True, False, True, False]
    assert [r["form"] for r in first.responses] == [True, True, True, False]
    assert [r["said"] for r in first.responses] == ["bell", HOSTILE[4], "bell", HOSTILE[3]]
    assert first.responses[0]["text"] == "<answer>bell</answer>"
    assert 30 not in run_data.saved_steps(folder / "trajectories", last=29)  # of an older, longer run
    prompt = PROMPT.format(question="What?", choices=["a", "b"])
    records = [
        {
            "full_sequence": f"<|endoftext|>{prompt}<answer>{said}</answer><|im_end|><|endoftext|>",
            "reference": "a",
            "info": {
                "reward": reward,
                "reward_metrics": {"accuracy_reward": [reward - 1], "format_reward": [1.0, 0.0]},
            },
            "advantages": [0.0, 0.5 if reward > 1 else -0.5, 0.0],
            "image_paths": ["audios/x.wav"],
        }
        for said, reward in (("a", 2.0), ("b", 1.0))
    ]
    (tmp_path / "trajectories_step_7.json").write_text(json.dumps(records))
    [group] = run_data.read_groups(tmp_path / "trajectories_step_7.json", 7)
    assert (group.question, group.choices, group.audio) == ("What?", ["a", "b"], tmp_path / "audios" / "x.wav")
    assert [(r["text"], r["right"], r["advantage"]) for r in group.responses] == [
        ("<answer>a</answer>", True, 0.5),
        ("<answer>b</answer>", False, -0.5),
    ]
    assert [r["form"] for r in group.responses] == [None, None]  # of a whole micro-batch: not known whose


def test_every_beginning_of_the_order_is_spread():
    assert [run_data.spread(n) for n in (0, 1, 2, 5)] == [[], [0], [1, 0], [4, 0, 2, 1, 3]]
    assert sorted(run_data.spread(77)) == list(range(77))
    assert sorted(run_data.spread(101)[:5]) == [0, 25, 50, 75, 100]


def test_rollouts_are_sampled_within_the_limits(tmp_path, capsys):
    folder = make_run(tmp_path / "run", rollouts=True)
    page.write_report(folder, [], tmp_path / "report.html", 3)
    warning = capsys.readouterr()
    assert re.search(r"WARNING: \d+ of \d+ sounds cannot be heard in the page: .* does not exist", "".join(warning))
    page.write_report(folder, [make_result(tmp_path / "run_result.json", 9)], tmp_path / "report.html", 3)
    assert '<span class="note">run_<wbr>result</span>' in (tmp_path / "report.html").read_text()  # where it may break

    def sample(most, room=10**7):
        clips = listening.Clips(room)
        groups, note = listening.sample_rollouts(folder, 30, most, clips)
        clips.name_all()
        return groups, note, clips.encoded

    groups, _, clips = sample(80)
    assert [(g["step"], g["number"]) for g in groups] == [(s, n) for s in (30, 15, 1) for n in (0, 1)]
    assert len(clips) == 5
    assert "does not exist" in groups[1]["silent"] and groups[1]["clip"] is None
    for group in groups[:1] + groups[2:]:
        assert clips[group["clip"]]["name"] == f'run/clip "{group["step"]}" <b>{group["number"]}.wav'
    assert [g["step"] for g in sample(2)[0]] == [30, 30]  # the last step comes first
    two_steps = groups[:2] + groups[4:]
    room = 50 + listening.json_size(two_steps + [clips[g["clip"]] for g in two_steps if g["clip"] is not None])
    assert [g["step"] for g in sample(80, room)[0]] == [30, 30, 1, 1]
    (folder / "trajectories" / "step_000015.jsonl").write_text('{"prompt": 1}')
    (folder / "trajectories" / "step_000030.jsonl").open("a").write('{"prom')  # killed while writing
    groups, note, _ = sample(80)
    assert [g["step"] for g in groups] == [30, 30, 1, 1]
    assert note == "4 groups of 2 steps; the run saved 3 steps, of which 1 cannot be read (15)"
    clips = listening.Clips(0)  # one file name in several folders
    clips.places, clips.encoded = {Path(f"mine/{kind}/alpha/a.ogg"): i for i, kind in enumerate("ef")}, [{}, {}]
    clips.name_all()
    assert [clip["name"] for clip in clips.encoded] == ["mine/e/alpha/a.ogg", "mine/f/alpha/a.ogg"]
    clips.places = ["/home/someone/mine/e/a.ogg", "/data/f/a.ogg"]  # on several disks
    clips.name_all()
    assert [clip["name"] for clip in clips.encoded] == ["e/a.ogg", "f/a.ogg"]


# ------------------------------------------------------------------------------------------------------------- held out
def only_kinds_of_one_answer(held: held_out.HeldOut) -> held_out.HeldOut:
    return replace(held, items={key: replace(item, kind=item.gold) for key, item in held.items.items()})


def test_held_out_answers_by_question_type(tmp_path):
    """Of make_evaluations."""
    run = run_data.read_run(make_run(tmp_path / "run", rollouts=True))
    run.metrics["rollout/accuracy_reward/question_type/horn"] = run.metrics["rollout/share/question_type/horn"] = [0.5]
    run.config["chance"] = {"all": 0.5, "question_type/drum": 0.25, "question_type/horn": 0.5}
    (held,), problems = held_out.read_held_out([run], {})
    assert problems == [] and [(r.name, r.silent) for r in held.rounds] == [
        ("step 10", False),
        ("step 30", False),
        ("step 30", True),
    ]
    table = held_out.accuracy_table([run], [held], last=10)
    assert [column[0] for column in table["columns"]] == ["sampled training accuracy"] + [
        "held-out, evaluation data"
    ] * 3
    assert table["columns"][0][1] == "steps 21 to 30, temperature 1.0"
    rows = {name: (chance, cells) for name, chance, cells in table["rows"]}
    levels = {name: chance for name, (chance, _) in rows.items()}  # of training, and one of three choices held out
    assert levels == {"all": "33 to 50", HOSTILE[0]: "33", "drum": "25 to 33", "horn": "50"}
    assert [cell.chance for cell in rows["drum"][1]] == [0.25, *[pytest.approx(1 / 3)] * 3]
    assert rows["horn"][1][0].chance == 0.5 and rows["horn"][1][1:] == [None] * 3  # only training has this type
    assert [(c.right, c.total) for c in rows["all"][1][1:]] == [(3, 12), (8, 12), (6, 12)]
    assert [(c.right, c.total) for c in rows["drum"][1][1:]] == [(1, 6), (4, 6), (3, 6)]
    drum = rows["drum"][1][0]  # 10 steps of 8 prompts and 4 responses, a quarter of them of this type, half right
    assert (drum.accuracy, drum.right, drum.total) == (0.5, 40, 80)
    assert drum.interval == pytest.approx((0.2993, 0.7007), abs=1e-4)  # Wilson's of 10 of 20 prompts, by hand
    assert rows[HOSTILE[0]][1][0] is None  # the metrics do not have this type


def test_what_is_confused_compared_and_listened_to(tmp_path):
    """Of make_evaluations."""
    (held,), _ = held_out.read_held_out([run_data.read_run(make_run(tmp_path / "run", rollouts=True))], {})
    mistakes = held_out.confusions(held)
    assert (mistakes["right"], mistakes["total"]) == (8, 12)
    pairs = {(p["kind"], p["gold"], p["said"]): (p["times"], p["of"]) for p in mistakes["pairs"]}
    odd = HOSTILE[0]
    assert pairs == {
        ("drum", "bell", "rain"): (1, 4),
        (odd, "bell", "rain"): (1, 4),
        (odd, "rain", "bell"): (1, 2),
        ("drum", "rain", held_out.NO_ANSWER): (1, 2),
    }
    first, second = mistakes["tables"]
    assert (first["kind"], first["columns"]) == (odd, ["bell", "rain"])
    assert (second["kind"], second["columns"]) == ("drum", ["bell", "rain", held_out.NO_ANSWER])
    counts = {gold: [times for times, _, _ in cells] for gold, _, cells in second["rows"]}
    assert counts == {"bell": [3, 1, 0], "rain": [0, 1, 1]}
    assert [len(c["rows"]) for c in held_out.comparisons(held)] == [3, 3]
    better, silent = (c["rows"][0][1] for c in held_out.comparisons(held))
    assert (better["only_first"], better["only_second"], silent["only_first"]) == (2, 7, 4)

    items = listening.sample_items(held, 80, listening.Clips(10**7), 0)
    outcomes = [item["outcome"] for item in items]
    assert outcomes == ["became wrong"] * 2 + ["right"] + ["became right"] * 7 + ["wrong"] * 2
    assert [r["who"] for r in items[0]["responses"]] == ["step 10", "step 30", "step 30, in silence"]
    assert [r["said"] for r in items[0]["responses"]] == ["bell", "rain", "bell"]
    # neither type of a single right answer has a table, so that they share one
    (together,) = (alike := held_out.confusions(only_kinds_of_one_answer(held)))["tables"]
    assert (together["kind"], together["columns"]) == (
        "all question types together",
        ["bell", "rain", held_out.NO_ANSWER],
    )
    assert alike["without"] == [
        ("bell", "the right answer is always “bell”", [("rain", 2)]),
        ("rain", "the right answer is always “rain”", [("bell", 1), (held_out.NO_ANSWER, 1)]),
    ]

    few = listening.sample_items(held, 4, listening.Clips(10**7), 0)
    assert [item["outcome"] for item in few] == ["became wrong"] * 2 + ["wrong"] * 2
    few = listening.sample_items(held, 8, listening.Clips(10**7), 0)
    outcomes = [item["outcome"] for item in few]  # the four mistakes, then of each outcome and type in turn
    assert outcomes == ["became wrong"] * 2 + ["right", "became right", "became right", "became right"] + ["wrong"] * 2


def test_answers_that_a_table_has_no_room_for():
    counts = Counter({("bell", "bell"): 3, ("bell", "horn"): 2, ("rain", held_out.OTHER): 1, ("drum", "drum"): 1})
    table = held_out.confusion_table(counts)
    assert table["columns"] == ["bell", "drum", "rain", "horn", held_out.OTHER]
    gold, total, cells = table["rows"][0]
    assert (gold, total) == ("bell", 5) and [times for times, _, _ in cells] == [3, 0, 0, 2, 0]
    assert cells[0] == (3, 3, True) and cells[3] == (2, 2, False)
    assert held_out.confusion_table(Counter({("bell", "bell"): 9})) is None  # one right answer
    many = Counter({(str(i), str(i)): 1 for i in range(30)})
    assert held_out.confusion_table(many) is None  # 12 of 30 questions would be shown
    assert held_out.why_no_table(many) == ("30 different right answers are too many", [])
    more = held_out.confusion_table(many + Counter({("0", "29"): 20}))
    assert more["left_out"] == 18 and more["rows"][0][2][-1] == (20, 5, False)  # 29 is not among the columns


def test_result_files_while_training(tmp_path):
    """Those of --eval_benchmark: first and last, the last in silence; a damaged one is named and passed over."""
    folder = make_run(tmp_path / "run")
    (folder / "eval").mkdir()
    for step, right in ((10, 10), (20, 20), (30, 30), (40, 40)):  # 40: of an older, longer run
        make_result(folder / "eval" / f"mini_step_{step:06d}.json", right)
        make_result(folder / "eval" / f"mini_silent_step_{step:06d}.json", 5, silent=True)
    (folder / "eval" / "other_step_000030.json").write_text("[{")
    (held,), problems = held_out.read_held_out([run_data.read_run(folder)], {})
    rounds = [(r.name, r.silent, sum(a.right for a in r.answers.values())) for r in held.rounds]
    assert held.name == "benchmark mini" and rounds == [
        ("step 10", False, 10),
        ("step 30", False, 30),
        ("step 30", True, 5),
    ]
    assert len(problems) == 1 and "other_step_000030.json" in problems[0]


# ---------------------------------------------------------------------------------------------------------------- clips
def test_a_clip_sounds_and_looks_like_its_file(tmp_path):
    wave = np.zeros(16_000, np.float32)
    wave[4_000:8_000] = 0.5 * np.sin(2 * np.pi * 1_000 * np.arange(4_000) / 16_000)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    clip = audio.encode_clip(tmp_path / "a.wav")
    back, rate = soundfile.read(io.BytesIO(base64.b64decode(clip["mp3"])))
    assert rate == 16_000 and abs(len(back) - len(wave)) <= 2 * 1152
    assert np.corrcoef(back[: len(wave)], wave)[0, 1] > 0.99
    peaks = np.array(clip["peaks"]).reshape(-1, 2)
    assert np.abs(peaks[:58]).max() == 0 and np.abs(peaks[122:]).max() == 0
    assert peaks[62:118].min() <= -95 and peaks[62:118].max() >= 95
    assert clip["heard"] == "80 % of the energy between 998 and 1,002 Hz"
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(clip["mel"])))).astype(int).sum(-1)
    row, column = np.unravel_index(image.argmax(), image.shape)
    # 1 kHz is about a third of the way up 128 mel bands to 8 kHz
    assert 0.55 < row / image.shape[0] < 0.75 and 0.2 < column / image.shape[1] < 0.55


def test_the_spectrogram_is_the_models():
    wave = np.random.default_rng(1).standard_normal(12_345).astype(np.float32) * 0.1
    extractor = WhisperFeatureExtractor(feature_size=128)
    heard = extractor(wave, sampling_rate=16_000, padding="do_not_pad", return_tensors="np")["input_features"][0]
    mel = audio.log_mel(wave)
    assert mel.shape == heard.shape == (128, 77)
    np.testing.assert_allclose(mel, heard, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- the rest
def test_result_files_are_compared(tmp_path):
    paths = {name: make_result(tmp_path / f"{name}.json", n) for name, n in (("before", 10), ("after", 30))}
    settings = {"run": {"audio_dir": "x", "model_path": "results/own/run"}}
    (tmp_path / "after.score.json").write_text(json.dumps(settings))
    paths["silent"] = make_result(tmp_path / "silent.json", 11, silent=True)
    paths["other"] = tmp_path / "other.json"
    paths["other"].write_text(json.dumps([{**r, "id": f"z{r['id']}"} for r in json.loads(paths["before"].read_text())]))
    run = run_data.read_run(make_run(tmp_path / "run"))
    same, apart = held_out.read_held_out([run], paths)[0]
    assert [r.name for r in same.rounds] == ["before", "after", "silent"] and [r.name for r in apart.rounds] == [
        "other"
    ]
    notes = [column[1] for column in held_out.accuracy_table([run], [same], 10)["columns"]]
    assert notes[1:] == ["before", "after, model own/run", "silent"]
    after, silent = held_out.comparisons(same)
    assert [name for name, _ in after["rows"]] == ["all", "music", f"sound {HOSTILE[0]}"]
    overall = after["rows"][0][1]
    assert (overall["difference"], overall["only_second"]) == (0.5, 20)
    assert overall["mcnemar_p"] == pytest.approx(2 / 2**20)
    rows = json.loads(paths["before"].read_text())  # answered in silence too, without a file of its own
    again = {"in_silence": {"prediction": "rain", "raw_output": "<answer>rain</answer>"}}
    paths["also"] = tmp_path / "also.json"
    paths["also"].write_text(json.dumps([row | again for row in rows]))
    ((also,), _) = held_out.read_held_out([run], {"also": paths["also"]})
    assert [(r.silent, sum(a.right for a in r.answers.values())) for r in also.rounds] == [(False, 10), (True, 0)]
    assert silent["first"].name == "after" and silent["rows"][0][1]["only_first"] == 19
    assert held_out.comparisons(apart) == []


def test_runs_are_compared_by_question_type(tmp_path):
    """The other run's last answers are a round of the same questions; other questions are a set of their own."""
    runs = [run_data.read_run(make_run(tmp_path / name, rollouts=True)) for name in ("run", "other")]
    path = runs[1].folder / "eval" / "rows" / "step_000030.jsonl"
    rows = [row | {"accuracy_reward": 1.0} for row in map(json.loads, path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (held,), _ = held_out.read_held_out(runs, {})
    assert [r.title for r in held.rounds][2:] == ["step 30, in silence", "other, step 30"]
    table = held_out.accuracy_table(runs, [held], last=10)
    notes = ["other, steps 21 to 30, temperature 1.0", "step 10", "step 30", "step 30", "other, step 30"]
    assert [column[1] for column in table["columns"]][1:] == notes
    drum = {name: cells for name, _, cells in table["rows"]}["drum"]
    assert [(c.right, c.total) for c in drum] == [(40, 80), (40, 80), (1, 6), (4, 6), (3, 6), (6, 6)]
    against = held_out.comparisons(held)[-1]
    assert (against["first"].title, against["rows"][0][1]["only_second"]) == ("step 30", 4)  # 8 of 12 against 12
    assert held_out.confusions(held)["round"].title == "step 30"
    listened = listening.sample_items(held, 1, listening.Clips(10**7), 0)[0]["responses"]
    assert [(r["who"], r["main"]) for r in listened[1::2]] == [("step 30", True), ("other, step 30", False)]
    assert page.lessons(runs, [held]) == [
        "run: held-out accuracy 0.250 at step 10, 0.667 after step 30 (12 questions, p=0.2): too little for a "
        "difference; in silence 0.500 (p=0.7): no sign that it listens",
        "other: held-out accuracy 0.250 at step 10, 1.000 after step 30 (12 questions, p=0.004): it has learned; in "
        "silence 1.000 (p=1): no sign that it listens",
        "p: how often chance alone does as much (McNemar's test); below 0.05 it counts",
    ]
    path.write_text("".join(json.dumps(row | {"row": row["row"] + 50}) + "\n" for row in rows))
    path.with_name("step_000010.jsonl").unlink()
    _, apart = held_out.read_held_out(runs, {})[0]
    assert apart.name == "evaluation data of other" and [r.title for r in apart.rounds] == ["other, step 30"]


def test_curves_of_kinds_share_a_panel(tmp_path):
    run = run_data.read_run(make_run(tmp_path / "run"))
    found = {panel["title"]: panel for panel in page.panels([run])}
    assert found["Evaluation accuracy by question type"]["labels"] == ["drum"]
    assert found["Accuracy"]["labels"] == ["sampled in training", "held-out, greedy"]
    run.metrics["eval/accuracy_reward_silent"] = [0.25] * 30
    (accuracy,) = (panel for panel in page.panels([run]) if panel["title"] == "Accuracy")
    assert accuracy["labels"][2] == "held-out, in silence"
    assert not any("/question_type/" in title for title in found)
    names = {f"eval/mini/{i}": [0.5] * 30 for i in range(8)} | {"eval/mini/collapsed": [3.0] * 30}
    run.metrics |= names | {"eval/rule_reward/question_type/drum": [2.0] * 30}
    found = {panel["title"]: panel for panel in page.panels([run])}
    assert found["Benchmark mini (1 of 2)"]["labels"] == list("012345") and found["Benchmark mini (1 of 2)"]["full"]
    assert not found["eval/mini/collapsed"]["full"]
    assert not found["Evaluation reward by rule by question type"]["full"]
    apart = [panel["title"] for panel in page.panels([run, run])]
    del run.metrics["eval/accuracy_reward"], run.metrics["eval/accuracy_reward_silent"]
    assert page.panels([run])[1]["title"] == "Sampled training accuracy"
    assert "Benchmark mini: 7" in apart and "Sampled training accuracy by question type: drum" in apart
    assert page.resumed_at(run) == [13]


def test_embedded_json_has_nothing_that_ends_a_script():
    text = listening.embed({"texts": HOSTILE})
    assert not set(text) & set("<>&") and text.isascii()
    assert json.loads(text) == {"texts": HOSTILE}
    with pytest.raises(ValueError, match="JSON"):
        listening.embed(float("nan"))
    assert page.when("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04 UTC" and page.when("") == ""
    assert page.visible("a\u202eb\x00") == "a[U+202E]b[U+0000]"


def test_config_holds_versions_and_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save_path", default="x")
    args = parser.parse_args(["--save_path", str(tmp_path / "run")])
    args.added_later = object()
    config = run_config.describe_program(args, parser, "host", "1 x CPU")
    assert config["changed"] == ["save_path"]
    assert {"torch", "transformers", "python"} <= config["versions"].keys()
    assert "s3cret" not in json.dumps(config)


def test_a_report_that_fails_is_a_warning(tmp_path):
    line = run_config.write_report(tmp_path)
    assert line.startswith("WARNING: no report.html: report.py: error: ")
    assert f"report.py {tmp_path}" in line


def test_the_document_shows_the_table():
    document = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert metrics.table() in document, "python examples/r1_aqa/aqa/report/metrics.py prints the new one"


def test_trajectories_name_the_clip(tmp_path):
    """The dataset's pairs know their file, and everything else takes them for pairs."""
    from aqa.patches.experience_maker import NamedClip, check_audio, describe_audio

    clip = NamedClip.of(np.zeros(400, np.float32), 16_000, "/a.wav")
    wave, rate = clip
    assert (rate, len(clip), len(wave)) == (16_000, 2, 400)
    assert describe_audio(check_audio([clip])[0]) == {"audio_path": "/a.wav"}
    assert describe_audio(None) == describe_audio((wave, rate)) == {"audio_path": None}
    assert AudioPromptDataset.collate_fn([("p", clip, "r", "l")])[1][0] is clip
