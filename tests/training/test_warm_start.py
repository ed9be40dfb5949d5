"""Supervised steps before GRPO: their gradient, what GRPO starts from, resuming in either phase, their responses."""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from support.training import metrics_of, train, train_recorded
from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioForConditionalGeneration

from aqa.audio.decode import load_audio
from aqa.data.columns import DataError
from aqa.data.prompts import render_chat
from aqa.rewards.r1_aqa import PLAIN_LABEL, THINK_LABEL
from aqa.training.responses import doubt_long_answers, given_responses

FLAGS = ("--engine_type", "hf", "--max_samples", 8, "--audio_token_weights", 0.5)
STEPS = ("--sft_steps", 3, "--sft_learning_rate", 5e-4, "--max_steps", 2)


@pytest.fixture(scope="module")
def run(tiny_model, demo_parquet, tmp_path_factory):
    """Three supervised steps, two of GRPO, and a checkpoint after each."""
    out = tmp_path_factory.mktemp("run")
    train(tiny_model, demo_parquet, out, *FLAGS, *STEPS, "--save_steps", 1, "--max_ckpt_num", 9)
    return out


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_grpo_goes_on_as_a_run_of_its_own_from_the_model_would(run, demo_parquet, tmp_path):
    """Its first step has fresh moments, its own learning rate and sampling, and a KL of 0 to that model."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [-3, -2, -1, 1, 2]
    assert records[2]["train/sft_loss"] < records[0]["train/sft_loss"]
    assert [records[0]["train/lr"], records[3]["train/lr"]] == [pytest.approx(5e-4), pytest.approx(1e-3)]
    assert records[3]["train/kl"] < 1e-9 < records[4]["train/kl"] and 0 < records[3]["train/heard"] < 1
    train(run / "warm_start", demo_parquet, tmp_path / "run", *FLAGS, "--max_steps", 2)
    assert weights_of(tmp_path / "run") == weights_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 4])  # in the warm start, at its end, and after GRPO's first step
def test_a_run_goes_on_from_either_phase(run, tiny_model, demo_parquet, tmp_path, number):
    shutil.copytree(run / "_actor", tmp_path / "_actor")
    for folder in (tmp_path / "_actor").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > number:
            shutil.rmtree(folder)
    (tmp_path / "_actor" / "latest").write_text(f"step_{number:06d}")
    for name in ("metrics.jsonl", "run_config.json"):
        shutil.copy(run / name, tmp_path / name)
    if number > 3:
        shutil.copytree(run / "warm_start", tmp_path / "warm_start")
    train(tiny_model, demo_parquet, tmp_path, *FLAGS, *STEPS, "--load_checkpoint")
    assert weights_of(tmp_path) == weights_of(run)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [-3, -2, -1, 1, 2]


@pytest.mark.slow
def test_with_adapters_the_reference_is_the_merged_model(tiny_model, demo_parquet, tmp_path):
    lora = ("--lora_rank", 2, "--sft_learning_rate", 1e-2)
    train(tiny_model, demo_parquet, tmp_path, *FLAGS, *STEPS, *lora)
    assert weights_of(tmp_path / "warm_start") != weights_of(tiny_model)
    first, second = (record["train/kl"] for record in metrics_of(tmp_path))
    assert first < 1e-9 < second


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "flags"), [(1, ()), (2, ("--zero_stage", 3)), (2, ("--fsdp",))])
def test_a_supervised_step_is_the_gradient_of_transformers_cross_entropy(
    tiny_model, demo_parquet, tmp_path, processes, flags
):
    """With plain SGD at a rate of 1 a step is the gradient. It takes all four rows, so their order does not matter."""
    setup = ("--sft_steps", 1, "--temperature", 1.7, "--no-report", "--rollout_batch_size", 4, "--max_samples", 4)
    setup += ("--n_samples_per_prompt", 4, "--train_batch_size", 16, "--micro_train_batch_size", 4, "--max_norm", 0)
    setup += ("--generate_max_len", 20, "--engine_type", "hf", "--actor_learning_rate", 1)
    train_recorded(tiny_model, demo_parquet, tmp_path, *setup, *flags, processes=processes)

    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(demo_parquet / "train.parquet"), split="train")
    processor = AutoProcessor.from_pretrained(tiny_model)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()
    losses, tokens = [], 0
    for row in rows.shuffle(seed=42).select(range(4)):  # as --max_samples draws them
        prompt = render_chat(processor, row["prompt"])
        text = f"{prompt}<answer>{row['reference']}</answer><|im_end|>"
        inputs = processor(text=text, audio=[load_audio(row["audio_path"])], return_tensors="pt", sampling_rate=16_000)
        length = len(processor.tokenizer(text[len(prompt) :])["input_ids"])
        labels = inputs["input_ids"].clone()
        labels[:, :-length] = -100
        losses.append(model(**inputs, labels=labels).loss * length)  # the mean over the response
        tokens += length
    (sum(losses) / tokens).backward()
    [record] = [r for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if r["step"] == -1]
    assert record["train/sft_loss"] == pytest.approx(sum(losses).item() / tokens, rel=1e-5)
    after = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "run" / "warm_start", dtype=torch.float32)
    error = size = 0.0
    for name, parameter in model.named_parameters():
        moved = after.get_parameter(name).double() - parameter.double()
        if parameter.grad is None or "embed_positions" in name:
            assert not moved.any(), name
            continue
        expected = (parameter.detach() - parameter.grad).double() - parameter.detach().double()
        error += (moved - expected).square().sum().item()
        size += expected.square().sum().item()
    assert (error / size) ** 0.5 < 1e-5


def test_responses_by_hand(tiny_model, demo_parquet):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    references = pq.read_table(demo_parquet / "train.parquet")["reference"].to_pylist()[:2]
    labels = [PLAIN_LABEL, THINK_LABEL]
    wrapped = [references[0], f"<answer>{references[1]}</answer>"]
    thoughts = [None, f" {references[0]} "]
    expected = [
        f"<answer>{references[0]}</answer><|im_end|>",
        f"<think>{references[0]}</think><answer>{references[1]}</answer><|im_end|>",
    ]
    assert given_responses(wrapped, labels, thoughts, tokenizer, 40) == expected
    thoughts[1] = f"<think>{references[0]} </think>\n"  # as many data sets have it
    assert given_responses(wrapped, labels, thoughts, tokenizer, 40) == expected
    with pytest.raises(DataError, match="row 1: its thinking holds <answer>"):
        given_responses(wrapped, labels, [None, "or <answer>a</answer>?"], tokenizer, 90)
    short = len(tokenizer(expected[0])["input_ids"]) - 1
    assert doubt_long_answers(wrapped, tokenizer, short, "rows") is None  # the end of turn earns nothing
    told = doubt_long_answers(wrapped, tokenizer, short - 1, "rows")
    assert re.search(rf"of 2 of 2 rows, .* row 0: '{references[0]}' takes {short}\. Use {short + 1}", told)
    wrong = [references[0], references[0], "<|im_end|>"]
    with pytest.raises(DataError) as told:
        given_responses(wrong, [*labels, PLAIN_LABEL], None, tokenizer, short)
    for problem in ("row 1: asks for thinking", "row 2: its response holds the control", "row 0: its response has"):
        assert problem in str(told.value)
