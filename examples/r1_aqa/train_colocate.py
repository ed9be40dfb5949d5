#!/usr/bin/env python3
"""GRPO for Qwen2-Audio on audio question answering: R1-AQA's recipe on LightRFT.

Rollouts (vLLM) and training (DeepSpeed) share the processes. Three things differ from textbook GRPO: the reward is the
unweighted sum of accuracy and format, 0 to 2; each rollout batch gets one optimizer step, so the ratio is 1 and the
clip never active; the KL to the start model, by the k3 estimator, is a term of the loss.

One process:      python examples/r1_aqa/train_colocate.py --pretrain MODEL --prompt_data DATA
Memory needed:    python examples/r1_aqa/train_colocate.py --plan --pretrain MODEL ...
Many GPUs:        torchrun --nproc-per-node 8 examples/r1_aqa/train_colocate.py ...
R1-AQA's values:  bash examples/r1_aqa/run_grpo_r1_aqa_qwen2_audio_7b.sh
"""

from __future__ import annotations

import argparse
import atexit
import copy
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aqa.audio.prefetch import PrefetchLoader
from aqa.common import gpu
from aqa.hosts.current import current_host, describe_host
from aqa.hosts.locate import find_host
from aqa.training import gloo_shutdown
from aqa.training.flag_rules import find_problems, find_warnings, has_checkpoint, rank_problems
from aqa.training.flags import build_parser, finish, has_split, split_reward
from aqa.training.length import Length, chance_levels, describe_chance, describe_length, has_ended, plan_length
from aqa.training.run_config import describe_program, write_report
from aqa.training.run_folder import RunFolder, open_run
from aqa.training.summary import next_command, summary

# atexit runs handlers last-registered first, so this one runs last, when all else that uses gloo has ended
atexit.register(gloo_shutdown.settle)
find_host()
HOST = current_host()
HOST.prepare_import()
from lightrft.utils import add_arguments  # noqa: E402

FAILED, WRONG_USE = 1, 2  # exit statuses
NOTHING_LEFT = (
    "nothing left to do: this run has ended, its model is in {0}; to train it further, give more --num_episodes (or "
    "--max_steps) and --allow_changes num_episodes (or max_steps)"
)


def train(args: argparse.Namespace, parser: argparse.ArgumentParser, folder: RunFolder | None) -> None:
    """Train and save, from validated flags.

    :param folder: The run's folder on rank 0, None on other ranks.
    """
    HOST.prepare(args)
    from lightrft.strategy import get_strategy

    # this precedes the other imports, because the runtime redirects what libraries print to its log
    strategy = get_strategy(args)

    from reward_models_utils import find_reward

    reward_fn = find_reward(args.reward, args.reward_weights, words=args.reward_words, group=args.n_samples_per_prompt)
    strategy.print(banner(args, strategy))
    for warning in find_warnings(args):
        strategy.print(f"WARNING: {warning}")

    HOST.status("loading the models ...")
    actor, initial_model = load_models(args, strategy)
    HOST.status("checking the data ...")
    data = load_data(args, strategy, actor)
    length = describe_run(args, strategy, data)
    total = length.steps * args.rollout_batch_size  # prompts
    if args.load_checkpoint and has_ended(on_rank_0(lambda: folder.trained()), total):
        HOST.say(NOTHING_LEFT.format(args.save_path))
        return

    (actor, optimizer, scheduler), _, _, initial_model = strategy.prepare_models_and_optimizers(
        actor, None, [], initial_model, args, length.updates
    )
    if args.fsdp and initial_model is not None:
        strategy.offload_model(initial_model)
    states = resume(args, strategy, actor, optimizer, scheduler) if args.load_checkpoint else None
    done = states["consumed_samples"] if states else 0  # prompts
    has_ended(done, total)
    begin(args, parser, strategy, folder, states, data.prompts.dataset)

    notes = model_notes(folder, data.asked_to_think)
    initial_model = start_engine(args, strategy, data, notes, actor, initial_model)
    trainer = make_trainer(args, strategy, data, reward_fn, actor, initial_model, optimizer, scheduler)
    HOST.complete_trainer(trainer, data.prompts, data.evaluators, states, find_collapsed(data))
    if args.sft_steps:
        warm_start(args, strategy, data, trainer)

    args.num_episodes = length.episodes  # --max_steps may need more, or fewer
    data.prompts.remaining = length.steps - done // args.rollout_batch_size
    trainer.fit(
        args,
        prompts_dataloader=data.prompts,
        pretrain_dataloader=None,
        eval_dataloader=data.evaluation,
        consumed_samples=done,
        num_update_steps_per_episodes=length.updates_an_episode,
    )
    notes |= model_notes(folder, data.asked_to_think, total)
    HOST.status("saving the model ...")
    strategy.save_model(actor, data.tokenizer, args.save_path)
    if folder is not None:
        conclude(args, folder)


def describe_run(args: argparse.Namespace, strategy: Any, data: Data) -> Length:
    """Print how long the run is and what guessing would earn.

    :return: The length.
    """
    length = plan_length(args, len(data.prompts))
    strategy.print("\n".join(describe_length(args, length, len(data.prompts.dataset))))
    held_out = data.evaluation.dataset.prompts if data.evaluation else ()
    strategy.print(describe_chance(data.prompts.dataset.prompts, held_out))
    return length


def begin(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    strategy: Any,
    folder: RunFolder | None,
    states: dict[str, Any] | None,
    dataset: Any,
) -> None:
    """Record in the run's folder that a session begins.

    :param states: Of the checkpoint that is resumed, if there is one.
    :param dataset: Of the training prompts, for the report's levels of chance.
    """
    # LightRFT's checkpoints have no step: it counts prompts
    prompts = states["consumed_samples"] if states else 0
    step = states.get("step", prompts // args.rollout_batch_size) - states.get("sft_step", 0) if states else 0

    def write() -> list[str]:
        about = describe_program(args, parser, describe_host(), describe_devices(strategy))
        return folder.begin(step, about | {"chance": chance_levels(dataset.prompts, dataset.tags)})

    for line in on_rank_0(write):
        strategy.print(line)


def conclude(args: argparse.Namespace, folder: RunFolder) -> None:
    """End the run's session, and print and write what was learned."""
    folder.end()  # before the report, which shows it
    HOST.say(summary(args))
    if args.report:
        HOST.status("writing report.html ...")
        HOST.say(write_report(Path(args.save_path)))
        if command := next_command(args):
            HOST.say(f"next      {command}")


# ------------------------------------------------------------------------------------------------------ models, trainer
def load_models(args: argparse.Namespace, strategy: Any) -> tuple[Any, Any]:
    """Load the actor and the reference model.

    The reference model is None without KL, with LoRA, where the actor without its adapters is the reference, and before
    a warm start, see :func:`warm_start`.

    :raises SystemExit: if ``--pretrain`` cannot be loaded, or has too few positions.
    """
    from aqa.families import family_of
    from aqa.training.freezing import freeze, trainable

    refuse_beyond_positions(args)
    with strategy.init_model_context():
        actor = HOST.load_actor(args, None if args.fsdp else strategy.get_ds_train_config(is_actor=True))
        initial_model = None
        if args.init_kl_coef > 0 and args.lora_rank == 0 and args.sft_steps == 0:
            initial_model = HOST.load_actor(args, None if args.fsdp else strategy.get_ds_eval_config(offload=False))
    if args.freeze_prefix:
        strategy.print(freeze(actor.model, args.freeze_prefix, family_of(actor.model).checkpoint_name))
    if args.lora_rank > 0:
        strategy.print(f"LoRA of rank {args.lora_rank}: {trainable(actor.model)}")
    if args.gradient_checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})
    return actor, initial_model


def refuse_beyond_positions(args: argparse.Namespace) -> None:
    """Refuse lengths beyond the model's positions, where it answers nonsense: transformers does not.

    :raises SystemExit: with the flags to lower.
    """
    from aqa.evaluation.engines import beyond_positions
    from aqa.patches.slots import audio_token_count

    prompt, seconds, response = args.prompt_max_len, args.audio_seconds, args.generate_max_len
    audio = audio_token_count(math.ceil(seconds * 100)) * args.limit_mm_image_per_prompt
    made = f"--prompt_max_len {prompt}, --audio_seconds {seconds:g} and --generate_max_len {response}"
    try:
        problem = beyond_positions(args.pretrain, prompt + audio + response, made, "one of them")
    except (OSError, ValueError) as error:  # no such model, or half of one
        raise SystemExit(f"--pretrain {args.pretrain}: {error}") from error
    if problem:
        raise SystemExit(problem)


def resume(args: argparse.Namespace, strategy: Any, actor: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Load the newest checkpoint; learning rate, weight decay, betas and the weight of the KL stay those of the flags.

    :return: Its state beside the weights; ``consumed_samples`` is the number of prompts already used.
    :raises SystemExit: if there is none, as a finished run may have none.
    """
    if not has_checkpoint(args.ckpt_path, args.fsdp):
        raise SystemExit(
            f"--load_checkpoint: {args.ckpt_path} holds no checkpoint to go on from (--save_steps N writes them); "
            f"--pretrain {args.save_path} with another --save_path trains its model further, as a new run"
        )
    kept = ("initial_lr", "betas", "weight_decay")
    groups = [{name: group[name] for name in kept} for group in scheduler.optimizer.param_groups]
    rates = list(scheduler.base_lrs)
    path, states = strategy.load_ckpt(
        actor.model, os.path.join(args.ckpt_path, "_actor"), optimizer=optimizer, scheduler=scheduler
    )
    # a checkpoint brings back its own; without a change of flags these are the same
    scheduler.base_lrs = rates
    scheduler._last_lr = [b * f(scheduler.last_epoch) for b, f in zip(rates, scheduler.lr_lambdas, strict=True)]
    for group, ours, rate in zip(scheduler.optimizer.param_groups, groups, scheduler._last_lr, strict=True):
        group |= ours | {"lr": rate}
    if args.kl_target is None:
        states["kl_coef"] = args.init_kl_coef
    strategy.print(f"resumed {path}: {states['consumed_samples']} prompts were already used")
    return states


def on_rank_0(action: Callable[[], Any]) -> Any:
    """Do something with the run's files on rank 0. Collective.

    :return: What it returns, on all ranks.
    :raises SystemExit: on all ranks, if it fails.
    """
    import torch.distributed as dist

    answer = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except SystemExit as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise SystemExit(answer[1])
    return answer[0]


def model_notes(folder: RunFolder | None, asked_to_think: float, prompts: int | None = None) -> dict[str, str]:
    """A file for a saved model's folder, which rank 0 writes.

    :param folder: The run's; None on other ranks.
    :param asked_to_think: Share of training prompts that ask for thinking, for eval_mmau.py.
    :param prompts: Prompts that the final model was trained on; the names of other folders tell their step.
    """
    from aqa.evaluation.checkpoints import NOTES_FILE

    note = {"asked_to_think": asked_to_think, "run": folder and folder.run, "prompts": prompts}
    return {NOTES_FILE: json.dumps(note) + "\n"}


def start_engine(
    args: argparse.Namespace, strategy: Any, data: Data, notes: dict[str, str], actor: Any, initial_model: Any
) -> Any:
    """Start the rollout engine, and let it and the models take audio in place of images.

    :param notes: Files for every model's folder.
    :return: The reference model: with LoRA, the actor without its adapters.
    """
    from audio_dataset import patch_actor_for_audio, patch_strategy_for_audio

    HOST.status(f"starting {args.engine_type} ...")
    patch_strategy_for_audio(strategy, data.processor, notes)
    if on_rank_0(lambda: has_room_for_engine_weights(args, strategy)):
        strategy.keep_engine_weights = True
        strategy.print("vLLM's weights stay on the GPU while the policy trains: --plan finds room for them")
    strategy.setup_inference_engine(args, engine_type=args.engine_type, actor=actor)
    strategy.report_memory("with models and engine")
    models = [model for model in (actor, initial_model) if model is not None]
    for model in models:
        patch_actor_for_audio(model)
    HOST.share_tower(args, strategy, models)
    if args.lora_rank > 0 and args.init_kl_coef > 0 and args.sft_steps == 0:
        return HOST.without_adapters(actor)
    return initial_model


def has_room_for_engine_weights(args: argparse.Namespace, strategy: Any) -> bool:
    """Whether the plan has room for vLLM's weights on this rank's GPU while the policy trains."""
    import torch

    from aqa.training.planner import GIB, Plan, SizeError, read_sizes

    if not torch.cuda.is_available():
        return False
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        return Plan(args, read_sizes(args.pretrain), strategy.world_size, memory / GIB).engine_weights_stay
    except SizeError:  # a name on the hub, whose sizes are not known here
        return False


def make_trainer(
    args: argparse.Namespace,
    strategy: Any,
    data: Data,
    reward_fn: Any,
    actor: Any,
    initial_model: Any,
    optimizer: Any,
    scheduler: Any,
) -> Any:
    """LightRFT's trainer. There is no critic and no reward model: advantages come from groups, rewards from rules."""
    from audio_dataset import patch_experience_maker_for_audio

    from aqa.data.prompts import end_tokens
    from aqa.patches.experience_maker import BANNED
    from aqa.rewards.r1_aqa import special_tokens
    from lightrft.trainer.spmd_ppo_trainer import SPMDPPOTrainerVL

    audio_token_id = data.tokenizer.convert_tokens_to_ids(data.processor.audio_token)
    trainer = SPMDPPOTrainerVL(
        strategy=strategy,
        actor=actor,
        critic=None,
        reward_model=[],
        initial_model=initial_model,
        ema_model=None,
        actor_optim=optimizer,
        critic_optim=None,
        actor_scheduler=scheduler,
        critic_scheduler=None,
        tokenizer=data.tokenizer,
        reward_fn=partial(reward_fn, special=special_tokens(data.tokenizer)),
        reward_fn_label_map={},
        max_epochs=args.max_epochs,
        micro_train_batch_size=args.micro_train_batch_size,
        eps_clip=args.eps_clip,
        loss_agg_mode=args.loss_agg_mode,
        init_kl_coef=args.init_kl_coef,
        kl_target=args.kl_target,
        save_hf_ckpt=args.save_hf_ckpt,
        disable_ds_ckpt=args.disable_ds_ckpt,
        max_new_tokens=args.generate_max_len,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        end_token_ids=end_tokens(data.tokenizer, args.pretrain),
        logit_bias={audio_token_id: BANNED},
        **HOST.trainer_arguments(args, data.processor),
    )
    lengths = args.prompt_max_len, args.audio_seconds
    patch_experience_maker_for_audio(trainer.experience_maker, data.processor, data.tokenizer, *lengths)
    return trainer


def warm_start(args: argparse.Namespace, strategy: Any, data: Data, trainer: Any) -> None:
    """Make the supervised steps, and take the model after them as the reference, with LoRA too.

    :raises SystemExit: if that model is gone when GRPO is resumed.
    """
    from audio_dataset import patch_actor_for_audio

    from lightrft.trainer.warm_start import warm_start as supervise

    HOST.status("")
    data.warm_start.remaining = args.sft_steps - trainer.restored_sft
    folder = supervise(trainer, data.warm_start)
    if args.init_kl_coef > 0:
        HOST.status("loading the reference model ...")
        source = {"pretrain": str(folder), "lora_rank": 0, "load_in_4bit": False}
        with strategy.init_model_context():
            ds_config = None if args.fsdp else strategy.get_ds_eval_config(offload=False)
            reference = strategy.prepare_model(HOST.load_actor(argparse.Namespace(**vars(args) | source), ds_config))
        if args.fsdp:
            strategy.offload_model(reference)
        patch_actor_for_audio(reference)
        HOST.share_tower(args, strategy, [trainer.actor, reference])
        trainer.take_reference(reference)
    strategy.update_engine_weights(trainer.actor)  # wakes the engine up, whose memory loading may have taken


# ----------------------------------------------------------------------------------------------------------------- data
@dataclass
class Data:
    """The data that a run trains and is evaluated on.

    :param prompts: This rank's training batches.
    :param evaluation: This rank's batches of evaluation prompts, scored by the reward, if there are any.
    :param evaluators: One for each benchmark file.
    :param asked_to_think: Share of training prompts that ask for the thinking process.
    :param warm_start: This rank's batches of supervised steps, if there are any.
    """

    tokenizer: Any
    processor: Any
    prompts: PrefetchLoader
    evaluation: PrefetchLoader | None
    evaluators: list[Any]
    asked_to_think: float
    warm_start: PrefetchLoader | None


def load_data(args: argparse.Namespace, strategy: Any, actor: Any) -> Data:
    """Read and check all data.

    :raises SystemExit: if there are too few rows, or ``--keep_best`` names a metric that is not evaluated.
    :raises DataError: naming the rows that cannot be trained on.
    """
    from reward_models_utils import THINK_LABEL, label_doubts

    tokenizer, processor = HOST.load_processor(args, actor.model)
    source = (args.prompt_data, args.prompt_split, args.max_samples)
    dataset = load_prompts(args, strategy, tokenizer, processor, *source, training=True)
    if len(dataset) < args.rollout_batch_size:
        raise SystemExit(too_few(args, len(dataset), strategy.world_size))
    for doubt in label_doubts(dataset.prompts, dataset.labels):
        strategy.print(f"WARNING: {doubt}")
    per_rank = args.rollout_batch_size // strategy.world_size
    shuffle = args.prompt_data_probs_end is None and not args.easy_first  # else the rows' order is the curriculum
    loader = strategy.setup_dataloader(dataset, per_rank, False, shuffle, collate_fn=dataset.collate_fn, drop_last=True)
    asked_to_think = sum(label == THINK_LABEL for label in dataset.labels) / len(dataset)
    eval_batch = HOST.eval_batch_size(per_rank, args.n_samples_per_prompt)
    evaluation = make_eval_dataloader(args, strategy, tokenizer, processor, eval_batch)
    evaluators = make_evaluators(args, strategy, processor, asked_to_think == 1)
    choose_metric(args, evaluation, evaluators)
    warm = make_warm_start_dataloader(args, strategy, dataset) if args.sft_steps else None
    return Data(tokenizer, processor, PrefetchLoader(loader), evaluation, evaluators, asked_to_think, warm)


def make_warm_start_dataloader(args: argparse.Namespace, strategy: Any, dataset: Any) -> PrefetchLoader:
    """The training rows again, with a response in place of each reference.

    :raises SystemExit: if there are too few for a step.
    :raises DataError: naming rows that have no response.
    """
    from aqa.training.responses import given_responses

    taught = copy.copy(dataset)
    rows = (dataset.references, dataset.labels, dataset.thinking)
    taught.references = given_responses(*rows, dataset.tokenizer, args.generate_max_len)
    size = strategy.warm_start_prompts
    if len(taught) < size * strategy.world_size:
        raise SystemExit(
            f"--sft_steps: a step takes {size * strategy.world_size} rows, and there are {len(taught)}: a smaller "
            "--train_batch_size, or more rows"
        )
    return PrefetchLoader(strategy.setup_dataloader(taught, size, False, True, collate_fn=taught.collate_fn))


def too_few(args: argparse.Namespace, rows: int, ranks: int) -> str:
    """Why there is no step, and batch sizes that fit the data."""
    prompts, samples = rows // ranks * ranks, args.n_samples_per_prompt
    remedy = "; more rows are needed"
    if prompts:
        remedy = (
            f": add rows, or use --rollout_batch_size {prompts} --train_batch_size {prompts * samples} "
            f"--micro_train_batch_size {samples} --micro_rollout_batch_size {samples}"
        )
    return f"{rows} rows are fewer than --rollout_batch_size {args.rollout_batch_size}{remedy}"


def load_prompts(
    args: argparse.Namespace,
    strategy: Any,
    tokenizer: Any,
    processor: Any,
    source: str,
    split: str,
    limit: int,
    training: bool = False,
) -> Any:
    """Read and check one split of the sources. Training data is mixed, evaluation data is concatenated.

    :param source: Files or folders, separated by commas.
    """
    from audio_dataset import AudioPromptDataset
    from datasets import concatenate_datasets

    from aqa.audio.reader import AudioReader
    from aqa.data import mixing, selection
    from aqa.data.columns import THINKING_COLUMN
    from aqa.training.responses import doubt_long_answers

    needed = [args.input_key, args.images_key, args.reference_key, args.label_key]
    needed += selection.rate_columns(args) if training else []
    parts = mixing.read_sources(source, split, strategy, args.seed, needed)
    if training:
        names = source.split(",")
        parts = [selection.select_rows(*part, args, strategy.print) for part in zip(parts, names, strict=True)]
    start, end = shares_of(args.prompt_data_probs), shares_of(args.prompt_data_probs_end)
    if not training:
        rows = concatenate_datasets(parts)
    elif end:
        rows = mixing.mix_drifting(parts, start, end, limit, args.seed)
    else:
        rows = mixing.mix(parts, start, args.seed)
    if limit < len(rows):
        flag = "max_samples" if training else "max_eval_samples"
        strategy.print(f"note: --{flag} {limit} takes that many of {len(rows):,} rows, drawn by --seed")
        rows = rows.shuffle(seed=args.seed).select(range(limit))
    if len(parts) > 1:
        strategy.print(mixing.describe_mix(rows))
    if training and args.easy_first:
        rows = selection.easy_first(rows, source)
    dataset = AudioPromptDataset(
        rows,
        tokenizer,
        processor,
        args.prompt_max_len,
        strategy,
        reader=AudioReader(args.sandbox_audio, args.confine_audio, args.audio_seconds),
        decode_all=args.decode_audio,
        cache_bytes=args.audio_cache_mib * 2**20,
        tagged=HOST.row_tags,
        thinking=rows[THINKING_COLUMN] if THINKING_COLUMN in rows.column_names else None,
    )
    needs_text = {"accuracy", "r1_aqa"} & set(split_reward(args.reward)) and ":" not in args.reward  # another may not
    doubt = doubt_long_answers(dataset.references, tokenizer, args.generate_max_len, source) if needs_text else None
    if doubt:
        strategy.print(f"WARNING: {doubt}")
    return dataset


def shares_of(text: str | None) -> list[float]:
    """Parse a flag's numbers, separated by commas; None gives no numbers."""
    return [float(share) for share in text.split(",")] if text else []


def make_eval_dataloader(args: argparse.Namespace, strategy: Any, tokenizer: Any, processor: Any, size: int) -> Any:
    """Load the evaluation prompts; None if there are none.

    :param size: Prompts per batch on this rank.
    """
    if args.eval_steps <= 0:
        return None
    source = args.eval_data or args.prompt_data
    if not args.eval_data and not all(has_split(s, args.eval_split) for s in source.split(",")):
        if not args.eval_benchmark:
            strategy.print(
                f"note: no evaluation every {args.eval_steps} steps: {source} has no split {args.eval_split!r} "
                "(avqa.py --val_ratio makes one)"
            )
        return None
    dataset = load_prompts(args, strategy, tokenizer, processor, source, args.eval_split, args.max_eval_samples)
    loader = strategy.setup_dataloader(dataset, size, False, False, collate_fn=dataset.collate_fn, drop_last=False)
    return PrefetchLoader(loader)


def make_evaluators(args: argparse.Namespace, strategy: Any, processor: Any, think: bool) -> list[Any]:
    """Make an evaluator for each file of ``--eval_benchmark``.

    :param think: Whether all training rows ask for the thinking process.
    """
    if not args.eval_benchmark:
        return []
    from aqa.evaluation.while_training import BenchmarkEvaluator

    files, folders = args.eval_benchmark.split(","), args.eval_audio_dir.split(",")
    folders = folders * len(files) if len(folders) == 1 else folders
    asks = think if args.eval_think is None else args.eval_think
    return [
        BenchmarkEvaluator(Path(file), Path(folder), asks, processor, args, strategy)
        for file, folder in zip(files, folders, strict=True)
    ]


def find_collapsed(data: Data) -> Any:
    """What looks for evaluation answers that are all alike; None where there are none, or rows have no tags."""
    if data.evaluation is None or not HOST.row_tags:
        return None
    from aqa.evaluation.while_training import collapsed_rewards
    from aqa.rewards.r1_aqa import special_tokens

    return partial(collapsed_rewards, special=special_tokens(data.tokenizer))


def choose_metric(args: argparse.Namespace, eval_dataloader: Any, evaluators: list[Any]) -> None:
    """Set ``args.keep_best`` to the metric that ``--keep_best`` compares.

    :raises SystemExit: if nothing is evaluated, or this metric is not.
    """
    if args.keep_best is None:
        return
    parquet = ["accuracy_reward", "reward", "format_reward"] if eval_dataloader is not None else []
    known = [evaluator.metric for evaluator in evaluators] + [f"eval/{name}" for name in parquet]
    if not known:
        raise SystemExit("--keep_best: nothing is evaluated; give --eval_benchmark or --eval_data")
    args.keep_best = args.keep_best or known[0]
    if args.keep_best not in known:
        raise SystemExit(f"--keep_best {args.keep_best}: no such metric here; there are {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------- terminal and ends
def describe_devices(strategy: Any) -> str:
    """Number of processes, and the device of each."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{strategy.world_size} x {device}"


def banner(args: argparse.Namespace, strategy: Any) -> str:
    """Describe the run in the first lines of its output."""
    import torch
    import transformers

    responses = args.rollout_batch_size * args.n_samples_per_prompt
    micros = args.train_batch_size // (args.micro_train_batch_size * strategy.world_size)
    cut = args.micro_train_batch_size % args.n_samples_per_prompt > 0
    sharding = "FSDP2" if args.fsdp else f"ZeRO-{args.zero_stage}"
    return "\n".join(
        (
            f"host      {describe_host()}",
            *([f"fixes     {', '.join(HOST.fixes)}"] if HOST.fixes else []),
            f"versions  torch {torch.__version__}, transformers {transformers.__version__}"
            f"{'' if args.fsdp else ', deepspeed ' + version('deepspeed')}",
            f"devices   {describe_devices(strategy)}; {sharding}, {'bf16' if args.bf16 else 'fp32'}; "
            f"engine {args.engine_type}, TP {args.engine_tp_size}",
            f"model     {args.pretrain}",
            f"batch     {args.rollout_batch_size} prompts x {args.n_samples_per_prompt} = {responses} responses "
            "a rollout",
            f"          {args.train_batch_size} responses a step = ranks {strategy.world_size} x micro-batches "
            f"{micros} x {args.micro_train_batch_size}{' (groups are divided: prompts are computed again)' * cut}",
            f"output    {args.save_path}",
        )
    )


def main() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # torchrun ignores it, which its ranks inherit
    parser = build_parser(add_arguments)
    args = parser.parse_args()
    finish(args)
    if args.plan:
        from aqa.training import planner

        raise SystemExit(planner.run(args, HOST.find_problems(args)))
    if problems := rank_problems(os.environ):
        print("\n".join(problems), file=sys.stderr, flush=True)
        raise SystemExit(WRONG_USE)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problems = find_problems(args, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    problems += HOST.find_problems(args)
    problems = problems or gpu.find_problems(
        os.environ, vllm=args.engine_type == "vllm"
    )  # imports torch, so it is last
    if problems:
        text = "\n  ".join(["these settings cannot be used:", *problems])
        if HOST.speaks_for_node():
            print(text, file=sys.stderr, flush=True)
        HOST.leave(SystemExit(text))
        raise SystemExit(WRONG_USE)
    try:
        with open_run(args, parser) as folder:
            train(args, parser, folder)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        status = exit_status(error)
        if status is not None:
            report_error(error, args.debug)
        if HOST.leave(error, may_follow=status is None and isinstance(error, Exception)):
            raise SystemExit(1) from None
        if status is None:
            raise
        raise SystemExit(status) from None
    HOST.leave()


def exit_status(error: BaseException) -> int | None:
    """The exit status of an error whose message is sufficient; None for any other, which needs its traceback."""
    if isinstance(error, SystemExit):
        return WRONG_USE if isinstance(error.code, str) else None
    from audio_dataset import AudioError, DataError
    from reward_models_utils import RewardError

    if isinstance(error, RewardError):
        return FAILED
    return WRONG_USE if isinstance(error, (DataError, AudioError)) else HOST.exit_status(error)


def report_error(error: BaseException, debug: bool) -> None:
    """Print an error: once per node if all ranks have it, otherwise on the rank that has it.

    :param debug: Print the traceback, too.
    """
    alone = False
    if not isinstance(error, SystemExit):  # whose message needs no import of torch
        from audio_dataset import AudioError
        from reward_models_utils import RewardError

        # a file that could be opened at the start fails later, and only on the rank that decodes it
        alone = isinstance(error, (AudioError, RewardError))
    if not (alone or HOST.speaks_for_node()):
        return
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    where = f" (rank {os.environ.get('RANK', '0')})" if alone and several else ""
    stream = HOST.error_stream()
    if debug:
        traceback.print_exception(error, file=stream)
    print(f"train_colocate.py: error{where}: {error}", file=stream, flush=True)


if __name__ == "__main__":
    main()
