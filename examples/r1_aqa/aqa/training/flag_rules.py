"""Rules between the flags of ``train_colocate.py``: all problems are reported at once, before anything loads."""

import argparse
import math
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aqa.common.model_type import cut_weights, has_weights, missing_tokenizer, model_type_of
from aqa.common.versions import not_installed
from aqa.evaluation.checkpoints import NOTES_FILE
from aqa.families import BY_TYPE, KNOWN
from aqa.hosts.locate import lacks
from aqa.training.flags import (
    GROUP_METHODS,
    MODELS,
    PROCESSOR_FILES,
    REFUSED_ESTIMATORS,
    REWARD_PARTS,
    REWARDS,
    has_split,
    split_reward,
)

MEASURED = (*REWARDS, *REWARD_PARTS)


def rank_problems(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the variables that say which rank this process is, and how the ranks meet.

    :param environment: Without ``RANK`` and ``WORLD_SIZE`` there is one rank, and nothing to check.
    """
    limits = {"WORLD_SIZE": (1, None), "RANK": (0, "WORLD_SIZE"), "LOCAL_RANK": (0, "LOCAL_WORLD_SIZE")}
    limits["MASTER_PORT"] = (1, None)
    names = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if not names:
        return []
    numbers, problems = {"LOCAL_WORLD_SIZE": 1 << 16}, []
    for name in ("LOCAL_WORLD_SIZE", *limits):
        text = environment.get(name)
        if text is not None and text.isdecimal():
            numbers[name] = int(text)
        elif text is not None or name in ("RANK", "WORLD_SIZE"):
            problems.append(f"{name} {'is not set' if text is None else repr(text)}: must be a whole number")
    for name, (least, below) in limits.items():
        most = numbers.get(below, 1 << 16) - 1
        if name in numbers and not least <= numbers[name] <= most:
            problems.append(
                f"{name} {numbers[name]}: must be {least} to {most}" + (f" (below {below})" if below else "")
            )
    if numbers.get("WORLD_SIZE", 1) > 1:
        problems += [f"{name} is not set" for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if not problems and numbers["RANK"] == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", numbers.get("MASTER_PORT", 0)))
            except OSError as error:
                problems.append(f"MASTER_PORT {numbers['MASTER_PORT']}: {error.strerror}; name a free one")
    remedy = "torchrun and srun set these variables; unset them to train in one process"
    return [f"{problem} ({remedy})" for problem in problems]


def find_problems(
    args: argparse.Namespace, world_size: int, local_world_size: int | None = None, paths: bool = True
) -> list[str]:
    """Everything that is wrong with a configuration, before anything loads.

    :param world_size: Ranks of the run.
    :param local_world_size: Ranks of a node; default: there is but one.
    :param paths: Also look at folders and files, which a plan does not need.
    :return: One entry a problem, with values and a remedy; empty if all is well.
    """
    problems = _batch_problems(args, world_size, local_world_size or world_size)
    if paths:
        problems += _package_problems(args)
    problems += _range_problems(args) + _method_problems(args)
    return problems + (_path_problems(args) if paths else [])


def _package_problems(args: argparse.Namespace) -> list[str]:
    """Packages that are missing: those that every run needs, and those that some flags need."""
    always = ("torch", "transformers", "accelerate", "datasets", "math_verify", "soundfile")
    problems = not_installed(*always, *([] if args.fsdp else ["deepspeed"]))
    for used, flag, package in (
        (args.engine_type == "vllm", "--engine_type vllm", "vllm"),
        (args.lora_rank > 0, f"--lora_rank {args.lora_rank}", "peft"),
        (args.load_in_4bit, "--load_in_4bit", "bitsandbytes"),
        (args.flash_attn, "--flash_attn", "flash_attn"),
        (args.use_wandb, "--use_wandb", "wandb"),
        (args.use_tensorboard, f"--use_tensorboard {args.use_tensorboard}", "tensorboard"),
    ):
        problems += lacks(package, flag) if used else []
    return problems


RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (  # flags that are not given fit
    (
        "1 or more",
        lambda value: value >= 1,
        "max_samples lora_alpha max_eval_samples dynamic_sampling_rounds generate_max_len prompt_max_len plan_gpus "
        "num_trajectories_to_save max_ckpt_num num_episodes max_steps max_epochs limit_mm_image_per_prompt",
    ),
    (
        "above 0",
        lambda value: 0 < value < math.inf,
        "eps_clip eps_clip_high sft_learning_rate kl_target actor_learning_rate plan_gpu_gib plan_clip_seconds",
    ),
    (
        "0 or more",
        lambda value: 0 <= value < math.inf,
        "rollout_correction_floor overlong_buffer_penalty_factor init_kl_coef l2 audio_cache_mib",
    ),
    ("0 (none) or more", lambda value: value >= 0, "lora_rank sft_steps"),
    ("0 (no clipping) or more", lambda value: 0 <= value < math.inf, "max_norm"),
    ("0 (never) or more", lambda value: value >= 0, "wandb_table_steps"),
    ("0 to 1", lambda value: 0 <= value <= 1, "audio_token_weights"),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "max_silent_pass_rate"),
    ("in (0, 1]", lambda value: 0 < value <= 1, "top_p gamma"),
    ("in [0, 1)", lambda value: 0 <= value < 1, "lr_warmup_ratio"),
    ("between 0 and 1", lambda value: 0 < value < 1, "engine_mem_util"),
    ("above 0 and at most 2 (vLLM's limit)", lambda value: 0 < value <= 2, "temperature"),
    ("-1 (all tokens) or 1 and more", lambda value: value == -1 or value >= 1, "top_k"),
    ("above 0.02", lambda value: 0.02 < value < math.inf, "audio_seconds"),
    ("finite", lambda values: all(map(math.isfinite, values)), "reward_weights"),
    ("two numbers in [0, 1)", lambda values: all(0 <= beta < 1 for beta in values), "adam_betas"),
    ("two numbers, the first one smaller", lambda values: 0 <= values[0] < values[1], "reward_words"),
    (
        "two numbers from 0 to 1, the first one not larger, such as 0.1 0.9",
        lambda values: 0 <= values[0] <= values[1] <= 1,
        "pass_rate",
    ),
)


def _range_problems(args: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name} {getattr(args, name)}: must be {rule}"
        for rule, fits, names in RANGES
        for name in names.split()
        if getattr(args, name) is not None and not fits(getattr(args, name))
    ]
    if not args.rollout_correction_floor < args.rollout_correction_limit < math.inf:
        problems.append(
            f"--rollout_correction_limit {args.rollout_correction_limit}: must be above --rollout_correction_floor"
        )
    return problems


# What contradicts what: the condition, and its message, which is formatted with the flags' values.
METHOD_RULES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda a: a.advantage_estimator in REFUSED_ESTIMATORS,
        "--advantage_estimator {advantage_estimator} {refused}; "
        "use group_norm (GRPO), dr_grpo, rloo, reinforce_baseline, reinforce or reinforce++",
    ),
    (
        lambda a: a.advantage_estimator in GROUP_METHODS and a.n_samples_per_prompt < 2,
        "--advantage_estimator {advantage_estimator} compares the responses of a group: "
        "--n_samples_per_prompt {n_samples_per_prompt} must be 2 or more",
    ),
    (
        lambda a: any(part not in MEASURED and not all(part.partition(":")) for part in a.parts),
        f"--reward {{reward}}: must be one of {', '.join(REWARDS)}, or module:function, or a sum (a+b) of these "
        f"and of {', '.join(REWARD_PARTS)}",
    ),
    (lambda a: len(a.reward_parts) < len(a.parts), "--reward {reward}: two parts have the same name"),
    (
        lambda a: (
            (len(a.parts) > 1 or a.reward_weights is not None)
            and any(":" in part and part.rpartition(":")[2] in (*MEASURED, "rule") for part in a.parts)
        ),
        "--reward {reward}: a function has the name of a part that is measured anyway; rename it",
    ),
    (
        lambda a: a.reward_weights is not None and len(a.reward_weights) != len(a.parts),
        "--reward_weights: {weight_count} weights for the {part_count} parts of --reward {reward} ({part_names})",
    ),
    (
        lambda a: a.advantage_estimator == "gdpo" and len(a.parts) < 2,
        "--advantage_estimator gdpo with --reward {reward}: it normalises each of several rewards by itself; "
        "give a sum, such as accuracy+format",
    ),
    (
        lambda a: "audio_gain" in a.parts and not {"accuracy", *REWARDS} & set(a.parts),
        "--reward {reward}: audio_gain is paid to right answers only, and no part of the sum pays for these; "
        "add accuracy, such as accuracy+format+audio_gain",
    ),
    (
        lambda a: a.use_gspo and a.audio_token_weights > 0,
        "--audio_token_weights {audio_token_weights} with --use_gspo: all tokens of a response have one "
        "ratio there, so weights with the mean 1 change nothing; drop one",
    ),
    (
        lambda a: "majority" in a.parts and a.n_samples_per_prompt < 2,
        "--reward majority: a group of one response has no majority; --n_samples_per_prompt 2 or more",
    ),
    (
        lambda a: a.lora_rank > 0 and a.freeze_prefix,
        "--freeze_prefix with --lora_rank: adapters freeze all else anyway; choose --target_modules",
    ),
    (lambda a: a.flash_attn and not a.bf16, "--flash_attn: its kernels do not take float32; add --bf16"),
    (
        lambda a: a.overlong_buffer and not 1 <= a.overlong_buffer_len <= a.generate_max_len,
        "--overlong_buffer_len {overlong_buffer_len}: must be 1 to --generate_max_len {generate_max_len}",
    ),
    (
        lambda a: a.dynamic_sampling and a.n_samples_per_prompt < 2,
        "--dynamic_sampling: a group of one response is always alike; --n_samples_per_prompt 2 or more",
    ),
    (
        lambda a: a.dynamic_sampling and (a.easy_first or a.prompt_data_probs_end is not None),
        "--dynamic_sampling with --easy_first or --prompt_data_probs_end: replacements are drawn from all rows, "
        "also those whose turn has not come yet; use one of the two",
    ),
    (
        lambda a: (a.top_p < 1 or a.top_k > 0) and (a.on_anomaly != "warn" or a.rollout_correction != "none"),
        "--top_p or --top_k with --on_anomaly stop or skip, or with --rollout_correction: the engine's log-probs "
        "are those of the cut distribution, whose distance to the trainer's would count as an error; drop one",
    ),
    (
        lambda a: a.use_gspo and a.loss_agg_mode != "seq-mean-token-mean",
        "--use_gspo with --loss_agg_mode {loss_agg_mode}: GSPO weighs all responses alike, this by their "
        "length; use seq-mean-token-mean",
    ),
    (
        lambda a: a.use_cispo and a.eps_clip_high is None,
        "--use_cispo: its weight is at most 1 + --eps_clip_high, which is not given; 4 to 8 were good choices in "
        "Khatri et al., ScaleRL (2025)",
    ),
    (lambda a: a.use_cispo and a.use_gspo, "--use_cispo with --use_gspo: two losses; drop one"),
    (
        lambda a: getattr(a, "quiet", False) and a.verbose,  # --quiet is a flag of the runtime only
        "--quiet with --verbose: drop one of the two",
    ),
    (
        lambda a: a.kl_target is not None and a.init_kl_coef == 0,
        "--kl_target {kl_target} needs a start value: set --init_kl_coef above 0",
    ),
    (
        lambda a: a.init_kl_coef > 0 and a.use_kl_loss and a.kl_estimator == "k1",
        "--kl_estimator k1 as a loss: its gradient does not depend on the reference model; use k3 or k2, or put "
        "the KL into the reward with --no-use_kl_loss",
    ),
    (
        lambda a: a.init_kl_coef > 0 and not a.use_kl_loss and a.kl_estimator != "k1",
        "--no-use_kl_loss with --kl_estimator {kl_estimator}: in the reward its gradient cancels to first "
        "order, so it would hardly hold the model back; use --kl_estimator k1, or --use_kl_loss",
    ),
    (
        lambda a: a.advantage_estimator == "reinforce_baseline" and a.gamma != 1,
        "--gamma {gamma} with --advantage_estimator reinforce_baseline: REINFORCE++-baseline does not "
        "discount (LightRFT ignores the flag); drop it",
    ),
    (
        lambda a: a.wandb_table_steps > 0 and not a.use_wandb,
        "--wandb_table_steps {wandb_table_steps} without --use_wandb: add it, or drop this",
    ),
    (
        lambda a: a.engine_type == "hf" and a.engine_tp_size > 1,
        "--engine_type hf has no tensor parallelism: --engine_tp_size {engine_tp_size} must be 1",
    ),
    (
        lambda a: a.adam_offload and a.zero_stage == 0 and not a.fsdp,
        "--adam_offload with --zero_stage 0: DeepSpeed would ignore it; use --zero_stage 2 or 3",
    ),
    (
        lambda a: a.load_in_4bit and a.lora_rank == 0,
        "--load_in_4bit: weights at 4 bits cannot train; add adapters with --lora_rank 16",
    ),
    (lambda a: a.load_in_4bit and a.fsdp, "--load_in_4bit with --fsdp: FSDP2 cannot split packed weights; drop --fsdp"),
    (
        lambda a: a.load_in_4bit and a.zero_stage == 3,
        "--load_in_4bit with --zero_stage 3: ZeRO-3 cannot split packed weights; use --zero_stage 2",
    ),
)


def _method_problems(args: argparse.Namespace) -> list[str]:
    """Flags that contradict each other."""
    parts, weights = split_reward(args.reward), args.reward_weights or ()
    values = argparse.Namespace(**vars(args), parts=parts)
    more = {"part_names": ", ".join(parts), "part_count": len(parts), "weight_count": len(weights)}
    more["refused"] = REFUSED_ESTIMATORS.get(args.advantage_estimator)
    return [message.format(**vars(args), **more) for is_wrong, message in METHOD_RULES if is_wrong(values)]


def find_warnings(args: argparse.Namespace) -> list[str]:
    """What is allowed, but is not the method that its flag is named after; one entry a difference, with the remedy."""
    warnings = []
    constant = "seq-mean-token-sum-norm"
    if args.advantage_estimator == "dr_grpo" and args.loss_agg_mode != constant:
        warnings.append(
            f"--advantage_estimator dr_grpo with --loss_agg_mode {args.loss_agg_mode}: Dr. GRPO divides the sum over "
            f"a response's tokens by a constant, so that long wrong answers do not weigh less; use {constant}"
        )
    if args.use_gspo and args.eps_clip > 0.01:
        warnings.append(
            f"--use_gspo with --eps_clip {args.eps_clip}: the ratio of a response hardly leaves 1 so far; GSPO's paper "
            "has --eps_clip 3e-4 --eps_clip_high 4e-4"
        )
    one_step = args.train_batch_size >= args.rollout_batch_size * args.n_samples_per_prompt and args.max_epochs == 1
    if args.use_cispo and one_step:
        warnings.append(
            "--use_cispo with one optimizer step a rollout: every ratio is 1, so its gradient is GRPO's; it differs "
            "with a smaller --train_batch_size, or with --max_epochs"
        )
    if args.rollout_correction == "geo" and args.rollout_correction_limit > 1.1:
        warnings.append(
            f"--rollout_correction geo with --rollout_correction_limit {args.rollout_correction_limit}: the mean over "
            "a response's tokens hardly leaves 1 so far; try --rollout_correction_floor 0.999 "
            "--rollout_correction_limit 1.001"
        )
    if args.flash_attn and args.n_samples_per_prompt > 1:
        warnings.append(
            "--flash_attn: its kernels take no mask for responses that share a prompt, so each computes its own; "
            "without the flag a group computes it once, which is faster and smaller"
        )
    return warnings


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
    if train < responses and (responses % train or train % (micro * world)):
        whole = micro * world if share % micro == 0 else responses  # the smallest optimizer step
        fitting = max((d for d in range(whole, train + 1, whole) if responses % d == 0), default=whole)
        problems.append(
            f"--train_batch_size {train}: an optimizer step must be a whole part of the {responses} responses of a "
            f"rollout ({rollout} prompts x {n} samples), in micro-batches of {micro} on each of {world} ranks; "
            f"use --train_batch_size {fitting}"
        )
    elif train > responses and train % responses:
        problems.append(
            f"--train_batch_size {train} is no multiple of --rollout_batch_size x --n_samples_per_prompt "
            f"= {rollout} x {n} = {responses}: an optimizer step would end inside a rollout; "
            f"use --train_batch_size {_up(train, responses)}"
        )
    if args.max_epochs > 1 and train > responses:
        problems.append(
            f"--max_epochs {args.max_epochs} repeats each rollout batch, so an optimizer step must not span several: "
            f"use --train_batch_size {responses}"
        )
    if args.loss_agg_mode == "token-mean" and train > responses:
        problems.append(
            f"--loss_agg_mode token-mean with --train_batch_size {train}: an optimizer step would span several "
            f"rollouts of {responses} responses, whose tokens are not known when the first one is trained on; use "
            f"--loss_agg_mode seq-mean-token-sum-norm, or use --train_batch_size {responses}"
        )
    return problems


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _path_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    if not args.pretrain:
        problems.append(f"--pretrain is missing: the folder of a {MODELS} (demo/run_demo.py builds a tiny one)")
    elif Path(args.pretrain).is_dir():
        if not (Path(args.pretrain) / "config.json").is_file():
            problems.append(f"--pretrain {args.pretrain}: holds no config.json; is it a model folder?")
        elif not any((Path(args.pretrain) / name).is_file() for name in PROCESSOR_FILES):
            problems.append(f"--pretrain {args.pretrain}: holds no processor ({' or '.join(PROCESSOR_FILES)})")
        elif lacking := missing_tokenizer(Path(args.pretrain)):
            problems.append(f"--pretrain {args.pretrain}: holds no {lacking[0]}")
        elif not has_weights(Path(args.pretrain)):
            problems.append(f"--pretrain {args.pretrain}: holds no weights (*.safetensors)")
        kind = model_type_of(args.pretrain)
        if kind is not None and kind not in BY_TYPE:
            problems.append(f"--pretrain {args.pretrain}: is a {kind} model; known are {KNOWN}")
        elif kind is not None and args.audio_seconds > (most := BY_TYPE[kind].longest_seconds):
            problems.append(f"--audio_seconds {args.audio_seconds:g}: {BY_TYPE[kind].name} takes {most} s at most")
        several = args.engine_type == "vllm" and args.limit_mm_image_per_prompt > 1
        if several and kind in BY_TYPE and BY_TYPE[kind].one_clip_in_vllm:
            problems.append(
                f"--limit_mm_image_per_prompt {args.limit_mm_image_per_prompt}: vLLM takes one clip a prompt for "
                f"{BY_TYPE[kind].name}"
            )
        problems += [
            f"--pretrain {args.pretrain}: the end of {name} is missing; copy it again"
            for name in cut_weights(Path(args.pretrain))
        ]
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
        # a finished run needs no checkpoint: whether there is something left to do is told when the data are loaded
        finished = all((Path(args.save_path) / name).is_file() for name in ("config.json", NOTES_FILE))
        if not finished and not has_checkpoint(args.ckpt_path, args.fsdp):
            problems.append(f"--load_checkpoint: {args.ckpt_path} holds no checkpoint (_actor/latest)")
    return problems


def has_checkpoint(ckpt_path: str, fsdp: bool) -> bool:
    """Whether there is something to resume from, on either host."""
    # LightRFT's FSDP2 strategy writes no latest, and ours may have lost it
    signs = ("latest", "*/manifest.json", *(["*/.metadata"] if fsdp else []))
    return any(next((Path(ckpt_path) / "_actor").glob(sign), None) for sign in signs)


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
    if args.prompt_data_probs_end is not None and args.easy_first:
        problems.append("--prompt_data_probs_end with --easy_first: two orders of the rows; drop one")
    ordered = args.easy_first or args.prompt_data_probs_end is not None
    if ordered and (args.num_episodes != 1 or args.max_steps is not None):
        flag = "--easy_first" if args.easy_first else "--prompt_data_probs_end"
        given = f"--num_episodes {args.num_episodes}" if args.num_episodes != 1 else f"--max_steps {args.max_steps}"
        problems.append(f"{given} with {flag}: the curriculum is one episode; drop it, and set rows by --max_samples")
    return problems


def _evaluation_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    files = args.eval_benchmark.split(",") if args.eval_benchmark else []
    problems += [f"--eval_benchmark {file}: no such file" for file in files if not Path(file).is_file()]
    if len({Path(file).stem.removesuffix("_silent") for file in files}) < len(files):  # _silent: its answers to silence
        name = "one name, less an ending _silent"
        problems.append(f"--eval_benchmark {args.eval_benchmark}: two files have {name}, and the metrics go by it")
    if files:
        folders = (args.eval_audio_dir or "").split(",")
        if len(folders) not in (1, len(files)):
            problems.append(f"--eval_audio_dir {args.eval_audio_dir}: one folder or one for each of {len(files)} files")
        problems += [
            f"--eval_audio_dir {folder or 'is missing: it'}: must be the folder of --eval_benchmark's recordings"
            for folder in folders
            if not folder or not Path(folder).is_dir()
        ]
    problems += [
        f"--{name} without an evaluation: set --eval_steps"
        for name, wanted in (
            ("eval_benchmark", files),
            ("keep_best", args.keep_best is not None),
            ("eval_silent", args.eval_silent),
        )
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


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False
