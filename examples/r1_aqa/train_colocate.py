#!/usr/bin/env python3
"""GRPO for Qwen2-Audio on audio question answering: R1-AQA's recipe on LightRFT.

Rollouts (vLLM) and training (DeepSpeed) share the processes. What differs from textbook GRPO: reward = accuracy +
format, 0 to 2, unweighted; one optimizer step a rollout batch, so the ratio is 1 and the clip never active; KL to the
start model by the k3 estimator, as a loss.

One process:      python examples/r1_aqa/train_colocate.py --pretrain MODEL --prompt_data DATA --use_kl_loss
Will it fit:      python examples/r1_aqa/train_colocate.py --plan --pretrain MODEL ...
Many GPUs:        torchrun --nproc-per-node 8 examples/r1_aqa/train_colocate.py ...
R1-AQA's values:  bash examples/r1_aqa/run_grpo_r1_aqa_qwen2_audio_7b.sh
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from aqa.audio.prefetch import PrefetchLoader
from aqa.hosts.find import describe_host, find_host, on_runtime
from aqa.training import gloo_shutdown
from aqa.training.flags import build_parser, find_problems, finish, has_split, model_type_of, runtime_problems
from aqa.training.run_config import write_config, write_report
from aqa.training.summary import summary

atexit.register(gloo_shutdown.settle)  # handlers run in reverse order: this one after those of all that trains
find_host()
WRONG_USE, CANNOT_SAVE = 2, 5  # exit status
FIXES: list[str] = []  # version fixes in use, LightRFT only
if not on_runtime():
    from aqa.hosts.lightrft import training

    FIXES += training.prepare_import()
from lightrft.utils import add_arguments  # noqa: E402


def train(args: argparse.Namespace) -> None:
    """Train and save, from the flags.

    :param args: Validated flags.
    """
    if not on_runtime():
        training.complete(args)
        FIXES.extend(training.prepare_classes())
    from lightrft.strategy import get_strategy

    strategy = get_strategy(args)  # first of all: the runtime's moves the engines' chatter off the screen

    from audio_dataset import (
        patch_actor_for_audio,
        patch_experience_maker_for_audio,
        patch_strategy_for_audio,
    )
    from reward_models_utils import THINK_LABEL, label_doubts

    from aqa.evaluation.checkpoints import NOTES_FILE
    from aqa.patches.targets import BANNED
    from aqa.policy.forward import parts_of
    from aqa.policy.tower_cache import share_tower_outputs
    from aqa.rewards.named import find_reward
    from aqa.training.freezing import freeze, trainable
    from lightrft.trainer.spmd_ppo_trainer import SPMDPPOTrainerVL
    from lightrft.utils import get_tokenizer_processor_vl

    reward_fn = find_reward(args.reward)
    strategy.print(banner(args, strategy))
    if strategy.is_rank_0():
        problem = write_config(args, build_parser(add_arguments), describe_host(), describe_devices(strategy))
        if problem:
            strategy.print(problem)
    terminal = find_terminal()
    show_status = terminal.status if terminal else lambda text: None

    # ---- models
    show_status("loading the models ...")
    with strategy.init_model_context():
        actor = load_actor(args, None if args.fsdp else strategy.get_ds_train_config(is_actor=True))
        initial_model = None
        if args.init_kl_coef > 0 and args.lora_rank == 0:
            initial_model = load_actor(args, None if args.fsdp else strategy.get_ds_eval_config(offload=False))
    if args.freeze_prefix:
        strategy.print(freeze(actor.model, args.freeze_prefix))
    if args.lora_rank > 0:
        strategy.print(f"LoRA of rank {args.lora_rank}: {trainable(actor.model)}")
    if args.gradient_checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})

    # ---- data
    show_status("checking the data ...")
    tokenizer, processor = get_tokenizer_processor_vl(args.pretrain, actor.model, "left")
    source = (args.prompt_data, args.prompt_split, args.max_samples)
    dataset = load_prompts(args, strategy, tokenizer, processor, *source, training=True)
    per_rank = args.rollout_batch_size // strategy.world_size
    if len(dataset) < args.rollout_batch_size:
        raise SystemExit(f"{len(dataset)} rows are fewer than --rollout_batch_size {args.rollout_batch_size}")
    for doubt in label_doubts(dataset.prompts, dataset.labels):
        strategy.print(f"WARNING: {doubt}")
    shuffle = args.prompt_data_probs_end is None  # else the order is the curriculum
    prompts_dataloader = PrefetchLoader(
        strategy.setup_dataloader(dataset, per_rank, False, shuffle, collate_fn=dataset.collate_fn, drop_last=True)
    )
    asked_to_think = sum(label == THINK_LABEL for label in dataset.labels) / len(dataset)
    at_once = per_rank * args.n_samples_per_prompt if on_runtime() else per_rank  # of one answer each
    eval_dataloader = make_eval_dataloader(args, strategy, tokenizer, processor, at_once)
    evaluators = make_evaluators(args, strategy, processor, asked_to_think == 1)
    choose_metric(args, eval_dataloader, evaluators)

    # ---- optimizer
    rollouts = len(prompts_dataloader) * args.num_episodes
    responses = args.rollout_batch_size * args.n_samples_per_prompt
    max_steps = rollouts * responses * args.max_epochs // args.train_batch_size
    if max_steps == 0:
        raise SystemExit(
            f"{rollouts} rollouts of {responses} responses never fill --train_batch_size {args.train_batch_size}: "
            f"no optimizer step would be made; use --train_batch_size {responses} or more data"
        )
    left_over = rollouts * responses * args.max_epochs % args.train_batch_size
    if left_over:
        strategy.print(f"note: the last {left_over} responses do not fill an optimizer step and are not trained on")
    (actor, actor_optim, actor_scheduler), _, _, initial_model = strategy.prepare_models_and_optimizers(
        actor, None, [], initial_model, args, max_steps
    )
    if args.fsdp and initial_model is not None:
        strategy.offload_model(initial_model)
    consumed_samples = 0
    if args.load_checkpoint:
        folder = os.path.join(args.ckpt_path, "_actor")
        path, states = strategy.load_ckpt(actor.model, folder, optimizer=actor_optim, scheduler=actor_scheduler)
        consumed_samples = states["consumed_samples"]
        strategy.print(f"resumed {path}: {consumed_samples} prompts were already used")

    # ---- rollout engine and audio
    show_status(f"starting {args.engine_type} ...")
    patch_strategy_for_audio(strategy, processor, {NOTES_FILE: json.dumps({"asked_to_think": asked_to_think}) + "\n"})
    strategy.setup_inference_engine(args, engine_type=args.engine_type, actor=actor)
    strategy.report_memory("with models and engine")
    models = [model for model in (actor, initial_model) if model is not None]
    for model in models:
        patch_actor_for_audio(model)
    if on_runtime() and args.zero_stage < 3 and not args.fsdp:
        modules = [strategy.unwrap_model(model.model) for model in models]
        if not any(p.requires_grad for p in parts_of(modules[0]).tower.parameters()):
            share_tower_outputs(*modules)
    if args.lora_rank > 0 and args.init_kl_coef > 0:
        from lightrft.models.lora import WithoutAdapters

        initial_model = WithoutAdapters(actor)
    audio_token_id = tokenizer.convert_tokens_to_ids(processor.audio_token)
    trainer = SPMDPPOTrainerVL(
        strategy,
        actor,
        None,
        [],
        initial_model,
        None,
        actor_optim,
        None,
        actor_scheduler,
        None,
        tokenizer=tokenizer,
        reward_fn=reward_fn,
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
        logit_bias={audio_token_id: BANNED},
        **({} if on_runtime() else training.trainer_arguments(args, processor)),
    )
    patch_experience_maker_for_audio(trainer.experience_maker, processor, tokenizer, args.prompt_max_len)
    if not on_runtime():
        training.patch_trainer(trainer, prompts_dataloader)
    else:
        trainer.evaluators = evaluators
        if args.load_checkpoint:
            trainer.restore(states)

    # ---- train and save
    trainer.fit(
        args,
        prompts_dataloader=prompts_dataloader,
        pretrain_dataloader=None,
        eval_dataloader=eval_dataloader,
        consumed_samples=consumed_samples,
        num_update_steps_per_episodes=max_steps // args.num_episodes,
    )
    strategy.save_model(actor, tokenizer, args.save_path)
    if strategy.is_rank_0():
        say = partial(terminal.print, needed=True) if terminal else strategy.print
        say(summary(args.save_path))
        if args.report:
            say(write_report(Path(args.save_path)))


def find_terminal() -> Any:
    """The runtime's console; None inside LightRFT."""
    if not on_runtime():
        return None
    from lightrft.utils.console import console

    return console


def load_actor(args: argparse.Namespace, ds_config: dict[str, Any] | None) -> Any:
    """Actor or reference model from ``--pretrain``.

    :param args: Flags.
    :param ds_config: DeepSpeed configuration; None under FSDP2.
    :raises SystemExit: if it cannot be loaded.
    """
    if not on_runtime():
        return training.load_actor(args, ds_config)
    from lightrft.models.actor_al import ActorAL

    try:
        return ActorAL(
            args.pretrain,
            use_flash_attention_2=args.flash_attn,
            bf16=args.bf16,
            ds_config=ds_config,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha,
            target_modules=args.target_modules,
            load_in_4bit=args.load_in_4bit,
        )
    except (OSError, ValueError) as error:  # no such model, of another kind, not whole, or not fit for a flag
        raise SystemExit(f"--pretrain {args.pretrain}: {error}") from error


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
    """A split of one or several sources as a checked dataset: the training data mixed, evaluation data one after
    the other.

    :param args: Flags.
    :param strategy: Strategy.
    :param tokenizer: Tokenizer.
    :param processor: Processor.
    :param source: Files or folders.
    :param split: Split.
    :param limit: Most rows.
    :param training: The training data.
    """
    from audio_dataset import AudioPromptDataset
    from datasets import concatenate_datasets

    from aqa.audio.sandbox import Sandbox
    from aqa.data import mixing

    needed = (args.input_key, args.images_key, args.reference_key, args.label_key)
    parts = mixing.read_sources(source, split, strategy, args.seed, needed)
    start, end = shares_of(args.prompt_data_probs), shares_of(args.prompt_data_probs_end)
    if not training:
        rows = concatenate_datasets(parts)
    elif end:
        rows = mixing.mix_drifting(parts, start, end, limit, args.seed)
    else:
        rows = mixing.mix(parts, start, args.seed)
    if limit < len(rows):
        rows = rows.shuffle(seed=args.seed).select(range(limit))
    if len(parts) > 1:
        strategy.print(mixing.describe_mix(rows))
    return AudioPromptDataset(
        rows,
        tokenizer,
        processor,
        args.prompt_max_len,
        strategy,
        sandbox=Sandbox() if args.sandbox_audio else None,
        audio_root=args.confine_audio,
        decode_all=args.decode_audio,
        cache_bytes=args.audio_cache_mib * 2**20,
        tagged=on_runtime(),
    )


def shares_of(text: str | None) -> list[float]:
    """Numbers with commas.

    :param text: A flag's value; None: no numbers.
    """
    return [float(share) for share in text.split(",")] if text else []


def make_eval_dataloader(args: argparse.Namespace, strategy: Any, tokenizer: Any, processor: Any, size: int) -> Any:
    """The evaluation prompts, or None where nothing is to be evaluated.

    :param args: Flags.
    :param strategy: Strategy.
    :param tokenizer: Tokenizer.
    :param processor: Processor.
    :param size: Prompts a batch on this rank.
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
    """What is evaluated on benchmark files.

    :param args: Flags.
    :param strategy: Strategy.
    :param processor: Processor.
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


def choose_metric(args: argparse.Namespace, eval_dataloader: Any, evaluators: list[Any]) -> None:
    """Settle what ``--keep_best`` compares.

    :param args: Flags, changed in place.
    :param eval_dataloader: Prompts that are evaluated, or None.
    :param evaluators: Benchmarks.
    :raises SystemExit: if nothing is evaluated, or not this metric.
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


def describe_devices(strategy: Any) -> str:
    """How many processes, and what each computes on.

    :param strategy: Strategy.
    """
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{strategy.world_size} x {device}"


def banner(args: argparse.Namespace, strategy: Any) -> str:
    """What is about to run.

    :param args: Flags.
    :param strategy: Strategy.
    """
    import deepspeed
    import torch
    import transformers

    responses = args.rollout_batch_size * args.n_samples_per_prompt
    micros = args.train_batch_size // (args.micro_train_batch_size * strategy.world_size)
    sharding = "FSDP2" if args.fsdp else f"ZeRO-{args.zero_stage}"
    return "\n".join(
        (
            f"host      {describe_host()}",
            *([f"fixes     {', '.join(FIXES)}"] if FIXES else []),
            f"versions  torch {torch.__version__}, transformers {transformers.__version__}, "
            f"deepspeed {deepspeed.__version__}",
            f"devices   {describe_devices(strategy)}; {sharding}, {'bf16' if args.bf16 else 'fp32'}; "
            f"engine {args.engine_type}, TP {args.engine_tp_size}",
            f"model     {args.pretrain}",
            f"batch     {args.rollout_batch_size} prompts x {args.n_samples_per_prompt} = {responses} responses "
            "a rollout",
            f"          {args.train_batch_size} responses a step = {strategy.world_size} ranks x {micros} x "
            f"{args.micro_train_batch_size}",
            f"output    {args.save_path}",
        )
    )


def _host_problems(args: argparse.Namespace) -> list[str]:
    if on_runtime():
        return runtime_problems(args)
    problems = training.find_problems(args)
    if args.pretrain and model_type_of(args.pretrain) not in (None, "qwen2_audio"):
        problems.append(f"--pretrain {args.pretrain}: inside LightRFT qwen2_audio alone; unset LIGHTRFT_HOME")
    return problems


def main() -> None:
    """Parse, validate, train."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # the launch script has torchrun ignore it, and so would we
    parser = build_parser(add_arguments)
    args = parser.parse_args()
    finish(args)
    if args.plan:
        from aqa.training import planner

        raise SystemExit(planner.run(args, _host_problems(args)))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problems = find_problems(args, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    problems += _host_problems(args)
    if problems:
        text = "\n  - ".join([f"{len(problems)} problems with this configuration:", *problems])
        if speaks_for_host():
            print(text, file=sys.stderr, flush=True)
        tell_others(SystemExit(text))
        raise SystemExit(WRONG_USE)
    try:
        train(args)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        status = exit_status(error)
        if status is not None:
            report_error(error, args.debug)
        if tell_others(error, may_follow=status is None and isinstance(error, Exception)):
            raise SystemExit(1) from None
        if status is None:
            raise
        raise SystemExit(status) from None
    tell_others()


def speaks_for_host() -> bool:
    """Whether this rank shows what all ranks of its host may have to say: the first that fails, inside LightRFT the
    first of all."""
    peers = find_peers()
    return os.environ.get("LOCAL_RANK", "0") == "0" if peers is None else peers.first_to_speak()


def tell_others(error: BaseException | None = None, may_follow: bool = False) -> bool:
    """Tell the other ranks how this one ends, so that they end, too; LightRFT's would wait for it.

    :param error: What ended it; None if all is well.
    :param may_follow: The error may be what another rank's loss has led to.
    :return: Whether it was, and was named.
    """
    peers = find_peers()
    return peers is not None and peers.leave(error, may_follow)


def find_peers() -> Any:
    """The runtime's module for ranks that end, connected; None if this rank is alone, or inside LightRFT."""
    if not on_runtime() or os.environ.get("WORLD_SIZE", "1") == "1":
        return None

    from lightrft.utils import rank_watch

    rank_watch.join()  # a wrong flag is found before anything else is done
    return rank_watch


def exit_status(error: BaseException) -> int | None:
    """The exit status of an error whose message says all; None for any other, which needs its traceback.

    :param error: What ended the run.
    """
    if isinstance(error, SystemExit):
        return WRONG_USE if isinstance(error.code, str) else None
    from audio_dataset import AudioError, DataError

    if on_runtime():
        from lightrft.strategy.checkpoint import SaveError

        if isinstance(error, SaveError):
            return CANNOT_SAVE
    return WRONG_USE if isinstance(error, (DataError, AudioError)) else None


def report_error(error: BaseException, debug: bool) -> None:
    """Show an error's message on the terminal: once, if all ranks have it, else with the rank that has it.

    :param error: What ended the run.
    :param debug: Show its traceback, too.
    """
    from audio_dataset import AudioError

    rank = int(os.environ.get("RANK", "0"))
    alone = isinstance(error, AudioError)  # a file that could be opened at the start, on the rank that needs it
    if not (alone or speaks_for_host()):
        return
    where = f" (rank {rank})" if alone and int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    terminal = find_terminal()
    stream = terminal.stream if terminal and terminal.log_file else sys.stderr  # there stderr goes to the log file
    if terminal:
        terminal.status("")
    if debug:
        traceback.print_exception(error, file=stream)
    print(f"train_colocate.py: error{where}: {error}", file=stream, flush=True)


if __name__ == "__main__":
    main()
