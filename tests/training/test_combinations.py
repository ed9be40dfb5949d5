"""Two processes give one process's metrics, for each way to shard, each layout of the engine, and each engine.

`make test-all` runs them (8 minutes).
"""

from pathlib import Path

import pytest
from support.training import metrics_of, moved, train

SHARDING = {f"ZeRO-{stage}": ("--zero_stage", stage) for stage in (0, 2, 3)} | {"FSDP2": ("--fsdp",)}
LAYOUTS = {  # of two processes
    "vllm, DP 2": ("--engine_type", "vllm", "--engine_tp_size", 1),
    "vllm, TP 2": ("--engine_type", "vllm", "--engine_tp_size", 2),
    "hf, DP 2": ("--engine_type", "hf"),
}
CASES = [(sharding, layout) for sharding in SHARDING for layout in LAYOUTS]
# 13 rows fill three rollouts of 4 prompts, the rest is left out; 5 rows to evaluate on do not divide among two ranks
DATA = ("--max_samples", 13, "--eval_steps", 3, "--max_eval_samples", 5)
BOUND = 1e-4
pytestmark = pytest.mark.slow  # test_training.py runs two of them, and FSDP2 is in test_fsdp.py


@pytest.fixture(scope="module")
def alone(tiny_model, demo_parquet, tmp_path_factory):
    """The run of one process, by engine."""
    runs: dict[str, Path] = {}

    def get(engine: str) -> Path:
        if engine not in runs:
            runs[engine] = tmp_path_factory.mktemp(engine)
            train(tiny_model, demo_parquet, runs[engine], "--engine_type", engine, *DATA)
        return runs[engine]

    return get


def largest_difference(first: list[dict], second: list[dict]) -> float:
    """Over all metrics of all steps but times; they must be the same ones."""
    assert [record.keys() for record in first] == [record.keys() for record in second]
    return max(
        abs(one[name] - two[name])
        for one, two in zip(first, second, strict=True)
        for name in one
        if not name.startswith("time/") and name != "samples_per_second"
    )


@pytest.mark.parametrize(("sharding", "layout"), [pytest.param(*case, id=" ".join(case)) for case in CASES])
def test_two_processes_give_the_metrics_of_one(alone, tiny_model, demo_parquet, tmp_path, sharding, layout):
    train(tiny_model, demo_parquet, tmp_path, *SHARDING[sharding], *LAYOUTS[layout], *DATA, processes=2)
    records = metrics_of(tmp_path)
    assert len(records) == 3 and "eval/accuracy_reward" in records[2]
    assert all(record["rollout/logprob_gap_max"] < 1e-3 for record in records)
    assert largest_difference(records, metrics_of(alone(layout.split(",")[0]))) < BOUND
    _, same = moved(tiny_model, tmp_path)
    assert {name for name in same if "k_proj.bias" not in name} == {"audio_tower.embed_positions.weight"}
