"""The flags of training and the rules between them."""

import argparse
import dataclasses
import importlib.util
import re
from itertools import product
from pathlib import Path

import pytest
from conftest import parse_flags

from aqa.data.prompts import render_prompt
from aqa.training.flag_rules import find_warnings
from aqa.training.flags import ESTIMATORS, LOSS_AGG_MODES, REFUSED_ESTIMATORS, build_parser
from aqa.training.length import chance_levels, describe_chance, describe_length, plan_length
from lightrft.models import loss
from lightrft.trainer import advantages
from lightrft.utils import add_arguments

ROOT = Path(__file__).resolve().parents[2]


def actions() -> list[argparse.Action]:
    return [a for a in build_parser(add_arguments)._actions if not isinstance(a, argparse._HelpAction)]


# ---------------------------------------------------------------------------------------------------------- batch sizes
@pytest.mark.parametrize(
    ("world", "rollout", "n", "train", "micro"),
    # the table of the original example's manual, and R1-AQA's own eight GPUs
    [(1, 16, 8, 128, 4), (8, 16, 8, 128, 4), (1, 4, 4, 32, 4), (1, 4, 4, 16, 4), (8, 16, 8, 32, 4)],
    ids=["default", "default on 8", "dry-run", "1-GPU", "PPO-like on 8"],
)
def test_documented_batch_sizes_are_valid(problems, world, rollout, n, train, micro):
    flags = {"rollout_batch_size": rollout, "n_samples_per_prompt": n, "train_batch_size": train}
    assert problems(world, **flags, micro_train_batch_size=micro, micro_rollout_batch_size=micro) == []


def test_the_defaults_are_r1_aqas_and_valid(problems):
    assert problems() == []
    assert problems(8) == []
    args = parse_flags()
    assert (args.rollout_batch_size, args.n_samples_per_prompt, args.train_batch_size) == (16, 8, 128)
    assert (args.prompt_max_len, args.generate_max_len, args.temperature) == (512, 256, 1.0)
    assert (args.init_kl_coef, args.kl_estimator, args.actor_learning_rate) == (0.04, "k3", 1e-6)
    assert args.use_kl_loss


def test_a_micro_batch_is_a_group_unless_something_else_is_said():
    for flags, sizes in (("", (8, 8)), ("--n_samples_per_prompt 4 --micro_train_batch_size 2", (2, 4))):
        args = parse_flags(flags.split())
        assert (args.micro_train_batch_size, args.micro_rollout_batch_size) == sizes


SMALL = {"rollout_batch_size": 4, "n_samples_per_prompt": 4, "train_batch_size": 16}
SMALL |= {"micro_train_batch_size": 4, "micro_rollout_batch_size": 4}


@pytest.mark.parametrize(
    ("world", "flags", "message"),
    [
        (1, {"train_batch_size": 15}, "15: .* whole part of the 16 .*; use --train_batch_size 8"),
        (1, {"train_batch_size": 2}, "2: .* micro-batches of 4 .*; use --train_batch_size 4"),
        (2, {"train_batch_size": 4}, "on each of 2 ranks; use --train_batch_size 8"),
        (1, {"loss_agg_mode": "token-mean", "train_batch_size": 32}, "32: .* of 16 responses.* --train_batch_size 16"),
        (1, {"train_batch_size": 24}, "24 is no multiple of .* = 4 x 4 = 16: .*; use --train_batch_size 32"),
        (3, {"rollout_batch_size": 4}, "--rollout_batch_size 4 prompts do not divide among 3 ranks; 6 would"),
        (1, {"micro_train_batch_size": 6}, r"divide the 16 .*\(4 prompts x 4 samples / 1 ranks\); 4 does"),
        (2, {"micro_rollout_batch_size": 16}, "16 does not divide the 8 responses of a rank .*; 8 does"),
        (1, {"max_epochs": 2, "train_batch_size": 32}, "--max_epochs 2 repeats .* use --train_batch_size 16"),
        (4, {"engine_tp_size": 3}, "--engine_tp_size 3 does not divide the 4 ranks"),
    ],
)
def test_batch_rules_name_numbers_and_an_alternative(problems, world, flags, message):
    """The next but one test follows the advice."""
    (found,) = problems(world, **SMALL | flags)
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("world", "local", "tp", "remedy"),
    [
        (16, 8, 4, None),
        (16, 8, 16, "use 8, or 16 ranks a node"),
        (12, 6, 4, "use 3, or 8 ranks a node"),
        (4, 1, 2, "use 1, or 2 ranks a node"),
    ],
)
def test_an_engine_lies_within_a_node(problems, world, local, tp, remedy):
    sizes = {"rollout_batch_size": world, "n_samples_per_prompt": 4, "train_batch_size": 4 * world}
    sizes |= {"micro_train_batch_size": 4, "micro_rollout_batch_size": 4}
    found = problems(world, local, engine_tp_size=tp, **sizes)
    if remedy is None:
        assert found == []
        return
    assert len(found) == 1 and f"--engine_tp_size {tp} does not divide the {local} ranks of a node" in found[0]
    assert remedy in found[0]
    smaller, larger = map(int, re.search(r"use (\d+), or (\d+)", remedy).groups())
    assert problems(world, local, engine_tp_size=smaller, **sizes) == []
    assert larger % tp == 0


@pytest.mark.parametrize(
    ("world", "rollout", "n", "train", "micro"),
    [
        sizes
        for number, sizes in enumerate(product((1, 2, 3, 4), (3, 4, 6), (2, 5), (6, 20, 48), (1, 4, 7)))
        if number % 5 == 0
    ],
)
def test_whatever_is_wrong_with_batch_sizes_following_the_advice_ends_well(problems, world, rollout, n, train, micro):
    """Apply each message's own number until nothing is left to say, at most once a flag."""
    flags = {
        "rollout_batch_size": rollout,
        "n_samples_per_prompt": n,
        "train_batch_size": train,
        "micro_train_batch_size": micro,
        "micro_rollout_batch_size": micro,
    }
    for _ in range(5):
        found = problems(world, **flags)
        if not found:
            break
        for problem in found:
            name = re.match(r"--(\w+)", problem)[1]
            advice = re.search(r"use --train_batch_size (\d+)$|; (\d+) (?:would|does)$", problem)
            flags[name] = int(advice[1] or advice[2])
    assert found == []
    share = flags["rollout_batch_size"] * n // world
    assert share % flags["micro_train_batch_size"] == 0
    # DeepSpeed's own rule
    assert flags["train_batch_size"] % (flags["micro_train_batch_size"] * world) == 0


@pytest.mark.parametrize("name", [*SMALL, "engine_tp_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(problems, name, value):
    assert f"--{name} {value}: must be 1 or more" in problems(**SMALL | {name: value})


# ---------------------------------------------------------------------------------------------------------- other rules
@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("temperature", 0.0, 0.1),
        ("top_p", 0.0, 1.0),
        ("top_k", 0, -1),
        ("eps_clip", 0.0, 0.2),
        ("rollout_correction_limit", 0.0, 2.0),
        ("dynamic_sampling_rounds", 0, 1),
        ("overlong_buffer_penalty_factor", -1.0, 0.0),
        ("lora_rank", -1, 4),
        ("gamma", 0.0, 1.0),
        ("init_kl_coef", -0.1, 0.0),
        ("actor_learning_rate", 0.0, 1e-6),
        ("lr_warmup_ratio", 1.0, 0.0),
        ("max_norm", -1.0, 0.0),
        ("engine_mem_util", 0.0, 0.5),
        ("generate_max_len", 0, 1),
        ("max_ckpt_num", 0, 1),
        ("limit_mm_image_per_prompt", 0, 1),
        ("audio_cache_mib", -1, 0),
        ("sync_bucket_mb", 0, 1),
    ],
)
def test_values_out_of_range_are_named_with_the_range(problems, name, bad, good):
    found = problems(**{name: bad})
    assert len(found) == 1
    assert found[0].startswith(f"--{name} {bad}: must be ")
    assert problems(**{name: good}) == []


@pytest.mark.parametrize(
    ("flags", "message", "remedy"),
    [
        ({"advantage_estimator": "gae"}, "estimator gae needs a critic", {"advantage_estimator": "reinforce"}),
        ({"advantage_estimator": "cpgd"}, "estimator cpgd needs a loss", {"advantage_estimator": "reinforce++"}),
        (
            {"n_samples_per_prompt": 1, "train_batch_size": 16},
            "--advantage_estimator group_norm compares .* --n_samples_per_prompt 1 must be 2",
            {"n_samples_per_prompt": 2, "train_batch_size": 32},
        ),
        (
            {"n_samples_per_prompt": 1, "train_batch_size": 16, "advantage_estimator": "rloo"},
            "--advantage_estimator rloo compares",
            {"advantage_estimator": "reinforce"},
        ),
        ({"overlong_buffer": True, "generate_max_len": 60}, "1 to --generate_max_len 60", {"overlong_buffer_len": 8}),
        (
            {"advantage_estimator": "reinforce", "n_samples_per_prompt": 1, "train_batch_size": 16}
            | {"dynamic_sampling": True, "micro_rollout_batch_size": 4},
            "a group of one response is always alike",
            {"dynamic_sampling": None},
        ),
        ({"reward": "exat"}, "--reward exat: must be one of r1_aqa", {"reward": "exact"}),
        ({"reward": ":f"}, "or module:function", {"reward": "mine:f"}),
        ({"lora_rank": 4, "freeze_prefix": "audio_tower"}, "choose --target_modules", {"freeze_prefix": None}),
        ({"kl_target": 6.0, "init_kl_coef": 0.0}, "--kl_target 6.0 needs a start value", {"init_kl_coef": 0.1}),
        ({"kl_estimator": "k1"}, "does not depend on the reference model; use k3 or k2", {"kl_estimator": "k2"}),
        ({"kl_estimator": "k1"}, "put the KL into the reward", {"use_kl_loss": False}),
        ({"use_kl_loss": False}, "kl_estimator k3: .* cancels to first order", {"kl_estimator": "k1"}),
        ({"use_kl_loss": False, "kl_estimator": "k2"}, "k2: .* use --kl_estimator k1", {"use_kl_loss": True}),
        ({"use_kl_loss": False}, "k3: in the reward", {"init_kl_coef": 0.0}),
        ({"top_k": 20, "on_anomaly": "skip"}, "those of the cut distribution", {"top_k": None}),
        ({"top_p": 0.9, "rollout_correction": "tis"}, "those of the cut distribution", {"rollout_correction": "none"}),
        ({"advantage_estimator": "reinforce_baseline", "gamma": 0.9}, "--gamma 0.9 with", {"gamma": 1.0}),
        ({"quiet": True, "verbose": True}, "--quiet with --verbose: drop one of the two", {"verbose": None}),
        ({"adam_offload": True, "zero_stage": 0}, "DeepSpeed would ignore it", {"zero_stage": 2}),
        ({"param_offload": True}, "--param_offload with --zero_stage 2: only ZeRO-3", {"zero_stage": 3}),
        ({"param_offload": True, "fsdp": True}, "with --fsdp use --fsdp_cpu", {"param_offload": None}),
        ({"adam_offload": True, "fsdp": True}, "with --fsdp use --fsdp_cpu", {"adam_offload": None}),
        ({"load_in_4bit": True}, "4 bits cannot train; add adapters with --lora_rank 16", {"lora_rank": 16}),
        ({"load_in_4bit": True, "lora_rank": 8, "zero_stage": 3}, "ZeRO-3 cannot split packed", {"zero_stage": 2}),
        ({"load_in_4bit": True, "lora_rank": 8, "fsdp": True}, "FSDP2 cannot split packed", {"fsdp": None}),
        ({"fsdp_cpu_offload": True}, "--fsdp_cpu_offload: add --fsdp", {"fsdp": True}),
        ({"engine_type": "sglang"}, "only LightRFT runs it .* use vllm or hf", {"engine_type": "hf"}),
        ({"prompt_data_probs": "0.5,0.5"}, "one share for each of 1 sources", {"prompt_data_probs": "1.0"}),
        ({"prompt_data_probs": "0.9"}, "must add up to 1, not 0.9; 1 would be", {"prompt_data_probs": "1"}),
        ({"prompt_data_probs_end": "1.0"}, "needs several sources", {"prompt_data_probs_end": None}),
        ({"max_silent_pass_rate": 1.5}, "must be from 0 to 1", {"max_silent_pass_rate": 0.5}),
        ({"easy_first": True, "max_steps": 5}, "with --easy_first: the curriculum is one episode", {"max_steps": None}),
        ({"easy_first": True, "dynamic_sampling": True}, "use one of the two", {"dynamic_sampling": None}),
        (
            {"use_gspo": True, "loss_agg_mode": "token-mean"},
            "GSPO weighs all responses alike",
            {"loss_agg_mode": "seq-mean-token-mean"},
        ),
        ({"use_cispo": True}, "at most 1 \\+ --eps_clip_high, which is not given", {"eps_clip_high": 4.0}),
        ({"use_cispo": True, "eps_clip_high": 4.0, "use_gspo": True}, "two losses; drop one", {"use_gspo": None}),
        ({"use_gspo": True, "audio_token_weights": 0.5, "eps_clip": 1e-3}, "change nothing", {"use_gspo": None}),
        ({"reward": "format+audio_gain"}, "to right answers only", {"reward": "accuracy+audio_gain"}),
        ({"reward": "accuracy+fromat"}, "must be one of .* or a sum", {"reward": "accuracy+format"}),
        ({"reward": "m:f+n:f"}, "two parts have the same name", {"reward": "m:f+n:g"}),
        ({"reward": "m:accuracy+format"}, "measured anyway; rename it", {"reward": "m:accuracy"}),
        ({"reward_weights": "0.5"}, "1 weights for the 2 parts .*accuracy, format", {"reward_weights": None}),
        ({"advantage_estimator": "gdpo", "reward": "exact"}, "give a sum, such as", {"reward": "r1_aqa"}),
        ({"eval_benchmark": "gone.json", "eval_audio_dir": ".", "eval_steps": 5}, "gone", {"eval_benchmark": None}),
    ],
)
def test_rules_between_flags(problems, flags, message, remedy):
    found = problems(**flags)
    assert len(found) == 1, found
    assert re.search(message, found[0]), found[0]
    assert problems(**flags | remedy) == []


@pytest.mark.parametrize(
    ("package", "flags", "said"),
    [
        ("vllm", {}, "--engine_type vllm needs vllm, which is not installed: on a GPU pip install vllm==0.32.0; on a"),
        ("peft", {"lora_rank": 4}, "--lora_rank 4 needs peft, which is not installed: pip install peft"),
        ("bitsandbytes", {"lora_rank": 4, "load_in_4bit": True}, "--load_in_4bit needs bitsandbytes, which is not"),
        ("flash_attn", {"flash_attn": True, "bf16": True}, "--flash_attn needs flash_attn, which is not installed: "),
        ("peft", {"flash_attn": True}, "--flash_attn: its kernels do not take float32; add --bf16"),
        ("wandb", {"use_wandb": True}, "--use_wandb needs wandb, which is not installed: pip install wandb"),
        ("tensorboard", {"use_tensorboard": "logs"}, "--use_tensorboard logs needs tensorboard, which is not inst"),
        ("deepspeed", {}, "deepspeed: not installed for "),
        ("deepspeed", {"fsdp": True}, None),
        ("vllm", {"engine_type": "hf"}, None),
        ("flash_attn", {}, None),
    ],
)
def test_packages_that_a_flag_needs(problems, monkeypatch, package, flags, said):
    """Those that are missing are named before anything loads, with the line that installs them."""
    find_spec = importlib.util.find_spec
    # a flag's package counts as installed whether or not it is here, as flash-attn cannot be without a GPU
    fake = {package: None} | dict.fromkeys({"flash_attn", "bitsandbytes"} - {package}, "here")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fake[name] if name in fake else find_spec(name))
    found = problems(**flags)
    assert found == [] if said is None else len(found) == 1 and found[0].startswith(said), found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], None),
        (["--advantage_estimator", "dr_grpo"], "use seq-mean-token-sum-norm"),
        (["--advantage_estimator", "dr_grpo", "--loss_agg_mode", "seq-mean-token-sum-norm"], None),
        (["--flash_attn"], "each computes its own"),
        (["--use_gspo"], "--eps_clip 3e-4 --eps_clip_high 4e-4"),  # Zheng et al. (2025), section 5.1
        (["--use_gspo", "--eps_clip", "3e-4", "--eps_clip_high", "4e-4"], None),
        (["--use_cispo", "--eps_clip_high", "4"], "--train_batch_size"),
        (["--use_cispo", "--eps_clip_high", "4", "--max_epochs", "2"], None),
        (["--rollout_correction", "geo"], "--rollout_correction_floor 0.999 --rollout_correction_limit 1.001"),
    ],
)
def test_flags_that_are_not_quite_their_method(flags, said):
    warnings = find_warnings(parse_flags(flags))
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def test_the_hf_engine_has_no_tensor_parallelism(problems):
    assert problems(2, engine_type="hf", engine_tp_size=2) == [
        "--engine_type hf has no tensor parallelism: --engine_tp_size 2 must be 1"
    ]


@pytest.mark.parametrize(
    ("rows", "flags", "length", "says"),
    [
        # of the recordings in the README: 1151 = 71 x 16 + 15; 71 x 20 = 1420 steps of 16 x 8 responses
        (1151, {"num_episodes": 20}, (71, 1420, 1420, 71, 0, 20), ["71 steps an episode x 20 episodes = 1,420 steps",
         "181,760 responses", "an episode leaves out 15 of 1,151 rows, too few for a step, others in each"]),
        (1151, {"num_episodes": 20, "max_steps": 399}, (71, 399, 399, 71, 0, 6), ["--max_steps 399: 5.62 episodes"]),
        (16, {"max_steps": 5, "train_batch_size": 256}, (1, 5, 2, 0, 128, 5), ["= 1 step an episode; --max_steps 5",
         "the last 128 responses do not fill an optimizer step"]),
        (64, {"train_batch_size": 64, "max_epochs": 3}, (4, 4, 24, 24, 0, 1), ["x 1 episode = 4 steps"]),
    ],
)  # fmt: skip
def test_the_length_of_a_run(rows, flags, length, says):
    args = parse_flags()
    vars(args).update(flags)
    found = plan_length(args, rows // 16)
    assert (*dataclasses.astuple(found), found.episodes) == length
    text = "\n".join(describe_length(args, found, rows))
    assert all(part in text for part in says), text


def test_the_level_of_chance():
    two, four = (render_prompt("What?", options, False) for options in (["a", "b"], ["a", "b", "c", "d"]))
    assert describe_chance([two, four, "no options"], [four]).endswith("training 0.375, held-out 0.250")
    assert describe_chance(["no options"], ()).endswith("not known, since the prompts list no options")
    tags = [("label/x", "question_type/drum"), ("label/x",), ("question_type/drum",)]
    assert chance_levels([two, four, "no options"], tags) == {"all": 0.375, "label/x": 0.375, "question_type/drum": 0.5}


def test_several_sources_each_need_a_share(problems, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.parquet").touch()
    sources = f"{tmp_path / 'data'}, {other}"
    assert "one share for each of 2 sources" in problems(prompt_data=sources)[0]
    assert problems(prompt_data=sources, prompt_data_probs="0.7,0.3") == []
    assert "must add up to 1, not 3; 0.3333,0.6667" in problems(prompt_data=sources, prompt_data_probs="1,2")[0]
    curriculum = {"prompt_data": sources, "prompt_data_probs": "1,0", "prompt_data_probs_end": "0,1"}
    assert problems(**curriculum) == []
    assert "two orders of the rows" in problems(**curriculum, easy_first=True)[0]
    for longer in ({"num_episodes": 2}, {"max_steps": 5}):
        assert "the curriculum is one episode; drop it" in problems(**curriculum, **longer)[0]
    assert "use one of the two" in problems(**curriculum, dynamic_sampling=True)[0]
    # the same spelling for the data to evaluate on
    assert problems(eval_data=sources, eval_split="train") == []
    assert "holds no validation.parquet (--eval_split)" in problems(eval_data=sources)[0]


def test_benchmarks_need_their_recordings(problems, tmp_path):
    for name in ("a.json", "b.jsonl", "a_silent.json"):
        (tmp_path / name).touch()
    files = f"{tmp_path}/a.json,{tmp_path}/b.jsonl"
    known = {"eval_benchmark": files, "eval_steps": 5}
    assert "--eval_audio_dir is missing" in problems(**known)[0]
    assert problems(**known, eval_audio_dir=str(tmp_path)) == []
    assert problems(**known, eval_audio_dir=f"{tmp_path},{tmp_path}") == []
    assert "one for each of 2 files" in problems(**known, eval_audio_dir=",".join([str(tmp_path)] * 3))[0]
    assert "--eval_benchmark without an evaluation" in problems(**known | {"eval_steps": -1}, eval_audio_dir=".")[0]
    for again in (f"../{tmp_path.name}/a.json", "a_silent.json"):  # whose files would be a's answers to silence
        twice = f"{tmp_path}/a.json,{tmp_path}/{again}"
        found = problems(**known | {"eval_benchmark": twice}, eval_audio_dir=".")
        assert "two files have one name, less an ending _silent" in found[0]


@pytest.mark.parametrize("shares", ["a", "0.5;0.5", ""])
def test_shares_that_are_no_numbers_are_refused_before_anything_loads(problems, shares):
    assert any(problem.startswith("--prompt_data_probs") for problem in problems(prompt_data_probs=shares))


def test_paths(problems):
    assert "--pretrain is missing" in problems(pretrain="")[0]
    assert problems(pretrain="./nowhere") == ["--pretrain ./nowhere: no such folder"]
    assert problems(pretrain="Qwen/Qwen2-Audio-7B-Instruct") == []  # a name on the hub
    assert "--prompt_data is missing" in problems(prompt_data="")[0]
    assert "holds no test.parquet" in problems(prompt_split="test")[0]


def test_all_problems_are_reported_at_once(problems):
    found = problems(
        temperature=0.0, advantage_estimator="gae", train_batch_size=8, micro_train_batch_size=3, pretrain="./nowhere"
    )
    for flag in ("temperature", "advantage_estimator", "train_batch_size", "micro_train_batch_size", "pretrain"):
        assert any(problem.startswith(f"--{flag} ") for problem in found), flag
    assert len(found) == 5


# ------------------------------------------------------------------------------------------------------------ the flags
def test_freeze_prefix_alone_means_the_tower():
    assert parse_flags().freeze_prefix is None
    assert parse_flags(["--freeze_prefix"]).freeze_prefix == ["audio_tower"]
    assert parse_flags(["--freeze_prefix", "multi_modal_projector"]).freeze_prefix == ["multi_modal_projector"]


def test_every_flag_has_a_help_text():
    assert [action.dest for action in actions() if len(action.help or "") <= 8] == []


BOOLEANS = sorted({a.dest for a in actions() if a.nargs == 0})


def test_every_boolean_can_be_switched_on_and_off():
    """Also where a script in front has already given the flag: the last one wins."""
    parser = build_parser(add_arguments)
    for dest in BOOLEANS:
        options = [option for a in parser._actions if a.dest == dest for option in a.option_strings]
        assert {bool(getattr(parser.parse_args([option]), dest)) for option in options} == {True, False}, dest


def test_every_flag_is_read_by_something():
    """Checking a value, as flags.py does, is not yet using it."""
    sources = [*(ROOT / "examples" / "r1_aqa").rglob("*.py"), *(ROOT / "runtime").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.name != "flags.py")
    read = set(re.findall(r"\b(?:args|config)\.(\w+)", text)) | {f.name for f in dataclasses.fields(loss.LossSettings)}
    assert {a.dest for a in actions()} - read == set()


def test_the_choices_are_those_of_the_runtime():
    assert set(ESTIMATORS) == {*advantages.ESTIMATORS, "gdpo", *REFUSED_ESTIMATORS}
    assert LOSS_AGG_MODES == loss.LOSS_AGG_MODES
    choices = {a.dest: a.choices for a in actions()}
    assert tuple(choices["kl_estimator"]) == loss.KL_ESTIMATORS
