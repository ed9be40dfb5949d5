"""What the report is made of: records, rollouts, clips, comparisons, settings. The page itself: test_report_page."""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from audio_dataset import AudioPromptDataset
from conftest import EXAMPLE, ROOT, run_script
from PIL import Image
from support.report_run import HOSTILE, PROMPT, make_result, make_run
from transformers import WhisperFeatureExtractor

from aqa.report import audio, metrics, page, run_data
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


@pytest.mark.parametrize("content", [None, "", "no json\n", '{"a": 1}\n'])
def test_a_folder_without_records_is_refused_by_name(tmp_path, content):
    if content is not None:
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
    path = run_data.saved_steps(folder, last=29)[15]
    first, second = run_data.read_groups(path, 15)
    assert (first.step, first.number, second.number) == (15, 0, 1)
    assert (first.gold, first.choices[:2]) == ("bell", ["bell", "rain"])
    assert [r["right"] for r in first.responses] == [True, False, True, False]
    assert [r["form"] for r in first.responses] == [True, True, True, False]
    assert first.responses[0]["text"] == "<answer>bell</answer>"
    assert 30 not in run_data.saved_steps(folder, last=29)  # of an older, longer run
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
    assert [run_data.spread(n) for n in (0, 1, 2, 5)] == [[], [0], [0, 1], [0, 4, 2, 1, 3]]
    assert sorted(run_data.spread(77)) == list(range(77))
    assert sorted(run_data.spread(101)[:5]) == [0, 25, 50, 75, 100]


def test_rollouts_are_sampled_within_the_limits(tmp_path):
    folder = make_run(tmp_path / "run", rollouts=True)
    whole = page.sample_rollouts(folder, 30, 80)
    assert [(g["step"], g["number"]) for g in whole["groups"]] == [(s, n) for s in (1, 15, 30) for n in (0, 1)]
    assert len(whole["clips"]) == 5
    assert "does not exist" in whole["groups"][-1]["silent"] and whole["groups"][-1]["clip"] is None
    for group in whole["groups"][:-1]:
        assert f'"{group["step"]}" <b>{group["number"]}' in whole["clips"][group["clip"]]["name"]
    assert [g["step"] for g in page.sample_rollouts(folder, 30, 2)["groups"]] == [1, 1]
    room = page.json_size(whole["groups"][:2] + whole["groups"][-2:] + whole["clips"][:2] + whole["clips"][-1:])
    less = page.sample_rollouts(folder, 30, 80, room)
    assert [g["step"] for g in less["groups"]] == [1, 1, 30, 30]
    (folder / "trajectories" / "step_000015.jsonl").write_text('{"prompt": 1}')
    (folder / "trajectories" / "step_000030.jsonl").open("a").write('{"prom')  # killed while writing
    rest = page.sample_rollouts(folder, 30, 80)
    assert [g["step"] for g in rest["groups"]] == [1, 1, 30, 30]
    assert rest["note"] == "4 groups of 2 steps; the run saved 3 steps, of which 1 cannot be read (15)"


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
def test_evaluations_are_compared_with_the_first(tmp_path):
    paths = [make_result(tmp_path / f"{name}.json", right) for name, right in (("before", 10), ("after", 30))]
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{**row, "id": f"z{row['id']}"} for row in json.loads(paths[0].read_text())]))
    found = page.evaluations([*paths, other])
    assert [s["accuracy"] for s in found["scores"]] == [0.25, 0.75, 0.25]
    after, apart = found["comparisons"]
    name, overall = after["rows"][0]
    assert (name, overall["difference"], overall["only_second"]) == ("overall", 0.5, 20)
    assert overall["mcnemar_p"] == pytest.approx(2 / 2**20)
    assert [name for name, _ in after["rows"][1:]] == ["music", f"sound {HOSTILE[0]}"]
    assert "share no item" in apart["problem"]


def test_embedded_json_has_nothing_that_ends_a_script():
    text = page.embed({"texts": HOSTILE})
    assert not set(text) & set("<>&") and text.isascii()
    assert json.loads(text) == {"texts": HOSTILE}
    with pytest.raises(ValueError, match="JSON"):
        page.embed(float("nan"))
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


def test_help_loads_nothing_heavy():
    command = [sys.executable, "-X", "importtime", str(EXAMPLE / "report.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "--compare" in done.stdout and "argparse" in loaded
    assert not loaded & {"numpy", "jinja2", "transformers", "matplotlib"}
