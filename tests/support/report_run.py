"""A small run's folder for the tests of the report, with texts that try to break out of the page."""

import json
import math
from pathlib import Path

import numpy as np
import soundfile

HOSTILE = [
    "</script x><script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "<!--<script>'\"`${window.hacked = 1}\\",
    "right to left \u202e gnp.exe \u2066 and \u200b nothing",
    "null \x00 bell \x07 and half a pair \ud83d end",
    "]]> {{ 7 * 7 }} {% raw %} &lt; &amp;",
]
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAudio 1: "
    "<|audio_bos|><|AUDIO|><|audio_eos|>\n{question} Please choose the answer from the following options: {choices}. "
    "Output the final answer in <answer> </answer>.<|im_end|>\n<|im_start|>assistant\n"
)


def metrics_of(step: int, slower: float = 1.0) -> dict[str, float | None]:
    """A step's metrics, some of them absent or null as in a real run."""
    share = 1 / (1 + math.exp(4 - step * slower / 4))
    metrics = {
        "rollout/reward": 1 + share,
        "rollout/accuracy_reward": share,
        "rollout/format_reward": 1.0,
        "rollout/response_length": 8.0,
        "rollout/groups_without_spread": 0.25,
        "rollout/logprob_gap_mean": 1e-7,
        "rollout/logprob_gap_max": 2e-6 * step,
        "train/kl": 0.01 * step,
        "train/grad_norm": None if step % 2 else 0.3,
        "time/step": 1.5,
        "time/rollout": 1.0,
        "time/train": 0.5,
        "my/own": float(step),
        "my/zero": 0.0,
        "rollout/accuracy_reward/question_type/drum": 0.5,
        "rollout/share/question_type/drum": 0.25,
    }
    evaluated = {"eval/accuracy_reward": share, "eval/accuracy_reward/question_type/drum": share}
    return metrics | (evaluated if step % 10 == 0 else {})


def make_run(folder: Path, steps: int = 30, slower: float = 1.0, rollouts: bool = False) -> Path:
    """A run's folder.

    :param folder: Made.
    :param slower: Below 1 it learns slower.
    :param rollouts: With trajectories, evaluations and clips, hostile ones among them.
    """
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step} | metrics_of(step, slower)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "started": "2026-01-02T03:04:05+00:00",
        "host": HOSTILE[0],
        "code": "abc1234",
        "devices": "1 x CPU",
        "machine": "Linux",
        "versions": {"python": "3.11", "torch": "2.0"},
        "changed": ["seed", "wandb_run_name"],
        "flags": {"seed": 1, "wandb_run_name": HOSTILE[1], "bf16": False, "temperature": 1.0}
        | {"rollout_batch_size": 8, "n_samples_per_prompt": 4},
        "sessions": [{"started": "a", "first_step": 1}, {"started": "b", "first_step": 13}],
    }
    (folder / "run_config.json").write_text(json.dumps(config))
    if rollouts:
        make_rollouts(folder)
        make_evaluations(folder)
    return folder


def make_rollouts(folder: Path) -> None:
    """Trajectories of three steps: two groups of four each, a clip each; the last group's clip is missing."""
    (folder / "trajectories").mkdir()
    rng = np.random.default_rng(0)
    for step in (1, 15, 30):
        lines = []
        for group in range(2):
            clip = folder / f'clip "{step}" <b>{group}.wav'
            seconds = np.arange(int(16_000 * (0.8 + 0.4 * group))) / 16_000
            wave = 0.3 * np.sin(2 * np.pi * 440 * (group + 1) * seconds) + 0.02 * rng.standard_normal(len(seconds))
            if (step, group) != (30, 1):
                soundfile.write(clip, wave, 16_000)
            choices = ["bell", "rain", HOSTILE[1], HOSTILE[3]]
            question = f"What is {HOSTILE[step % 6]}?"
            for number in range(4):
                right, form = (number + group) % 2 == 0, not (number == 3 and step == 15)
                text = f"<answer>{'bell' if right else HOSTILE[(step + number) % 6]}</answer>"
                record = {
                    "step": step,
                    "group": group,
                    "audio_path": str(clip),
                    "prompt": PROMPT.format(question=question, choices=choices),
                    "response": f"{text if form else HOSTILE[number]}<|im_end|>",
                    "reference": "bell",
                    "label": "avqa_rule",
                    "reward": float(right) + float(form),
                    "format_reward": float(form),
                    "accuracy_reward": float(right),
                    "rule_reward": float(right) + float(form),
                    "advantage": 1.0 if right else -1.0,
                    "truncated": number == 2,
                }
                lines.append(json.dumps(record))
        (folder / "trajectories" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")


def make_evaluations(folder: Path, items: int = 12) -> None:
    """Answers to held-out questions of two types after steps 10 and 30, after the latter in silence, too.

    The right answer is bell to the first two thirds, rain to the rest. Right are, of 12, the first 3 after step 10, the
    3rd to the 10th after step 30, and the first 6 in silence. The last one's answer has no form after step 30.
    """
    clip = folder / "held out.wav"
    soundfile.write(clip, 0.3 * np.sin(np.arange(8_000) / 5), 16_000)
    (folder / "eval" / "rows").mkdir(parents=True)
    rounds = ((10, False, range(3)), (30, False, range(2, items - 2)), (30, True, range(6)))
    for step, silent, right in rounds:
        lines = []
        for i in range(items):
            gold = "bell" if i < items * 2 // 3 else "rain"
            said = gold if i in right else {"bell": "rain", "rain": "bell"}[gold]
            formless = (step, silent, i) == (30, False, items - 1)
            record = {
                "row": i,
                "silent": silent,
                "audio_path": None if silent else str(clip),
                "tags": ["dataset/x", f"question_type/{'drum' if i % 2 else HOSTILE[0]}"],
                "prompt": PROMPT.format(question=f"Number {i}?", choices=["bell", "rain", HOSTILE[1]]),
                "response": f"{HOSTILE[3] if formless else f'<answer>{said}</answer>'}<|im_end|>",
                "reference": gold,
                "label": "avqa_rule",
                "reward": float(i in right) + float(not formless),
                "accuracy_reward": float(i in right),
                "format_reward": float(not formless),
                "truncated": False,
            }
            lines.append(json.dumps(record))
        with (folder / "eval" / "rows" / f"step_{step:06d}.jsonl").open("a") as file:
            file.write("\n".join(lines) + "\n")


def make_result(path: Path, right: int, silent: bool = False) -> Path:
    """A result file of eval_mmau.py with 40 items of two tasks, of which the first ``right`` are right."""
    rows = [
        {
            "id": f"q{i}",
            "audio_id": "a.wav",
            "question": "?",
            "choices": ["bell", "rain"],
            "answer": "bell",
            "task": f"sound {HOSTILE[0]}" if i % 2 else "music",
            "difficulty": "easy",
            "sub-category": "x",
            "model_output": "bell" if i < right else "rain",
            **({"silent_audio": True} if silent else {}),
        }
        for i in range(40)
    ]
    path.write_text(json.dumps(rows))
    return path
