"""The flags of ``train_colocate.py``. Imports nothing heavy: ``--help`` shall be quick."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from aqa.common.arguments import Parser
from aqa.families import FAMILIES

ESTIMATORS = ("group_norm", "gdpo", "dr_grpo", "rloo", "reinforce_baseline", "reinforce++", "reinforce", "gae", "cpgd")
REFUSED_ESTIMATORS = {"gae": "needs a critic, and none is trained here", "cpgd": "needs a loss that is not in here"}
REWARDS = ("r1_aqa", "exact", "graded_format", "length_aware")
REWARD_PARTS = ("accuracy", "format", "consistency", "length", "majority", "audio_gain")
LOSS_AGG_MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
GROUP_METHODS = ("group_norm", "gdpo", "dr_grpo", "rloo", "reinforce_baseline")
BOOL = argparse.BooleanOptionalAction
DATA_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
EXIT_STATUS = (
    "exit status: 0 done; 2 wrong use or wrong data, the message says what to put right; 3 --plan: it does not "
    "fit; 4 stopped by --on_anomaly stop, state saved; 5 a checkpoint or the final model could not be written; 130, "
    "138, 143 asked to end by Ctrl-C, SIGUSR1, SIGTERM, state saved (torchrun makes all of these 1); 1 any other "
    "failure, with its traceback"
)
ESSENTIAL = (
    *("--pretrain", "--prompt_data", "--save_path", "--max_steps", "--actor_learning_rate", "--generate_max_len"),
    *("--eval_steps", "--eval_silent", "--save_steps", "--load_checkpoint"),
)
EXAMPLES = """\
examples:
  one process:
    python examples/r1_aqa/train_colocate.py --pretrain MODEL --prompt_data DATA --save_path RUN \\
        --max_steps 400 --eval_steps 100 --eval_silent --save_steps 100
  go on with it after an interruption: the same, and
    ... --load_checkpoint
  what it needs on GPUs, without loading anything:
    python examples/r1_aqa/train_colocate.py --plan --pretrain MODEL --bf16 --zero_stage 3
  several GPUs:
    torchrun --nproc-per-node 8 examples/r1_aqa/train_colocate.py --bf16 --zero_stage 3 ...\
"""
MODELS = ", ".join(family.name for family in FAMILIES[:-1]) + f" or {FAMILIES[-1].name}"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def build_parser(add_host_arguments: Any) -> argparse.ArgumentParser:
    """All flags.

    :param add_host_arguments: ``lightrft.utils.add_arguments``: adds the host's own flags.
    """
    parser = Parser(
        description="Train Qwen2-Audio with GRPO on audio question answering (R1-AQA's recipe).",
        essential=ESSENTIAL,
        examples=EXAMPLES,
        epilog=EXIT_STATUS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--debug", action=BOOL, default=False, help="show the traceback of an error, too")
    for title, add_flags in (
        ("model", _add_model_flags),
        ("data", _add_data_flags),
        ("batch sizes and length of the run", _add_batch_flags),
        ("sampling", _add_sampling_flags),
        ("reward", _add_reward_flags),
        ("warm start", _add_warm_start_flags),
        ("GRPO", _add_grpo_flags),
        ("optimizer and sharding", _add_optimizer_flags),
        ("output", _add_output_flags),
        ("planning", _add_planning_flags),
    ):
        add_flags(parser.add_argument_group(title))
    add_host_arguments(parser)
    return parser


def _add_model_flags(g: Any) -> None:
    g.add_argument("--pretrain", help=f"folder (or hub name) of the {MODELS} to start from")
    g.add_argument("--bf16", action=BOOL, default=False, help="weights and rollouts in bfloat16, else float32")
    g.add_argument(
        "--flash_attn",
        action=BOOL,
        default=False,
        help="use flash-attn kernels (must be installed), which compute a prompt once a response, not once a group",
    )
    g.add_argument("--gradient_checkpointing", action=BOOL, default=False, help="recompute activations: less memory")
    g.add_argument(
        "--freeze_prefix",
        nargs="*",
        default=None,
        metavar="PART",
        help="freeze the audio tower (the flag alone), or parts that are named: audio_tower, multi_modal_projector, "
        "language_model.layers.[0-7], ...; * ? [] as in file names",
    )
    g.add_argument(
        "--lora_rank", type=int, default=0, help="train LoRA adapters of this rank and nothing else; 0: none"
    )
    g.add_argument("--lora_alpha", type=int, default=16, help="adapters weigh lora_alpha / lora_rank")
    g.add_argument(
        "--load_in_4bit",
        action=BOOL,
        default=False,
        help="with --lora_rank: the language model's frozen layers at 4 bits a weight (NF4, by bitsandbytes)",
    )
    g.add_argument(
        "--target_modules",
        nargs="+",
        default=["language_model"],
        metavar="NAME",
        help="what gets adapters: linear layers (q_proj), or parts that hold them (language_model, audio_tower)",
    )


def _add_data_flags(g: Any) -> None:
    g.add_argument("--prompt_data", help="folder or parquet file that avqa.py wrote; several with commas")
    g.add_argument(
        "--prompt_data_probs",
        default="1.0",
        help="share of each source, with commas; an episode ends with the rows of the first source that is used up",
    )
    g.add_argument(
        "--prompt_data_probs_end",
        help="a curriculum: the shares go, in equal steps, from --prompt_data_probs at the first row to these at the "
        "last; a source that is used up starts again, and there are as many rows as in all sources together, at most "
        "--max_samples",
    )
    g.add_argument(
        "--pass_rate",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="train on rows that select_data.py saw answered right in this share of responses, such as 0.1 0.9, which "
        "leaves out what is never and what is always right",
    )
    g.add_argument(
        "--max_silent_pass_rate",
        type=float,
        help="train on rows that select_data.py saw answered right in silence in at most this share, such as 0.5",
    )
    g.add_argument(
        "--easy_first",
        action=BOOL,
        default=False,
        help="a curriculum: rows in the order of their pass rates, the highest first, for one episode",
    )
    g.add_argument("--prompt_split", default="train", help="split to train on")
    g.add_argument("--max_samples", type=int, default=1_000_000, help="use at most this many rows, drawn by --seed")
    g.add_argument("--eval_data", help="data to evaluate on; default: the --eval_split of --prompt_data, if it exists")
    g.add_argument("--eval_split", default="validation", help="split to evaluate on")
    g.add_argument("--max_eval_samples", type=int, default=500, help="the same for evaluation")
    g.add_argument(
        "--eval_benchmark",
        metavar="FILE",
        help="MMAU's .json, MMAR's .jsonl or R1-AQA's rows to evaluate on, too, by the official rule as eval_mmau.py "
        "does; several with commas",
    )
    g.add_argument("--eval_audio_dir", metavar="FOLDER", help="its recordings; one folder for all, or one each")
    g.add_argument(
        "--eval_think",
        action=BOOL,
        help="ask its questions for the thinking process, too; default: as all training rows do, else not",
    )
    g.add_argument("--input_key", default="prompt", help="column with the chat messages")
    g.add_argument("--images_key", default="audio_path", help="column with the audio file (LightRFT's image slot)")
    g.add_argument("--reference_key", default="reference", help="column with the gold answer")
    g.add_argument("--label_key", default="label", help="column with the reward rule")
    g.add_argument("--prompt_max_len", type=int, default=512, help="longest prompt in tokens, a clip counted as one")
    g.add_argument(
        "--audio_seconds",
        type=float,
        default=30.0,
        help="longest clip that is heard, what is longer is cut; beyond 30 in windows of 30 s, which Audio Flamingo 3 "
        "takes up to 600",
    )
    g.add_argument("--limit_mm_image_per_prompt", type=int, default=1, help="most clips a prompt")
    g.add_argument(
        "--decode_audio",
        action=BOOL,
        default=False,
        help="decode every clip before the first step, not only its header: a damaged or silent one does not stop the "
        "run in the middle (some milliseconds a clip)",
    )
    g.add_argument(
        "--audio_cache_mib",
        type=int,
        default=1024,
        help="memory of a rank for decoded clips, MiB, for training data, evaluation data and each benchmark: 1024 "
        "hold 1,677 clips of 10 s, whose files are not decoded again in the next episode; 0: none",
    )
    g.add_argument(
        "--confine_audio", metavar="FOLDER", help="refuse audio outside this folder, links resolved: for foreign data"
    )
    g.add_argument(
        "--sandbox_audio",
        action=BOOL,
        default=False,
        help="decode in a process of its own with limits of memory and time: for foreign data",
    )


def _add_batch_flags(g: Any) -> None:
    g.add_argument("--rollout_batch_size", type=int, default=16, help="prompts a rollout, over all ranks")
    g.add_argument("--n_samples_per_prompt", type=int, default=8, help="responses a prompt (the group)")
    g.add_argument(
        "--train_batch_size",
        type=int,
        default=128,
        help="responses an optimizer step, over all ranks; fewer than a rollout's: several steps a rollout, as in PPO",
    )
    g.add_argument(
        "--micro_train_batch_size",
        type=int,
        help="responses in one forward and backward; default: a group, whose prompt is then computed once",
    )
    g.add_argument("--micro_rollout_batch_size", type=int, help="responses in one log-prob forward; default: a group")
    g.add_argument("--num_episodes", type=int, default=1, help="passes over the data")
    g.add_argument(
        "--max_steps",
        type=int,
        help="in place of --num_episodes: this many steps (rollouts), with as many passes over the data as that takes",
    )
    g.add_argument("--max_epochs", type=int, default=1, help="passes over each rollout batch")


def _add_sampling_flags(g: Any) -> None:
    g.add_argument("--engine_type", choices=("vllm", "sglang", "hf"), default="vllm", help="rollout engine")
    g.add_argument("--generate_max_len", type=int, default=256, help="longest response in tokens")
    g.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    g.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; below 1 the log-prob gap includes the cut")
    g.add_argument(
        "--top_k",
        type=int,
        default=-1,
        help="most likely tokens to draw from, -1: all; as with --top_p, the log-prob gap includes the cut",
    )
    g.add_argument("--seed", type=int, default=42, help="seed of everything random")


def _add_reward_flags(g: Any) -> None:
    g.add_argument(
        "--reward",
        default="r1_aqa",
        help="what is paid for: r1_aqa (accuracy + format), exact (no math_verify), graded_format, length_aware, or a "
        "function of your own, module:function, of (response, reference, think); or a sum of these and of accuracy, "
        "format, consistency (the thinking ends at the choice that is answered), length (see --reward_words), majority "
        "(the group's most frequent answer; needs no right one) and audio_gain (of right responses, the "
        "share of their probability that silence in place of the sound would cost), such as "
        "accuracy+format+consistency",
    )
    g.add_argument(
        "--reward_weights", type=float, nargs="+", metavar="W", help="weight of each part of --reward; default: 1"
    )
    g.add_argument(
        "--reward_words",
        type=int,
        nargs=2,
        default=(0, 64),
        metavar=("LEAST", "MOST"),
        help="words of a response for which the part length pays 1; it falls to 0 at no word, and at twice the most",
    )


def _add_warm_start_flags(g: Any) -> None:
    g.add_argument(
        "--sft_steps",
        type=int,
        default=0,
        help="supervised steps on the training rows' answers before GRPO, with the thinking in a column thinking where "
        "it is asked for, each of --train_batch_size / --n_samples_per_prompt rows, or one for each micro-batch if "
        "these are more; the model after them is the reference, and is kept in <save_path>/warm_start",
    )
    g.add_argument("--sft_learning_rate", type=float, help="its peak; default: --actor_learning_rate")


def _add_grpo_flags(g: Any) -> None:
    g.add_argument(
        "--advantage_estimator",
        choices=ESTIMATORS,
        default="group_norm",
        help="group_norm is GRPO; gdpo normalises each part of --reward by itself; dr_grpo; rloo; reinforce_baseline: "
        "REINFORCE++-baseline; reinforce and reinforce++ are REINFORCE++ by LightRFT's and the paper's name; gae and "
        "cpgd are refused",
    )
    g.add_argument("--eps_clip", type=float, default=0.2, help="PPO's clip range")
    g.add_argument("--eps_clip_high", type=float, help="its upper half (DAPO's clip-higher); default: --eps_clip")
    g.add_argument("--use_gspo", action=BOOL, default=False, help="one ratio a response, not a token (GSPO)")
    g.add_argument(
        "--use_cispo",
        action=BOOL,
        default=False,
        help="weigh a token by its ratio, at most 1 + --eps_clip_high, where PPO would leave it out (CISPO)",
    )
    g.add_argument(
        "--audio_token_weights",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the loss, 0 to 1, in which a token weighs by how much its probability changes when silence "
        "takes the place of the sound; takes one more log-prob forward (time/silence)",
    )
    g.add_argument(
        "--rollout_correction",
        choices=("none", "tis", "mis", "geo"),
        default="none",
        help="weigh the loss by the trainer's over the engine's probability of what was sampled: tis of each token, at "
        "most --rollout_correction_limit; mis of each response, and 0 out of bounds; geo: 0 for a response whose "
        "geometric mean over tokens is out of bounds, else 1",
    )
    g.add_argument("--rollout_correction_limit", type=float, default=2.0, help="upper bound; geo wants some 1.001")
    g.add_argument("--rollout_correction_floor", type=float, default=0.0, help="lower bound of mis and geo")
    g.add_argument(
        "--dynamic_sampling",
        action=BOOL,
        default=False,
        help="replace groups whose rewards are all alike by groups of other prompts, drawn from all data (DAPO)",
    )
    g.add_argument("--dynamic_sampling_rounds", type=int, default=2, help="most rollouts a step to replace them")
    g.add_argument("--overlong_buffer", action=BOOL, default=False, help="lower the reward near the token limit (DAPO)")
    g.add_argument("--overlong_buffer_len", type=int, default=64, help="tokens before the limit over which it falls")
    g.add_argument("--overlong_buffer_penalty_factor", type=float, default=1.0, help="by how much at the limit")
    g.add_argument(
        "--mask_truncated",
        action=BOOL,
        default=False,
        help="train on no response that hit --generate_max_len; it still counts in its group's advantages and in the "
        "mean over responses or tokens (DAPO's overlong filtering)",
    )
    g.add_argument("--loss_agg_mode", choices=LOSS_AGG_MODES, default="seq-mean-token-mean", help="averaging of tokens")
    g.add_argument("--gamma", type=float, default=1.0, help="discount a token")
    g.add_argument("--init_kl_coef", type=float, default=0.04, help="weight of the KL to the start model; 0: none")
    g.add_argument("--kl_target", type=float, help="adapt the weight so that the KL stays near this")
    g.add_argument(
        "--kl_estimator",
        choices=("k1", "k2", "k3"),
        default="k3",
        help="k3 is GRPO's; as a loss k2 or k3, in the reward k1",
    )
    g.add_argument(
        "--use_kl_loss",
        action=BOOL,
        default=True,
        help="KL as a term of the loss (GRPO); --no-use_kl_loss puts it into the reward, token by token",
    )


def _add_optimizer_flags(g: Any) -> None:
    g.add_argument("--actor_learning_rate", type=float, default=1e-6, help="peak learning rate")
    g.add_argument("--lr_warmup_ratio", type=float, default=0.03, help="share of the optimizer steps that warm up")
    g.add_argument("--l2", type=float, default=0.0, help="weight decay")
    g.add_argument("--adam_betas", type=float, nargs=2, default=(0.9, 0.95), help="Adam's decay rates")
    g.add_argument("--max_norm", type=float, default=1.0, help="gradient norm to clip at")
    g.add_argument("--zero_stage", type=int, choices=(0, 2, 3), default=2, help="DeepSpeed ZeRO stage")
    g.add_argument("--adam_offload", action=BOOL, default=False, help="optimizer states in CPU memory")


def _add_output_flags(g: Any) -> None:
    g.add_argument("--save_path", default="./ckpt", help="folder of the run: metrics, logs and the final model")
    g.add_argument("--ckpt_path", help="folder of the checkpoints; default: --save_path")
    g.add_argument("--save_steps", type=int, default=-1, help="checkpoint every so many steps; -1: never")
    g.add_argument("--save_hf_ckpt", action=BOOL, default=False, help="with each checkpoint a Hugging Face folder too")
    g.add_argument(
        "--save_hf_on_stop",
        action=BOOL,
        help="when a run is stopped (Ctrl-C, SIGTERM, SIGUSR1, --on_anomaly), write the model of its last whole step "
        "as a Hugging Face folder, too; default: where that takes under a minute at 200 MB/s, up to 12 GB",
    )
    g.add_argument("--disable_ds_ckpt", action=BOOL, default=False, help="no checkpoints for resuming")
    g.add_argument("--max_ckpt_num", type=int, default=3, help="checkpoints to keep")
    g.add_argument("--load_checkpoint", action=BOOL, default=False, help="resume the run from --ckpt_path")
    g.add_argument(
        "--allow_changes",
        nargs="+",
        metavar="NAME",
        help="settings that a resumed run may change, such as num_episodes; any other change of what is trained is "
        "refused",
    )
    g.add_argument(
        "--on_anomaly",
        choices=("warn", "stop", "skip"),
        default="warn",
        help="engine and trainer disagree, KL runs away, all responses are cut off, or rewards are all alike: warn "
        "once and count, save and stop with status 4, or leave the optimizer step out; a loss that is not finite "
        "stops the run, or is left out with skip",
    )
    g.add_argument(
        "--on_save_error",
        choices=("warn", "stop"),
        default="warn",
        help="a checkpoint cannot be written (disk full): say so and go on, or stop with status 5; those written "
        "before stay whole either way",
    )
    g.add_argument(
        "--eval_steps", type=int, default=-1, help="evaluate every so many steps and after the last; -1: never"
    )
    g.add_argument(
        "--eval_silent",
        action=BOOL,
        default=False,
        help="ask the same questions with silence in place of every clip at each evaluation, too: what the model knows "
        "without listening",
    )
    g.add_argument(
        "--keep_best",
        nargs="?",
        const="",
        metavar="METRIC",
        help="keep the model of the best evaluation in <save_path>/best; by this metric, such as eval/reward (the flag "
        "alone: the first benchmark's accuracy, else eval/accuracy_reward)",
    )
    g.add_argument("--save_trajectories", action=BOOL, default=False, help="write responses of each step as JSON Lines")
    g.add_argument(
        "--num_trajectories_to_save", type=int, default=10, help="how many a step, rounded up to whole groups"
    )
    g.add_argument(
        "--report",
        action=BOOL,
        default=True,
        help="at the end of the run write report.html, and say what was learned and what is next",
    )
    g.add_argument("--use_wandb", action=BOOL, default=False, help="log to wandb (key from WANDB_API_KEY or a login)")
    g.add_argument("--wandb_org", help="wandb entity")
    g.add_argument("--wandb_group", help="wandb group")
    g.add_argument("--wandb_project", default="lightrft_r1_aqa", help="wandb project")
    g.add_argument("--wandb_run_name", default=f"r1_aqa_{datetime.now():%m%dT%H:%M}", help="name of the run")
    g.add_argument(
        "--wandb_table_steps",
        type=int,
        default=0,
        help="a wandb table of responses, with their clips, every so many steps; 0: never",
    )
    g.add_argument("--use_tensorboard", help="folder for TensorBoard logs")


def _add_planning_flags(g: Any) -> None:
    g.add_argument(
        "--plan",
        action=BOOL,
        default=False,
        help="load nothing; print memory a GPU, the batch's arithmetic and what to change so that it fits, and end",
    )
    g.add_argument("--plan_gpus", type=int, help="GPUs to plan for; default: WORLD_SIZE or those here, else 8")
    g.add_argument("--plan_gpu_gib", type=float, help="memory of each in GiB; default: what those here have, else 80")
    g.add_argument("--plan_clip_seconds", type=float, help="longest clip to plan for (default: --audio_seconds)")


def reward_parts(reward: str, weights: list[float] | None) -> dict[str, float]:
    """The metric of each part of ``--reward``, and its weight."""
    names = [f"{part.rpartition(':')[2]}_reward" for part in split_reward(reward)]
    return dict(zip(names, [*(weights or ()), *[1.0] * len(names)], strict=False))


def split_reward(reward: str) -> list[str]:
    """The parts of ``--reward``; R1-AQA's has two."""
    return ["accuracy", "format"] if reward == "r1_aqa" else reward.split("+")


def finish(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags.

    :param args: Parsed flags, changed in place.
    """
    args.reward_parts = reward_parts(args.reward, args.reward_weights)
    if args.freeze_prefix == []:
        args.freeze_prefix = ["audio_tower"]
    if args.ckpt_path is None:
        args.ckpt_path = args.save_path
    for name in ("micro_train_batch_size", "micro_rollout_batch_size"):
        if getattr(args, name) is None:
            setattr(args, name, max(1, args.n_samples_per_prompt))


def has_split(source: str, split: str) -> bool:
    """Whether a source is a file, or a folder with this split.

    :param split: Name of the split.
    """
    path = Path(source.strip())
    return path.is_file() or any((path / f"{split}{suffix}").is_file() for suffix in DATA_SUFFIXES)
