#!/usr/bin/env python3
"""GRPO for Qwen2-Audio on audio question answering: R1-AQA's recipe on LightRFT.

Rollouts (vLLM) and training (DeepSpeed) share the processes. What differs from textbook GRPO: reward = accuracy +
format, 0 to 2, unweighted; one optimizer step a rollout batch, so the ratio is 1 and the clip never active; KL to the
start model by the k3 estimator, as a loss.

One process:      python examples/r1_aqa/train_colocate.py --pretrain MODEL --prompt_data DATA --use_kl_loss
Many GPUs:        torchrun --nproc-per-node 8 examples/r1_aqa/train_colocate.py ...
R1-AQA's values:  bash examples/r1_aqa/run_grpo_r1_aqa_qwen2_audio_7b.sh
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
if "LIGHTRFT_HOME" in os.environ:
    sys.path.insert(0, os.environ["LIGHTRFT_HOME"])
else:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "runtime"))

from host import check_host, check_trainable, describe_host
from train_args import build_parser, find_problems, finish, has_split

check_host()
check_trainable()
from lightrft.utils import add_arguments  # noqa: E402


def train(args: argparse.Namespace) -> None:
    """Train and save, from the flags.

    :param args: Validated flags.
    """
    from lightrft.strategy import get_strategy

    strategy = get_strategy(args)  # first of all: it moves the engines' chatter off the screen

    from audio_dataset import (
        patch_actor_for_audio,
        patch_experience_maker_for_audio,
        patch_strategy_for_audio,
    )
    from reward_models_utils import reward_fn

    from lightrft.models.actor_al import ActorAL
    from lightrft.trainer.spmd_ppo_trainer import SPMDPPOTrainerVL
    from lightrft.utils import get_tokenizer_processor_vl

    strategy.print(banner(args, strategy))

    # ---- models
    with strategy.init_model_context(meta_init=False):
        actor = ActorAL(
            args.pretrain,
            use_flash_attention_2=args.flash_attn,
            bf16=args.bf16,
            ds_config=strategy.get_ds_train_config(is_actor=True),
        )
        initial_model = None
        if args.init_kl_coef > 0:
            initial_model = ActorAL(
                args.pretrain,
                use_flash_attention_2=args.flash_attn,
                bf16=args.bf16,
                ds_config=strategy.get_ds_eval_config(offload=False),
            )
    if args.freeze_prefix:
        strategy.print(freeze(actor.model, args.freeze_prefix))
    if args.gradient_checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})

    # ---- data
    tokenizer, processor = get_tokenizer_processor_vl(args.pretrain, actor.model, "left")
    dataset = load_prompts(args, strategy, tokenizer, processor, args.prompt_data, args.prompt_split, args.max_samples)
    per_rank = args.rollout_batch_size // strategy.world_size
    if len(dataset) < args.rollout_batch_size:
        raise SystemExit(f"{len(dataset)} rows are fewer than --rollout_batch_size {args.rollout_batch_size}")
    prompts_dataloader = strategy.setup_dataloader(
        dataset, per_rank, False, True, collate_fn=dataset.collate_fn, drop_last=True
    )
    eval_dataloader = make_eval_dataloader(args, strategy, tokenizer, processor, per_rank)

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
    consumed_samples = 0
    if args.load_checkpoint:
        path, states = strategy.load_ckpt(actor.model, os.path.join(args.ckpt_path, "_actor"))
        consumed_samples = states["consumed_samples"]
        strategy.print(f"resumed {path}: {consumed_samples} prompts were already used")

    # ---- rollout engine and audio
    strategy.setup_inference_engine(args, engine_type=args.engine_type, actor=actor)
    strategy.report_memory("with models and engine")
    patch_strategy_for_audio(strategy, processor)
    for model in filter(None, (actor, initial_model)):
        patch_actor_for_audio(model)
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
        logit_bias={audio_token_id: -100.0},  # a sampled placeholder would stand for audio that is not there
    )
    patch_experience_maker_for_audio(trainer.experience_maker, processor, tokenizer, args.prompt_max_len)

    # ---- train and save
    metrics = trainer.fit(
        args,
        prompts_dataloader=prompts_dataloader,
        pretrain_dataloader=None,
        eval_dataloader=eval_dataloader,
        consumed_samples=consumed_samples,
        num_update_steps_per_episodes=max_steps // args.num_episodes,
    )
    strategy.save_model(actor, tokenizer, args.save_path)
    strategy.print(summary(args, metrics))


def load_prompts(
    args: argparse.Namespace, strategy: Any, tokenizer: Any, processor: Any, source: str, split: str, limit: int
) -> Any:
    """A split as a checked dataset.

    :param args: Flags.
    :param strategy: Strategy.
    :param tokenizer: Tokenizer.
    :param processor: Processor.
    :param source: Files or folders.
    :param split: Split.
    :param limit: Most rows.
    """
    from audio_dataset import AudioPromptDataset

    from lightrft.utils import blending_datasets

    probs = args.prompt_data_probs if source == args.prompt_data else ",".join("1.0" for _ in source.split(","))
    rows = blending_datasets(source, probs, strategy, args.seed, return_eval=False, train_split=split)
    if limit < len(rows):
        rows = rows.shuffle(seed=args.seed).select(range(limit))
    return AudioPromptDataset(rows, tokenizer, processor, args.prompt_max_len, strategy)


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
        strategy.print(
            f"note: no evaluation every {args.eval_steps} steps: {source} has no split {args.eval_split!r} "
            "(avqa.py --val_ratio makes one)"
        )
        return None
    dataset = load_prompts(args, strategy, tokenizer, processor, source, args.eval_split, args.max_eval_samples)
    return strategy.setup_dataloader(dataset, size, False, False, collate_fn=dataset.collate_fn, drop_last=False)


def freeze(model: Any, parts: list[str]) -> str:
    """Stop training some parts of the model.

    :param model: Qwen2-Audio.
    :param parts: Names of sub-modules.
    :return: What was frozen.
    :raises ValueError: if a part has no parameter, which would leave it training silently.
    """
    counts = []
    for part in parts:
        parameters = [p for name, p in model.named_parameters() if part in name.split(".")]
        if not parameters:
            raise ValueError(f"--freeze_prefix {part}: the model has no parameter below a module of that name")
        for parameter in parameters:
            parameter.requires_grad_(False)
        counts.append(f"{part} ({len(parameters)} tensors)")
    return "frozen: " + ", ".join(counts)


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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return "\n".join(
        (
            f"host      {describe_host()}",
            f"versions  torch {torch.__version__}, transformers {transformers.__version__}, "
            f"deepspeed {deepspeed.__version__}",
            f"devices   {strategy.world_size} x {device}; ZeRO-{args.zero_stage}, {'bf16' if args.bf16 else 'fp32'}; "
            f"engine {args.engine_type}, TP {args.engine_tp_size}",
            f"model     {args.pretrain}",
            f"batch     {args.rollout_batch_size} prompts x {args.n_samples_per_prompt} = {responses} responses a "
            f"rollout; {args.train_batch_size} a step = {strategy.world_size} ranks x {micros} x "
            f"{args.micro_train_batch_size}",
            f"output    {args.save_path}",
        )
    )


def summary(args: argparse.Namespace, metrics: dict[str, float]) -> str:
    """What came out.

    :param args: Flags.
    :param metrics: Of the last step; empty if a resumed run had nothing left to do.
    """
    last = ""
    if metrics:
        last = (
            f"last step: reward {metrics['rollout/reward']:.3f}, accuracy {metrics['rollout/accuracy_reward']:.3f}, "
            f"format {metrics['rollout/format_reward']:.3f}\n"
        )
    return f"{last}model     {args.save_path}\nmetrics   {Path(args.save_path) / 'metrics.jsonl'}"


def main() -> None:
    """Parse, validate, train."""
    parser = build_parser(add_arguments)
    args = parser.parse_args()
    finish(args)
    problems = find_problems(args, int(os.environ.get("WORLD_SIZE", "1")))
    if problems:
        if os.environ.get("RANK", "0") == "0":
            print(f"{len(problems)} problems with this configuration:", *problems, sep="\n  - ", file=sys.stderr)
        raise SystemExit(2)
    train(args)


if __name__ == "__main__":
    main()
