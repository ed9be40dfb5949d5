"""A run's folder belongs to one run: what a new one moves aside, what a resumed one may change, who may train there."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import train_colocate
from conftest import LAUNCH_SCRIPT, NO_WEIGHTS, parse_flags, run_command, run_script

from aqa.report.page import session_rows
from aqa.report.run_data import Run
from aqa.training.flag_rules import find_problems, has_checkpoint
from aqa.training.flags import build_parser
from aqa.training.length import has_ended
from aqa.training.run_folder import EARLIER, FIXED, FREE, open_run
from lightrft.utils import add_arguments

PARSER = build_parser(add_arguments)
# by which files a run is told from another: a file for each thing that a run writes
FILES = ["model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "best/best.json", "report.html"]
FILES += ["metrics.jsonl", "trajectories/step_000001.jsonl", "hf_step_000002/config.json", "eval/a.json", "metrics.csv"]
FILES += ["warm_start/config.json", "warm_start.part/config.json"]
FILES += ["logs/rank0.20260101-000000.log", "wandb_run_id.txt", "adapter/adapter_config.json", "chat_template.jinja"]
CHECKPOINT = ["_actor/latest", "_actor/step_000002/weights"]


@pytest.fixture
def session(tmp_path):
    """``session(flag=value, ...)``: a session's work on its folders, without the training. Returns id and messages."""
    for name, text in (("model/config.json", "{}"), ("model/model.safetensors", "w"), ("data/train.parquet", "12")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def work(prompts=0, trained=8, files=(), **flags):
        folders = {"pretrain": "model", "prompt_data": "data", "save_path": "run"}
        given = {name: tmp_path / folder for name, folder in folders.items()} | flags
        command = []
        for name, value in given.items():
            values = value if isinstance(value, list) else [value]
            command += [f"--{name}", *([] if value is True else map(str, values))]
        args = parse_flags(command)
        with open_run(args, PARSER) as folder:
            notes = folder.begin(prompts // args.rollout_batch_size, {})
            note = train_colocate.model_notes(folder, 0.0, trained)["r1_aqa.json"]
            for name in (*files, *(["r1_aqa.json"] if files else [])):
                path = Path(args.ckpt_path if name.startswith("_actor") else args.save_path) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(note if path.name == "r1_aqa.json" else f"{name} of {folder.run}")
            folder.work_done = folder.trained()
        return folder.run, "\n".join(notes), folder

    return work


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- new runs
@pytest.mark.parametrize("apart", [False, True])
def test_a_new_run_moves_everything_of_the_older_one_aside(session, tmp_path, apart):
    places = {"ckpt_path": tmp_path / "checkpoints"} if apart else {}
    out, ckpt = tmp_path / "run", tmp_path / ("checkpoints" if apart else "run")
    first, _, _ = session(files=[*FILES, *CHECKPOINT], **places)
    (out / "my notes.txt").touch()
    older = {**content(out), **content(ckpt)}
    second, said, _ = session(files=["model.safetensors", "config.json"], **places)
    assert first != second and str(out / EARLIER / first) in said and str(ckpt / EARLIER / first) in said
    aside = {**content(out / EARLIER / first), **content(ckpt / EARLIER / first)}
    assert aside == {name: text for name, text in older.items() if name != "my notes.txt"}
    left = [name for name in content(out) if not name.startswith(EARLIER)]
    assert sorted(left) == sorted(
        ["config.json", "model.safetensors", "my notes.txt", "r1_aqa.json", "run_config.json"]
        + ([] if apart else ["_actor/run.json"])
    )
    # the severe case: the older run's checkpoints cannot be resumed into the newer run's model any more
    assert not has_checkpoint(str(ckpt), fsdp=False)
    places = {"save_path": out / EARLIER / first, "ckpt_path": ckpt / EARLIER / first}
    assert session(load_checkpoint=True, prompts=4, **places)[0] == first  # but where it is now, the run goes on


def test_runs_without_an_id_are_moved_aside_by_their_date(session, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("run_config.json", "model.safetensors", "config.json"):  # the first one is no JSON
        (tmp_path / "run" / name).write_text("old")
        os.utime(tmp_path / "run" / name, (0, 86400 * 365))
    with pytest.raises(SystemExit, match=r"run_config.json: cannot be read .*; put it right, or remove it"):
        session(load_checkpoint=True)
    session()
    [place] = (tmp_path / "run" / EARLIER).iterdir()
    assert place.name.startswith("1971-01-01".replace("-", "")) and len(content(place)) == 3


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        (["config.json", "model.safetensors"], {}, "holds config.json, model.safetensors, which no run"),
        (["best/x"], {}, "holds best, which no run"),
        (["metrics.jsonl", "best/config.json"], {"pretrain": "run/best"}, "--pretrain run/best lies there"),
        (["metrics.jsonl", "config.json"], {"pretrain": "run"}, "--pretrain run lies there"),
        (["train.parquet"], {"prompt_data": "run"}, "--prompt_data run lies there"),
        (["metrics.jsonl", "eval/q.json"], {"eval_benchmark": "run/eval/q.json"}, "--eval_benchmark run/eval/q"),
    ],
)  # fmt: skip
def test_folders_that_are_no_runs_and_what_is_read_stay_where_they_are(
    session, tmp_path, monkeypatch, files, flags, message
):
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("precious")
    before = content(tmp_path / "run")
    with pytest.raises(SystemExit, match=message):
        session(**flags)
    assert content(tmp_path / "run") == before


# ------------------------------------------------------------------------------------------------------------- resuming
CHANGES = {"actor_learning_rate": 2e-6, "seed": 7, "n_samples_per_prompt": 4, "rollout_batch_size": 8}
CHANGES |= {"train_batch_size": 256, "num_episodes": 3, "max_samples": 100, "lr_warmup_ratio": 0.5, "init_kl_coef": 0.1}
CHANGES |= {"temperature": 0.5, "advantage_estimator": "rloo", "reward": "exact", "max_norm": 2.0, "bf16": True}
CHANGES |= {"adam_betas": [0.9, 0.99], "engine_type": "hf", "lora_rank": 8, "zero_stage": 3, "fsdp": True}
CHANGES |= {"freeze_prefix": "audio_tower"}


def test_changed_settings_are_refused_unless_they_are_named(session):
    session(files=CHECKPOINT)
    for name, value in CHANGES.items():
        allowed = {"allow_changes": [name]} if name in FIXED else {}
        with pytest.raises(SystemExit, match=f"- {name}: .*, now") as refused:
            session(load_checkpoint=True, **{name: value}, **allowed)
        assert (f"--allow_changes {name} if this is meant" in str(refused.value)) == (name not in FIXED)
    may = {name: value for name, value in CHANGES.items() if name not in FIXED}
    _, said, _ = session(load_checkpoint=True, allow_changes=list(may), **may)
    assert said.count("changed   ") == len(may) and "actor_learning_rate: 1e-06, from now on 2e-06" in said
    session(load_checkpoint=True, **may)  # these are the run's settings now
    with pytest.raises(SystemExit, match="actor_learning_rate: 2e-06, now 1e-06"):
        session(load_checkpoint=True)
    with pytest.raises(SystemExit, match="--allow_changes sed: no such flag"):
        session(load_checkpoint=True, **may, allow_changes=["sed", "seed"])
    assert set(vars(PARSER.parse_args([]))) | {"ranks"} >= {*FREE, *FIXED}  # all are flags


def test_what_a_change_would_not_reach_is_refused(session, monkeypatch):
    session(files=CHECKPOINT, kl_target=0.1)
    with pytest.raises(SystemExit, match=r"init_kl_coef: 0.04, now 0.1 \(--kl_target has adapted it since\)"):
        session(load_checkpoint=True, kl_target=0.1, init_kl_coef=0.1, allow_changes=["init_kl_coef"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"ranks: 1, now 2 .*on the same number of ranks"):
        session(load_checkpoint=True, kl_target=0.1, allow_changes=["ranks"])


def test_model_and_data_are_compared_by_content(session, tmp_path):
    session(files=CHECKPOINT, eval_steps=5)
    for name in ("data", "model"):
        shutil.move(tmp_path / name, tmp_path / f"moved_{name}")
    moved = {"prompt_data": tmp_path / "moved_data", "pretrain": tmp_path / "moved_model"}
    session(load_checkpoint=True, save_steps=7, **moved)
    (tmp_path / "moved_data" / "train.parquet").write_text("21")  # the rows in another order
    with pytest.raises(SystemExit, match=r"prompt_data: .*data \(content \w+\), now .*moved_data \(content \w+\)\n"):
        session(load_checkpoint=True, **moved)
    session(load_checkpoint=True, **moved, allow_changes=["prompt_data"])
    (tmp_path / "moved_model" / "model.safetensors").write_text("v")
    with pytest.raises(SystemExit, match="the weights are the checkpoint's"):
        session(load_checkpoint=True, **moved, allow_changes=["pretrain"])


def test_a_model_that_is_a_folder_once_and_a_name_on_the_hub_then_is_the_users_word(session, tmp_path):
    folder, hub = {"pretrain": tmp_path / "model"}, {"pretrain": "who/model"}
    for save, before, now in (("a", folder, hub), ("b", hub, folder)):
        session(files=CHECKPOINT, save_path=tmp_path / save, **before)
        resumed = {"load_checkpoint": True, "save_path": tmp_path / save} | now
        with pytest.raises(SystemExit, match=r"(?s)- pretrain: .*, or --allow_changes pretrain if") as refused:
            session(**resumed)
        assert "the weights are the checkpoint's" not in str(refused.value)
        session(**resumed, allow_changes=["pretrain"])
    session(files=CHECKPOINT, save_path=tmp_path / "c", **hub)
    with pytest.raises(SystemExit, match="the weights are the checkpoint's"):
        session(load_checkpoint=True, save_path=tmp_path / "c", pretrain="who/other", allow_changes=["pretrain"])


def test_a_flag_is_compared_while_what_it_belongs_to_is_on(session):
    session(files=CHECKPOINT)
    idle = {"target_modules": "q_proj", "lora_alpha": 8, "overlong_buffer_len": 9, "dynamic_sampling_rounds": 3}
    session(load_checkpoint=True, **idle)
    session(files=CHECKPOINT, overlong_buffer=True, lora_rank=4)
    on = {"load_checkpoint": True, "overlong_buffer": True, "lora_rank": 4}
    with pytest.raises(SystemExit, match=r"(?s)- lora_alpha: .*- target_modules: .*- overlong_buffer_len") as refused:
        session(**on, **idle)
    assert "dynamic_sampling_rounds" not in str(refused.value)


def test_a_changed_reward_function_is_noticed(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("x = 1")
    session(files=CHECKPOINT, reward="mine:f")
    (tmp_path / "mine.py").write_text("x = 2")
    with pytest.raises(SystemExit, match=r"- reward: mine:f \(content \w+\), now mine:f \(content"):
        session(load_checkpoint=True, reward="mine:f")
    (tmp_path / "mine.py").write_text("x = 1")
    with pytest.raises(SystemExit, match=r"- reward: mine:f .*, now mine:g"):
        session(load_checkpoint=True, reward="mine:g")
    session(load_checkpoint=True, reward="mine:f")


def test_one_changed_part_of_a_large_file_is_noticed(session, tmp_path):
    with (tmp_path / "model" / "model.safetensors").open("wb") as file:
        file.truncate(40 * 2**20)
    session(files=CHECKPOINT)
    for place in (0, 40 * 2**20 - 1):
        with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        with pytest.raises(SystemExit, match="pretrain"):
            session(load_checkpoint=True)


def test_folder_and_checkpoints_must_be_of_one_run(session, tmp_path):
    first, _, _ = session(files=CHECKPOINT)
    second, _, _ = session(files=["config.json"], save_path=tmp_path / "other")
    before = content(tmp_path / "other")
    with pytest.raises(SystemExit, match=f"checkpoints of run {first}, and .* the folder of run {second}"):
        session(load_checkpoint=True, save_path=tmp_path / "other", ckpt_path=tmp_path / "run")
    assert content(tmp_path / "other") == before
    places = {"save_path": tmp_path / "third", "ckpt_path": tmp_path / "run"}
    assert session(load_checkpoint=True, **places)[0] == first  # goes on in a folder of its own


def test_runs_of_an_older_version_resume_with_a_note(session, tmp_path):
    for name in CHECKPOINT:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    for name in ("config.json", "model.safetensors"):  # perhaps another run's
        (tmp_path / "run" / name).write_text("a finished model")
    _, said, folder = session(load_checkpoint=True)
    assert "none are compared" in said and folder.work_done == 0
    assert len(list((tmp_path / "run" / EARLIER).glob("*/model.safetensors"))) == 1
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run" / "_actor").mkdir(parents=True)
    config = {"started": "2026-01-01", "flags": {"seed": 42, "num_episodes": 5}}  # an older version knew fewer flags
    (tmp_path / "run" / "run_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="num_episodes: 5, now 1"):
        session(load_checkpoint=True)
    _, said, _ = session(load_checkpoint=True, num_episodes=5)
    assert "only flags are compared" in said


def test_a_run_that_has_ended_is_not_trained_further_and_none_becomes_shorter(session):
    _, _, folder = session(files=["config.json"], trained=8)
    assert folder.work_done == 8
    assert has_ended(8, 8) and not has_ended(8, 12)
    with pytest.raises(SystemExit, match=r"trained on 8 prompts already, and .* now make 4"):
        has_ended(8, 4)
    with pytest.raises(SystemExit, match=r"holds no checkpoint to go on from .*; --pretrain .*/run with another"):
        train_colocate.resume(folder.args, None, None, None, None)


@pytest.mark.parametrize("apart", [False, True])
def test_a_finished_run_without_checkpoints_is_known_as_finished(session, tmp_path, apart):
    places = {"save_path": str(tmp_path / "run"), "ckpt_path": str(tmp_path / ("checkpoints" if apart else "run"))}
    first, _, _ = session(files=["config.json"], trained=8, **places)
    shutil.rmtree(Path(places["ckpt_path"]) / "_actor")
    args = parse_flags([*(f"--{name}={value}" for name, value in places.items()), "--load_checkpoint"])
    assert not any("checkpoint" in problem for problem in find_problems(args, 1))
    again, _, folder = session(load_checkpoint=True, **places)
    assert again == first and folder.work_done == 8
    with pytest.raises(SystemExit, match="- seed: 42, now 7"):
        session(load_checkpoint=True, seed=7, **places)


def test_a_new_run_leaves_the_checkpoints_of_another_ones_folder(session, tmp_path):
    shared = tmp_path / "shared"
    names = {name: session(files=CHECKPOINT, save_path=tmp_path / name)[0] for name in "ac"}
    names["d"], _, _ = session(files=CHECKPOINT, save_path=tmp_path / "d", ckpt_path=shared)
    before = content(shared)
    for save, more in (("a", {}), ("c", {"disable_ds_ckpt": True}), ("new", {}), ("shared", {})):
        refusal = rf"--ckpt_path .*shared: .* holds checkpoints of run {names['d']}, whose folder is .*/d; give"
        with pytest.raises(SystemExit, match=refusal):
            session(save_path=tmp_path / save, ckpt_path=shared, **more)
        assert content(shared) == before
    (shared / "_actor" / "run.json").unlink()  # an older version's
    with pytest.raises(SystemExit, match="holds checkpoints of a run without an id; give this run another --ckpt_path"):
        session(save_path=tmp_path / "new", ckpt_path=shared)
    (tmp_path / "a" / "run_config.json").unlink()  # of one place, by what its checkpoints say
    assert names["a"] in session(save_path=tmp_path / "a")[1]


@pytest.mark.parametrize("apart", [False, True])
def test_an_older_versions_run_can_be_resumed_more_than_once(session, tmp_path, apart):
    places = {"ckpt_path": tmp_path / ("checkpoints" if apart else "run"), "disable_ds_ckpt": True}
    session(files=CHECKPOINT, **places)
    config = json.loads((tmp_path / "run" / "run_config.json").read_text())
    for name in ("run", "digests", "sessions"):
        del config[name]
    (tmp_path / "run" / "run_config.json").write_text(json.dumps(config))
    first, _, _ = session(load_checkpoint=True, **places)
    assert session(load_checkpoint=True, **places)[0] == first


# ------------------------------------------------------------------------------------------------ two trainings, places
def test_a_second_training_is_refused(session, tmp_path):
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / "model" / name).touch()
    (tmp_path / "model" / "model.safetensors").write_bytes(NO_WEIGHTS)
    command = ["--pretrain", tmp_path / "model", "--prompt_data", tmp_path / "data", "--engine_type", "hf"]
    command += ["--save_path", tmp_path / "a", "--ckpt_path", tmp_path / "b"]
    args = parse_flags(command)
    with open_run(args, PARSER):
        before = content(tmp_path / "a")
        done = run_script("train_colocate.py", *command, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"error: --save_path {tmp_path / 'a'} is in use by process {os.getpid()} on host" in done.stderr
        with pytest.raises(SystemExit, match=f"--ckpt_path {tmp_path / 'b'} is in use by"):
            session(ckpt_path=tmp_path / "b")
        assert content(tmp_path / "a") == before
    assert not list(tmp_path.rglob("run.lock"))


def test_a_place_that_cannot_be_written_is_named(session, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run" / "run_config.json.part").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"--save_path .*/run: cannot be written \(Is a directory\); make room"):
        session()
    with pytest.raises(SystemExit, match=r"--save_path .*file/run: cannot be written"):
        session(save_path=tmp_path / "file" / "run")
    with pytest.raises(SystemExit, match=r"--save_path .*/file: cannot be written \(.*/file: File exists\); move that"):
        session(save_path=tmp_path / "file")


def test_links_are_moved_aside_and_what_they_lead_to_is_not(session, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "old.log").touch()
    session(files=["config.json"])
    (tmp_path / "run" / "logs").symlink_to(elsewhere)
    shutil.rmtree(tmp_path / "run" / "_actor")
    (tmp_path / "run" / "_actor").symlink_to(tmp_path / "an unmounted disk")
    session(files=["config.json"])
    assert (elsewhere / "old.log").exists() and len(list((tmp_path / "run" / EARLIER).glob("*/config.json"))) == 1
    assert [path.is_symlink() for path in (tmp_path / "run" / EARLIER).glob("*/*") if path.name == "_actor"] == [True]

    def rename(path, new):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))

    monkeypatch.setattr(Path, "rename", rename)  # as of a disk that is mounted in the folder
    with pytest.raises(
        SystemExit, match=r"--save_path .*/run: cannot be written \(.*/run/\w+.json: .*; move that away"
    ):
        session()


@pytest.mark.parametrize("name", ["run_config.json", "r1_aqa.json", "_actor/run.json"])
@pytest.mark.parametrize("damage", ["folder", "list"])
def test_a_record_that_cannot_be_read_is_named(session, tmp_path, name, damage):
    session(files=[*CHECKPOINT, "config.json"])
    (tmp_path / "run" / name).unlink()
    if damage == "folder":
        (tmp_path / "run" / name).mkdir()
    else:
        (tmp_path / "run" / name).write_text("[1]")
    with pytest.raises(SystemExit, match=rf"{name}: cannot be read \(.*\); put it right, or remove it"):
        session(load_checkpoint=True)


# ------------------------------------------------------------------------------------------------------------- sessions
def test_each_session_is_recorded_and_shown(session, tmp_path):
    session(files=CHECKPOINT)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3}\n')
    session(load_checkpoint=True, prompts=32, num_episodes=2, allow_changes=["num_episodes"], save_steps=7)
    config = json.loads((tmp_path / "run" / "run_config.json").read_text())
    assert [each["first_step"] for each in config["sessions"]] == [1, 3]  # 32 prompts are 2 steps of 16
    config["sessions"][0] = {k: v for k, v in config["sessions"][0].items() if k not in ("ended", "how", "last_step")}
    rows = session_rows(Run(tmp_path, "run", [1], {}, config, 0))
    assert rows[0][1:4] == ("", "killed, or still running", "1 to ?")
    assert rows[1][2:4] == ("finished", "3 to 3") and rows[1][5] == "num_episodes: 1 → 2; save_steps: -1 → 7"
    config["sessions"][1]["last_step"] = -2  # it ended in the warm start
    assert session_rows(Run(tmp_path, "run", [1], {}, config, 0))[1][3] == "none"


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (SystemExit(143), "SIGTERM"),
        (SystemExit(4), "--on_anomaly stop"),
        (SystemExit("no such metric"), "no such metric"),
        (SystemExit(), "exit status 0"),
        (SystemExit(""), "exit status 0"),
        (ValueError("a\nb"), "ValueError: a"),
    ],
)
def test_how_a_session_ended(tmp_path, error, how):
    args = parse_flags([f"--save_path={tmp_path}", "--pretrain=a/b", f"--prompt_data={tmp_path / 'data'}"])
    with pytest.raises(type(error)), open_run(args, PARSER) as folder:
        folder.begin(0, {})
        raise error
    config = json.loads((tmp_path / "run_config.json").read_text())
    assert config["sessions"][0]["how"] == how


# -------------------------------------------------------------------------------------------------------- launch script
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "exp-ep1-kl0.04-lr1e-6-newer"),
        ({"LR": "2e-6"}, "exp-ep1-kl0.04-lr2e-6-second"),
        ({"EPISODE": "2"}, None),  # nobody trained so: a new run
        ({"RUN_ID": "first"}, "exp-ep1-kl0.04-lr1e-6-first"),
        ({"RUN_ID": "second"}, "exp-ep1-kl0.04-lr2e-6-second"),  # whose settings train_colocate.py compares
        ({"RUN_ID": "second", "EPISODE": "2"}, "exp-ep1-kl0.04-lr2e-6-second"),
        ({"RUN_ID": "er"}, None),  # is no other run's end
        ({"EXPERIMENT_NAME": "another"}, None),
        ({"RUN_ID": "finished"}, "exp-ep1-kl0.04-lr1e-6-finished"),  # its model is no other run's to replace
        ({"RUN_ID": "cut"}, None),  # no whole model, no checkpoint
    ],
)
def test_the_launch_script_resumes_the_run_that_its_variables_name(tmp_path, settings, expected):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\n[ "$1" = -c ] || echo "told: $*"\n')
    stub.chmod(0o755)
    names = ["exp-ep1-kl0.04-lr1e-6-first", "exp-ep1-kl0.04-lr1e-6-newer", "exp-ep1-kl0.04-lr2e-6-second"]
    for age, name in enumerate(names):  # the newest of all is the one with another learning rate
        latest = tmp_path / "results" / "exp" / name / "_actor" / "latest"
        latest.parent.mkdir(parents=True)
        latest.touch()
        os.utime(latest, (1000 + age, 1000 + age))
    for name, files in (("finished", ("r1_aqa.json", "config.json")), ("cut", ("r1_aqa.json",))):
        for file in files:
            path = tmp_path / "results" / "exp" / f"exp-ep1-kl0.04-lr1e-6-{name}" / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
            os.utime(path, (0, 0))
    variables = {"EXPERIMENT_NAME": "exp", "RESUME": "1", "PYTHON": stub, "PATH_TO_YOUR_AVQA_DATASET": "x"}
    done = run_command("bash", LAUNCH_SCRIPT, cwd=tmp_path, **variables | settings)
    [told] = [line for line in done.stdout.splitlines() if line.startswith("told: ")]
    path = told.split("--save_path results/")[1].split()[0]
    assert ("--load_checkpoint" in told) == (expected is not None)
    if expected or settings.get("RUN_ID") == "cut":
        assert path == f"exp/{expected or 'exp-ep1-kl0.04-lr1e-6-cut'}"
    else:
        assert path.split("/")[1] not in names
