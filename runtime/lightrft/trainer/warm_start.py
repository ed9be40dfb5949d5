"""Supervised steps before GRPO: the policy learns given responses to the training prompts.

They use the forward, the optimizer, the checkpoints and the metrics of GRPO. GRPO then begins as a run of its own from
this model would: with fresh moments, its own learning-rate schedule, and this model as the reference, as InstructGPT
and DeepSeekMath do it (Ouyang et al., 2022, section 3.5; Shao et al., 2024, section 4.1).
"""

import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightrft.models.loss import aggregate
from lightrft.strategy.strategy_base import is_usable
from lightrft.trainer.fast_exp_maker import forward, split_tags
from lightrft.trainer.replay_buffer import Experience, make_micro_batch
from lightrft.trainer.spmd_ppo_trainer import SPMDPPOTrainerVL
from lightrft.utils.distributed import reduce_metrics
from lightrft.utils.metrics import MetricsWriter
from lightrft.utils.preemption import stop_request
from lightrft.utils.progress import Progress

FOLDER = "warm_start"  # in the run's folder: the model after the warm start


def warm_start(trainer: SPMDPPOTrainerVL, loader: Any) -> Path:
    """Make the supervised steps that are left, and write the model to :data:`FOLDER`. The rollout engine sleeps.

    Steps count up to -1 in ``metrics.jsonl``: GRPO's begin at 1. Collective.

    :param loader: Prompts with responses in place of references, ``strategy.warm_start_prompts`` a batch.
    :return: The model's folder.
    :raises SystemExit: after a signal, once the run is saved.
    """
    args, strategy, saver = trainer.args, trainer.strategy, trainer.saver
    steps, done = args.sft_steps, trainer.restored_sft
    run = Path(args.save_path)
    strategy.inference_engine.sleep()
    if trainer.restored_step > 0:  # GRPO has begun
        return run / FOLDER
    saver.point = replace(saver.point, sft=done)
    stop_request.install()
    trainer.writers = []  # of metrics.jsonl alone: wandb takes no step below 0
    quiet = Namespace(**vars(args) | {"use_wandb": False, "use_tensorboard": None})
    strategy.together(lambda: trainer.writers.append(MetricsWriter(run, quiet, done - steps - 1)), strategy.is_rank_0())
    trainer.progress = Progress(steps, done, strategy.is_rank_0())
    temperature, bias = trainer.actor.temperature, trainer.actor.logit_bias
    trainer.actor.temperature, trainer.actor.logit_bias = 1.0, {}  # the likelihood is the model's, not the sampling's
    try:
        with trainer.saving_what_is_done():
            batches = trainer.batches(loader, done, math.ceil(steps / len(loader)))
            for step, (batch, waited) in zip(range(done + 1, steps + 1), batches, strict=False):
                metrics = supervised_step(trainer, batch, step, waited)
                saver.point = replace(saver.point, sft=step)
                saver.whole = True
                for writer in trainer.writers:
                    writer.write(step - steps - 1, metrics)
                    trainer.progress.step(
                        f"warm start {step:>{len(str(steps))}}/{steps}  sft loss {metrics['train/sft_loss']:.4f}  "
                        f"{metrics['time/step']:.1f} s"
                    )
                if args.save_steps > 0 and step % args.save_steps == 0:
                    saver.save()
                stop_request.check(strategy.device)
    finally:
        trainer.actor.temperature, trainer.actor.logit_bias = temperature, bias
    forget_moments(trainer.actor.model)
    saver.save_folder(run / FOLDER)
    return run / FOLDER


def supervised_step(trainer: SPMDPPOTrainerVL, batch: Sequence[Any], step: int, waited: float) -> dict[str, float]:
    """Cross-entropy of the responses' tokens, averaged over all tokens of the step, and one optimizer step.

    :param batch: Prompts, image-slot contents, responses, labels, and tags where rows have some.
    :return: Metrics, the same on every rank.
    :raises FloatingPointError: if the loss or its gradient is not finite.
    """
    started = time.perf_counter()
    strategy, model, device = trainer.strategy, trainer.actor.model, trainer.strategy.device
    items = supervised_items(trainer, split_tags(batch)[0])
    rate = trainer.scheduler.get_last_lr()[0]
    sums = {"loss": 0.0, "tokens": float(sum(len(item.response_ids) for item in items))}
    tokens = {"all": sums["tokens"]}
    reduce_metrics(tokens, {}, device)
    tokens_per_micro_batch = tokens["all"] / (strategy.accumulation * strategy.world_size)
    size = len(items) // strategy.accumulation
    trainer.actor.train()
    trainer.saver.whole = False  # until the step is done
    norm = math.nan
    for start in range(0, len(items), size):
        part = make_micro_batch(items[start : start + size], trainer.tokenizer.pad_token_id, device)
        losses = -forward(trainer.actor, part)  # (batch, length)
        loss = aggregate(losses, part.response_mask, "token-mean", tokens_per_micro_batch)
        due = model.is_gradient_accumulation_boundary()
        model.backward(loss)
        sums["loss"] += float((losses.detach() * part.response_mask).sum())
        if due:
            norm = trainer.guard.step(discard=False)
        else:
            model.step()
    maxima = {"time/step": waited + time.perf_counter() - started, "train/grad_norm": norm}
    reduce_metrics(sums, maxima, device)
    if not (math.isfinite(sums["loss"]) and is_usable(norm)):
        raise FloatingPointError(f"step {step} of the warm start: loss {sums['loss']} or its gradient is not finite")
    return {"train/sft_loss": sums["loss"] / sums["tokens"], "train/lr": rate, **maxima}


def supervised_items(trainer: SPMDPPOTrainerVL, prompts: Sequence[Any]) -> list[Experience]:
    """A batch's prompts with their given responses.

    :param prompts: Prompts, image-slot contents, responses, labels.
    """
    texts, images, responses, labels = prompts
    data, _, clips = trainer.experience_maker.read_prompts(texts, images, responses)
    ids = trainer.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    return [
        Experience(
            prompt=text,
            prompt_ids=torch.tensor(prompt_ids, dtype=torch.long),
            response_ids=torch.tensor(response_ids, dtype=torch.long),
            engine_log_probs=torch.zeros(len(response_ids)),
            truncated=False,
            clips=mine,
            reference="",
            label=label,
        )
        for text, prompt_ids, response_ids, mine, label in zip(
            texts, data["all_prompt_token_ids"], ids, clips, labels, strict=True
        )
    ]


def forget_moments(engine: Any) -> None:
    """Set an optimizer's moments and its count of steps back to those of a new one.

    :param engine: DeepSpeed's, whose optimizer may wrap the one with the moments, or FSDP2's.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            else:
                state[name] = type(value)()
