"""Two runs in one folder, and a finished run that is resumed: real trainings, and nothing good is written over."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.training import metrics_of, train

HF = ("--engine_type", "hf")


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves; logs grow at every start."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("logs")}


def test_no_finished_model_is_written_over(tiny_model, demo_parquet, tmp_path):
    out = tmp_path / "run"
    flags = (*HF, "--max_samples", 8)  # 2 steps of 4 prompts
    train(tiny_model, demo_parquet, out, *flags, "--save_steps", 1)
    first = json.loads((out / "run_config.json").read_text())["run"]
    older = files(out)
    assert json.loads(older["r1_aqa.json"]) == {"asked_to_think": 0.0, "run": first, "prompts": 8}

    # another run in the same folder, without checkpoints: the older one is moved aside
    done = train(tiny_model, demo_parquet, out, *HF, "--max_samples", 4)
    aside = out / "earlier" / first
    assert f"is now in {aside}" in done.stdout and files(aside) == older
    [log] = (aside / "logs").iterdir()
    assert "step 2/2" in log.read_text() and "step 2/2" not in (out / "logs" / "rank0.log").read_text()
    newer = files(out)
    assert not [name for name in newer if name.startswith("_actor/step")]
    done = train(tiny_model, demo_parquet, out, *HF, "--max_samples", 4, "--load_checkpoint")
    assert "nothing left to do" in done.stdout and files(out) == newer

    # the older run has ended
    resume = (*flags, "--load_checkpoint")
    done = train(tiny_model, demo_parquet, aside, *resume)
    assert "nothing left to do" in done.stdout and files(aside) == older
    for changed, message in (
        (("--max_samples", 4, "--allow_changes", "max_samples"), "trained on 8 prompts already, and"),
        (("--num_episodes", 2, "--seed", 7), "num_episodes: 1, now 2"),
    ):
        done = train(tiny_model, demo_parquet, aside, *resume, *changed, check=False)
        assert done.returncode == 2 and message in done.stdout + done.stderr and files(aside) == older

    # changes that are named are made: two steps of 8 prompts after the two of 4, and nothing is done or written twice;
    # half a cosine down to a tenth, of the new learning rate and over 3 steps, as many as make the 24 prompts now
    changed = ("--num_episodes", 3, "--actor_learning_rate", 2e-3, "--init_kl_coef", 0)
    changed += ("--rollout_batch_size", 8, "--train_batch_size", 32, "--save_steps", 1, "--max_ckpt_num", 9)
    names = ("num_episodes", "actor_learning_rate", "init_kl_coef", "rollout_batch_size", "train_batch_size")
    done = train(
        tiny_model, demo_parquet, aside, *resume, *changed, "--no-use_kl_loss", "--allow_changes", *names, "use_kl_loss"
    )
    assert "changed   actor_learning_rate: 0.001, from now on 0.002" in done.stdout
    records = metrics_of(aside)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["train/lr"] for record in records[2:]] == pytest.approx([2e-3 * (0.1 + 0.45 * (1 - 0.5)), 2e-4])
    assert records[3]["train/kl"] == 0
    now = files(aside)
    assert now["metrics.jsonl"].startswith(older["metrics.jsonl"])
    assert all(now[name] == older[name] for name in older if "/step_00000" in name)
    manifests = [json.loads(now[f"_actor/step_00000{step}/manifest.json"]) for step in (1, 2, 3, 4)]
    assert [manifest["prompts"] for manifest in manifests] == [4, 8, 16, 24]
    config = json.loads((aside / "run_config.json").read_text())
    assert [(each["last_step"], each["how"]) for each in config["sessions"]] == [(2, "finished"), (4, "finished")]
    assert load_file(aside / "model.safetensors").keys() == load_file(out / "model.safetensors").keys()
    assert json.loads((aside / "r1_aqa.json").read_text())["prompts"] == 24
