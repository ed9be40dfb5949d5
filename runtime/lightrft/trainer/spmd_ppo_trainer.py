"""The GRPO loop.

What differs from the textbook: a rollout batch is trained on in one optimizer step (or takes part in one, where
``train_batch_size`` spans several rollouts), so the sampling policy *is* the trained one and old log-probs need no
pass of their own unless ``max_epochs > 1`` or KL is part of the reward. The trainer's log-probs are compared with the
engine's in every step, and the difference is a metric.
"""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightrft.engines.base import Sampling, stable_seed
from lightrft.models.loss import aggregate, kl_tokens, policy_loss_tokens, rollout_weights
from lightrft.strategy import checkpoint
from lightrft.strategy.checkpoint import SaveError
from lightrft.strategy.strategy_base import is_usable
from lightrft.utils.console import console
from lightrft.utils.distributed import gather_objects, reduce_by_name, reduce_metrics
from lightrft.utils.metrics import MetricsWriter
from lightrft.utils.preemption import StopError, stop_request
from lightrft.utils.progress import Progress, step_lines

from . import trajectories
from .advantages import KLController
from .evaluation import BestModel, Evaluation, Evaluator, rollout_sums, tag_metrics, tag_sums
from .fast_exp_maker import FastExperienceMaker, forward, split_tags
from .health import AnomalyError, Health
from .replay_buffer import Experience, make_micro_batch, pad_tokens

ANOMALY_EXIT = 4  # exit status after --on_anomaly stop
MEMORY_STEPS = 50  # between two returns of freed memory


class SPMDPPOTrainerVL:
    """Trains an actor with group-relative policy optimization.

    :param strategy: Strategy with a running engine.
    :param actor: Prepared policy.
    :param critic: None.
    :param reward_models: Empty: rewards are rules.
    :param initial_model: Prepared reference model, or None.
    :param ema_model: None.
    :param actor_optim: Its optimizer (DeepSpeed steps it).
    :param critic_optim: None.
    :param actor_scheduler: Learning-rate schedule (DeepSpeed steps it).
    :param critic_scheduler: None.
    :param tokenizer: Tokenizer.
    :param reward_fn: ``(model_reward_list, labels, queries, refs, label_map) -> (rewards, metrics)``.
    :param reward_fn_label_map: Handed to it.
    :param max_epochs: Passes over each rollout batch.
    :param micro_train_batch_size: Responses in one forward and backward.
    :param eps_clip: PPO's clip range.
    :param loss_agg_mode: See :func:`lightrft.models.loss.aggregate`.
    :param init_kl_coef: Weight of the KL.
    :param kl_target: Adapt the weight to this KL; None keeps it.
    :param save_hf_ckpt: Also write Hugging Face folders at ``save_steps``.
    :param disable_ds_ckpt: Write no DeepSpeed checkpoints.
    :param max_new_tokens: Longest response.
    :param temperature: Sampling temperature.
    :param top_p: Nucleus mass.
    :param logit_bias: Bias on token ids at sampling.
    """

    def __init__(
        self,
        strategy: Any,
        actor: Any,
        critic: None,
        reward_models: list[Any],
        initial_model: Any,
        ema_model: None,
        actor_optim: Any,
        critic_optim: None,
        actor_scheduler: Any,
        critic_scheduler: None,
        *,
        tokenizer: Any,
        reward_fn: Any,
        reward_fn_label_map: dict[str, int],
        max_epochs: int,
        micro_train_batch_size: int,
        eps_clip: float,
        loss_agg_mode: str,
        init_kl_coef: float,
        kl_target: float | None,
        save_hf_ckpt: bool,
        disable_ds_ckpt: bool,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        logit_bias: dict[int, float],
    ) -> None:
        args = strategy.args
        self.strategy = strategy
        self.actor = actor
        self.tokenizer = tokenizer
        self.scheduler = actor_scheduler
        self.max_epochs = max_epochs
        self.micro_train_batch_size = micro_train_batch_size
        self.eps_clip = eps_clip
        self.loss_agg_mode = loss_agg_mode
        self.save_hf_ckpt = save_hf_ckpt
        self.disable_ds_ckpt = disable_ds_ckpt
        self.max_new_tokens = max_new_tokens
        self.kl_ctl = KLController(init_kl_coef, kl_target)
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.warn = console.warn if strategy.is_rank_0() else lambda _: None
        self.health = Health(dtype, args.on_anomaly, self.warn)
        self.guard = strategy.step_guard(actor.model)
        self.failed_saves = 0
        self.evaluators: list[Evaluator] = []  # what is measured every eval_steps beside the reward, see Evaluation
        self.best: BestModel | None = None
        self.best_remembered: dict[str, Any] | None = None  # by the checkpoint that was loaded
        self.progress = Progress()
        self.samples: list[dict[str, Any]] = []  # of the last step, on rank 0: see trajectories.records
        # last step whose gradients are all in the weights, the KL weight then, and what health knew
        self.boundary = (0, init_kl_coef, self.health.state())
        for model in filter(None, (actor, initial_model)):
            model.temperature, model.logit_bias = temperature, logit_bias
        kl_in_reward = initial_model is not None and not args.use_kl_loss
        self.experience_maker = FastExperienceMaker(
            actor,
            initial_model,
            tokenizer,
            strategy,
            self.kl_ctl,
            reward_fn,
            reward_fn_label_map,
            Sampling(
                n=args.n_samples_per_prompt,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                logit_bias=logit_bias,
            ),
            needs_old_log_probs=max_epochs > 1 or kl_in_reward,
        )

    # ------------------------------------------------------------ loop
    def fit(
        self,
        args: Any,
        prompts_dataloader: Any,
        pretrain_dataloader: None,
        eval_dataloader: Any = None,
        consumed_samples: int = 0,
        num_update_steps_per_episodes: int = 1,
    ) -> dict[str, float]:
        """Train.

        :param args: The run's arguments.
        :param prompts_dataloader: This rank's prompts.
        :param pretrain_dataloader: None.
        :param eval_dataloader: Prompts for ``eval_steps``, or None.
        :param consumed_samples: Prompts that a resumed run has already used, over all ranks.
        :param num_update_steps_per_episodes: Unused here; LightRFT derives its rollouts from it.
        :return: Metrics of the last step.
        """
        per_episode = len(prompts_dataloader)
        total = per_episode * args.num_episodes
        step = consumed_samples // args.rollout_batch_size
        self.boundary = (step, self.kl_ctl.value, self.health.state())
        stop_request.install()
        if step and not self.disable_ds_ckpt:
            self._finish_save(args)
        evaluation = Evaluation(self.experience_maker, self.max_new_tokens, eval_dataloader, self.evaluators)
        if args.keep_best is not None:
            folder = Path(args.save_path) / "best"
            self.best = BestModel(self.strategy, folder, args.keep_best, step > 0, self.best_remembered)
        writer = MetricsWriter(Path(args.save_path), args, step) if self.strategy.is_rank_0() else None
        self.progress = Progress(total, step, self.strategy.is_rank_0())
        self.experience_maker.on_phase = self.progress.phase
        if writer is not None and step == 0:
            trajectories.set_aside(Path(args.save_path))
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        if args.dynamic_sampling:
            self.experience_maker.draw_prompts = partial(self.draw_prompts, prompts_dataloader)
        try:
            for episode in range(step // per_episode, args.num_episodes):
                sampler = prompts_dataloader.sampler
                sampler.set_epoch(episode)
                sampler.start = step % per_episode * prompts_dataloader.batch_size
                for batch, waited in timed(prompts_dataloader):
                    step += 1
                    metrics = self.train_on(batch, step, waited)
                    if evaluation.due(step, total, args.eval_steps):
                        self.progress.phase("evaluate")
                        metrics |= evaluation(step)
                        self.keep_best(args, metrics, step)
                    self.report(writer, step, total, metrics)
                    if step % MEMORY_STEPS == 0:
                        hand_back_memory()
                    if args.save_steps > 0 and step % args.save_steps == 0:
                        self.progress.phase("save")
                        self.save(args)
                    stop_request.check(self.strategy.device)
                sampler.start = 0
        except AnomalyError as anomaly:
            console.print(f"stopped by --on_anomaly stop: {anomaly}; {self._save_for_later(args)}", needed=True)
            raise SystemExit(ANOMALY_EXIT) from None
        except StopError as stop:
            console.print(f"{stop}: {self._save_for_later(args)}", needed=True)
            raise SystemExit(stop.exit_code) from None
        finally:
            self.progress.close()
            if writer is not None:
                writer.close()
        seconds = time.perf_counter() - started
        self.strategy.print(f"trained {step - consumed_samples // args.rollout_batch_size} steps in {seconds:.0f} s")
        return metrics

    def train_on(self, batch: tuple[Any, ...], step: int, waited: float) -> dict[str, float]:
        """One rollout batch: sample, score, train, synchronise.

        :param batch: Prompts, image-slot contents, references, labels, and tags where rows have some.
        :param step: Rollout step, from 1.
        :param waited: Seconds that the batch was waited for; part of the step's time.
        :return: Metrics, the same on every rank.
        """
        started = time.perf_counter()
        prompts, tags = split_tags(batch)
        stop_request.check(self.strategy.device)
        items = self.experience_maker.make_experience_list(*prompts, step, all_tags=tags)
        train_started = time.perf_counter()
        self.progress.phase("train")
        sums, maxima, updated = self.update(items, step)
        sync_started = time.perf_counter()
        if updated:
            self.progress.phase("sync")
            self.strategy.update_engine_weights(self.actor)
        ended = time.perf_counter()
        maxima |= {f"time/{name}": value for name, value in self.experience_maker.timings.items()}
        maxima |= {
            "time/data": waited,
            "time/train": sync_started - train_started,
            "time/sync": ended - sync_started,
            "time/step": waited + ended - started,
        }
        sums |= self._rollout_sums(items)
        reduce_metrics(sums, maxima, self.strategy.device)
        metrics = step_metrics(sums, maxima)
        metrics |= tag_metrics(reduce_by_name(tag_sums(items), self.strategy.device), "rollout", sums["responses"])
        metrics["train/grad_norm"] = maxima["grad_norm"]
        metrics["train/lr"] = self.scheduler.get_last_lr()[0]
        if math.isfinite(metrics["train/kl"]):
            self.kl_ctl.update(metrics["train/kl"], int(sums["responses"]))
        counts, fatal = self.health.check(metrics, step)
        metrics |= counts | {"health/failed_saves": float(self.failed_saves)}
        if updated:
            self.boundary = (step, self.kl_ctl.value, self.health.state())
        if fatal:
            raise AnomalyError(fatal)
        if self.strategy.is_rank_0():
            args = self.strategy.args
            self.samples = trajectories.records(items, step, args.n_samples_per_prompt, args.num_trajectories_to_save)
            if args.save_trajectories:
                trajectories.save(Path(args.save_path), step, self.samples)
        return metrics

    def draw_prompts(self, loader: Any, step: int, attempt: int, count: int) -> tuple[Any, ...]:
        """Prompts beside those of the step, at random from all data; the same again in a resumed run.

        :param loader: This rank's prompts.
        :param step: Rollout step.
        :param attempt: Number of the draw within the step.
        :param count: How many.
        :return: As a batch of the loader.
        """
        seed = stable_seed(self.strategy.args.seed, "more", step, attempt, self.strategy.rank)
        rows = random.Random(seed).choices(range(len(loader.dataset)), k=count)
        return loader.dataset.collate_fn(loader.dataset.__getitems__(rows))

    def update(self, items: list[Experience], step: int) -> tuple[dict[str, float], dict[str, float], bool]:
        """Forward and backward over all micro-batches; DeepSpeed steps the optimizer when its batch is full.

        :param items: This rank's experiences.
        :param step: Rollout step.
        :return: Sums and maxima for the metrics, and whether the optimizer stepped.
        :raises FloatingPointError: if a loss is not finite.
        """
        args, engine = self.strategy.args, self.actor.model
        sums = dict.fromkeys(
            ("policy_loss", "kl", "clipped", "tokens", "micro_batches", "gap", "gap_tokens", "train/not_finite"), 0.0
        )
        if args.rollout_correction != "none":
            sums |= {"weights": 0.0, "limited": 0.0}
        maxima = {"gap": 0.0, "grad_norm": math.nan}  # no norm where no optimizer step was due
        skip = self.health.action == "skip"
        updated = False
        self.actor.train()
        tokens = {"all": float(sum(len(item.response_ids) for item in items))}
        reduce_metrics(tokens, {}, self.strategy.device)
        parts = [items[i : i + self.micro_train_batch_size] for i in range(0, len(items), self.micro_train_batch_size)]
        scale = {
            "mode": self.loss_agg_mode,
            "tokens_per_micro_batch": tokens["all"] / (len(parts) * self.strategy.world_size),
            "max_response_length": self.max_new_tokens,
        }
        for epoch in range(self.max_epochs):
            for number, part in enumerate(parts):
                if not updated:  # the weights are still those of the last step that was done
                    stop_request.check(self.strategy.device)
                batch = make_micro_batch(part, self.tokenizer.pad_token_id, self.strategy.device)
                mask, width = batch.response_mask, batch.response_mask.shape[1]
                log_probs = forward(self.actor, batch)
                detached = log_probs.detach()
                on_policy = part[0].old_log_probs is None
                old = detached if on_policy else self._padded(part, "old_log_probs", width)
                engine_log_probs = self._padded(part, "engine_log_probs", width)
                losses, clipped = policy_loss_tokens(
                    log_probs,
                    old,
                    self._padded(part, "advantages", width),
                    self.eps_clip,
                    args.eps_clip_high,
                    mask if args.use_gspo else None,
                )
                if args.rollout_correction != "none":
                    weights, limited = rollout_weights(
                        old, engine_log_probs, mask, args.rollout_correction, args.rollout_correction_limit
                    )
                    losses = losses * weights
                    sums["weights"] += float((weights * mask).sum())
                    sums["limited"] += float(limited.sum())
                policy_loss = loss = aggregate(losses, mask, **scale)
                kl = None
                if part[0].ref_log_probs is not None:
                    kl = kl_tokens(log_probs, self._padded(part, "ref_log_probs", width), args.kl_estimator)
                    if args.use_kl_loss:
                        loss = loss + self.kl_ctl.value * aggregate(kl, mask, **scale)
                finite = bool(torch.isfinite(loss))
                if not finite and not skip:
                    raise FloatingPointError(
                        f"the loss of step {step}, epoch {epoch}, micro-batch {number} is {loss.item()}; first prompt: "
                        f"{part[0].prompt!r}"
                    )
                boundary = engine.is_gradient_accumulation_boundary()
                engine.backward(loss)
                if finite:
                    if kl is not None:
                        sums["kl"] += float((kl.detach() * mask).sum())
                    if epoch == 0:  # the weights are still those that sampled
                        gap = ((old - engine_log_probs).abs() * mask).cpu()
                        sums["gap"] += float(gap.sum())
                        sums["gap_tokens"] += float(mask.sum())
                        maxima["gap"] = max(maxima["gap"], float(gap.max()))
                    sums["policy_loss"] += float(policy_loss.detach())
                    sums["clipped"] += float((clipped & mask).sum())
                    sums["tokens"] += float(mask.sum())
                    sums["micro_batches"] += 1
                else:
                    sums["train/not_finite"] += 1
                if boundary:
                    maxima["grad_norm"] = self._optimizer_step(items, sums, maxima["gap"], step)
                    updated = True
                else:
                    engine.step()
        return sums, maxima, updated

    def _optimizer_step(self, items: list[Experience], sums: dict[str, float], gap: float, step: int) -> float:
        """Let the optimizer step, unless ``--on_anomaly skip`` sees a sign.

        :param items: This rank's experiences.
        :param sums: Of the micro-batches so far; a gradient that is not finite is counted in it.
        :param gap: Largest so far.
        :param step: Rollout step.
        :return: The gradient's norm before clipping; NaN if it was not finite.
        :raises FloatingPointError: if it was not, and such steps are not to be skipped.
        """
        skip, discard = self.health.action == "skip", False
        if skip:
            so_far, largest = self._rollout_sums(items) | sums, {"gap": gap, "time/step": math.nan}
            reduce_metrics(so_far, largest, self.strategy.device)
            discard = bool(self.health.signs(step_metrics(so_far, largest)))
        norm = self.guard.step(discard)
        if not self.guard.applied:
            self.health.skipped += 1
        if is_usable(norm):
            return norm
        if not skip:
            raise FloatingPointError(f"the gradient of step {step} is not finite; the weights are as before it")
        if self.strategy.is_rank_0() and not sums["train/not_finite"]:
            sums["train/not_finite"] += 1  # once, not once a rank
        return math.nan

    def _rollout_sums(self, items: list[Experience]) -> dict[str, float]:
        return rollout_sums(items) | spread_sums(items, self.strategy.args.n_samples_per_prompt)

    def _padded(self, items: list[Experience], name: str, width: int) -> torch.Tensor:
        return pad_tokens([getattr(item, name) for item in items], width, self.strategy.device)

    # ------------------------------------------------------------ output
    def report(self, writer: MetricsWriter | None, step: int, total: int, metrics: dict[str, float]) -> None:
        """Write the metrics and print the step's line.

        :param writer: On rank 0.
        :param step: Rollout step.
        :param total: Steps of the run.
        :param metrics: The step's metrics.
        """
        if writer is None:
            return
        writer.write(step, metrics, self.samples)
        self.progress.step(*step_lines(step, total, metrics))

    def save(self, args: Any) -> None:
        """Write a checkpoint for resuming and, if asked, a Hugging Face folder.

        :param args: The run's arguments.
        :raises SaveError: if that fails, unless ``on_save_error`` is ``warn``.
        """
        try:
            if not self.disable_ds_ckpt:
                self.save_state(args)
            if self.save_hf_ckpt:
                self._save_folder(args)
        except SaveError as error:
            self._take_failure(args, error)

    def keep_best(self, args: Any, metrics: dict[str, float], step: int) -> None:
        """Keep the model if its evaluation is the best so far, and say in the metrics which one is.

        :param args: The run's arguments.
        :param metrics: The step's; ``eval/best`` and ``eval/best_step`` are added.
        :param step: Rollout step.
        :raises SaveError: as :meth:`save`.
        """
        if self.best is None:
            return
        try:
            self.best.keep(metrics, step, lambda folder: self.strategy.save_model(self.actor, self.tokenizer, folder))
        except SaveError as error:
            self._take_failure(args, error)
        if self.best.record is not None:
            metrics |= {"eval/best": self.best.record["value"], "eval/best_step": float(self.best.record["step"])}

    def _take_failure(self, args: Any, error: SaveError) -> None:
        if args.on_save_error == "stop":
            raise error
        self.failed_saves += 1
        self.warn(f"step {self.boundary[0]} could not be saved ({error}); what was saved before is as it was")

    def _save_folder(self, args: Any) -> None:
        folder = Path(args.save_path) / f"hf_step_{self.boundary[0]:06d}"
        aside = folder.with_name(folder.name + checkpoint.PART)
        self.strategy.save_model(self.actor, self.tokenizer, str(aside))
        self.strategy.together(lambda: checkpoint.replace_folder(aside, folder), self.strategy.is_rank_0())

    def _finish_save(self, args: Any) -> None:
        """Do what is left of a save in which the run was ended, once it goes on.

        :param args: The run's arguments.
        """
        step, run = self.boundary[0], Path(args.save_path)

        def tidy() -> None:
            for left_over in run.glob("hf_step_*.part"):
                shutil.rmtree(left_over)
            checkpoint.clear(str(Path(args.ckpt_path) / "_actor"))
            checkpoint.rotate(str(Path(args.ckpt_path) / "_actor"), args.max_ckpt_num)

        self.strategy.together(tidy, self.strategy.is_rank_0())
        due = self.save_hf_ckpt and args.save_steps > 0 and step % args.save_steps == 0
        # agreed on: rank 0 alone looks, and another node may see another disk
        if any(gather_objects(self.strategy.is_rank_0() and due and not (run / f"hf_step_{step:06d}").exists())):
            self._save_folder(args)

    def _save_for_later(self, args: Any) -> str:
        step = f"step {self.boundary[0]} is the last one that is done"
        if self.disable_ds_ckpt:
            return step
        try:
            self.save_state(args)
        except SaveError as error:
            return f"{step}, but could not be saved: {error}"
        return f"{step} and saved; --load_checkpoint goes on from there"

    def save_state(self, args: Any) -> None:
        """Write a checkpoint from which :meth:`restore` and :meth:`fit` go on exactly.

        It is of the last optimizer step: rollouts whose gradients have only been accumulated are done again.

        :param args: The run's arguments.
        """
        step, kl_coef, health = self.boundary
        kind, keys, *rest = np.random.get_state()
        state = {
            "consumed_samples": step * args.rollout_batch_size,
            "kl_coef": kl_coef,
            "health": health,
            "best": self.best and self.best.record,
            "rng": gather_objects((random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state())),
        }
        folder = str(Path(args.ckpt_path) / "_actor")
        self.strategy.save_ckpt(self.actor.model, folder, f"step_{step:06d}", args.max_ckpt_num, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what a checkpoint holds beside model, optimizer and schedule.

        :param state: From :meth:`save_state`, by ``strategy.load_ckpt``.
        """
        self.kl_ctl.value = state["kl_coef"]
        self.health.restore(state["health"])
        self.best_remembered = state.get("best")  # checkpoints of earlier versions have none
        if len(state["rng"]) == dist.get_world_size():  # nothing here draws from them; a user's reward might
            python, numpy, torch_state = state["rng"][dist.get_rank()]
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(torch_state)


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch, and the seconds that it was waited for.

    :param batches: A dataloader.
    """
    started = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - started
        started = time.perf_counter()


def spread_sums(items: list[Experience], n_samples: int) -> dict[str, float]:
    """Sums that show how far rewards differ.

    :param items: Scored experiences, a group's next to each other.
    :param n_samples: Responses a group.
    """
    groups = [[item.reward for item in items[i : i + n_samples]] for i in range(0, len(items), n_samples)]
    return {
        "squares": sum(item.reward**2 for item in items),
        "groups": float(len(groups)),
        "groups_alike": float(sum(min(group) == max(group) for group in groups)),
    }


def hand_back_memory() -> None:
    """Give freed host memory back to the system, where the C library can (glibc).

    Its heap keeps the pages of freed tensors, and as sequences have ever other lengths, these no longer fit the gaps.
    Some 80 ms on a CPU, and as much again for pages that are taken anew: not for every step.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def step_metrics(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """Metrics of a step from its sums and maxima over all ranks.

    :param sums: From :func:`rollout_sums` and the update.
    :param maxima: Largest log-prob gap and the times, in seconds.
    """
    metrics = {name: value / sums["responses"] for name, value in sums.items() if name.startswith("rollout/")}
    # without any finite micro-batch these are NaN
    tokens, gap_tokens = sums["tokens"] or math.nan, sums["gap_tokens"] or math.nan
    variance = sums["squares"] / sums["responses"] - metrics["rollout/reward"] ** 2
    metrics |= {
        "rollout/reward_std": math.sqrt(variance) if variance > 1e-9 else 0.0,
        "rollout/groups_without_spread": sums["groups_alike"] / sums["groups"],
        "rollout/logprob_gap_mean": sums["gap"] / gap_tokens,
        "rollout/logprob_gap_max": maxima["gap"],
        "train/policy_loss": sums["policy_loss"] / (sums["micro_batches"] or math.nan),
        "train/kl": sums["kl"] / tokens,
        "train/clip_fraction": sums["clipped"] / tokens,
        **({"train/correction_weight": sums["weights"] / tokens} if "weights" in sums else {}),
        **({"train/correction_limited": sums["limited"] / tokens} if "limited" in sums else {}),
        "train/not_finite": sums["train/not_finite"],
        "samples_per_second": sums["responses"] / maxima["time/step"],
    }
    return metrics | {name: value for name, value in maxima.items() if name.startswith("time/")}
