"""The GRPO loop.

What differs from the textbook: by default each rollout is used for one optimizer step. So the weights that sampled are
those that are trained, the ratio is 1, and old log-probs need no forward pass of their own. With ``max_epochs > 1`` or
a ``train_batch_size`` below the rollout's responses there are several optimizer steps a rollout, as in PPO: old
log-probs are computed before the first of them and stay. The trainer's log-probs are compared with the engine's in
every rollout, and the difference is a metric.

The loss is :func:`lightrft.models.loss.grpo_loss`.
"""

import ctypes
import math
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightrft.engines.base import Sampling, stable_seed
from lightrft.models.actor_al import ActorAL
from lightrft.models.loss import LossSettings, grpo_loss
from lightrft.strategy.checkpoint import SaveError
from lightrft.strategy.strategy_base import StrategyBase, is_usable
from lightrft.trainer import trajectories
from lightrft.trainer.advantages import KLController
from lightrft.trainer.evaluation import BestModel, Evaluation, Evaluator, FindCollapsed
from lightrft.trainer.fast_exp_maker import AUDIO_GAIN, FastExperienceMaker, forward, split_tags
from lightrft.trainer.health import AnomalyError, Health
from lightrft.trainer.replay_buffer import Experience, make_micro_batch, pad_tokens
from lightrft.trainer.saving import ResumePoint, RunSaver, restore_random_state
from lightrft.trainer.step_metrics import (
    normalised_parts,
    reward_sums,
    spread_sums,
    step_metrics,
    tag_metrics,
    tag_sums,
)
from lightrft.utils.console import console
from lightrft.utils.distributed import gather_objects, reduce_by_name, reduce_metrics
from lightrft.utils.metrics import MetricsWriter
from lightrft.utils.preemption import RankError, StopError, stop_request
from lightrft.utils.progress import Progress, evaluation_lines, step_lines

ANOMALY_EXIT = 4  # exit status after --on_anomaly stop
MEMORY_STEPS = 50  # steps between two calls of hand_back_memory


@dataclass
class UpdateTotals:
    """What one rank's micro-batches add up to.

    :param sums: Of :func:`~lightrft.models.loss.grpo_loss`'s statistics, of the log-prob gap and of the entropy; keys
        are the same on every rank, so that they can be added up over ranks.
    :param maxima: ``gap`` over micro-batches, and ``grad_norm`` over optimizer steps: NaN until one was made.
    :param stepped: Whether an optimizer step was due; it may have been left out.
    """

    sums: dict[str, float]
    maxima: dict[str, float] = field(default_factory=lambda: {"gap": 0.0, "grad_norm": math.nan})
    stepped: bool = False

    def add(self, statistics: dict[str, torch.Tensor]) -> None:
        """Count a micro-batch with a finite loss."""
        for name, value in statistics.items():
            self.sums[name] += float(value)
        self.sums["micro_batches"] += 1

    def add_sampling(self, trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> None:
        """Count how far the engine's log-probs are from the trainer's, and what the entropy is estimated from.

        :param trainer: Log-probs under the policy that sampled ``(batch, length)``; ``engine`` likewise.
        :param mask: ``(batch, length)``, True at sampled tokens.
        """
        gap = ((trainer - engine).abs() * mask).cpu()
        self.sums["gap"] += float(gap.sum())
        self.sums["entropy"] -= float((trainer * mask).sum())
        self.sums["sampled_tokens"] += float(mask.sum())
        self.maxima["gap"] = max(self.maxima["gap"], float(gap.max()))

    def add_step(self, norm: float) -> None:
        """Count an optimizer step with a gradient of this norm."""
        self.stepped = True
        if math.isnan(self.maxima["grad_norm"]) or norm > self.maxima["grad_norm"]:
            self.maxima["grad_norm"] = norm


class SPMDPPOTrainerVL:
    """Trains an actor with group-relative policy optimization.

    Critic, its optimizer and scheduler, ``ema_model`` and ``reward_model`` are LightRFT's parameters and ignored here:
    group-relative methods have no critic, and rewards are rules.

    :param actor: Prepared policy; ``actor_optim`` and ``actor_scheduler`` are stepped by its engine.
    :param initial_model: Prepared reference model, or None without KL.
    :param reward_fn: ``(model_reward_list, labels, queries, refs, label_map) -> (rewards, metrics)``.
    :param reward_fn_label_map: Passed to ``reward_fn`` as ``label_map``.
    :param micro_train_batch_size: Responses in one forward and backward.
    :param kl_target: Adapt the KL's weight, ``init_kl_coef`` at first, towards this KL; None keeps it.
    :param logit_bias: Bias on token ids at sampling, which log-probs take into account.
    """

    def __init__(
        self,
        *,
        strategy: StrategyBase,
        actor: ActorAL,
        critic: None,
        reward_model: Any,
        initial_model: ActorAL | None,
        ema_model: None,
        actor_optim: Any,
        critic_optim: None,
        actor_scheduler: Any,
        critic_scheduler: None,
        tokenizer: PreTrainedTokenizerBase,
        reward_fn: Callable,
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
        top_k: int,
        end_token_ids: Sequence[int],
        logit_bias: dict[int, float],
    ) -> None:
        args = self.args = strategy.args
        self.strategy, self.actor, self.tokenizer, self.scheduler = strategy, actor, tokenizer, actor_scheduler
        self.max_epochs, self.micro_train_batch_size = max_epochs, micro_train_batch_size
        self.kl_ctl = KLController(init_kl_coef, kl_target)
        given = {"eps_clip": eps_clip, "loss_agg_mode": loss_agg_mode, "max_response_length": max_new_tokens}
        flags = {each.name: getattr(args, each.name) for each in fields(LossSettings) if each.name not in given}
        self.loss_settings = LossSettings(**given, **flags)
        warn = console.warn if strategy.is_rank_0() else lambda _: None
        self.health = Health(torch.bfloat16 if args.bf16 else torch.float32, args.on_anomaly, warn)
        self.guard = strategy.step_guard(actor.model)
        start = ResumePoint(0, 0, init_kl_coef, self.health.state())
        self.saver = RunSaver(strategy, actor, tokenizer, save_hf_ckpt, disable_ds_ckpt, warn, start)
        self.progress = Progress()
        for model in filter(None, (actor, initial_model)):
            model.temperature, model.logit_bias = temperature, logit_bias
        kl_in_reward = init_kl_coef > 0 and not args.use_kl_loss
        several_steps = args.train_batch_size < args.rollout_batch_size * args.n_samples_per_prompt
        needs_old_log_probs = max_epochs > 1 or several_steps or kl_in_reward or AUDIO_GAIN in args.reward_parts
        ends = tuple(end_token_ids)
        sampling = Sampling(args.n_samples_per_prompt, temperature, top_p, top_k, max_new_tokens, ends, logit_bias)
        scoring = reward_fn, reward_fn_label_map, sampling, needs_old_log_probs
        self.experience_maker = FastExperienceMaker(actor, initial_model, tokenizer, strategy, self.kl_ctl, *scoring)
        self._start_state()

    def _start_state(self) -> None:
        """What changes in the course of a run."""
        self.losses_not_finite = 0.0  # micro-batches of the present optimizer step, on this rank
        self.suspicious = False  # an earlier rollout of the present optimizer step shows a sign (--on_anomaly skip)
        self.evaluators: list[Evaluator] = []  # what is measured every eval_steps beside the reward, see Evaluation
        self.find_collapsed: FindCollapsed | None = None
        self.restored_step = self.restored_sft = 0
        self.batches_ahead = 0  # batches of the data that are used, beyond the steps: see fit
        self.restored_best: dict[str, Any] | None = None  # record of the best model in the checkpoint that was loaded
        self.samples: list[dict[str, Any]] = []  # of the last step, on rank 0: see trajectories.records
        self.total = 0  # rollout steps of the whole run
        self.writers: list[MetricsWriter] = []  # one, on rank 0

    # ------------------------------------------------------------ loop
    def fit(
        self,
        args: Namespace,
        prompts_dataloader: Any,
        pretrain_dataloader: None,
        eval_dataloader: Any = None,
        consumed_samples: int = 0,
        num_update_steps_per_episodes: int = 1,
    ) -> dict[str, float]:
        """Train. Arguments as in LightRFT; ``args`` and ``num_update_steps_per_episodes`` are not needed here.

        :param eval_dataloader: Prompts for ``eval_steps``, or None.
        :param consumed_samples: Prompts that a resumed run has already used, over all ranks.
        :return: Metrics of the last step.
        :raises SystemExit: after a signal or an anomaly, once the run is saved.
        """
        # steps go on from the checkpoint's, also if --rollout_batch_size was changed and the data are at another batch
        first = self.restored_step
        self.batches_ahead = consumed_samples // self.args.rollout_batch_size - first
        planned = self.args.max_steps or len(prompts_dataloader) * self.args.num_episodes
        self.total = planned - self.batches_ahead
        health = self.health.state()
        self.saver.point = ResumePoint(first, consumed_samples, self.kl_ctl.value, health, self.args.sft_steps)
        stop_request.install()
        if not self.saver.disable_ds_ckpt:
            self.saver.finish_interrupted_save()
        evaluation = Evaluation(
            self.experience_maker,
            eval_dataloader,
            self.evaluators,
            find_collapsed=self.find_collapsed,
            silent=self.args.eval_silent,
            folder=Path(self.args.save_path) / trajectories.EVALUATION_FOLDER,
        )
        run = Path(self.args.save_path)
        if self.args.keep_best is not None:
            best = BestModel(self.strategy, run / "best", self.args.keep_best, self.restored_best)
            self.saver.best = best
        # what the last step of the earlier process lacks: at the start, or where a signal ended its evaluation
        missing = {} if first == 0 else self.saver.unevaluated
        self.saver.unevaluated = None
        evaluates = missing is not None and evaluation.due(first, self.total, self.args.eval_steps)
        done = first - 1 if evaluates or first == 0 else first  # the last step whose record is whole
        self.writers, rank_0 = [], self.strategy.is_rank_0()
        self.strategy.together(lambda: self.writers.append(MetricsWriter(run, self.args, done)), rank_0)
        self.progress = Progress(self.total, first, rank_0)
        self.experience_maker.on_phase = self.progress.phase
        if self.args.dynamic_sampling:
            self.experience_maker.draw_prompts = partial(self.draw_prompts, prompts_dataloader)
        batches = self.batches(prompts_dataloader, first + self.batches_ahead, self.args.num_episodes)
        started, step = time.perf_counter(), first
        metrics: dict[str, float] = {}
        with self.saving_what_is_done():
            if evaluates:
                self._evaluate_first(evaluation, first, missing)
            for step, (batch, waited) in enumerate(batches, first + 1):
                metrics, anomaly = self.train_on(batch, step, waited)
                self._after_step(evaluation, step, metrics, anomaly)
        self.strategy.print(f"trained {step - first} steps in {time.perf_counter() - started:.0f} s")
        return metrics

    @contextmanager
    def saving_what_is_done(self) -> Iterator[None]:
        """Save the last whole step where a signal, an anomaly or an error ends the run; then close bar and writers."""
        try:
            yield
        except AnomalyError as anomaly:
            console.print(f"stopped by --on_anomaly stop: {anomaly}; {self.saver.save_before_exit()}", needed=True)
            raise SystemExit(ANOMALY_EXIT) from None
        except StopError as stop:
            console.print(f"{stop}: {self.saver.save_before_exit()}", needed=True)
            raise SystemExit(stop.exit_code) from None
        except Exception as error:
            raise self._end_of(error) from None
        finally:
            self.progress.close()
            for writer in self.writers:
                writer.close()

    def take_reference(self, model: ActorAL) -> None:
        """Use a prepared model as the reference from now on."""
        model.temperature, model.logit_bias = self.actor.temperature, self.actor.logit_bias
        self.experience_maker.initial_model = model

    def _end_of(self, error: Exception) -> BaseException:
        """Save the last whole step after an error, if it is whole and all ranks know of the error.

        :return: What ends this rank: its own error, or exit status 1 for that of another rank.
        """
        known = self.strategy.world_size == 1 or isinstance(error, RankError)
        if known and self.saver.whole and not isinstance(error, SaveError):
            # set while an evaluation is due, which a resumed run makes up before anything else
            remedy = "" if self.saver.unevaluated is None else "; with --eval_steps -1 it goes on without evaluation"
            try:
                said = f"{describe(error)} ends the run: {self.saver.save_before_exit(False)}{remedy}"
                console.print(said, needed=True)
            except RuntimeError as second:  # of a GPU that the first one has left unusable
                console.warn(f"the last step could not be saved: {second}")
        return (error.own or SystemExit(1)) if isinstance(error, RankError) else error

    def batches(self, loader: Any, done: int, episodes: int) -> Iterator[tuple[tuple[Any, ...], float]]:
        """Batches of all episodes, from the first one that is not done, and the seconds that each was waited for."""
        sampler = loader.sampler
        for episode in range(done // len(loader), episodes):
            sampler.set_epoch(episode)
            sampler.start = max(0, done - episode * len(loader)) * loader.batch_size
            yield from stop_request.each(timed(loader), self.strategy.device)
            sampler.start = 0

    def _evaluate_first(self, evaluation: Evaluation, step: int, metrics: dict[str, float]) -> None:
        """Evaluate the start model, as step 0, which shows later what was learned, or a resumed one that has not been.

        :param metrics: What the step measured before it was ended.
        """
        console.status(f"evaluating the model of step {step} ..." if step else "evaluating the start model ...")
        try:
            self._evaluate(evaluation, step, metrics)
            if step:  # its checkpoint asks for this evaluation: a run that stops before the next step writes it again
                self.saver.saved = 0
        finally:
            for writer in self.writers if metrics else ():
                writer.write(step, metrics)
                self.progress.show(*evaluation_lines(step, self.total, metrics))

    def _evaluate(self, evaluation: Evaluation, step: int, metrics: dict[str, float]) -> None:
        """Add the evaluation to the step's metrics. A checkpoint that is written before its end asks for it again."""
        if step == self.saver.point.step:  # else a resumed run does this step again
            self.saver.unevaluated = {name: float(value) for name, value in metrics.items()}
        self.progress.phase("evaluate")
        metrics |= evaluation(step)
        if step:
            self.saver.keep_best(metrics, step)
        self.saver.unevaluated = None

    def _after_step(self, evaluation: Evaluation, step: int, metrics: dict[str, float], anomaly: str | None) -> None:
        """Evaluate, report, save and stop, as far as each is due.

        :raises AnomalyError: of the step, once it is reported.
        """
        try:
            if evaluation.due(step, self.total, self.args.eval_steps) and not anomaly:
                self._evaluate(evaluation, step, metrics)
        finally:  # the step is done, even if a signal or an error ends its evaluation
            for writer in self.writers:
                writer.write(step, metrics, self.samples)
                self.progress.step(*step_lines(step, self.total, metrics))
        if anomaly:
            raise AnomalyError(anomaly)
        if step % MEMORY_STEPS == 0:
            hand_back_memory()
        if self.args.save_steps > 0 and step % self.args.save_steps == 0:
            self.progress.phase("save")
            self.saver.save()
        stop_request.check(self.strategy.device)

    def train_on(self, batch: tuple[Any, ...], step: int, waited: float) -> tuple[dict[str, float], str | None]:
        """One rollout batch: sample, score, train, synchronise.

        :param batch: Prompts, image-slot contents, references, labels, and tags where rows have some.
        :param step: Rollout step, from 1.
        :param waited: Seconds that the batch was waited for; part of the step's time.
        :return: Metrics, the same on every rank, and the anomaly that the run shall stop at, if any.
        """
        started = time.perf_counter()
        prompts, tags = split_tags(batch)
        stop_request.check(self.strategy.device)
        items = self.experience_maker.make_experience_list(*prompts, step, all_tags=tags)
        train_started = time.perf_counter()
        self.progress.phase("train")
        rate = self.scheduler.get_last_lr()[0]  # before the update, after which it is the next step's
        sums, maxima, stepped = self.update(items, step)
        sync_started = time.perf_counter()
        if stepped or not self.strategy.inference_engine.complete:
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
        metrics = self._metrics(items, sums, maxima) | {"train/lr": rate}
        anomaly = self._finish_step(metrics, items, step, stepped)
        if self.strategy.is_rank_0():
            n, count = self.args.n_samples_per_prompt, self.args.num_trajectories_to_save
            self.samples = trajectories.records(items, step, n, count)
            if self.args.save_trajectories:
                try:
                    trajectories.save(Path(self.args.save_path) / trajectories.FOLDER, step, self.samples)
                except OSError as error:
                    console.warn(f"the trajectories of step {step} cannot be written ({error})")
        return metrics, anomaly

    def _metrics(self, items: list[Experience], sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
        """The step's metrics over all ranks; ``sums`` and ``maxima`` are this rank's and are changed."""
        sums |= self._rollout_sums(items)
        reduce_metrics(sums, maxima, self.strategy.device)
        metrics = step_metrics(sums, maxima)
        metrics |= tag_metrics(reduce_by_name(tag_sums(items), self.strategy.device), "rollout", sums["responses"])
        metrics["train/grad_norm"] = maxima["grad_norm"]
        return metrics

    def _finish_step(self, metrics: dict[str, float], items: list[Experience], step: int, stepped: bool) -> str | None:
        """Adapt the KL's weight, look for anomalies (:class:`Health`) and move the resume point.

        :return: The anomaly that the run shall stop at, if any.
        """
        if math.isfinite(metrics["train/kl"]):
            self.kl_ctl.update(metrics["train/kl"], len(items) * self.strategy.world_size)
        counts, anomaly = self.health.check(metrics, step)
        metrics |= counts | {"health/failed_saves": float(self.saver.failed)}
        if stepped:
            prompts = (step + self.batches_ahead) * self.args.rollout_batch_size
            health = self.health.state()
            self.saver.point = ResumePoint(step, prompts, self.kl_ctl.value, health, self.args.sft_steps)
            self.saver.whole = True
        return anomaly

    def draw_prompts(self, loader: Any, step: int, attempt: int, count: int) -> tuple[Any, ...]:
        """Random prompts in addition to those of the step; a resumed run draws the same.

        :param attempt: Number of the draw within the step.
        :return: As a batch of the loader.
        """
        seed = stable_seed(self.args.seed, "more", step, attempt, self.strategy.rank)
        rows = random.Random(seed).choices(range(len(loader.dataset)), k=count)
        return loader.dataset.collate_fn(loader.dataset.__getitems__(rows))

    # ------------------------------------------------------------ update
    def update(self, items: list[Experience], step: int) -> tuple[dict[str, float], dict[str, float], bool]:
        """Forward and backward over all micro-batches; the optimizer steps whenever its batch is full.

        The run may stop before the first optimizer step of a rollout and after the last one: in between, the weights
        are neither those of the resume point nor those of the next.

        :return: Sums and maxima for the metrics, and whether the optimizer stepped.
        :raises FloatingPointError: if a loss or gradient is not finite, unless ``--on_anomaly skip``.
        """
        names = ["policy_loss", "kl", "clipped", "tokens", "micro_batches", "train/not_finite"]
        names += ["gap", "entropy", "sampled_tokens"]
        if self.args.rollout_correction != "none":
            names += ["weights", "limited"]
        if self.args.audio_token_weights:
            names += ["heard"]
        totals = UpdateTotals(dict.fromkeys(names, 0.0))
        size = self.micro_train_batch_size
        parts = [items[i : i + size] for i in range(0, len(items), size)]
        tokens_per_micro_batch = self._tokens_per_micro_batch(parts)
        self.actor.train()
        for epoch in range(self.max_epochs):
            for number, part in enumerate(parts):
                if not totals.stepped:
                    stop_request.check(self.strategy.device)
                place = f"step {step}, epoch {epoch}, micro-batch {number}"
                due = self._backward(part, tokens_per_micro_batch[number], totals, first=epoch == 0, place=place)
                if due:
                    totals.add_step(self._optimizer_step(items, totals, step))
                else:
                    self.actor.model.step()
        if self.health.action == "skip" and not totals.stepped:  # the step is due after a later rollout
            self.suspicious |= bool(self._signs(items, totals))
        return totals.sums, totals.maxima, totals.stepped

    def _tokens_per_micro_batch(self, parts: list[list[Experience]]) -> list[float]:
        """For each micro-batch, the response tokens of its optimizer step over the step's micro-batches of all ranks.

        Where an optimizer step spans several rollouts these are the rollout's, and nothing uses them (flag_rules).
        """
        size = min(self.strategy.accumulation, len(parts))
        tokens: dict[int, float] = dict.fromkeys(range(len(parts) // size), 0.0)
        for number, part in enumerate(parts):
            tokens[number // size] += sum(len(item.response_ids) for item in part)
        reduce_metrics(tokens, {}, self.strategy.device)
        return [tokens[number // size] / (size * self.strategy.world_size) for number in range(len(parts))]

    def _backward(
        self, part: list[Experience], tokens_per_micro_batch: float, totals: UpdateTotals, first: bool, place: str
    ) -> bool:
        """Forward and backward of a micro-batch.

        :return: Whether the optimizer steps next.
        """
        batch = make_micro_batch(part, self.tokenizer.pad_token_id, self.strategy.device)
        mask = batch.response_mask

        def padded(name: str) -> torch.Tensor:  # (batch, length)
            return pad_tokens([getattr(item, name) for item in part], mask.shape[1], self.strategy.device)

        trained = mask
        if self.args.mask_truncated:
            ended = torch.tensor([not item.truncated for item in part], device=mask.device)
            trained = mask & ended[:, None]
        log_probs = forward(self.actor, batch)
        # under the policy that sampled, also where the optimizer has stepped since
        old = log_probs.detach() if part[0].old_log_probs is None else padded("old_log_probs")  # None: on-policy
        engine_log_probs = padded("engine_log_probs")
        loss, statistics = grpo_loss(
            log_probs,
            old,
            engine_log_probs,
            None if part[0].ref_log_probs is None else padded("ref_log_probs"),
            padded("advantages"),
            trained,
            self.loss_settings,
            self.kl_ctl.value,
            tokens_per_micro_batch,
            None if part[0].silent_log_probs is None else padded("silent_log_probs"),
        )
        finite = bool(torch.isfinite(loss))
        if not finite and self.health.action != "skip":
            self.saver.whole = False  # perhaps the weights are not finite either
            raise FloatingPointError(f"the loss of {place} is {loss.item()}; first prompt: {part[0].prompt!r}")
        due = self.actor.model.is_gradient_accumulation_boundary()
        # backward even then, because the ranks' collectives must match; the step guard drops the NaN gradient
        self.actor.model.backward(loss)
        if not finite:
            totals.sums["train/not_finite"] += 1
            self.losses_not_finite += 1
            return due
        totals.add(statistics)
        if first:
            totals.add_sampling(old, engine_log_probs, mask)
        return due

    def _optimizer_step(self, items: list[Experience], totals: UpdateTotals, step: int) -> float:
        """Let the optimizer step, unless ``--on_anomaly skip`` finds something wrong with the rollouts so far that it
        is made of, or with a loss of this optimizer step.

        :return: The gradient's norm before clipping; NaN if it was not finite.
        :raises FloatingPointError: if it was not, unless such steps are to be skipped.
        """
        skip = self.health.action == "skip"
        signs = self._signs(items, totals) if skip else {}
        self.saver.whole = False  # until the rollout's last optimizer step is done, see _finish_step
        norm = self.guard.step(discard=bool(signs) or self.suspicious)
        self.losses_not_finite, self.suspicious = 0.0, False
        if not self.guard.applied:
            self.health.skipped += 1
        if is_usable(norm):
            return norm
        if not skip:
            raise FloatingPointError(f"a gradient of step {step} is not finite; it was not applied")
        if self.strategy.is_rank_0() and "not finite" not in signs:
            totals.sums["train/not_finite"] += 1  # all ranks see the same norm: count it once
        return math.nan

    def _signs(self, items: list[Experience], totals: UpdateTotals) -> dict[str, str]:
        """What is wrong with a rollout so far, over all ranks; see :meth:`Health.signs`. Collective."""
        sums = self._rollout_sums(items) | totals.sums | {"train/not_finite": self.losses_not_finite}
        maxima = {"gap": totals.maxima["gap"], "time/step": math.nan}
        reduce_metrics(sums, maxima, self.strategy.device)
        return self.health.signs(step_metrics(sums, maxima))

    def _rollout_sums(self, items: list[Experience]) -> dict[str, float]:
        return reward_sums(items) | spread_sums(items, self.args.n_samples_per_prompt, normalised_parts(self.args))

    # ------------------------------------------------------------ resuming
    def restore(self, state: dict[str, Any]) -> None:
        """Take back what a checkpoint holds in addition to model, optimizer and schedule."""
        self.saver.saved = state["step"]
        self.restored_sft = state.get("sft_step", 0)  # checkpoints of earlier versions have none
        self.restored_step = state["step"] - self.restored_sft
        self.kl_ctl.value = state["kl_coef"]
        self.health.restore(state["health"])
        self.restored_best = state.get("best")  # checkpoints of earlier versions have none
        self.saver.unevaluated = state.get("unevaluated")
        restore_random_state(state["rng"])


def describe(error: Exception) -> str:
    """An error in a few words; of a :class:`RankError` the rank's own, which is a collective."""
    if isinstance(error, RankError):
        return f"rank {error.rank}: " + gather_objects(describe(error.own) if error.own else "")[error.rank]
    return f"{type(error).__name__} ({error})"


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch of a dataloader, and the seconds that it was waited for."""
    started = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - started
        started = time.perf_counter()


def hand_back_memory() -> None:
    """Return freed host memory to the system, where the C library can do that (glibc).

    Its heap keeps the pages of freed tensors, and because every step has other sequence lengths, new tensors do not fit
    into the gaps. Takes some 80 ms on a CPU, and as much again for the pages that are then taken anew.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
