"""Training on LightRFT itself: what its trainer wants to know, and what this example adds around it.

``train_colocate.py`` calls, in this order: :func:`prepare_import`, :func:`find_problems`, :func:`complete`,
:func:`prepare_classes`, :func:`trainer_arguments`, :func:`patch_trainer`. On this repository's runtime none of it runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aqa.hosts.find import host_folder
from aqa.hosts.lightrft import audio, fixes
from aqa.hosts.lightrft.contract import check_contract
from aqa.patches.targets import Patch

GAP_WARNING = {False: 1e-3, True: 0.05}  # of float32, bfloat16: mean |log p engine - log p trainer| worth a warning
LONGEST_LINE = 2_000  # characters; LightRFT prints whole batches, waveforms included

# What LightRFT's examples have flags for and this one has not: the values that change nothing.
NEUTRAL = {
    "aux_loss_coef": 0.0,
    "critic_learning_rate": 0.0,
    "critic_pretrain": None,
    "freezing_actor_steps": -1,
    "grad_accum_dtype": None,
    "high_entropy_token_ratio": 0.0,
    "local_rank": -1,
    "logging_steps": 1,
    "mark_high_entropy_tokens": False,
    "max_ckpt_mem": 100_000_000,
    "overlap_comm": False,
    "pretrain_data": None,
    "remote_rm_url": None,
    "reward_running_norm": False,
    "text_only": False,
    "trajectory_analysis": False,
    "use_cpg_loss": False,
    "zpg": 1,
}


def prepare_import() -> list[str]:
    """Check LightRFT's surface, and make it importable.

    :return: Names of the version fixes that were needed.
    :raises SystemExit: if LightRFT is not as expected; lists every difference.
    """
    check_contract(host_folder())
    if "RANK" not in os.environ:  # LightRFT wants torchrun's variables, also for one process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = port
    return fixes.patch_for_import()[1]


def find_problems(args: argparse.Namespace) -> list[str]:
    """What LightRFT cannot do, or would silently not do.

    :param args: Finished flags.
    :return: One entry a problem.
    """
    problems = []
    if args.engine_type == "hf":
        problems.append("--engine_type hf: LightRFT rolls out with vllm or sglang; hf is this repository's runtime's")
    if args.packing_samples:
        problems.append("--packing_samples: LightRFT packs text only, the audio would be lost; drop it")
    if args.sp_size > 1:
        problems.append(f"--sp_size {args.sp_size}: sequence parallelism would cut through the clips; use 1")
    if args.loss_agg_mode != "seq-mean-token-mean":
        problems.append(f"--loss_agg_mode {args.loss_agg_mode}: LightRFT ignores it; use seq-mean-token-mean")
    problems += [
        f"--{flag} {getattr(args, flag)}: LightRFT has no such thing; drop it"
        for flag, neutral in (("eps_clip_high", None), ("use_gspo", False), ("rollout_correction", "none"))
        if getattr(args, flag) != neutral
    ]
    if args.lora_rank > 0:
        problems.append(f"--lora_rank {args.lora_rank}: LightRFT would send the engine adapters unmerged; drop it")
    if args.advantage_estimator == "dr_grpo":
        problems.append("--advantage_estimator dr_grpo: LightRFT has no such thing; use group_norm")
    if args.dynamic_sampling:
        problems.append("--dynamic_sampling: LightRFT only drops groups of rewards 0 or 1, not those of 2; drop it")
    problems += [
        f"--{flag}: only this repository's runtime evaluates so; drop it, and use eval_mmau.py afterwards"
        for flag in ("eval_benchmark", "keep_best")
        if getattr(args, flag) is not None
    ]
    if args.fused_linear_logprob:
        problems.append("--fused_linear_logprob: only LightRFT's text models know it; drop it")
    if args.on_anomaly != "warn":
        problems.append(f"--on_anomaly {args.on_anomaly}: inside LightRFT a sign is warned of only; drop it")
    if args.fsdp and not args.bf16:
        problems.append("--fsdp trains in bfloat16 whatever the flag says: add --bf16")
    if args.fsdp and args.max_norm == 0:
        problems.append("--fsdp with --max_norm 0: LightRFT would clip every gradient to zero; use --max_norm 1")
    return problems


def complete(args: argparse.Namespace) -> None:
    """Give LightRFT the settings that it reads and this example has no flag for.

    :param args: Finished flags, changed in place.
    """
    for name, value in NEUTRAL.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def prepare_classes() -> list[str]:
    """Mend what is left, after LightRFT can be imported and before anything is made of it.

    :return: Names of the version fixes that were needed.
    :raises SystemExit: if LightRFT imports a package that is not installed.
    """
    try:
        return fixes.patch_for_versions()[1]
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"LightRFT cannot be imported from {host_folder()}: {error}. Install what its README asks for, and what "
            "requirements/lightrft.txt of this project names, into this environment, or unset LIGHTRFT_HOME"
        ) from error


def load_actor(args: argparse.Namespace, ds_config: dict[str, Any] | None) -> Any:
    """LightRFT's ``ActorAL`` from ``--pretrain``.

    :param args: Finished flags.
    :param ds_config: DeepSpeed configuration; None under FSDP2.
    :raises SystemExit: if the checkpoint has another dtype than asked for.
    """
    from lightrft.models.actor_al import ActorAL

    actor = ActorAL(args.pretrain, use_flash_attention_2=args.flash_attn, bf16=args.bf16, ds_config=ds_config)
    wanted = torch.bfloat16 if args.bf16 else torch.float32
    wrong = {p.dtype for p in actor.model.parameters()} - {wanted}
    if wrong:
        raise SystemExit(
            f"{args.pretrain} is stored in {wrong.pop()}, which LightRFT keeps: use --bf16, or --no-bf16 with "
            "a checkpoint in float32"
        )
    for name, parameter in actor.model.named_parameters():
        if "embed_positions" in name.split("."):  # sinusoids; transformers 5 forgets while loading that they stay
            parameter.requires_grad_(False)
    return actor


def trainer_arguments(args: argparse.Namespace, processor: Any) -> dict[str, Any]:
    """Arguments of LightRFT's trainer that the runtime's has not.

    :param args: Finished flags.
    :param processor: Qwen2-Audio processor.
    """
    return {
        "processor": processor,
        "prompt_max_len": args.prompt_max_len,
        "micro_rollout_batch_size": args.micro_rollout_batch_size,
        "gamma": args.gamma,
    }


def patch_trainer(trainer: Any, prompts_dataloader: Any) -> Patch:
    """Add to LightRFT's trainer what this example promises on every host.

    Metrics under the same names in ``<save_path>/metrics.jsonl``, a line a step, a warning where engine and trainer
    differ, clips beside saved trajectories, checkpoints that resume with their optimizer, and prints that do not fill
    the log with waveforms.

    :param trainer: ``SPMDPPOTrainerVL`` whose experience maker is patched for audio.
    :param prompts_dataloader: The :class:`~aqa.audio.prefetch.PrefetchLoader` that it will train on.
    :return: Undoes it.
    """
    patch = Patch()
    strategy = trainer.strategy
    _shorten_prints(patch, strategy)
    Recorder(trainer, prompts_dataloader).watch(patch)
    if trainer.trajectory_saver is not None:
        audio.patch_trajectory_saver(patch, trainer.trajectory_saver)
    if strategy.args.fsdp:
        audio.resume_with_optimizer(patch, strategy, trainer.actor_optim, trainer.actor_scheduler)
    return patch


def _shorten_prints(patch: Patch, strategy: Any) -> None:
    original = strategy.print

    def print_shortened(*messages: Any) -> None:
        texts = [str(message) for message in messages]
        long = [f"{text[:LONGEST_LINE]} ... ({len(text)} characters)" for text in texts]
        original(*(text if len(text) <= LONGEST_LINE else cut for text, cut in zip(texts, long, strict=True)))

    patch.replace(strategy, "print", print_shortened)


class Recorder:
    """Measures each step of LightRFT's trainer and writes it to ``metrics.jsonl``.

    :param trainer: ``SPMDPPOTrainerVL``.
    :param prompts_dataloader: The :class:`~aqa.audio.prefetch.PrefetchLoader` that it trains on.
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
        self.started = time.perf_counter()

    def watch(self, patch: Patch) -> None:
        """Put the measuring points in place.

        :param patch: Takes the replacements.
        """
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
            rollout, maxima, times = self.rollout, self.maxima, self.times  # the step's, not the evaluation's
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
        """Add one micro-batch's sums: rewards, lengths, and how far engine and trainer are apart."""
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
        """Over all ranks; every rank has the same names."""
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
        """Of the last optimizer step; LightRFT's FSDP2 strategy keeps none."""
        norm = getattr(self.trainer.actor.model, "get_global_grad_norm", lambda: None)()
        return math.nan if norm is None else float(norm)

    def _write(self, step: int, steps_an_episode: int, status: dict[str, float]) -> None:
        sums = self._reduced(self.rollout, dist.ReduceOp.SUM)
        maxima = self._reduced(self.maxima | self.times, dist.ReduceOp.MAX)
        responses = sums.pop("responses")
        tokens, gap = sums.pop("tokens"), sums.pop("gap")
        metrics = {f"rollout/{name}": value / responses for name, value in sums.items() if name != "rule_reward"}
        metrics |= {
            "rollout/logprob_gap_mean": gap / tokens,
            "rollout/logprob_gap_max": maxima.pop("gap"),
            "train/policy_loss": status.get("policy_loss", math.nan),
            "train/kl": status.get("kl", math.nan),
            "train/grad_norm": self._grad_norm(),
            "train/lr": status.get("actor_lr", math.nan),
            **maxima,
            "samples_per_second": responses / maxima["time/step"],
            **self.evaluation,
        }
        self.rollout, self.maxima, self.times, self.evaluation = {}, {}, {}, {}
        self.started = time.perf_counter()
        if dist.get_rank() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"step": step} | {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        m = metrics
        total = steps_an_episode * self.args.num_episodes
        print(
            f"\nstep {step:>{len(str(total))}}/{total}  reward {m['rollout/reward']:.3f}  "
            f"acc {m['rollout/accuracy_reward']:.3f}  len {m['rollout/response_length']:.1f}  kl {m['train/kl']:.4f}  "
            f"gap {m['rollout/logprob_gap_mean']:.0e}  {m['time/step']:.1f} s",
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
