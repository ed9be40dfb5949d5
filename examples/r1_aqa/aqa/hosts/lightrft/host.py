"""LightRFT itself as a host: what it cannot do, what its trainer wants to know, and what this example adds around it.

What imports torch or LightRFT is imported inside the methods: the flags are checked before anything heavy is imported,
and :meth:`LightRFTHost.prepare_import` decides whether LightRFT can be imported at all.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from aqa.common.model_type import model_type_of
from aqa.common.patch import Patch
from aqa.data.prompts import end_tokens
from aqa.families import family_named
from aqa.hosts.base import Host
from aqa.hosts.lightrft import fixes
from aqa.hosts.lightrft.contract import check_contract
from aqa.hosts.locate import lacks

# Flags that LightRFT knows nothing of: the values that change nothing.
UNKNOWN = {
    "eps_clip_high": None,
    "use_gspo": False,
    "use_cispo": False,
    "rollout_correction": "none",
    "mask_truncated": False,
    "audio_token_weights": 0.0,
    "sft_steps": 0,
    "save_hf_on_stop": None,
}
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


def complete_flags(args: argparse.Namespace) -> None:
    """Give LightRFT the settings that it reads and this example has no flag for; those that are there stay."""
    for name, value in NEUTRAL.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def _model_problems(args: argparse.Namespace) -> list[str]:
    """What of this model family does not work inside LightRFT."""
    problems = []
    kind = model_type_of(args.pretrain) if args.pretrain else None
    if kind not in (None, "qwen2_audio") and args.engine_type == "sglang":
        problems.append(f"--pretrain {args.pretrain}: of a {kind} SGLang does not roll out here; use vllm")
    if args.audio_seconds > 30:
        problems.append(f"--audio_seconds {args.audio_seconds:g}: inside LightRFT a clip has one window; use 30")
    return problems


class LightRFTHost(Host):
    """See :class:`aqa.hosts.base.Host`.

    LightRFT samples as many responses in evaluation as in training, and its ranks wait for a lost one until their
    collectives time out. Sharing the tower's outputs has not been tried with its strategies.
    """

    name = "LightRFT"
    row_tags = False  # its trainer takes four members

    def prepare_import(self) -> None:
        """Make LightRFT importable, and check what the flags are made of; :meth:`prepare` checks the rest.

        :raises SystemExit: if LightRFT is not as expected; lists every difference.
        """
        if "RANK" not in os.environ:  # LightRFT wants torchrun's variables, also for one process
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = port
        self.fixes += fixes.patch_for_import()[1]
        check_contract("lightrft.utils")

    def find_problems(self, args: argparse.Namespace) -> list[str]:
        problems = []
        if args.engine_type == "hf":
            problems.append("--engine_type hf: LightRFT rolls out by vllm or sglang; hf is this repository's runtime's")
        problems += lacks("sglang", "--engine_type sglang") if args.engine_type == "sglang" else []
        if args.packing_samples:
            problems.append("--packing_samples: LightRFT packs text only, the audio would be lost; drop it")
        if args.sp_size > 1:
            problems.append(f"--sp_size {args.sp_size}: sequence parallelism would cut through the clips; use 1")
        if args.loss_agg_mode != "seq-mean-token-mean":
            problems.append(f"--loss_agg_mode {args.loss_agg_mode}: LightRFT ignores it; use seq-mean-token-mean")
        problems += [
            f"--{flag} {getattr(args, flag)}: LightRFT has no such thing; drop it"
            for flag, neutral in UNKNOWN.items()
            if getattr(args, flag) != neutral
        ]
        if args.lora_rank > 0:
            problems.append(f"--lora_rank {args.lora_rank}: LightRFT would send the engine adapters unmerged; drop it")
        problems += [
            f"--advantage_estimator {name}: LightRFT has no such thing; use {instead}"
            for name, instead in (
                ("dr_grpo", "group_norm"),
                ("gdpo", "group_norm"),
                ("reinforce++", "reinforce, which is the same there"),
            )
            if args.advantage_estimator == name
        ]
        if "majority" in args.reward.split("+") and args.micro_rollout_batch_size % args.n_samples_per_prompt:
            problems.append(
                f"--reward majority with --micro_rollout_batch_size {args.micro_rollout_batch_size}: LightRFT pays "
                f"each such batch by itself, and would cut groups; use a multiple of {args.n_samples_per_prompt}"
            )
        if "audio_gain" in args.reward.split("+"):
            problems.append("--reward audio_gain: LightRFT scores before the policy's log-probs are known; drop it")
        if args.dynamic_sampling:
            problems.append("--dynamic_sampling: LightRFT only drops groups of rewards 0 or 1, not those of 2; drop it")
        problems += [
            f"--{flag}: only this repository's runtime evaluates so; drop it, and use eval_mmau.py afterwards"
            for flag in ("eval_benchmark", "keep_best", "eval_silent")
            if getattr(args, flag) not in (None, False)
        ]
        if args.fused_linear_logprob:
            problems.append("--fused_linear_logprob: only LightRFT's text models know it; drop it")
        if args.on_anomaly != "warn":
            problems.append(f"--on_anomaly {args.on_anomaly}: inside LightRFT a sign is warned of only; drop it")
        if args.fsdp and not args.bf16:
            problems.append("--fsdp trains in bfloat16 whatever the flag says: add --bf16")
        if args.bf16 and not args.fsdp and args.zero_stage == 0:
            problems.append("--zero_stage 0 with --bf16: LightRFT would add up micro-batches in bfloat16; use stage 2")
        if args.fsdp and args.max_norm == 0:
            problems.append("--fsdp with --max_norm 0: LightRFT would clip every gradient to zero; use --max_norm 1")
        return problems + _model_problems(args)

    def prepare(self, args: argparse.Namespace) -> None:
        if args.bf16 and not args.fsdp:
            args.grad_accum_dtype = "fp32"  # DeepSpeed would add up the gradients of micro-batches in bfloat16
        complete_flags(args)
        check_contract()
        self.fixes += fixes.patch_for_versions()[1]

    def load_actor(self, args: argparse.Namespace, ds_config: dict[str, Any] | None) -> Any:
        """LightRFT's ``ActorAL``; a checkpoint of another dtype than asked for is refused, too."""
        import torch

        from lightrft.models import actor_al

        family = family_named(args.pretrain)
        with Patch() as patch:  # it names one class
            patch.replace(actor_al, "Qwen2AudioForConditionalGeneration", family.model_class())
            flags = {"use_flash_attention_2": args.flash_attn, "bf16": args.bf16, "ds_config": ds_config}
            actor = actor_al.ActorAL(args.pretrain, **flags)
        wanted = torch.bfloat16 if args.bf16 else torch.float32
        wrong = {p.dtype for p in actor.model.parameters()} - {wanted}
        if wrong:
            raise SystemExit(
                f"{args.pretrain} is stored in {wrong.pop()}, which LightRFT keeps: use --bf16, or --no-bf16 with "
                "a checkpoint in float32"
            )
        for name, parameter in actor.model.named_parameters():
            # sinusoids do not train, which transformers 5 forgets on loading
            if name.startswith(family.unheard) or "embed_positions" in name.split("."):
                parameter.requires_grad_(False)
        return actor

    def load_processor(self, args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
        """By LightRFT's function, but with the family's own class: that of Qwen2.5-Omni needs no torchvision."""
        from lightrft.utils import utils

        with Patch() as patch:
            patch.replace(utils, "AutoProcessor", family_named(args.pretrain).processor_class())
            return utils.get_tokenizer_processor_vl(args.pretrain, model, "left")

    def trainer_arguments(self, args: argparse.Namespace, processor: Any) -> dict[str, Any]:
        return {
            "processor": processor,
            "prompt_max_len": args.prompt_max_len,
            "micro_rollout_batch_size": args.micro_rollout_batch_size,
            "gamma": args.gamma,
        }

    def without_adapters(self, actor: Any) -> Any:
        """Never called: :meth:`find_problems` refuses LoRA."""
        raise NotImplementedError("LightRFT would send the engine adapters unmerged")

    def complete_trainer(
        self,
        trainer: Any,
        prompts_dataloader: Any,
        evaluators: Sequence[Any],
        states: dict[str, Any] | None,
        find_collapsed: Any = None,
    ) -> Patch:
        """Metrics in ``metrics.jsonl``, a line a step, a warning where engine and trainer differ, clips beside saved
        trajectories, checkpoints that resume with their optimizer, and prints without waveforms.

        LightRFT evaluates by itself: it takes no evaluators, and nobody looks for answers that are all alike.
        """
        from aqa.hosts.lightrft import audio
        from aqa.hosts.lightrft.recorder import Recorder, shorten_prints

        patch, strategy = Patch(), trainer.strategy
        shorten_prints(patch, strategy)
        audio.keep_every_batch(patch, trainer)
        Recorder(trainer, prompts_dataloader).watch(patch)
        if trainer.trajectory_saver is not None:
            audio.patch_trajectory_saver(patch, trainer.trajectory_saver)
        if strategy.args.fsdp:
            audio.resume_with_optimizer(patch, strategy, trainer.actor_optim, trainer.actor_scheduler)
        return patch

    def patch_strategy(self, patch: Patch, strategy: Any, processor: Any, files: dict[str, str] | None) -> None:
        from aqa.hosts.lightrft import audio

        audio.patch_strategy(patch, strategy, processor, files)

    def patch_experience_maker(self, patch: Patch, exp_maker: Any, audio_token_id: int) -> None:
        from aqa.hosts.lightrft import audio
        from aqa.patches.experience_maker import BANNED

        ends = end_tokens(exp_maker.tokenizer, exp_maker.strategy.args.pretrain)
        audio.patch_experience_maker(patch, exp_maker, {audio_token_id: BANNED}, ends)

    def patch_actor(self, patch: Patch, actor: Any) -> None:
        from aqa.hosts.lightrft import audio

        audio.patch_actor(patch, actor)

    def say(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)

    def error_stream(self) -> TextIO:
        return sys.stderr

    def speaks_for_node(self) -> bool:
        """The first rank of the node."""
        return os.environ.get("LOCAL_RANK", "0") == "0"
