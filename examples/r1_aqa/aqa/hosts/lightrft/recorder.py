"""Measure LightRFT's trainer, and write its metrics under the names that this example uses on every host."""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aqa.common.patch import Patch

# by args.bf16: a mean of |log p engine - log p trainer| above this causes a warning
GAP_WARNING = {False: 1e-3, True: 0.05}
LONGEST_LINE = 2_000  # characters


def shorten_prints(patch: Patch, strategy: Any) -> None:
    """Shorten long messages: LightRFT prints whole batches, waveforms included, which would fill the log."""
    original = strategy.print

    def print_shortened(*messages: Any) -> None:
        texts = [str(message) for message in messages]
        long = [f"{text[:LONGEST_LINE]} ... ({len(text)} characters)" for text in texts]
        original(*(text if len(text) <= LONGEST_LINE else cut for text, cut in zip(texts, long, strict=True)))

    patch.replace(strategy, "print", print_shortened)


class Recorder:
    """Measures each step of LightRFT's trainer and writes it to ``metrics.jsonl``.

    :param prompts_dataloader: The :class:`~aqa.audio.prefetch.PrefetchLoader` that the trainer trains on.
    """

    def __init__(self, trainer: Any, prompts_dataloader: Any) -> None:
        self.trainer = trainer
        self.prompts_dataloader = prompts_dataloader
        self.strategy = trainer.strategy
        self.args = trainer.strategy.args
        self.path = Path(self.args.save_path) / "metrics.jsonl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self.rollout: dict[str, float] = {}  # sums over this rank's responses
        self.maxima: dict[str, float] = {}
        self.times: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self._begin_step()

    def _begin_step(self) -> None:
        self.started = time.perf_counter()
        # LightRFT's own "actor_lr" is read after the scheduler's step, so it is the next step's
        self.rate = self.trainer.actor_scheduler.get_last_lr()[0]

    def watch(self, patch: Patch) -> None:
        """Wrap the methods of the trainer that are measured."""
        maker, trainer = self.trainer.experience_maker, self.trainer
        for owner, name, label in (
            (maker, "generate_samples", "rollout"),
            (maker, "make_experience_list", "experience"),
            (trainer, "ppo_train", "update"),
            (self.strategy, "update_engine_weights", "sync"),
        ):
            patch.replace(owner, name, self._timed(getattr(owner, name), label))
        by_model = maker._make_experience_list_by_model
        evaluate, save_logs = trainer.evaluate, trainer.save_logs_and_checkpoints

        @functools.wraps(by_model)
        def _make_experience_list_by_model(all_samples: list[Any]) -> list[Any]:
            experiences = by_model(all_samples)
            for sample, experience in zip(all_samples, experiences, strict=True):
                self._add(sample, experience)
            return experiences

        @functools.wraps(evaluate)
        def evaluate_and_keep(*args: Any, **kwargs: Any) -> dict[str, float]:
            rollout, maxima, times = self.rollout, self.maxima, self.times  # set the step's sums aside
            self.rollout, self.maxima, self.times = {}, {}, {}
            result = evaluate(*args, **kwargs)
            sums = self._reduced(self.rollout, dist.ReduceOp.SUM)
            self.rollout, self.maxima, self.times = rollout, maxima, times
            names = ("reward", "accuracy_reward", "format_reward", "response_length")
            self.evaluation = {f"eval/{name}": sums[name] / sums["responses"] for name in names if name in sums}
            return result

        @functools.wraps(save_logs)
        def save_logs_and_checkpoints(
            args: Any, step: int, step_bar: Any, logs: dict, *rest: Any, **kwargs: Any
        ) -> None:
            if "policy_loss" not in logs:  # it drops a batch that it takes for invalid, and goes on
                raise RuntimeError(f"step {step}: LightRFT trained on none of the batches; see its lines above")
            self._measure_step()
            save_logs(args, step, step_bar, logs, *rest, **kwargs)
            self._write(step, step_bar.total, logs)

        patch.replace(maker, "_make_experience_list_by_model", _make_experience_list_by_model)
        patch.replace(trainer, "evaluate", evaluate_and_keep)
        patch.replace(trainer, "save_logs_and_checkpoints", save_logs_and_checkpoints)

    def _timed(self, original: Any, label: str) -> Any:
        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.times[label] = self.times.get(label, 0.0) + time.perf_counter() - started

        return timed

    def _add(self, sample: Any, experience: Any) -> None:
        """Add one micro-batch's sums: rewards, lengths, and the gap between engine's and trainer's log-probs."""
        mask = experience.action_mask.bool()
        engine = torch.zeros_like(experience.action_log_probs)
        for row, log_probs in enumerate(sample.engine_log_probs):
            engine[row, : len(log_probs)] = torch.tensor(log_probs, dtype=engine.dtype)
        gap = ((experience.action_log_probs - engine).abs() * mask).float()
        if not torch.isfinite(gap).all():
            raise FloatingPointError("log-probs of the rollout are not finite")
        values = {
            "responses": float(len(mask)),
            "tokens": float(mask.sum()),
            "gap": float(gap.sum()),
            "entropy": -float((experience.action_log_probs * mask).sum()),
            "reward": float(experience.info["reward"].sum()),
            "response_length": float(mask.sum()),
            "truncated_fraction": float(sum(sample.truncated)),
        }
        for name, scores in (experience.info.get("reward_metrics") or {}).items():
            values[name] = float(scores.sum())
        for name, value in values.items():
            self.rollout[name] = self.rollout.get(name, 0.0) + value
        self.maxima["gap"] = max(self.maxima.get("gap", 0.0), float(gap.max()))

    def _reduced(self, values: dict[str, float], op: Any) -> dict[str, float]:
        """Reduce values over all ranks, which must have the same names."""
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(packed, op=op)
        return dict(zip(values, packed.tolist(), strict=True))

    def _measure_step(self) -> None:
        ended = time.perf_counter()
        times = {"rollout": 0.0, "experience": 0.0, "update": 0.0, "sync": 0.0} | self.times
        self.times = {
            "time/data": self.prompts_dataloader.seconds_waited,
            "time/rollout": times["rollout"],
            "time/logprobs": times["experience"] - times["rollout"],
            "time/train": times["update"] - times["sync"],
            "time/sync": times["sync"],
            "time/step": ended - self.started,
        }

    def _grad_norm(self) -> float:
        """Gradient norm of the last optimizer step; NaN under FSDP2, where LightRFT keeps none."""
        norm = getattr(self.trainer.actor.model, "get_global_grad_norm", lambda: None)()
        return math.nan if norm is None else float(norm)

    def _write(self, step: int, steps_an_episode: int, status: dict[str, float]) -> None:
        sums = self._reduced(self.rollout, dist.ReduceOp.SUM)
        maxima = self._reduced(self.maxima | self.times, dist.ReduceOp.MAX)
        responses = sums.pop("responses")
        tokens, gap, entropy = sums.pop("tokens"), sums.pop("gap"), sums.pop("entropy")
        metrics = {f"rollout/{name}": value / responses for name, value in sums.items() if name != "rule_reward"}
        metrics |= {
            "rollout/logprob_gap_mean": gap / tokens,
            "rollout/logprob_gap_max": maxima.pop("gap"),
            "train/policy_loss": status["policy_loss"],
            "train/entropy": entropy / tokens,
            "train/kl": status.get("kl", math.nan),
            "train/grad_norm": self._grad_norm(),
            "train/lr": self.rate,
            **maxima,
            "samples_per_second": responses / maxima["time/step"],
            **self.evaluation,
        }
        self.rollout, self.maxima, self.times, self.evaluation = {}, {}, {}, {}
        self._begin_step()
        if dist.get_rank() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"step": step} | {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        m = metrics
        total = self.args.max_steps or steps_an_episode * self.args.num_episodes
        print(
            f"\nstep {step:>{len(str(total))}}/{total}  reward {m['rollout/reward']:.3f}  "
            f"acc {m['rollout/accuracy_reward']:.3f}  len {m['rollout/response_length']:.1f}  kl {m['train/kl']:.4f}  "
            f"avg gap {m['rollout/logprob_gap_mean']:.0e}  {m['time/step']:.1f} s",
            flush=True,
        )
        limit = GAP_WARNING[self.args.bf16]
        if m["rollout/logprob_gap_mean"] > limit:
            print(
                f"warning: step {step}: the engine's log-probs are {m['rollout/logprob_gap_mean']:.2g} from the "
                f"trainer's on average (largest {m['rollout/logprob_gap_max']:.2g}); above {limit:g} something "
                "differs: weights, audio or sampling",
                flush=True,
            )
