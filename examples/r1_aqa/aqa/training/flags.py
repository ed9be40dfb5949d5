"""The flags of ``train_colocate.py``. Imports nothing heavy: ``--help`` shall be quick."""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from aqa.common.arguments import Defaults, Flags, Parser, add_flags
from aqa.families import FAMILIES

ESTIMATORS = ("group_norm", "gdpo", "dr_grpo", "rloo", "reinforce_baseline", "reinforce++", "reinforce", "gae", "cpgd")
REFUSED_ESTIMATORS = {"gae": "needs a critic, and none is trained here", "cpgd": "needs a loss that is not in here"}
REWARDS = ("r1_aqa", "exact", "graded_format", "length_aware")
REWARD_PARTS = ("accuracy", "format", "consistency", "length", "majority", "audio_gain")
LOSS_AGG_MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
GROUP_METHODS = ("group_norm", "gdpo", "dr_grpo", "rloo", "reinforce_baseline")
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
  one process; after an interruption the same and --load_checkpoint:
    python examples/r1_aqa/train_colocate.py --pretrain MODEL --prompt_data DATA --save_path RUN \\
        --max_steps 400 --eval_steps 100 --eval_silent --save_steps 100
  what it needs on GPUs, without loading anything:
    python examples/r1_aqa/train_colocate.py --plan --pretrain MODEL --bf16 --zero_stage 3
  several GPUs:
    torchrun --nproc-per-node 8 examples/r1_aqa/train_colocate.py --bf16 --zero_stage 3 ...\
"""
MODELS = ", ".join(family.name for family in FAMILIES[:-1]) + f" or {FAMILIES[-1].name}"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


MODEL: Flags = {
    "--pretrain": (str, f"folder (or hub name) of the {MODELS} to start from"),
    "--bf16": (False, "weights and rollouts in bfloat16, else float32"),
    "--flash_attn": (
        False,
        "use flash-attn kernels (must be installed), which compute a prompt once a response, not once a group",
    ),
    "--gradient_checkpointing": (False, "recompute activations: less memory"),
    "--freeze_prefix": (
        str,
        "freeze the audio tower (the flag alone), or parts that are named: audio_tower, multi_modal_projector, "
        "language_model.layers.[0-7], ...; * ? [] as in file names",
        {"nargs": "*", "metavar": "PART"},
    ),
    "--lora_rank": (0, "train LoRA adapters of this rank and nothing else; 0: none"),
    "--lora_alpha": (16, "adapters weigh lora_alpha / lora_rank"),
    "--load_in_4bit": (
        False,
        "with --lora_rank: the language model's frozen layers at 4 bits a weight (NF4, by bitsandbytes)",
    ),
    "--target_modules": (
        ["language_model"],
        "what gets adapters: linear layers (q_proj), or parts that hold them (language_model, audio_tower)",
        {"nargs": "+", "metavar": "NAME"},
    ),
}


DATA: Flags = {
    "--prompt_data": (str, "folder or parquet file that avqa.py wrote; several with commas"),
    "--prompt_data_probs": (
        "1.0",
        "share of each source, with commas; an episode ends with the rows of the first source that is used up",
    ),
    "--prompt_data_probs_end": (
        str,
        "a curriculum: the shares go, in equal steps, from --prompt_data_probs at the first row to these at the "
        "last; a source that is used up starts again, and there are as many rows as in all sources together, at "
        "most --max_samples",
    ),
    "--pass_rate": (
        float,
        "train on rows that select_data.py saw answered right in this share of responses, such as 0.1 0.9, which "
        "leaves out what is never and what is always right",
        {"nargs": 2, "metavar": ("LEAST", "MOST")},
    ),
    "--max_silent_pass_rate": (
        float,
        "train on rows that select_data.py saw answered right in silence in at most this share, such as 0.5",
    ),
    "--easy_first": (False, "a curriculum: rows in the order of their pass rates, the highest first, for one episode"),
    "--prompt_split": ("train", "split to train on"),
    "--max_samples": (1_000_000, "use at most this many rows, drawn by --seed"),
    "--eval_data": (str, "data to evaluate on; default: the --eval_split of --prompt_data, if it exists"),
    "--eval_split": ("validation", "split to evaluate on"),
    "--max_eval_samples": (500, "the same for evaluation"),
    "--eval_benchmark": (
        str,
        "MMAU's .json, MMAR's .jsonl or R1-AQA's rows to evaluate on, too, by the official rule as eval_mmau.py "
        "does; several with commas",
        {"metavar": "FILE"},
    ),
    "--eval_audio_dir": (str, "its recordings; one folder for all, or one each", {"metavar": "FOLDER"}),
    "--eval_think": (bool, "ask its questions for the thinking, too; default: as all training rows do, else not"),
    "--input_key": ("prompt", "column with the chat messages"),
    "--images_key": ("audio_path", "column with the audio file (LightRFT's image slot)"),
    "--reference_key": ("reference", "column with the gold answer"),
    "--label_key": ("label", "column with the reward rule"),
    "--prompt_max_len": (512, "longest prompt in tokens, a clip counted as one"),
    "--audio_seconds": (
        30.0,
        "longest clip that is heard, what is longer is cut; beyond 30 in windows of 30 s, which Audio Flamingo 3 "
        "takes up to 600",
    ),
    "--limit_mm_image_per_prompt": (1, "most clips a prompt"),
    "--decode_audio": (
        False,
        "decode every clip before the first step, not only its header: a damaged or silent one does not stop the "
        "run in the middle (some milliseconds a clip)",
    ),
    "--audio_cache_mib": (
        1024,
        "memory of a rank for decoded clips, MiB, for training data, evaluation data and each benchmark: 1024 hold "
        "1,677 clips of 10 s, whose files are not decoded again in the next episode; 0: none",
    ),
    "--confine_audio": (str, "refuse audio outside this folder, links resolved (foreign data)", {"metavar": "FOLDER"}),
    "--sandbox_audio": (False, "decode in a process of its own with limits of memory and time: for foreign data"),
}


BATCH: Flags = {
    "--rollout_batch_size": (16, "prompts a rollout, over all ranks"),
    "--n_samples_per_prompt": (8, "responses a prompt (the group)"),
    "--train_batch_size": (
        128,
        "responses an optimizer step, over all ranks; fewer than a rollout's: several steps a rollout, as in PPO",
    ),
    "--micro_train_batch_size": (
        int,
        "responses in one forward and backward; default: a group, whose prompt is then computed once",
    ),
    "--micro_rollout_batch_size": (int, "responses in one log-prob forward; default: a group"),
    "--num_episodes": (1, "passes over the data"),
    "--max_steps": (
        int,
        "in place of --num_episodes: this many steps (rollouts), with as many passes over the data as that takes",
    ),
    "--max_epochs": (1, "passes over each rollout batch"),
}


SAMPLING: Flags = {
    "--engine_type": ("vllm", "rollout engine", {"choices": ("vllm", "sglang", "hf")}),
    "--generate_max_len": (256, "longest response in tokens"),
    "--temperature": (1.0, "sampling temperature"),
    "--top_p": (1.0, "nucleus mass; below 1 the log-prob gap includes the cut"),
    "--top_k": (-1, "most likely tokens to draw from, -1: all; as with --top_p, the log-prob gap includes the cut"),
    "--seed": (42, "seed of everything random"),
}


REWARD: Flags = {
    "--reward": (
        "r1_aqa",
        "what is paid for: r1_aqa (accuracy + format), exact (no math_verify), graded_format, length_aware, or a "
        "function of your own, module:function, of (response, reference, think); or a sum of these and of accuracy, "
        "format, consistency (the thinking ends at the choice that is answered), length (see --reward_words), "
        "majority (the group's most frequent answer; needs no right one) and audio_gain (of right responses, the "
        "share of their probability that silence in place of the sound would cost), such as "
        "accuracy+format+consistency",
    ),
    "--reward_weights": (float, "weight of each part of --reward; default: 1", {"nargs": "+", "metavar": "W"}),
    "--reward_words": (
        (0, 64),
        "words of a response for which the part length pays 1; it falls to 0 at no word, and at twice the most",
        {"nargs": 2, "metavar": ("LEAST", "MOST")},
    ),
}


WARM_START: Flags = {
    "--sft_steps": (
        0,
        "supervised steps on the training rows' answers before GRPO, with the thinking in a column thinking where "
        "it is asked for, each of --train_batch_size / --n_samples_per_prompt rows, or one for each micro-batch if "
        "these are more; the model after them is the reference, and is kept in <save_path>/warm_start",
    ),
    "--sft_learning_rate": (float, "its peak; default: --actor_learning_rate"),
}


GRPO: Flags = {
    "--advantage_estimator": (
        "group_norm",
        "group_norm is GRPO; gdpo normalises each part of --reward by itself; dr_grpo; rloo; reinforce_baseline: "
        "REINFORCE++-baseline; reinforce and reinforce++ are REINFORCE++ by LightRFT's and the paper's name; gae "
        "and cpgd are refused",
        {"choices": ESTIMATORS},
    ),
    "--eps_clip": (0.2, "PPO's clip range"),
    "--eps_clip_high": (float, "its upper half (DAPO's clip-higher); default: --eps_clip"),
    "--use_gspo": (False, "one ratio a response, not a token (GSPO)"),
    "--use_cispo": (False, "weigh a token by its ratio, at most 1 + --eps_clip_high, where PPO leaves it out (CISPO)"),
    "--audio_token_weights": (
        0.0,
        "share of the loss, 0 to 1, in which a token weighs by how much its probability changes when silence takes "
        "the place of the sound; takes one more log-prob forward (time/silence)",
        {"metavar": "SHARE"},
    ),
    "--rollout_correction": (
        "none",
        "weigh the loss by the trainer's over the engine's probability of what was sampled: tis of each token, at "
        "most --rollout_correction_limit; mis of each response, and 0 out of bounds; geo: 0 for a response whose "
        "geometric mean over tokens is out of bounds, else 1",
        {"choices": ("none", "tis", "mis", "geo")},
    ),
    "--rollout_correction_limit": (2.0, "upper bound; geo wants some 1.001"),
    "--rollout_correction_floor": (0.0, "lower bound of mis and geo"),
    "--dynamic_sampling": (
        False,
        "replace groups whose rewards are all alike by groups of other prompts, drawn from all data (DAPO)",
    ),
    "--dynamic_sampling_rounds": (2, "most rollouts a step to replace them"),
    "--overlong_buffer": (False, "lower the reward near the token limit (DAPO)"),
    "--overlong_buffer_len": (64, "tokens before the limit over which it falls"),
    "--overlong_buffer_penalty_factor": (1.0, "by how much at the limit"),
    "--mask_truncated": (
        False,
        "train on no response that hit --generate_max_len; it still counts in its group's advantages and in the "
        "mean over responses or tokens (DAPO's overlong filtering)",
    ),
    "--loss_agg_mode": ("seq-mean-token-mean", "averaging of tokens", {"choices": LOSS_AGG_MODES}),
    "--gamma": (1.0, "discount a token"),
    "--init_kl_coef": (0.04, "weight of the KL to the start model; 0: none"),
    "--kl_target": (float, "adapt the weight so that the KL stays near this"),
    "--kl_estimator": ("k3", "k3 is GRPO's; as a loss k2 or k3, in the reward k1", {"choices": ("k1", "k2", "k3")}),
    "--use_kl_loss": (True, "KL as a term of the loss (GRPO); --no-use_kl_loss puts it in the reward, token by token"),
}


OPTIMIZER: Flags = {
    "--actor_learning_rate": (1e-6, "peak learning rate"),
    "--lr_warmup_ratio": (0.03, "share of the optimizer steps that warm up"),
    "--l2": (0.0, "weight decay"),
    "--adam_betas": ((0.9, 0.95), "Adam's decay rates", {"nargs": 2}),
    "--max_norm": (1.0, "gradient norm to clip at"),
    "--zero_stage": (2, "DeepSpeed ZeRO stage", {"choices": (0, 2, 3)}),
    "--adam_offload": (False, "optimizer states in CPU memory"),
}


OUTPUT: Flags = {
    "--save_path": ("./ckpt", "folder of the run: metrics, logs and the final model"),
    "--ckpt_path": (str, "folder of the checkpoints; default: --save_path"),
    "--save_steps": (-1, "checkpoint every so many steps; -1: never"),
    "--save_hf_ckpt": (False, "with each checkpoint a Hugging Face folder too"),
    "--save_hf_on_stop": (
        bool,
        "when a run is stopped (Ctrl-C, SIGTERM, SIGUSR1, --on_anomaly), write the model of its last whole step as "
        "a Hugging Face folder, too; default: where that takes under a minute at 200 MB/s, up to 12 GB",
    ),
    "--disable_ds_ckpt": (False, "no checkpoints for resuming"),
    "--max_ckpt_num": (3, "checkpoints to keep"),
    "--load_checkpoint": (False, "resume the run from --ckpt_path"),
    "--allow_changes": (
        str,
        "settings that a resumed run may change, such as num_episodes; any other change of what is trained is refused",
        {"nargs": "+", "metavar": "NAME"},
    ),
    "--on_anomaly": (
        "warn",
        "engine and trainer disagree, KL runs away, all responses are cut off, or rewards are all alike: warn once "
        "and count, save and stop with status 4, or leave the optimizer step out; a loss that is not finite stops "
        "the run, or is left out with skip",
        {"choices": ("warn", "stop", "skip")},
    ),
    "--on_save_error": (
        "warn",
        "a checkpoint cannot be written (disk full): say so and go on, or stop with status 5; those written before "
        "stay whole either way",
        {"choices": ("warn", "stop")},
    ),
    "--eval_steps": (-1, "evaluate every so many steps and after the last; -1: never"),
    "--eval_silent": (
        False,
        "ask the same questions with silence in place of every clip at each evaluation, too: what the model knows "
        "without listening",
    ),
    "--keep_best": (
        str,
        "keep the model of the best evaluation in <save_path>/best; by this metric, such as eval/reward (the flag "
        "alone: the first benchmark's accuracy, else eval/accuracy_reward)",
        {"nargs": "?", "const": "", "metavar": "METRIC"},
    ),
    "--save_trajectories": (False, "write responses of each step as JSON Lines"),
    "--num_trajectories_to_save": (10, "how many a step, rounded up to whole groups"),
    "--report": (True, "at the end of the run write report.html, and say what was learned and what is next"),
    "--use_wandb": (False, "log to wandb (key from WANDB_API_KEY or a login)"),
    "--wandb_org": (str, "wandb entity"),
    "--wandb_group": (str, "wandb group"),
    "--wandb_project": ("lightrft_r1_aqa", "wandb project"),
    "--wandb_run_name": (f"r1_aqa_{datetime.now():%m%dT%H:%M}", "name of the run"),
    "--wandb_table_steps": (0, "a wandb table of responses, with their clips, every so many steps; 0: never"),
    "--use_tensorboard": (str, "folder for TensorBoard logs"),
}


PLANNING: Flags = {
    "--plan": (False, "load nothing; print memory a GPU, the batch's arithmetic and what to change to make it fit"),
    "--plan_gpus": (int, "GPUs to plan for; default: WORLD_SIZE or those here, else 8"),
    "--plan_gpu_gib": (float, "memory of each in GiB; default: what those here have, else 80"),
    "--plan_clip_seconds": (float, "longest clip to plan for (default: --audio_seconds)"),
}


GROUPS = {
    "model": MODEL,
    "data": DATA,
    "batch sizes and length of the run": BATCH,
    "sampling": SAMPLING,
    "reward": REWARD,
    "warm start": WARM_START,
    "GRPO": GRPO,
    "optimizer and sharding": OPTIMIZER,
    "output": OUTPUT,
    "planning": PLANNING,
}


def build_parser(add_host_arguments: Any) -> argparse.ArgumentParser:
    """All flags.

    :param add_host_arguments: ``lightrft.utils.add_arguments``: adds the host's own flags.
    """
    parser = Parser(
        description="Train Qwen2-Audio with GRPO on audio question answering (R1-AQA's recipe).",
        essential=ESSENTIAL,
        examples=EXAMPLES,
        epilog=EXIT_STATUS,
        formatter_class=Defaults,
    )
    add_flags(parser, {"--debug": (False, "show the traceback of an error, too")})
    for title, table in GROUPS.items():
        add_flags(parser.add_argument_group(title), table)
    add_host_arguments(parser)
    return parser


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
