"""Evaluation while training: each row counts once over the ranks, names that ranks lack, the best model's folder."""

import json
import re
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.experiences import make_experience
from transformers import AutoProcessor

from aqa.data.prompts import render_prompt
from aqa.evaluation import while_training
from aqa.evaluation.benchmarks import MMAU, MMSU
from aqa.evaluation.items import make_items
from aqa.evaluation.while_training import BenchmarkEvaluator
from aqa.training import gloo_shutdown
from lightrft.engines.base import Sampling
from lightrft.strategy.checkpoint import SaveError
from lightrft.trainer import evaluation
from lightrft.trainer.evaluation import BestModel, Evaluation
from lightrft.trainer.step_metrics import tag_metrics, tag_sums
from lightrft.utils.distributed import ResumableSampler, reduce_by_name


def test_tag_metrics_by_hand():
    items = [
        make_experience(tags=tags, reward_metrics={"accuracy_reward": accuracy})
        for tags, accuracy in (
            (("dataset/a", "label/x"), 1.0),
            (("dataset/a",), 0.0),
            (("dataset/b", "label/x"), 0.0),
            ((), 1.0),
        )
    ]
    assert tag_metrics(tag_sums(items), "rollout", 4.0) == {
        "rollout/share/dataset/a": 0.5,
        "rollout/share/dataset/b": 0.25,
        "rollout/share/label/x": 0.5,
        "rollout/accuracy_reward/dataset/a": 0.5,
        "rollout/accuracy_reward/dataset/b": 0.0,
        "rollout/accuracy_reward/label/x": 0.5,
    }


# ------------------------------------------------------------------------------------------------------------ two ranks
class FakeMaker:
    """Rewards of rows 0, 1, 2, ... are 0, 1, 2, ...; a row's tag is its own."""

    sampling = Sampling(n=8)
    ending_together = nullcontext

    def __init__(self, strategy):
        self.strategy = strategy
        self.calls = 0

    def rollout(self, prompts, images, references, labels, sampling, step, all_tags):
        self.calls += 1
        assert sampling.temperature == 0 and sampling.n == 1
        return [make_experience(row + 1, tags=tags, response="") for row, tags in zip(prompts, all_tags, strict=True)]

    def score(self, items):
        for item in items:
            item.reward = float(len(item.response_ids) - 1)
            item.reward_metrics = {"accuracy_reward": item.reward}


def evaluate_rows(strategy, rows, size):
    batches = [(i, None, "", "", (f"dataset/{i}",)) for i in range(rows)]
    sampler = ResumableSampler(batches, strategy.world_size, strategy.rank, shuffle=False, drop_last=False)
    loader = torch.utils.data.DataLoader(
        batches, size, sampler=sampler, collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True)))
    )
    maker, seen = FakeMaker(strategy), []
    metrics = Evaluation(maker, loader, [], lambda heard, _: seen.extend(heard) or {})(1)
    # every rank has every row's record, once and in the data's order
    assert [(row["row"], row["tags"]) for row in seen] == [(i, [f"dataset/{i}"]) for i in range(rows)]
    return metrics, maker.calls


def check_rank(rank, port, folder, failures):
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        device = torch.device("cpu")
        strategy = SimpleNamespace(rank=rank, world_size=2, device=device, is_rank_0=lambda: rank == 0, print=print)
        mine = {("share", "a"): 1.0, ("share", "b"): 2.0} if rank == 0 else {("share", "b"): 3.0, ("share", "c"): 4.0}
        assert reduce_by_name(mine, device) == {("share", "a"): 1.0, ("share", "b"): 5.0, ("share", "c"): 4.0}
        assert reduce_by_name({}, device) == {}
        # 5 rows, and 1: the sampler gives rank 1 a row of rank 0's, too
        for rows, size, calls in ((5, 2, 2), (1, 2, 1)):
            metrics, asked = evaluate_rows(strategy, rows, size)
            assert asked == calls
            assert metrics["eval/reward"] == sum(range(rows)) / rows
            assert metrics["eval/response_length"] == sum(range(rows)) / rows + 1
            assert {name for name in metrics if "share" in name} == {f"eval/share/dataset/{i}" for i in range(rows)}
            assert all(metrics[f"eval/share/dataset/{i}"] == 1 / rows for i in range(rows))
        check_benchmark(strategy, folder)
        gloo_shutdown.settle()
    except BaseException as error:
        failures.put(f"rank {rank}: {error!r}")
        raise


def check_benchmark(strategy, folder):
    """Three questions over two ranks, two at a time or one: answers are put together in the file's order."""
    rows = json.loads((folder / "questions.json").read_text())
    for size, calls in ((1, 2), (2, 1)):
        evaluator = object.__new__(BenchmarkEvaluator)  # without a processor
        evaluator.path, evaluator.folder, evaluator.strategy = folder / "questions.json", folder / "eval", strategy
        evaluator.benchmark, evaluator.items = MMAU, make_items(rows, MMAU, folder, think=False)
        evaluator.prompts = [row["id"] for row in rows]
        evaluator.batch_size, evaluator.clips = size, lambda path: path
        say = lambda ids, **_: "<answer>" + rows[ids[0]]["choices"][0] + "</answer>"  # noqa: E731
        evaluator.processor = SimpleNamespace(tokenizer=SimpleNamespace(decode=say))
        evaluator.silent, evaluator.warned = False, set()
        asked = []

        def ask(prompts, images, asked=asked):
            asked.append(prompts)
            return [[int(prompt)] for prompt in prompts]

        # every answer is the first choice, which is right for questions 0 and 2
        expected = {"eval/questions/accuracy": 2 / 3, "eval/questions/music": 0.5, "eval/questions/sound": 1.0}
        expected["eval/questions/collapsed"] = 0.0
        assert evaluator(ask, step=7) == expected
        assert len(asked) == calls
    dist.barrier()
    written = json.loads((folder / "eval" / "questions_step_000007.json").read_text())
    assert [row["model_output"] for row in written] == [row["choices"][0] for row in rows]


def test_two_ranks_count_each_row_once(tmp_path):
    tasks = ("sound", "music", "music")
    rows = [
        {
            "id": str(i),
            "question": "?",
            "choices": [f"one {i}", f"two {i}"],
            "audio_id": "x.wav",
            "answer": ("one", "two", "one")[i] + f" {i}",
            "task": tasks[i],
        }
        for i in range(3)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    context = mp.get_context("fork")  # a spawned process would import everything again
    failures = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=check_rank, args=(rank, port, tmp_path, failures)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    found = [] if failures.empty() else [failures.get()]
    for process in ranks:
        if process.is_alive():
            found.append("a rank hangs")
            process.kill()
    assert found == [] and [process.exitcode for process in ranks] == [0, 0]


# ---------------------------------------------------------------------------------------------------------- a benchmark
@pytest.mark.parametrize(
    ("change", "limit", "message"),
    [
        ({}, 512, None),
        ({"answer": None}, 512, "has questions without an answer"),
        ({"choices": "bell"}, 512, "choices is 'bell'"),
        ({"audio_id": "./gone.wav"}, 512, "gone.wav: does not exist"),
        ({}, 20, "prompt tokens, more than --prompt_max_len 20"),
    ],
)
def test_what_cannot_be_asked_is_named_before_training(
    tiny_model, demo_data, tmp_path, monkeypatch, change, limit, message
):
    monkeypatch.setattr(while_training, "gather_objects", lambda value: [value])  # one rank
    rows = json.loads((demo_data / "demo-test.json").read_text())[:2]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([row | change for row in rows]))
    args = SimpleNamespace(save_path=tmp_path, rollout_batch_size=4, n_samples_per_prompt=2, prompt_max_len=limit)
    vars(args).update(
        sandbox_audio=False, confine_audio=None, audio_cache_mib=0, pretrain=str(tiny_model), eval_silent=False
    )
    args.audio_seconds = 30.0
    strategy = SimpleNamespace(rank=0, world_size=1)
    processor = AutoProcessor.from_pretrained(tiny_model)

    def make():
        return BenchmarkEvaluator(path, demo_data, False, processor, args, strategy)

    if message is None:
        evaluator = make()
        assert evaluator.metric == "eval/questions/accuracy" and evaluator.batch_size == 8
        return
    with pytest.raises(SystemExit, match=re.escape(message)):
        make()


def test_a_benchmark_whose_answers_collapse(tmp_path, monkeypatch):
    """Of task a all answers are yes; of task b they are right, but for silence, to which they are yes, too."""
    monkeypatch.setattr(while_training, "gather_objects", lambda value: [value])  # one rank
    rows = [
        {"id": f"{task}{i}", "question": "?", "choices": ["yes", "no"], "audio_id": "x.wav", "task": task}
        | {"answer": ("yes", "no")[i % 2]}
        for task in "ab"
        for i in range(12)
    ]
    evaluator, printed, heard = object.__new__(BenchmarkEvaluator), [], []
    evaluator.path, evaluator.folder = tmp_path / "q.json", tmp_path
    evaluator.strategy = SimpleNamespace(rank=0, world_size=1, is_rank_0=lambda: True, print=printed.append)
    evaluator.benchmark, evaluator.items = MMAU, make_items(rows, MMAU, tmp_path, think=False)
    evaluator.prompts, evaluator.batch_size = [f"{row['task']} {row['answer']}" for row in rows], 24
    evaluator.clips = lambda path: np.ones(5, np.float32)
    evaluator.processor = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: "".join(ids)))
    evaluator.silent, evaluator.warned = True, set()

    def ask(prompts, images):
        heard.append(images)
        sound = images[0][0].any()
        return [(prompt[2:] if sound and prompt.startswith("b") else "yes") for prompt in prompts]

    accuracies = {"eval/q/accuracy": 0.75, "eval/q/a": 0.5, "eval/q/b": 1.0, "eval/q/collapsed": 1.0}
    silent = {"eval/q_silent/accuracy": 0.5, "eval/q_silent/a": 0.5, "eval/q_silent/b": 0.5}
    for step in (1, 2):
        assert evaluator(ask, step) == accuracies | silent
    said = "WARNING: q.json: task a: 12 of 12 answers are 'yes', which is right for 6; 12 are the same in silence"
    assert printed == [said]  # once
    assert all(len(wave) == 5 and rate == 16_000 for images in heard for wave, rate in images)
    assert [images[0][0].any() for images in heard] == [True, False, True, False]
    written = json.loads((tmp_path / "q_silent_step_000002.json").read_text())
    assert all(row["silent_audio"] for row in written)
    # MMSU's script would leave the second answer out, and one right answer of one would choose the checkpoint; the
    # task's accuracy is of the same answers as that of the whole
    row = {"question": "?", "choice_a": "yes", "choice_b": "no", "answer_gt": "yes", "audio_path": "x.wav"}
    rows = [MMSU.as_question(row | {"id": i, "category": "c", "sub-category": "s"}) for i in range(2)]
    evaluator.benchmark, evaluator.items = MMSU, make_items(rows, MMSU, tmp_path, think=False)
    evaluator.prompts = ["yes", "hm, well"]
    _, found = evaluator.measure(lambda prompts, _: prompts, 3, silent=False)
    assert found == {"eval/q/accuracy": 0.5, "eval/q/c": 0.5}


def test_evaluation_data_in_silence(monkeypatch, tmp_path):
    """The rewards of sound and of silence, and the responses to both, side by side."""
    for name, alone in (("gather_objects", lambda x: [x]), ("reduce_by_name", lambda x, _: x)):  # one rank
        monkeypatch.setattr(evaluation, name, alone)
    monkeypatch.setattr(evaluation, "reduce_metrics", lambda *_: None)
    printed, seen = [], []

    class Maker(FakeMaker):
        def rollout(self, prompts, images, references, labels, sampling, step, all_tags):
            items = super().rollout(prompts, images, references, labels, sampling, step, all_tags)
            for item, clip, prompt in zip(items, images, prompts, strict=True):
                item.prompt, item.response = str(prompt), "text" if clip is None else f"{clip[0].sum():.0f} {clip[1]}"
                item.reward_metrics = {"accuracy_reward": float(clip is None or clip[0].any())}
            return items

        def score(self, items):
            pass

    def find(heard, silent):
        seen.append((heard, silent))
        return {"kind": "is odd"}

    strategy = SimpleNamespace(
        rank=0, world_size=1, device=torch.device("cpu"), print=printed.append, is_rank_0=lambda: True
    )
    clips = [(np.ones(3, np.float32), 16_000), None, (np.ones(2, np.float32), 16_000)]
    batches = [(i, clip, "gold", "", (f"question_type/{i}",)) for i, clip in enumerate(clips)]
    loader = torch.utils.data.DataLoader(batches, 2, collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True))))
    measure = Evaluation(Maker(strategy), loader, [], find, silent=True, folder=tmp_path / "rows")
    metrics = measure(1) | measure(2)
    assert metrics["eval/accuracy_reward"] == 1.0
    assert metrics["eval/accuracy_reward_silent"] == pytest.approx(1 / 3)
    assert metrics["eval/accuracy_reward_silent/question_type/1"] == 1.0  # a prompt without a clip
    assert metrics["eval/accuracy_reward_silent/question_type/2"] == 0.0
    assert metrics["eval/collapsed"] == 1.0 and printed == ["WARNING: evaluation data: kind: is odd"]
    heard, silent = seen[0]
    assert [row["response"] for row in heard] == ["3 16000", "text", "2 16000"]
    assert [row["response"] for row in silent] == ["0 16000", "text", "0 16000"]
    last = {"tags": ["question_type/2"], "prompt": "2", "response": "2 16000", "reference": "", "accuracy_reward": 1.0}
    assert heard[2].items() >= ({"row": 2, "silent": False} | last).items()
    written = [json.loads(line) for line in (tmp_path / "rows" / "step_000002.jsonl").read_text().splitlines()]
    assert written == seen[1][0] + seen[1][1]


def test_evaluation_data_whose_answers_collapse():
    prompt = render_prompt("?", ["(A) yes", "(B) no"], False) + "<|im_end|>\n<|im_start|>assistant\n"
    golds = ["(A) yes", "(B) no"] * 6
    turn = "<|im_start|>assistant\n<answer>"  # imitated, and no second answer
    said = [f"<answer>A</answer>{turn}B<|im_end|>", "<answer>y<sp>es</answer><|im_end|>"] * 6  # two names of one choice
    tags = ("question_type/x", "dataset/y")
    names = ("tags", "prompt", "response", "reference")
    rows = [(tags, prompt, response, gold) for response, gold in zip(said, golds, strict=True)]
    others = [(("question_type/z",), prompt, f"<answer>{gold}</answer>", gold) for gold in golds]
    heard, other = ([dict(zip(names, row, strict=True)) for row in part] for part in (rows, others))
    found = while_training.collapsed_rewards(heard + other, [*other, *other], ("<|im_start|>", "<sp>"))
    sentence = "12 of 12 answers are '(a) yes', which is right for 6; 6 are the same in silence"
    assert found == {"question_type/x": sentence}
    assert while_training.collapsed_rewards(other, None) == {}


# ------------------------------------------------------------------------------------------------------- the best model
METRIC = "eval/mmau/accuracy"


@pytest.fixture
def make_best(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "gather_objects", lambda value: [value])  # one rank

    def together(action, mine=True):
        if mine:
            action()

    said = []
    strategy = SimpleNamespace(together=together, is_rank_0=lambda: True, print=said.append, said=said)

    def make(remembered=None, metric=METRIC):
        return BestModel(strategy, tmp_path / "best", metric, remembered)

    make.said = said
    return make


def keep(best, step, value):
    """Offer a model that is a file with its step."""

    def save(folder):
        Path(folder).mkdir()
        (Path(folder) / "weights").write_text(f"of step {step}")

    best.keep({METRIC: value}, step, save)


def kept(tmp_path):
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    return (tmp_path / "best" / "weights").read_text(), record["step"], record["metric"], record["value"]


def test_a_better_model_takes_the_place_of_the_best(make_best, tmp_path):
    best = make_best()
    for step, value in ((1, 0.5), (2, 0.4), (3, 0.5), (4, 0.75), (5, float("nan"))):
        keep(best, step, value)
        expected = 1 if step < 4 else 4
        assert kept(tmp_path) == (f"of step {expected}", expected, METRIC, 0.5 if expected == 1 else 0.75)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]  # nothing left over


def test_a_resumed_run_keeps_a_better_one(make_best, tmp_path):
    keep(make_best(), 9, 0.9)
    # from a checkpoint that is older than the best, or knows it
    for remembered in (None, {"step": 9, "metric": METRIC, "value": 0.9}):
        best = make_best(remembered=remembered)
        keep(best, 8, 0.8)
        assert kept(tmp_path) == ("of step 9", 9, METRIC, 0.9)
    keep(best, 10, 0.95)
    assert kept(tmp_path)[1] == 10


@pytest.mark.parametrize(
    ("left", "found"),
    [
        ({"best.part": 4, "best.old.part": 2}, 4),  # between the renames
        ({"best": 4, "best.old.part": 2}, 4),  # after them
        ({"best": 2, "best.part": 4}, 2),  # before them: perhaps not all of it is on disk
        ({"best.part": 4}, None),
    ],
)
def test_killed_at_the_renames(make_best, tmp_path, left, found):
    for name, step in left.items():
        keep(make_best(), step, 0.5)
        (tmp_path / "best").rename(tmp_path / f"{name} made")
    for name in left:
        (tmp_path / f"{name} made").rename(tmp_path / name)
    record = make_best().record
    assert (record and record["step"]) == found
    assert [path.name for path in tmp_path.iterdir()] == ([] if found is None else ["best"])
    assert found is None or kept(tmp_path)[1] == found


def test_killed_while_writing(make_best, tmp_path):
    keep(make_best(), 2, 0.5)
    (tmp_path / "best.part").mkdir()
    (tmp_path / "best.part" / "weights").write_text("half")
    assert make_best().record["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_failed_save_leaves_the_best(make_best, tmp_path):
    best = make_best()
    keep(best, 2, 0.5)

    def save(folder):
        raise SaveError("no space left")

    with pytest.raises(SaveError):
        best.keep({METRIC: 0.6}, 4, save)
    assert kept(tmp_path)[1] == 2 and best.record["value"] == 0.5
    keep(best, 6, 0.55)  # the next that is better than the one that is there
    assert kept(tmp_path)[1] == 6


def test_a_folder_that_is_gone_is_said(make_best):
    assert make_best(remembered={"step": 9, "metric": METRIC, "value": 0.9}).record is None
    assert "is gone, the model of step 9" in make_best.said[0]


def test_another_metric_is_refused(make_best, tmp_path):
    keep(make_best(), 9, 0.9)
    with pytest.raises(SystemExit, match="holds the best by eval/mmau/accuracy, which cannot be compared"):
        make_best(metric="eval/reward")
    with pytest.raises(KeyError, match="no such metric; it has eval/mmau/accuracy"):
        shutil.rmtree(tmp_path / "best")
        make_best(metric="eval/reward").keep({METRIC: 0.1, "time/eval": 1.0}, 1, None)
