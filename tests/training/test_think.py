"""Think mode from the data to the scores: rows that ask for it and rows that do not, each paid by its own rule."""

import json
import shutil

import eval_mmau
import pytest
from conftest import run_script
from support.training import metrics_of, train
from transformers import AutoProcessor

from aqa.rewards.r1_aqa import PLAIN_LABEL, THINK_LABEL, avqa_combined_reward_fn


@pytest.fixture(scope="module")
def think_parquet(demo_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "think"
    source = ("--input_jsonl", demo_data / "train_qa.data", "--audio_dir", demo_data)
    run_script("data_preprocess/avqa.py", *source, "--enable_think", "--local_save_dir", folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny_model, demo_parquet, think_parquet, demo_data, tmp_path_factory):
    """Three steps of a curriculum from plain to think rows, whose last step asks the benchmark's questions, too."""
    out = tmp_path_factory.mktemp("run")
    mixed = ("--prompt_data_probs", "0.75,0.25", "--prompt_data_probs_end", "0.25,0.75", "--max_samples", 12)
    benchmark = ("--eval_benchmark", demo_data / "demo-test.json", "--eval_audio_dir", demo_data, "--eval_think")
    shown = ("--eval_steps", 3, "--save_trajectories", "--num_trajectories_to_save", 16, "--engine_type", "hf")
    train(tiny_model, f"{demo_parquet},{think_parquet}", out, *mixed, *benchmark, *shown)
    return out


def test_each_row_is_paid_by_its_own_rule(run, demo_parquet, think_parquet):
    plain_source = f"source/{demo_parquet.name}"
    for step, record in enumerate(metrics_of(run), start=1):
        lines = (run / "trajectories" / f"step_{step:06d}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 16
        for row in rows:
            think = row["label"] == THINK_LABEL
            assert ("<think>" in row["prompt"]) is think
            response = row["response"].removesuffix("<|im_end|>")
            total, accuracy, form = avqa_combined_reward_fn(response, row["reference"], think)
            assert (row["reward"], row["accuracy_reward"], row["format_reward"]) == (total, accuracy, form)
        for label in (PLAIN_LABEL, THINK_LABEL):
            mine = [row for row in rows if row["label"] == label]
            for part in ("accuracy_reward", "format_reward"):
                mean = sum(row[part] for row in mine) / len(mine)
                assert record[f"rollout/{part}/label/{label}"] == pytest.approx(mean)
        # the model was warm-started to answer at once: the same words earn the form's point by one rule alone
        assert record[f"rollout/format_reward/label/{PLAIN_LABEL}"] > 0.5
        assert record[f"rollout/format_reward/label/{THINK_LABEL}"] == 0
        # 3 of 4 rows at the first step, 2 at the second, 1 at the last
        assert record[f"rollout/share/{plain_source}"] == (4 - step) / 4
        assert record[f"rollout/share/label/{PLAIN_LABEL}"] == (4 - step) / 4


def evaluate(capsys, model, data, out, *flags):
    source = ("--model_path", model, "--data_file", data / "demo-test.json", "--audio_dir", data, "--out_file", out)
    more = ("--max_new_tokens", 12, "--overwrite", *flags)
    assert eval_mmau.main([str(value) for value in (*source, *more)]) == 0
    shown = capsys.readouterr()
    return shown.out + shown.err


def test_the_evaluation_asks_for_it_and_gives_the_trainings_numbers(run, demo_data, tmp_path, capsys):
    out = tmp_path / "result.json"
    shown = evaluate(capsys, run, demo_data, out, "--think")
    assert "ask for the thinking process" in shown and "WARNING" not in shown  # it was trained both ways
    assert json.loads(out.read_text()) == json.loads((run / "eval" / "demo-test_step_000003.json").read_text())
    accuracy = json.loads(out.with_suffix(".score.json").read_text())["accuracy"]
    assert metrics_of(run)[2]["eval/demo-test/accuracy"] == accuracy


@pytest.mark.parametrize(
    ("trained", "flag", "asked", "warned"),
    [
        (1.0, None, True, None),
        (1.0, "--no-think", False, "trained to think before it answers"),
        (0.0, None, False, None),
        (0.0, "--think", True, "trained to answer at once"),
        (0.5, None, False, None),
        (None, "--think", True, None),
    ],
)
def test_the_evaluation_asks_as_the_training_did(
    tiny_model, demo_data, tmp_path, capsys, trained, flag, asked, warned, monkeypatch
):
    """What is asked, without asking: no model is loaded."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    if trained is not None:
        (model / "r1_aqa.json").write_text(json.dumps({"asked_to_think": trained}))
    prompts = []

    def ask(args, model, make_jobs, done, *_, **_kw):
        jobs = make_jobs(AutoProcessor.from_pretrained(model.processor))
        prompts.extend(job.text for job in jobs)
        done.update({job.index: "<think>one or two</think><answer>bell</answer>" for job in jobs})
        return {}

    monkeypatch.setattr("aqa.evaluation.asking.ask", ask)
    out = tmp_path / "result.json"
    shown = evaluate(capsys, model, demo_data, out, "--limit", 4, *([flag] if flag else []))
    assert [("<think> </think>" in prompt) for prompt in prompts] == [asked] * 4
    assert ("WARNING" in shown) is (warned is not None) and (warned or "") in shown
    score = json.loads(out.with_suffix(".score.json").read_text())
    assert score["run"]["think"] is asked and score["run"]["trained_to_think"] == trained
    # the answer is what stands in its tags, and the form is asked for only where thinking is
    assert {row["model_output"] for row in json.loads(out.read_text())} == {"bell"}
    assert score["asked_form"] == (4 if asked else 0)
