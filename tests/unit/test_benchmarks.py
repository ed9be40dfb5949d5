"""What the benchmarks compute: the baseline's loss and its agreement with the runtime, fits, and the prediction."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_scaling
import harness
import r1_aqa_scheme
import run_all
from doc_figures import kept


def test_loss_of_the_baseline_by_hand():
    # sequence 1: two tokens, KL 0 and exp(ln 2) - ln 2 - 1 = 1 - ln 2; sequence 2: one token, KL 0
    values = torch.tensor([[-1.0, -2.0], [-0.5, -7.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -2.0 + math.log(2)], [-0.5, 3.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss, kl = r1_aqa_scheme.grpo_loss(values, reference, torch.tensor([1.0, -2.0]), mask, 0.5)
    extra = 1 - math.log(2)
    # -(1 + 1 - 0.5 * extra) / 2 and -(-2), and their mean
    assert loss.item() == pytest.approx((-1 + extra / 4 + 2) / 2)
    assert kl == pytest.approx(extra / 3)
    loss.backward()
    # of the first sequence's tokens -1/4 each, the second with d KL / d value = 1 - 2: 0.5 * (-1) / 4 more
    torch.testing.assert_close(values.grad, torch.tensor([[-0.25, -0.375], [1.0, 0.0]]))


def test_baseline_computes_what_the_runtime_does(tiny_model):
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    from demo.sounds import SAMPLING_RATE, synthesize
    from demo.warm_start import render_prompt

    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(tiny_model)
    model, ref = (Qwen2AudioForConditionalGeneration.from_pretrained(tiny_model).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():  # so that the KL is not 0, and lengths differ
            parameter.mul_(0.8)
    rng = np.random.default_rng(0)
    rows = []
    for seconds, label in ((1, "bell"), (3, "rain")):
        wave = np.resize(synthesize(label, rng), seconds * SAMPLING_RATE)
        prompt = render_prompt(processor, "What do you hear in the audio?", ["bell", "rain", "horn", "drum"][:seconds])
        rows.append((prompt, (wave, SAMPLING_RATE), label, "avqa_rule"))
    batch = r1_aqa_scheme.sample(model, processor, rows, 3, 12)
    assert batch["input_features"].shape == (6, 128, 3000)
    responses = batch["sequences"][:, -batch["mask"].shape[1] :]
    assert (responses != batch["suppressed"]).all()
    assert len(set(batch["mask"].sum(1).tolist())) > 1
    end = processor.tokenizer.eos_token_id
    for tokens, mask in zip(responses.tolist(), batch["mask"].tolist(), strict=True):
        assert sum(mask) == (tokens.index(end) + 1 if end in tokens else len(tokens))
    gaps = r1_aqa_scheme.compare(model, ref, batch, 0.04, 3)
    assert max(gaps["log_probs"], gaps["loss"], gaps["gradient"]) < 1e-4
    assert gaps["gradient_norm"] > 0.01


def test_fit_finds_a_line():
    start, slope, r2 = bench_scaling.fit([1, 2, 4], [5.0, 7.0, 11.0])
    assert (start, slope, r2) == pytest.approx((3, 2, 1))
    assert bench_scaling.fit([0, 1, 2], [0.0, 3.0, 0.0])[2] == pytest.approx(0)


def test_prediction_by_hand():
    # decoder: 32 * (4 * 4096^2 + 3 * 4096 * 11008); a rollout reads it and the head once a token
    decoder = 6_476_005_376 + 32 * 5 * 4096 + 4096  # with biases of q, k and v, and norms
    assert decoder == bench_scaling.DECODER
    assert pytest.approx(8.4e9, rel=0.01) == bench_scaling.PARAMETERS
    # 340 tokens of prompt and 24 of response, 16 responses, 2 * 2 * 32 * 4096 bytes of keys and values a token
    read = 2 * (decoder + 4096 * 156_032) + 16 * 364 * 524_288
    parts = bench_scaling.predict("A100 80 GB", 2, 8)
    assert parts["decode"] == pytest.approx(24 * read / (0.7 * 2.04e12))
    # four micro-batches of 4 x 364 tokens, four passes each, at 40 % of 312 TFLOP/s; tower and attention add a little
    assert 1 < parts["train"] / (4 * 4 * 2 * 6_476_005_376 * 4 * 364 / (0.4 * 312e12)) < 1.1
    assert parts["step"] == pytest.approx(sum(value for name, value in parts.items() if name != "step"))


def test_ratio_is_the_median_of_pairs():
    # pairs 2, 1, 10: not the ratio of the medians, which is 4 / 2
    assert harness.ratio([2.0, 4.0, 10.0], [1.0, 4.0, 1.0]) == 2.0
    assert harness.ratio([1.0, 9.0, 8.0], [2.0, 3.0, 1.0]) == 3.0


def test_limits_are_judged_and_a_missed_one_ends_with_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    ended = {}
    for value in (0.5, 0.51, math.nan):
        found = harness.Report("thing", "what it does", 5)
        found.judge("share", value, at_most=0.5)
        found.judge("times", 3.0, at_least=3)
        found.judge("differences", 0, at_most=0)
        found.judge("seconds", 7.25)
        with pytest.raises(SystemExit) as end:
            found.finish(detail=1)
        ended[value] = end.value.code
    assert list(ended.values()) == [0, 1, 1]
    assert capsys.readouterr().out.count("MISSED") == 2
    (path,) = tmp_path.glob("*_thing.json")
    record = json.loads(path.read_text())
    assert [row["met"] for row in record["limits"]] == [False, True, True, None]
    assert record["limits"][1]["limit"] == "at least 3"
    assert 0 <= record["machine"]["others"] <= 1
    assert record["details"] == {"detail": 1}


def test_take_turns_leaves_out_the_first_round():
    order = []
    found = harness.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["a", "b"] * 3
    assert [len(times) for times in found.values()] == [2, 2]


def test_table_of_results_goes_between_its_marks():
    row = {"what": "speed", "value": 2.5, "limit": "at least 3", "met": False}
    machine = {"threads": 2, "cores": 4, "others": 0.07}
    record = {"date": "2026-01-02", "rounds": 5, "seconds": 125, "machine": machine, "limits": [row]}
    text = run_all.table({"thing": record})
    assert "| speed | 2.5 | at least 3 | **missed** |" in text
    assert "| thing | 2026-01-02 | 5 | 2, 4 | 7% | 2 min |" in text
    assert "Preliminary" not in text
    for change in ({"rounds": 4}, {"machine": machine | {"others": 0.2}}):
        assert "busy machine: odd.\n" in run_all.table({"thing": record, "odd": record | change})
    page = f"before\n{run_all.START}old\n{run_all.END}after\n"
    assert run_all.put_between(page, text) == f"before\n{run_all.START}{text}{run_all.END}after\n"
    assert run_all.put_between(run_all.PAGE.read_text(), "").count(run_all.END) == 1


def test_the_table_of_the_benchmarks_page_is_that_of_the_kept_results():
    text = run_all.START + run_all.table(kept("")) + run_all.END
    assert text in run_all.PAGE.read_text(encoding="utf-8")
