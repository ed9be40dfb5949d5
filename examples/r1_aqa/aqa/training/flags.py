"""The flags of ``train_colocate.py`` and the rules between them. Imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib.util
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from aqa.common.model_type import model_type_of
from aqa.hosts.locate import not_installed

ESTIMATORS = ("group_norm", "dr_grpo", "rloo", "reinforce_baseline", "reinforce++", "reinforce", "gae", "cpgd")
REFUSED_ESTIMATORS = {"gae": "needs a critic, and none is trained here", "cpgd": "needs a loss that is not in here"}
REWARDS = ("r1_aqa", "exact", "graded_format", "length_aware")
LOSS_AGG_MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
GROUP_METHODS = ("group_norm", "dr_grpo", "rloo", "reinforce_baseline")
DATA_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
EXIT_STATUS = (
    "exit status: 0 done; 2 wrong use or wrong data, the message says what to put right; 3 --plan: it does not "
    "fit; 4 stopped by --on_anomaly stop, state saved; 5 a checkpoint or the final model could not be written; 130, "
    "138, 143 asked to end by Ctrl-C, SIGUSR1, SIGTERM, state saved (torchrun makes all of these 1); 1 any other "
    "failure, with its traceback"
)
MODEL_TYPES = ("qwen2_audio", "qwen2_5_omni")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def build_parser(add_host_arguments: Any) -> argparse.ArgumentParser:
    """All flags.

    :param add_host_arguments: ``lightrft.utils.add_arguments``: adds the host's own flags.
    """
    parser = argparse.ArgumentParser(
        description="Train Qwen2-Audio with GRPO on audio question answering (R1-AQA's recipe).",
        epilog=EXIT_STATUS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--debug", action=flag, default=False, help="show the traceback of an error, too")

    g = parser.add_argument_group("model")
    g.add_argument("--pretrain", help="folder (or hub name) of the Qwen2-Audio or Qwen2.5-Omni to start from")
    g.add_argument("--bf16", action=flag, default=False, help="weights and rollouts in bfloat16, else float32")
    g.add_argument("--flash_attn", action=flag, default=False, help="use flash-attn kernels (must be installed)")
    g.add_argument("--gradient_checkpointing", action=flag, default=False, help="recompute activations: less memory")
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
        action=flag,
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

    g = parser.add_argument_group("data")
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
    g.add_argument("--prompt_split", default="train", help="split to train on")
    g.add_argument("--max_samples", type=int, default=1_000_000, help="use at most this many rows, drawn by --seed")
    g.add_argument("--eval_data", help="data to evaluate on; default: the --eval_split of --prompt_data, if it exists")
    g.add_argument("--eval_split", default="validation", help="split to evaluate on")
    g.add_argument("--max_eval_samples", type=int, default=500, help="the same for evaluation")
    g.add_argument(
        "--eval_benchmark",
        metavar="FILE",
        help="MMAU's .json or MMAR's .jsonl to evaluate on, too, by the official rule as eval_mmau.py does; several "
        "with commas",
    )
    g.add_argument("--eval_audio_dir", metavar="FOLDER", help="its recordings; one folder for all, or one each")
    g.add_argument(
        "--eval_think",
        action=flag,
        help="ask its questions for the thinking process, too; default: as all training rows do, else not",
    )
    g.add_argument("--input_key", default="prompt", help="column with the chat messages")
    g.add_argument("--images_key", default="audio_path", help="column with the audio file (LightRFT's image slot)")
    g.add_argument("--reference_key", default="reference", help="column with the gold answer")
    g.add_argument("--label_key", default="label", help="column with the reward rule")
    g.add_argument("--prompt_max_len", type=int, default=512, help="longest prompt in tokens, a clip counted as one")
    g.add_argument("--limit_mm_image_per_prompt", type=int, default=1, help="most clips a prompt")
    g.add_argument(
        "--decode_audio",
        action=flag,
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
        action=flag,
        default=False,
        help="decode in a process of its own with limits of memory and time: for foreign data",
    )

    g = parser.add_argument_group("batch sizes and length of the run")
    g.add_argument("--rollout_batch_size", type=int, default=16, help="prompts a rollout, over all ranks")
    g.add_argument("--n_samples_per_prompt", type=int, default=8, help="responses a prompt (the group)")
    g.add_argument("--train_batch_size", type=int, default=128, help="responses an optimizer step, over all ranks")
    g.add_argument("--micro_train_batch_size", type=int, default=4, help="responses in one forward and backward")
    g.add_argument("--micro_rollout_batch_size", type=int, default=8, help="responses in one log-prob forward")
    g.add_argument("--num_episodes", type=int, default=1, help="passes over the data")
    g.add_argument("--max_epochs", type=int, default=1, help="passes over each rollout batch")

    g = parser.add_argument_group("sampling")
    g.add_argument("--engine_type", choices=("vllm", "sglang", "hf"), default="vllm", help="rollout engine")
    g.add_argument("--generate_max_len", type=int, default=256, help="longest response in tokens")
    g.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    g.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; below 1 the log-prob gap includes the cut")
    g.add_argument("--seed", type=int, default=42, help="seed of everything random")

    g = parser.add_argument_group("GRPO")
    g.add_argument("--advantage_estimator", choices=ESTIMATORS, default="group_norm", help="group_norm is GRPO")
    g.add_argument(
        "--reward",
        default="r1_aqa",
        help="what is paid for: r1_aqa (accuracy + format), exact (no math_verify), graded_format, length_aware, or a "
        "function of your own, module:function, of (response, reference, think)",
    )
    g.add_argument("--eps_clip", type=float, default=0.2, help="PPO's clip range")
    g.add_argument("--eps_clip_high", type=float, help="its upper half (DAPO's clip-higher); default: --eps_clip")
    g.add_argument("--use_gspo", action=flag, default=False, help="one ratio a response, not a token (GSPO)")
    g.add_argument(
        "--rollout_correction",
        choices=("none", "tis", "mis"),
        default="none",
        help="weigh the loss by the trainer's over the engine's probability of what was sampled: tis of each token, at "
        "most --rollout_correction_limit; mis of each response, and 0 beyond that",
    )
    g.add_argument("--rollout_correction_limit", type=float, default=2.0, help="largest weight of a correction")
    g.add_argument(
        "--dynamic_sampling",
        action=flag,
        default=False,
        help="replace groups whose rewards are all alike by groups of other prompts, drawn from all data (DAPO)",
    )
    g.add_argument("--dynamic_sampling_rounds", type=int, default=2, help="most rollouts a step to replace them")
    g.add_argument("--overlong_buffer", action=flag, default=False, help="lower the reward near the token limit (DAPO)")
    g.add_argument("--overlong_buffer_len", type=int, default=64, help="tokens before the limit over which it falls")
    g.add_argument("--overlong_buffer_penalty_factor", type=float, default=1.0, help="by how much at the limit")
    g.add_argument("--loss_agg_mode", choices=LOSS_AGG_MODES, default="seq-mean-token-mean", help="averaging of tokens")
    g.add_argument("--gamma", type=float, default=1.0, help="discount a token")
    g.add_argument("--init_kl_coef", type=float, default=0.04, help="weight of the KL to the start model; 0: none")
    g.add_argument("--kl_target", type=float, help="adapt the weight so that the KL stays near this")
    g.add_argument("--kl_estimator", choices=("k1", "k2", "k3"), default="k3", help="k3 is GRPO's")
    g.add_argument("--use_kl_loss", action=flag, default=False, help="KL as a loss (GRPO), else in the reward")

    g = parser.add_argument_group("optimizer and sharding")
    g.add_argument("--actor_learning_rate", type=float, default=1e-6, help="peak learning rate")
    g.add_argument("--lr_warmup_ratio", type=float, default=0.03, help="share of the steps that warm up")
    g.add_argument("--l2", type=float, default=0.0, help="weight decay")
    g.add_argument("--adam_betas", type=float, nargs=2, default=(0.9, 0.95), help="Adam's decay rates")
    g.add_argument("--max_norm", type=float, default=1.0, help="gradient norm to clip at")
    g.add_argument("--zero_stage", type=int, choices=(0, 2, 3), default=2, help="DeepSpeed ZeRO stage")
    g.add_argument("--adam_offload", action=flag, default=False, help="optimizer states in CPU memory")

    g = parser.add_argument_group("output")
    g.add_argument("--save_path", default="./ckpt", help="folder of the run: metrics, logs and the final model")
    g.add_argument("--ckpt_path", help="folder of the checkpoints; default: --save_path")
    g.add_argument("--save_steps", type=int, default=-1, help="checkpoint every so many steps; -1: never")
    g.add_argument("--save_hf_ckpt", action=flag, default=False, help="with each checkpoint a Hugging Face folder too")
    g.add_argument("--disable_ds_ckpt", action=flag, default=False, help="no checkpoints for resuming")
    g.add_argument("--max_ckpt_num", type=int, default=3, help="checkpoints to keep")
    g.add_argument("--load_checkpoint", action=flag, default=False, help="resume from --ckpt_path")
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
        "--keep_best",
        nargs="?",
        const="",
        metavar="METRIC",
        help="keep the model of the best evaluation in <save_path>/best; by this metric, such as eval/reward (the flag "
        "alone: the first benchmark's accuracy, else eval/accuracy_reward)",
    )
    g.add_argument("--save_trajectories", action=flag, default=False, help="write responses of each step as JSON Lines")
    g.add_argument(
        "--num_trajectories_to_save", type=int, default=10, help="how many a step, rounded up to whole groups"
    )
    g.add_argument("--report", action=flag, default=True, help="write report.html at the end of the run")
    g.add_argument("--use_wandb", action=flag, default=False, help="log to wandb (key from WANDB_API_KEY or a login)")
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

    g = parser.add_argument_group("planning")
    g.add_argument(
        "--plan",
        nargs="?",
        choices=("table", "json"),
        const="table",
        help="load nothing; print memory a GPU, the batch's arithmetic and what to change so that it fits, and end",
    )
    g.add_argument("--plan_gpus", type=int, help="GPUs to plan for; default: WORLD_SIZE or those here, else 8")
    g.add_argument("--plan_gpu_gib", type=float, help="memory of each in GiB; default: what those here have, else 80")
    g.add_argument("--plan_clip_seconds", type=float, default=30.0, help="longest clip to plan for, in seconds")
    add_host_arguments(parser)
    return parser


def finish(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags.

    :param args: Parsed flags, changed in place.
    """
    if args.freeze_prefix == []:
        args.freeze_prefix = ["audio_tower"]
    if args.ckpt_path is None:
        args.ckpt_path = args.save_path


def find_problems(
    args: argparse.Namespace, world_size: int, local_world_size: int | None = None, paths: bool = True
) -> list[str]:
    """Everything that is wrong with a configuration, before anything loads.

    :param args: Finished flags.
    :param world_size: Ranks of the run.
    :param local_world_size: Ranks of a node; default: there is but one.
    :param paths: Also look at folders and files, which a plan does not need.
    :return: One entry a problem, with values and a remedy; empty if all is well.
    """
    problems = _batch_problems(args, world_size, local_world_size or world_size)
    if paths:
        engine = ["vllm"] if args.engine_type == "vllm" else []
        problems += not_installed("torch", "transformers", "deepspeed", "soundfile", *engine)
    problems += [
        f"--{name} {getattr(args, name)}: must be {rule}"
        for name, fits, rule in (
            ("max_samples", args.max_samples >= 1, "1 or more"),
            ("lora_rank", args.lora_rank >= 0, "0 (none) or more"),
            ("lora_alpha", args.lora_alpha >= 1, "1 or more"),
            ("max_eval_samples", args.max_eval_samples >= 1, "1 or more"),
            ("temperature", 0 < args.temperature <= 2, "above 0 and at most 2 (vLLM's limit)"),
            ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
            ("eps_clip", 0 < args.eps_clip < math.inf, "above 0"),
            ("eps_clip_high", args.eps_clip_high is None or 0 < args.eps_clip_high < math.inf, "above 0"),
            ("rollout_correction_limit", 0 < args.rollout_correction_limit < math.inf, "above 0"),
            ("dynamic_sampling_rounds", args.dynamic_sampling_rounds >= 1, "1 or more"),
            ("overlong_buffer_penalty_factor", 0 <= args.overlong_buffer_penalty_factor < math.inf, "0 or more"),
            ("gamma", 0 < args.gamma <= 1, "in (0, 1]"),
            ("init_kl_coef", 0 <= args.init_kl_coef < math.inf, "0 or more"),
            ("kl_target", args.kl_target is None or 0 < args.kl_target < math.inf, "above 0"),
            ("l2", 0 <= args.l2 < math.inf, "0 or more"),
            ("adam_betas", all(0 <= beta < 1 for beta in args.adam_betas), "two numbers in [0, 1)"),
            ("actor_learning_rate", 0 < args.actor_learning_rate < math.inf, "above 0"),
            ("lr_warmup_ratio", 0 <= args.lr_warmup_ratio < 1, "in [0, 1)"),
            ("max_norm", 0 <= args.max_norm < math.inf, "0 (no clipping) or more"),
            ("engine_mem_util", 0 < args.engine_mem_util < 1, "between 0 and 1"),
            ("generate_max_len", args.generate_max_len >= 1, "1 or more"),
            ("prompt_max_len", args.prompt_max_len >= 1, "1 or more"),
            ("audio_cache_mib", args.audio_cache_mib >= 0, "0 or more"),
            ("plan_gpus", args.plan_gpus is None or args.plan_gpus >= 1, "1 or more"),
            ("plan_gpu_gib", args.plan_gpu_gib is None or 0 < args.plan_gpu_gib < math.inf, "above 0"),
            ("plan_clip_seconds", 0 < args.plan_clip_seconds < math.inf, "above 0"),
            ("num_trajectories_to_save", args.num_trajectories_to_save >= 1, "1 or more"),
            ("wandb_table_steps", args.wandb_table_steps >= 0, "0 (never) or more"),
            ("max_ckpt_num", args.max_ckpt_num >= 1, "1 or more"),
            ("num_episodes", args.num_episodes >= 1, "1 or more"),
            ("max_epochs", args.max_epochs >= 1, "1 or more"),
            ("limit_mm_image_per_prompt", args.limit_mm_image_per_prompt >= 1, "1 or more"),
        )
        if not fits
    ]
    if args.advantage_estimator in REFUSED_ESTIMATORS:
        problems.append(
            f"--advantage_estimator {args.advantage_estimator} {REFUSED_ESTIMATORS[args.advantage_estimator]}; "
            "use group_norm (GRPO), rloo, reinforce_baseline, reinforce or reinforce++"
        )
    if args.advantage_estimator in GROUP_METHODS and args.n_samples_per_prompt < 2:
        problems.append(
            f"--advantage_estimator {args.advantage_estimator} compares the responses of a group: "
            f"--n_samples_per_prompt {args.n_samples_per_prompt} must be 2 or more"
        )
    if args.reward not in REWARDS and not all(args.reward.partition(":")):
        problems.append(f"--reward {args.reward}: must be one of {', '.join(REWARDS)}, or module:function")
    if args.lora_rank > 0 and args.freeze_prefix:
        problems.append("--freeze_prefix with --lora_rank: adapters freeze all else anyway; choose --target_modules")
    if args.overlong_buffer and not 1 <= args.overlong_buffer_len <= args.generate_max_len:
        problems.append(
            f"--overlong_buffer_len {args.overlong_buffer_len}: must be 1 to --generate_max_len {args.generate_max_len}"
        )
    if args.dynamic_sampling and args.n_samples_per_prompt < 2:
        problems.append("--dynamic_sampling: a group of one response is always alike; --n_samples_per_prompt 2 or more")
    if args.dynamic_sampling and args.prompt_data_probs_end is not None:
        problems.append(
            "--dynamic_sampling with --prompt_data_probs_end: replacements are drawn from all rows, also whose turn "
            "has not come yet; use one of the two"
        )
    if args.use_gspo and args.loss_agg_mode != "seq-mean-token-mean":
        problems.append(
            f"--use_gspo with --loss_agg_mode {args.loss_agg_mode}: GSPO weighs all responses alike, this by their "
            "length; use seq-mean-token-mean"
        )
    if getattr(args, "quiet", False) and args.verbose:  # flags of the runtime only
        problems.append("--quiet with --verbose: drop one of the two")
    if args.use_kl_loss and args.init_kl_coef == 0:
        problems.append("--use_kl_loss with --init_kl_coef 0 asks for a KL of no weight: drop one of the two")
    if args.kl_target is not None and args.init_kl_coef == 0:
        problems.append(f"--kl_target {args.kl_target} needs a start value: set --init_kl_coef above 0")
    if args.use_kl_loss and args.kl_estimator == "k1":
        problems.append("--use_kl_loss with --kl_estimator k1: its gradient knows no reference model; use k3 or k2")
    if args.wandb_table_steps > 0 and not args.use_wandb:
        problems.append(f"--wandb_table_steps {args.wandb_table_steps} without --use_wandb: add it, or drop this")
    if args.engine_type == "hf" and args.engine_tp_size > 1:
        problems.append(f"--engine_type hf has no tensor parallelism: --engine_tp_size {args.engine_tp_size} must be 1")
    if args.load_in_4bit:
        problems += _four_bit_problems(args)
    if args.adam_offload and args.zero_stage == 0 and not args.fsdp:
        problems.append("--adam_offload with --zero_stage 0: DeepSpeed would ignore it; use --zero_stage 2 or 3")
    return problems + (_path_problems(args) if paths else [])


def _four_bit_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.lora_rank == 0:
        problems.append("--load_in_4bit: weights at 4 bits cannot train; add adapters with --lora_rank 16")
    if args.fsdp:
        problems.append("--load_in_4bit with --fsdp: FSDP2 cannot split packed weights; drop --fsdp")
    if args.zero_stage == 3:
        problems.append("--load_in_4bit with --zero_stage 3: ZeRO-3 cannot split packed weights; use --zero_stage 2")
    if args.plan is None and importlib.util.find_spec("bitsandbytes") is None:
        problems.append("--load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return problems


def _batch_problems(args: argparse.Namespace, world: int, local: int) -> list[str]:
    rollout, n, train = args.rollout_batch_size, args.n_samples_per_prompt, args.train_batch_size
    micro, micro_rollout, tp = args.micro_train_batch_size, args.micro_rollout_batch_size, args.engine_tp_size
    names = "rollout_batch_size n_samples_per_prompt train_batch_size micro_train_batch_size micro_rollout_batch_size"
    problems = [
        f"--{name} {getattr(args, name)}: must be 1 or more"
        for name in (*names.split(), "engine_tp_size")
        if getattr(args, name) < 1
    ]
    if problems:
        return problems
    if world % tp:
        problems.append(f"--engine_tp_size {tp} does not divide the {world} ranks of this run")
    elif local % tp:
        fitting = max(d for d in range(1, min(tp, local) + 1) if local % d == 0)
        problems.append(
            f"--engine_tp_size {tp} does not divide the {local} ranks of a node, and an engine must lie within one: "
            f"use {fitting}, or {_up(local, tp)} ranks a node (MLP_WORKER_GPU)"
        )
    if rollout % world:
        problems.append(
            f"--rollout_batch_size {rollout} prompts do not divide among {world} ranks; {_up(rollout, world)} would"
        )
        return problems
    responses = rollout * n
    share = responses // world
    for name, size in (("micro_train_batch_size", micro), ("micro_rollout_batch_size", micro_rollout)):
        if share % size:
            fitting = max(d for d in range(1, min(size, share) + 1) if share % d == 0)
            problems.append(
                f"--{name} {size} does not divide the {share} responses of a rank "
                f"({rollout} prompts x {n} samples / {world} ranks); {fitting} does"
            )
    if train < responses:
        problems.append(
            f"--train_batch_size {train} must be at least --rollout_batch_size x --n_samples_per_prompt "
            f"= {rollout} x {n} = {responses}; use --train_batch_size {responses}"
        )
    elif train % responses:
        problems.append(
            f"--train_batch_size {train} is no multiple of --rollout_batch_size x --n_samples_per_prompt "
            f"= {rollout} x {n} = {responses}: an optimizer step would end inside a rollout; "
            f"use --train_batch_size {_up(train, responses)}"
        )
    if args.max_epochs > 1 and train != responses:
        problems.append(
            f"--max_epochs {args.max_epochs} repeats each rollout batch, so an optimizer step must be one rollout: "
            f"use --train_batch_size {responses}"
        )
    return problems


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _path_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    if not args.pretrain:
        problems.append(
            "--pretrain is missing: the folder of a Qwen2-Audio or Qwen2.5-Omni (demo/run_demo.py builds a tiny one)"
        )
    elif Path(args.pretrain).is_dir():
        if not (Path(args.pretrain) / "config.json").is_file():
            problems.append(f"--pretrain {args.pretrain}: holds no config.json; is it a model folder?")
        elif not any((Path(args.pretrain) / name).is_file() for name in PROCESSOR_FILES):
            problems.append(f"--pretrain {args.pretrain}: holds no processor ({' or '.join(PROCESSOR_FILES)})")
        kind = model_type_of(args.pretrain)
        if kind is not None and kind not in MODEL_TYPES:
            problems.append(f"--pretrain {args.pretrain}: is a {kind} model; known are {' and '.join(MODEL_TYPES)}")
        if kind == "qwen2_5_omni" and args.load_in_4bit:
            problems.append("--load_in_4bit: a qwen2_5_omni model is not packed here; drop it")
    elif args.pretrain.startswith((".", "/", "~")) or args.pretrain.count("/") != 1:
        problems.append(f"--pretrain {args.pretrain}: no such folder")
    if not args.prompt_data:
        problems.append("--prompt_data is missing: the folder that data_preprocess/avqa.py wrote")
    else:
        problems += _source_problems("prompt_data", args.prompt_data, args.prompt_split)
        problems += _share_problems(args)
    if args.confine_audio and not Path(args.confine_audio).is_dir():
        problems.append(f"--confine_audio {args.confine_audio}: no such folder")
    problems += _evaluation_problems(args)
    if args.eval_data:
        problems += _source_problems("eval_data", args.eval_data, args.eval_split)
    if args.load_checkpoint:
        folder = Path(args.ckpt_path) / "_actor"
        # LightRFT's FSDP2 strategy writes no latest
        if not (folder / "latest").is_file() and not (args.fsdp and any(folder.glob("*/.metadata"))):
            problems.append(f"--load_checkpoint: {args.ckpt_path} holds no checkpoint (_actor/latest)")
    return problems


def _share_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    sources = len(args.prompt_data.split(","))
    for name in ("prompt_data_probs", "prompt_data_probs_end"):
        text = getattr(args, name)
        if text is None:
            continue
        shares = text.split(",")
        if len(shares) != sources or not all(map(_is_number, shares)):
            problems.append(f"--{name} {text}: one share for each of {sources} sources is needed")
        elif abs(sum(map(float, shares)) - 1) > 1e-6:
            total = sum(map(float, shares))
            fitting = ",".join(f"{float(share) / total:.4g}" for share in shares) if total else ""
            remedy = f"; {fitting} would be these shares" if fitting else ""
            problems.append(f"--{name} {text}: the shares must add up to 1, not {total:g}{remedy}")
    if args.prompt_data_probs_end is not None and sources == 1:
        problems.append("--prompt_data_probs_end: a curriculum needs several sources in --prompt_data")
    if args.prompt_data_probs_end is not None and args.num_episodes != 1:
        problems.append(
            f"--num_episodes {args.num_episodes} with --prompt_data_probs_end: the shares move over one episode, for "
            "which --max_samples sets the rows; use --num_episodes 1"
        )
    return problems


def _evaluation_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    files = args.eval_benchmark.split(",") if args.eval_benchmark else []
    problems += [f"--eval_benchmark {file}: no such file" for file in files if not Path(file).is_file()]
    if len({Path(file).stem for file in files}) < len(files):
        problems.append(f"--eval_benchmark {args.eval_benchmark}: two files have one name, and the metrics go by it")
    if files:
        folders = (args.eval_audio_dir or "").split(",")
        if len(folders) not in (1, len(files)):
            problems.append(
                f"--eval_audio_dir {args.eval_audio_dir}: one folder, or one for each of {len(files)} files"
            )
        problems += [
            f"--eval_audio_dir {folder or 'is missing: it'}: must be the folder of --eval_benchmark's recordings"
            for folder in folders
            if not folder or not Path(folder).is_dir()
        ]
    problems += [
        f"--{name} without an evaluation: set --eval_steps"
        for name, wanted in (("eval_benchmark", files), ("keep_best", args.keep_best is not None))
        if wanted and args.eval_steps <= 0
    ]
    return problems


def _source_problems(flag: str, sources: str, split: str) -> list[str]:
    problems = []
    for source in sources.split(","):
        if not Path(source.strip()).exists():
            problems.append(f"--{flag} {source}: does not exist")
        elif not has_split(source, split):
            problems.append(f"--{flag} {source}: holds no {split}.parquet (--{flag.split('_')[0]}_split)")
    return problems


def has_split(source: str, split: str) -> bool:
    """Whether a source is a file, or a folder with this split.

    :param source: File or folder.
    :param split: Name of the split.
    """
    path = Path(source.strip())
    return path.is_file() or any((path / f"{split}{suffix}").is_file() for suffix in DATA_SUFFIXES)


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False
