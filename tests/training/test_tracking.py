"""Metrics under the same names in wandb, TensorBoard and the run's folder."""

import json
from types import SimpleNamespace

import numpy as np
import soundfile
import wandb

from lightrft.utils.metrics import MetricsWriter


def tracked(folder, clip):
    """Two steps through every kind of tracking, the second with a table."""
    names = {"wandb_org": None, "wandb_group": None, "wandb_project": "p", "wandb_run_name": "name"}
    args = SimpleNamespace(use_wandb=True, wandb_table_steps=2, use_tensorboard=str(folder / "tb"), **names)
    writer = MetricsWriter(folder, args)
    samples = [
        {"step": 2, "group": 0, "audio_path": path, "prompt": "p", "response": said, "reward": 1.0}
        for path, said in ((str(clip), "a"), (str(clip), "b"), (None, "c"), (str(folder / "gone.wav"), "d"))
    ]
    for step in (1, 2):
        writer.write(step, {"rollout/reward": step * 1.0, "train/grad_norm": float("nan")}, samples)
    writer.write(1, {"eval/reward": 0.5})  # as the evaluation that a resumed run makes up
    writer.close()
    # the run's file may be whole only a moment after the run's end (2 of 80 times); and the environment is read anew
    wandb.teardown()


def test_the_same_names_everywhere(tmp_path, monkeypatch):
    """Offline: what wandb would send. Nothing here reaches its servers."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.zeros(800), 16_000)
    tracked(tmp_path / "run", clip)
    names = {"rollout/reward", "train/grad_norm", "eval/reward"}
    events = EventAccumulator(str(tmp_path / "run" / "tb" / "name")).Reload()
    assert set(events.Tags()["scalars"]) == names
    assert [(e.step, e.value) for e in events.Scalars("rollout/reward")] == [(1, 1.0), (2, 2.0)]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set().union(*records) == {"step"} | names
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (log,) = kept.glob("*.wandb")
    assert all(name.encode() in log.read_bytes() for name in names)
    (table,) = (kept / "files" / "media" / "table").glob("rollouts_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["audio", "group", "prompt", "response", "reward"]
    assert [row[3] for row in content["data"]] == ["a", "b", "c", "d"]
    assert [row[0] for row in content["data"]] == ["Audio", "Audio", None, None]
    staged = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert staged.count(clip.read_bytes()) == 1  # the responses of a group share it


def test_wandb_can_be_disabled(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracked(tmp_path / "run", tmp_path / "gone.wav")
    assert not (tmp_path / "run" / "wandb").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
