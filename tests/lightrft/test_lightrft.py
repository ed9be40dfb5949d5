"""The example inside LightRFT itself, on the CPU: ``make test-lightrft LIGHTRFT_HOME=...``."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLE, LAUNCH_SCRIPT, ROOT, python_on, run_command
from safetensors.torch import load_file
from support.training import METRICS, SMALL, metrics_of, moved
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from aqa.families import AudioFlamingo3, Qwen2_5Omni
from aqa.report.metrics import METRICS as METRIC_TABLE

NOT_MEASURED = {"train/clip_fraction"}  # by LightRFT's trainer
DEEPSPEED = ("--zero_stage", 2)
FSDP = ("--fsdp", "--bf16")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of the LightRFT checkout into whose examples this example alone was copied, with the launcher beside it.

    No other file of this repository can be reached from there.
    """
    if "LIGHTRFT_HOME" not in os.environ:
        pytest.skip("LIGHTRFT_HOME is not set: the folder of a LightRFT checkout (commit 49e62cb)")
    for package in ("peft", "easydict"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"LightRFT needs {package}: make test-lightrft installs it")
    folder = tmp_path_factory.mktemp("drop_in") / "LightRFT"
    ignored = shutil.ignore_patterns("__pycache__", ".git", "r1_aqa")  # LightRFT has an example of this name, too
    shutil.copytree(os.environ["LIGHTRFT_HOME"], folder, ignore=ignored)
    shutil.copytree(EXAMPLE, folder / "examples" / "r1_aqa", ignore=shutil.ignore_patterns("__pycache__"))
    (folder.parent / "launcher").mkdir()
    shutil.copy(ROOT / "tests" / "lightrft_launcher.py", launcher_of(folder))
    return folder


def launcher_of(checkout: Path) -> Path:
    return checkout.parent / "launcher" / "lightrft_launcher.py"


OUTSIDE = {"LIGHTRFT_HOME": None, "PYTHONPATH": None}  # the environment of somebody who has the checkout only


def launch(checkout: Path, script: Path, *args: object, hooks=(), processes=1, check=True, home=None):
    """Run a script by the launcher, under torchrun for several processes; ``home`` sets LIGHTRFT_HOME."""
    flags = [flag for hook in hooks for flag in ("--hook", hook)]
    command = (*python_on(processes), launcher_of(checkout), *flags, script, *args)
    return run_command(*command, check=check, timeout=900, cwd=checkout, **OUTSIDE | {"LIGHTRFT_HOME": home})


def train(checkout: Path, model: Path, data: Path, out: Path, *extra: object, **kwargs) -> subprocess.CompletedProcess:
    arguments = ["--pretrain", model, "--prompt_data", data, "--save_path", out, *SMALL, *extra]
    return launch(checkout, checkout / "examples" / "r1_aqa" / "train_colocate.py", *arguments, **kwargs)


CASES = {"DeepSpeed": (*DEEPSPEED, "--no-bf16"), "ZeRO-3": ("--zero_stage", 3, "--bf16"), "FSDP2": FSDP}


LENGTH = ("--max_samples", 8, "--max_steps", 3)  # an episode and a half of two steps each


@pytest.fixture(scope="module", params=CASES)
def run(request, checkout, tiny_model, demo_parquet, tmp_path_factory):
    """Three steps with everything switched on."""
    out = tmp_path_factory.mktemp("lightrft") / "run"
    flags = (*LENGTH, "--save_steps", 2, "--save_hf_ckpt", "--save_trajectories", "--eval_steps", 2)
    done = train(
        checkout, tiny_model, demo_parquet, out, *flags, "--max_eval_samples", 8, "--report", *CASES[request.param]
    )
    return request.param, out, done


def test_engine_and_trainer_agree_in_every_step(checkout, run):
    kind, out, done = run
    metrics = metrics_of(out)
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert set(METRICS) - NOT_MEASURED <= set(m) and set(m) - {"step"} <= METRIC_TABLE.keys()
        assert m["rollout/logprob_gap_mean"] < (1e-5 if kind == "DeepSpeed" else 1e-2)
        assert kind != "DeepSpeed" or m["rollout/logprob_gap_max"] < 1e-3
        assert 0.5 < m["rollout/format_reward"] <= 1 and 0 < m["rollout/accuracy_reward"] < 1
    assert metrics[0]["train/kl"] == pytest.approx(0, abs=1e-4)  # the reference model hears the same
    assert "eval/accuracy_reward" in metrics[1] and "eval/accuracy_reward" not in metrics[0]
    said = f"(tested: 0.1.1 at commit 49e62cb), {checkout}"
    assert "host      LightRFT 0.1.1 at commit" in done.stdout and said in done.stdout
    assert "step 3/3  reward" in done.stdout


def test_every_parameter_moves_and_the_folder_is_whole(run, tiny_model):
    _, out, _ = run
    before, after = load_file(tiny_model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    # a step of AdamW moves a weight by the learning rate, which is too little for a gain of 1 in bfloat16
    in_float32 = after["audio_tower.conv1.weight"].dtype == torch.float32
    frozen = ("embed_positions",) if in_float32 else ("embed_positions", "norm")
    stuck = [
        n for n in before if torch.equal(before[n].to(after[n].dtype), after[n]) and not any(f in n for f in frozen)
    ]
    assert not stuck
    assert Qwen2AudioForConditionalGeneration.from_pretrained(out)
    assert json.loads((out / "config.json").read_text()).get("use_cache", True)
    assert AutoProcessor.from_pretrained(out).audio_token == "<|AUDIO|>"
    checkpoint = out / "global_step2_hf"
    assert (checkpoint / "model.safetensors").is_file() and AutoProcessor.from_pretrained(checkpoint)


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize("kind", ["DeepSpeed", "FSDP2"])
@pytest.mark.parametrize("family", [AudioFlamingo3, Qwen2_5Omni])
def test_the_other_families_train(checkout, family, kind, request, demo_parquet, tmp_path):
    tiny = request.getfixturevalue({AudioFlamingo3: "tiny_flamingo", Qwen2_5Omni: "tiny_omni"}[family])
    train(checkout, tiny, demo_parquet, tmp_path / "run", *LENGTH, *CASES[kind])
    metrics = metrics_of(tmp_path / "run")
    limit = 1e-4 if kind == "DeepSpeed" else 1e-2
    assert len(metrics) == 3 and all(m["rollout/logprob_gap_mean"] < limit and m["train/kl"] < 1 for m in metrics)
    if kind == "FSDP2":  # in bfloat16 a weight may be too large for a step of AdamW to move it
        return
    before, changed = load_file(tiny / "model.safetensors"), moved(tiny, tmp_path / "run")[0]
    still = ("audio_tower.embed_positions", *map(family.checkpoint_name, family.unheard))
    trained = {name for name in before if not name.startswith(still)}
    assert changed == trained, changed ^ trained
    _, info = family.model_class().from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_trajectories_can_be_listened_to(run):
    _, out, _ = run
    [saved] = (out / "trajectories").glob("*.json")
    first = json.loads(saved.read_text())[0]
    assert first["has_images"] and first["num_images"] == 1
    assert (out / "trajectories" / first["image_paths"][0]).is_file()
    assert '"mp3":"' in (out / "report.html").read_text()


def test_a_second_start_continues_after_the_checkpoint(checkout, run, tiny_model, demo_parquet, tmp_path):
    kind, out, _ = run
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    for name in ("metrics.jsonl", "r1_aqa.json"):  # as if it had been killed before it had written the model
        (copy / name).unlink()
    done = train(checkout, tiny_model, demo_parquet, copy, *LENGTH, "--load_checkpoint", *CASES[kind])
    assert "8 prompts were already used" in done.stdout
    [resumed] = metrics_of(copy)
    [uninterrupted] = [m for m in metrics_of(out) if m["step"] == 3]
    assert resumed["step"] == 3
    assert resumed["train/lr"] == pytest.approx(uninterrupted["train/lr"])


# --------------------------------------------------------------------------------------------------------------- reward
PERFECT = """
from lightrft_launcher import after_import, wrap

@after_import("lightrft.trainer.fast_exp_maker")
def _(module):
    def answering(original):
        def _build_unpacked_sample(self, outputs, references, **kwargs):
            for output, reference in zip(outputs, references):
                gold = reference.replace("<answer>", "").replace("</answer>", "")
                tokens = self.tokenizer(f"<answer>{gold}</answer>", add_special_tokens=False)["input_ids"]
                output.output_token_ids = tokens + [self.tokenizer.eos_token_id]
                output.output_log_probs = [0.0] * len(output.output_token_ids)
            return original(self, outputs=outputs, references=references, **kwargs)
        return _build_unpacked_sample
    wrap(module.FastExperienceMaker, "_build_unpacked_sample", answering)
"""
WHOLE_QUERY = """
from lightrft_launcher import after_import

@after_import("aqa.rewards.r1_aqa")
def _(module):
    module.extract_response = lambda query, special: query
"""


@pytest.mark.parametrize(
    ("hooks", "expected"), [([PERFECT], 2.0), ([PERFECT, WHOLE_QUERY], 0.0)], ids=["ours", "naive"]
)
def test_a_perfect_answer_earns_two_and_nothing_where_the_whole_query_is_scored(
    checkout, tiny_model, demo_parquet, tmp_path, hooks, expected
):
    files = []
    for number, hook in enumerate(hooks):
        files.append(tmp_path / f"hook{number}.py")
        files[-1].write_text(hook)
    out = tmp_path / "run"
    train(checkout, tiny_model, demo_parquet, out, *DEEPSPEED, "--max_samples", 4, hooks=files)
    assert [m["rollout/reward"] for m in metrics_of(out)] == [expected]


# -------------------------------------------------------------------------------------------------------- other batches
def test_text_and_audio_in_one_batch(checkout, tiny_model, demo_parquet, tmp_path):
    import pandas

    rows = pandas.read_parquet(demo_parquet / "train.parquet")
    for i in range(0, len(rows), 3):
        rows.at[i, "prompt"] = [{"role": "user", "content": [{"type": "text", "text": "Which? ['bell', 'hum']"}]}]
        rows.at[i, "audio_path"] = ""
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    out = tmp_path / "run"
    train(checkout, tiny_model, tmp_path / "data", out, *DEEPSPEED, "--max_samples", 8)
    assert len(metrics_of(out)) == 2
    assert all(m["rollout/logprob_gap_max"] < 1e-3 for m in metrics_of(out))


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*DEEPSPEED, "--engine_tp_size", 2), id="DeepSpeed TP 2"),
        pytest.param(FSDP, id="FSDP2 DP 2"),
        pytest.param(("--zero_stage", 3, "--no-bf16"), id="ZeRO-3 DP 2"),
    ],
)
def test_two_processes(checkout, tiny_model, demo_parquet, tmp_path, flags):
    out = tmp_path / "run"
    train(checkout, tiny_model, demo_parquet, out, *flags, "--max_samples", 8, processes=2)
    metrics = metrics_of(out)
    assert len(metrics) == 2
    assert all(m["rollout/logprob_gap_mean"] < (1e-2 if "--bf16" in flags else 1e-4) for m in metrics)
    assert Qwen2AudioForConditionalGeneration.from_pretrained(out)


COUNT_STEPS = """
from lightrft_launcher import after_import, wrap
from torch.optim.lr_scheduler import LambdaLR

@after_import("lightrft.trainer.spmd_ppo_trainer")
def _(module):
    def counting(original):
        def step(self, *args):
            original(self, *args)
            print("scheduler at", self.last_epoch, flush=True)
        return step
    wrap(LambdaLR, "step", counting)
"""


@pytest.mark.parametrize("flags", [pytest.param(DEEPSPEED, id="DeepSpeed"), pytest.param(FSDP, id="FSDP2")])
def test_several_optimizer_steps_a_rollout(checkout, tiny_model, demo_parquet, tmp_path, flags):
    """LightRFT keeps the log-probs of the rollout, and steps as often as --train_batch_size says."""
    hook, out = tmp_path / "hook.py", tmp_path / "run"
    hook.write_text(COUNT_STEPS)
    flags = (*flags, "--max_samples", 8, "--train_batch_size", 4, "--micro_train_batch_size", 4)
    done = train(checkout, tiny_model, demo_parquet, out, *flags, hooks=[hook])
    steps = [int(n) for n in re.findall(r"scheduler at (\d+)", done.stdout)]
    assert len(metrics_of(out)) == 2 and max(steps) == 8  # two rollouts of 16 responses


# ----------------------------------------------------------------------------------------------------- before and after
IDENTITY = """
import sys
import types

sys.path.insert(0, sys.argv[1])
from aqa.hosts.locate import find_host
find_host()
from aqa.hosts.current import current_host
current_host().prepare_import()
from aqa.hosts.lightrft import fixes
from aqa.common.patch import *
from aqa.hosts.targets import *
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
from lightrft.models.actor_al import ActorAL
from lightrft.strategy import vllm_utils
from lightrft.strategy.deepspeed.deepspeed import DeepspeedStrategy
from lightrft.strategy.fsdp.fsdpv2 import FSDPV2Strategy
from lightrft.trainer import fast_exp_maker

def state(*owners):
    return [dict(vars(owner)) for owner in owners]

classes = (ActorAL, DeepspeedStrategy, FSDPV2Strategy, fast_exp_maker.FastExperienceMaker, vllm_utils, fast_exp_maker)
original = state(*classes)
with fixes.patch_for_versions()[0]:
    assert state(*classes) != original
    processor = AutoProcessor.from_pretrained(sys.argv[2])
    actor = ActorAL(Qwen2AudioForConditionalGeneration.from_pretrained(sys.argv[2]))
    for kind in (DeepspeedStrategy, FSDPV2Strategy):
        strategy = kind.__new__(kind)
        strategy.args = types.SimpleNamespace(fsdp=kind is FSDPV2Strategy, temperature=1.0, pretrain=sys.argv[2])
        maker = fast_exp_maker.FastExperienceMaker.__new__(fast_exp_maker.FastExperienceMaker)
        maker.strategy, maker.actor, maker.initial_model, maker.multimodal_processor = strategy, actor, None, None
        maker.tokenizer = processor.tokenizer
        owners = (strategy, maker, actor, actor.model, fast_exp_maker, vllm_utils)
        before = state(*owners)
        for patch in (
            lambda: patch_strategy_for_audio(strategy, processor),
            lambda: patch_actor_for_audio(actor),
            lambda: patch_experience_maker_for_audio(maker, processor, processor.tokenizer, 512),
        ):
            with patch():
                assert state(*owners) != before
                changed = state(*owners)
                with patch():
                    assert state(*owners) == changed, "applied twice"
            after = state(*owners)
            assert all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(after, before))
assert all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(state(*classes), original))
print("all given back")
"""


def test_lightrfts_own_functions_come_back(checkout, tiny_model, tmp_path):
    script = tmp_path / "identity.py"
    script.write_text(IDENTITY)
    assert "all given back" in launch(checkout, script, checkout / "examples" / "r1_aqa", tiny_model).stdout


CHANGES = (
    ("def update_engine_weights(", "def push_weights("),
    ("multi_modal_inputs=inputs if is_multimodal", "clips=inputs if is_multimodal"),
)


def test_a_changed_checkout_is_refused_at_the_start(checkout, tiny_model, demo_parquet, tmp_path):
    """By one message; the checkout is the one that LIGHTRFT_HOME names."""
    shutil.copytree(checkout / "lightrft", tmp_path / "lightrft")
    changed = tmp_path / "lightrft" / "strategy" / "strategy_base.py"
    source = changed.read_text()
    for old, new in CHANGES:
        assert old in source
        source = source.replace(old, new)
    changed.write_text(source)
    done = train(checkout, tiny_model, demo_parquet, tmp_path / "run", *DEEPSPEED, home=tmp_path, check=False)
    assert done.returncode == 2
    owner = "lightrft.strategy.strategy_base.StrategyBase"
    for line in (f"{owner}.update_engine_weights: expected (actor, /); found nothing", "the keyword clips, which"):
        assert line in done.stderr
    assert "in 2 places" in done.stderr and "Traceback" not in done.stderr


def test_a_package_that_lightrft_lacks_is_named(checkout, tiny_model, demo_parquet, tmp_path):
    hook = tmp_path / "hook.py"
    hook.write_text("import sys\n\nsys.modules['easydict'] = None\n")
    done = train(checkout, tiny_model, demo_parquet, tmp_path / "run", *DEEPSPEED, hooks=[hook], check=False)
    assert done.returncode == 2
    assert "easydict" in done.stderr and "requirements.txt" in done.stderr
    assert "Traceback" not in done.stderr


WRAPPER = """#!/usr/bin/env bash
# python, but a training script runs by the launcher
arguments=()
for argument in "$@"; do
    case "$argument" in */train_colocate.py) arguments+=("$LAUNCHER") ;; esac
    arguments+=("$argument")
done
exec "$REAL_PYTHON" "${arguments[@]}"
"""


def test_the_launch_script(checkout, tiny_model, demo_parquet, tmp_path):
    """As in the manual's dry run."""
    python = tmp_path / "python"
    python.write_text(WRAPPER)
    python.chmod(0o755)
    sizes = "EPISODE=1 RBS=4 TBS=32 N_SAMPLES=4 MLP_WORKER_GPU=1 ENGINE_TP=1 ENGINE_MEM_UTIL=0.5 GENERATE_MAX_LEN=16"
    env = OUTSIDE | dict(pair.split("=") for pair in f"{sizes} MAX_SAMPLES=16".split())
    env |= {"PYTHON": python, "REAL_PYTHON": sys.executable, "LAUNCHER": launcher_of(checkout)}
    env |= {"PATH_TO_YOUR_BASE_MODEL": tiny_model, "PATH_TO_YOUR_AVQA_DATASET": demo_parquet}
    script = checkout / "examples" / "r1_aqa" / LAUNCH_SCRIPT.name
    done = run_command("bash", script, cwd=tmp_path, **env)
    assert "host      LightRFT 0.1.1" in done.stdout
    [metrics] = tmp_path.glob("results/*/*/metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == 4


def test_the_manuals_command_says_what_it_would_start(checkout, demo_parquet, tmp_path):
    """The block that names the checkout, with ``--plan``."""
    manual = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^LIGHTRFT_HOME=\S+ bash \S+$", manual, re.M).group(0)
    (tmp_path / "LightRFT").symlink_to(checkout)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    env = OUTSIDE | {"PYTHON": sys.executable, "PATH_TO_YOUR_AVQA_DATASET": demo_parquet}
    done = run_command("bash", "-c", f"{command} --plan", cwd=tmp_path, **env)
    assert "GPUs       8 x 80 GiB" in done.stdout and "It fits" in done.stdout


ADVANTAGES = """
import json, os, sys
from types import SimpleNamespace
import torch
sys.path[:0] = [os.getcwd(), "examples/r1_aqa"]
from aqa.hosts.lightrft.fixes import patch_for_import
patch_for_import()
from lightrft.trainer import advantage_calculator as calculator
config = SimpleNamespace(n_samples_per_prompt=4, advantages_norm=False, advantage_clip=0, dynamic_sampling=False)
mask = torch.tensor([[1, 1]] + [[1, 0]] * 7).bool()
last = mask.sum(-1) - 1
found = {}
for name in ("group_norm", "rloo", "reinforce_baseline", "reinforce"):
    one = calculator.get_advantage_calculator(name, config)
    experience = SimpleNamespace(action_mask=mask, info={"reward": torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])})
    _, [rewards] = one.preprocess_rewards(experience.info["reward"], [experience], 2)
    of_tokens = torch.zeros(8, 2)
    of_tokens[torch.arange(8), last] = rewards
    experience.advantages, _, _ = one.compute(experience, of_tokens, 1.0, {})
    [experience] = calculator.normalize_advantages_cross_batch([experience], name, SimpleNamespace())
    found[name] = experience.advantages[mask].tolist()
print("FOUND", json.dumps(found))
"""


def test_lightrfts_own_estimators_give_the_hand_worked_advantages(checkout, tmp_path):
    """The numbers of test_advantages.py: rewards 1 0 0 0 and 0 0 0 0, two tokens in the first response."""
    script = tmp_path / "advantages.py"
    script.write_text(ADVANTAGES)
    [line] = re.findall("FOUND (.*)", launch(checkout, script, home=checkout).stdout)
    found = json.loads(line)
    assert found["group_norm"] == pytest.approx([1.5] * 2 + [-0.5] * 3 + [0.0] * 4)  # without R1-AQA's 1e-4
    assert found["rloo"] == pytest.approx([1.0] * 2 + [-1 / 3] * 3 + [0.0] * 4)
    assert found["reinforce_baseline"] == pytest.approx([1.788854] * 2 + [-0.894427] * 3 + [-0.223607] * 4, abs=1e-5)
    assert found["reinforce"] == pytest.approx([1.870829] * 2 + [-0.534522] * 7, abs=1e-5)
