"""What the documents' figures are compared with, where it takes more than a name: for test_doc_figures.py."""

from __future__ import annotations

import functools
import json
import re
from itertools import pairwise
from statistics import NormalDist
from typing import Any

from conftest import ROOT
from doc_figures import in_file, kept

README, MANUAL = "README.md", "examples/r1_aqa/README.md"
LAUNCH = "examples/r1_aqa/run_grpo_r1_aqa_qwen2_audio_7b.sh"


def durations() -> dict[str, float]:
    """Seconds of each command of ``documented.py``."""
    return {name: run["seconds"] for name, run in kept("_documented").items()}


def outcome(name: str) -> dict[str, Any]:
    """What one of them led to."""
    return kept("_documented")[name]["outcome"]


@functools.cache
def results() -> dict[str, dict[str, Any]]:
    """The benchmarks' figures with their limits, by what they are."""
    return {row["what"]: row for record in (*kept("").values(), kept("_host")) for row in record["limits"]}


def measured(what: str) -> float:
    """One of them."""
    return results()[what]["value"]


def limit(what: str) -> float:
    """Its limit."""
    return float(results()[what]["limit"].split()[-1])


def default(flag: str) -> Any:
    """The default of a flag of ``train_colocate.py``."""
    from train_args import build_parser

    from lightrft.utils import add_arguments

    return build_parser(add_arguments).get_default(flag)


def variable(name: str) -> float:
    """The default of a variable of the launch script."""
    return float(in_file(LAUNCH, rf"{name}:-([^}}]*)}}"))


def in_command(page: str, name: str, nth: int = 0) -> float:
    """The value of a flag or variable in a page's commands.

    :param nth: Of those that give it one.
    """
    return float(re.findall(rf"{name}[ =]([\d.]+)", (ROOT / page).read_text(encoding="utf-8"))[nth])


def status(help_text: str, words: str) -> str:
    """The exit status of which a script's help says something.

    :param words: What follows it there, or a regular expression with a group for it.
    """
    return re.search(words if "(" in words else rf"(\d+) {words}", " ".join(help_text.split())).group(1)


def clip_seconds() -> int:
    """What the tower takes; a frame is 10 ms."""
    from audio_slots import MAX_FRAMES

    return MAX_FRAMES // 100


def wrong_sum(figures: list[str]) -> str | None:
    """Of a row of the table of batch sizes."""
    prompts, samples, train, *again, product = map(int, figures)
    fits = again == [train, prompts, samples] and product == prompts * samples and train % product == 0
    return None if fits else "a train batch of whole rollouts"


def own_sounds() -> dict[str, float]:
    """README's way with one's own sounds, by the arithmetic of its flags."""
    sounds = int(in_file("tests/test_docs.py", r"for i in range\((\d+)\)"))
    held_out = sounds * in_command(README, "--val_ratio")
    rollouts = (sounds - held_out) // default("rollout_batch_size")
    return {"sounds": sounds, "held out": held_out, "steps": rollouts * in_command(README, "--num_episodes")}


def first_answer() -> int:
    """``answer`` of README's row, if its first choice is the right one."""
    from avqa_rows import parse_records, read_records

    row = json.loads(in_file(README, r"```json\n(.*)\n"))
    lines = "\n".join(json.dumps(row | {"answer": answer}) for answer in range(2))
    rows, _ = parse_records(read_records(lines.encode(), README), enable_think=False)
    return next(found.answer_idx for found in rows if found.gold == row["multi_choice"][0])


@functools.cache
def demo_parameters() -> tuple[int, float]:
    """Of the demo's model; and of the manual's LoRA, as a share of both."""
    from demo.make_model import build_model, build_processor
    from model_sizes import count, parameters, sizes_of, trained

    sizes = sizes_of(build_model(build_processor(), 0).config.to_dict())
    targets = in_file(MANUAL, r'TRAIN_FLAGS="[^"]*--target_modules ([\w ]*\w) --').split()
    every = count(parameters(sizes))
    adapters = count(trained(sizes, (), int(in_command(MANUAL, 'TRAIN_FLAGS="--lora_rank')), targets))
    return every, adapters / (every + adapters)


def interval() -> float:
    """Per cent of the interval that the score table gives."""
    from eval_scoring import Z95

    return 100 * (2 * NormalDist().cdf(Z95) - 1)


def wrong_cache(figures: list[str]) -> str | None:
    """Of the clips that the cache holds, float32."""
    from audio_io import SAMPLING_RATE

    mebibytes, clips, seconds = (int(figure.replace(",", "")) for figure in figures)
    fits = mebibytes == default("audio_cache_mib") and clips == mebibytes * 2**20 // (4 * seconds * SAMPLING_RATE)
    return None if fits else "what the default holds"


def wrong_cats(figures: list[str]) -> str | None:
    """Of the two sentences that ``math_verify`` takes for one another."""
    from reward_models_utils import accuracy_reward_fn

    cats, dogs = figures
    agree = accuracy_reward_fn(f"<answer>about {cats} cats</answer>", f"some {dogs} dogs")
    return None if agree else "equal for math_verify"


def on_policy_ratio() -> float:
    """GSPO's, where the policy that is trained has sampled."""
    import torch

    from lightrft.models.loss import policy_loss_tokens

    log_probs, one = torch.tensor([[-0.5, -2.0]]), torch.ones(1, 1)
    loss, _ = policy_loss_tokens(log_probs, log_probs, one, 0.2, None, torch.ones(1, 2))
    return -loss.mean().item()


def wrong_advice(figures: list[str]) -> str | None:
    """Of what to lower where memory does not do: one response, and less than the launch script's defaults."""
    micro, engine, samples = map(float, figures)
    fits = micro == 1 and 0 < engine < variable("ENGINE_MEM_UTIL") and 1 < samples < variable("N_SAMPLES")
    return None if fits else "less than the defaults"


def extreme_rewards() -> list[float]:
    """Accuracy of a wrong and a right response, and format likewise."""
    from reward_models_utils import avqa_combined_reward_fn

    pairs = [avqa_combined_reward_fn(text, "bird") for text in ("cat", "<answer>bird</answer>")]
    return [pair[i] for i in (1, 2) for pair in pairs]


@functools.cache
def packed_second() -> tuple[Any, Any]:
    """A clip of one second in the slot, by the demo's feature extractor: its rows and its grid."""
    import numpy as np
    from audio_io import SAMPLING_RATE
    from audio_slots import grid_of, pack_clip
    from demo.make_model import build_processor

    extractor = build_processor().feature_extractor
    sound = np.random.default_rng(0).standard_normal(SAMPLING_RATE).astype(np.float32)
    mel = extractor(sound, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features[0]
    rows = pack_clip(mel, SAMPLING_RATE // extractor.hop_length)
    return rows, grid_of(rows)


def mel_rows(seconds: int) -> int:
    """Rows of a clip in the slot."""
    from audio_slots import GUARD_ROWS

    return 100 * seconds + GUARD_ROWS


def wrong_rows(figures: list[str]) -> str | None:
    """Of a clip's seconds, its rows, and the frames that the tower always takes."""
    from audio_slots import MAX_FRAMES

    seconds, rows, *frames = (int(figure.replace(",", "")) for figure in figures)
    return None if rows == mel_rows(seconds) and frames in ([], [MAX_FRAMES]) else "the rows of such a clip"


@functools.cache
def random_model() -> list[int]:
    """Bytes in float32 of each weight of the benchmarks' random model, in order."""
    import torch
    from bench_sync import random_config
    from demo.make_model import build_processor
    from transformers import Qwen2AudioForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(random_config(build_processor().tokenizer))
    return [4 * parameter.numel() for parameter in model.parameters()]


def largest_neighbours() -> int:
    """Bytes of the two neighbouring weights that are the largest."""
    return max(one + two for one, two in pairwise(random_model()))


def gpu_lengths() -> list[int]:
    """Tokens a response in ``bench_7b.py``."""
    text = in_file("benchmarks/gpu/bench_7b.py", r"else \(([\d, ]+)\)")
    return [int(number) for number in text.split(",")]
