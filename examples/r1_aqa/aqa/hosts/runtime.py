"""The runtime of this repository (``runtime/lightrft``) as a host.

Parts of ``lightrft``, and what imports torch, are imported inside the methods: the flags are checked before anything
heavy is imported, and with LightRFT itself as host these parts do not exist.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from aqa.common.patch import Patch
from aqa.families import FAMILIES
from aqa.hosts.base import Host

CANNOT_SAVE = 5  # exit status


class RuntimeHost(Host):
    name = "this repository's runtime"
    row_tags = True

    def prepare_import(self) -> None:
        """Tell the runtime which models there are."""
        from lightrft.utils.families import register

        register(FAMILIES)

    def find_problems(self, args: argparse.Namespace) -> list[str]:
        rules = (
            (
                args.engine_type == "sglang",
                "--engine_type sglang: only LightRFT runs it (LIGHTRFT_HOME); use vllm or hf",
            ),
            (args.sync_bucket_mb < 1, f"--sync_bucket_mb {args.sync_bucket_mb}: must be 1 or more"),
            (args.fsdp and args.adam_offload, "--adam_offload is DeepSpeed's: with --fsdp use --fsdp_cpu_offload"),
            (args.fsdp and args.param_offload, "--param_offload is ZeRO-3's: with --fsdp use --fsdp_cpu_offload"),
            (args.fsdp_cpu_offload and not args.fsdp, "--fsdp_cpu_offload: add --fsdp, or use --adam_offload"),
            (
                args.param_offload and not args.fsdp and args.zero_stage != 3,
                f"--param_offload with --zero_stage {args.zero_stage}: only ZeRO-3 shards parameters; "
                "use --zero_stage 3",
            ),
        )
        return [problem for wrong, problem in rules if wrong]

    def load_actor(self, args: argparse.Namespace, ds_config: dict[str, Any] | None) -> Any:
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
        # no such model, of another kind, not whole, not fit for a flag, or what a flag needs cannot be imported
        except (OSError, ValueError, ImportError) as error:
            raise SystemExit(f"--pretrain {args.pretrain}: {error}") from error

    def load_processor(self, args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
        from lightrft.utils import get_tokenizer_processor_vl

        return get_tokenizer_processor_vl(args.pretrain, model, "left")

    def eval_batch_size(self, prompts: int, samples: int) -> int:
        """Evaluation samples one response a prompt, so its batches can hold ``samples`` times as many prompts."""
        return prompts * samples

    def without_adapters(self, actor: Any) -> Any:
        from lightrft.models.lora import WithoutAdapters

        return WithoutAdapters(actor)

    def share_tower(self, args: argparse.Namespace, strategy: Any, models: Sequence[Any]) -> None:
        """Not for sharded models, which must run the same modules on all ranks.

        vLLM has a cache of its own, because autograd takes no tensors that were made in inference mode.
        """
        from aqa.policy.forward import parts_of
        from aqa.policy.tower_cache import TowerCache, share_tower_outputs

        modules = [strategy.unwrap_model(model.model) for model in models]
        if any(parameter.requires_grad for parameter in parts_of(modules[0]).tower.parameters()):
            return
        if args.engine_type == "vllm":
            strategy.inference_engine.keep_tower_outputs(TowerCache())
        if args.zero_stage != 3 and not args.fsdp:
            share_tower_outputs(*modules)

    def complete_trainer(
        self,
        trainer: Any,
        prompts_dataloader: Any,
        evaluators: Sequence[Any],
        states: dict[str, Any] | None,
        find_collapsed: Any = None,
    ) -> Patch:
        """Nothing is replaced."""
        trainer.evaluators = list(evaluators)
        trainer.find_collapsed = find_collapsed
        if states is not None:
            trainer.restore(states)
        return Patch()

    def patch_strategy(self, patch: Patch, strategy: Any, processor: Any, files: dict[str, str] | None) -> None:
        from aqa.patches.strategy import save_processor

        if processor is not None:
            save_processor(patch, strategy, processor, files)

    def patch_experience_maker(self, patch: Patch, exp_maker: Any, audio_token_id: int) -> None:
        """Trajectories record the file of a clip."""
        from aqa.patches.experience_maker import describe_audio

        patch.replace(exp_maker, "describe_image", describe_audio)

    def patch_actor(self, patch: Patch, actor: Any) -> None:
        from aqa.patches.actor import read_clips

        read_clips(patch, actor)

    def status(self, text: str) -> None:
        self._console().status(text)

    def say(self, text: str) -> None:
        self._console().print(text, needed=True)

    def error_stream(self) -> TextIO:
        """The terminal; standard error goes to the log file once training has begun."""
        console = self._console()
        console.status("")
        return console.stream if console.log_file else sys.stderr

    @staticmethod
    def _console() -> Any:
        from lightrft.utils.console import console

        return console

    def speaks_for_node(self) -> bool:
        """The first rank of the node that asks."""
        ranks = self._rank_watch()
        return ranks is None or ranks.first_to_speak()

    def leave(self, error: BaseException | None = None, may_follow: bool = False) -> bool:
        ranks = self._rank_watch()
        return ranks is not None and ranks.leave(error, may_follow)

    @staticmethod
    def _rank_watch() -> Any:
        """The module that connects the ranks, connected; None if there is one rank only."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return None
        from lightrft.utils import rank_watch

        rank_watch.join()  # a wrong flag is found before anything else is done
        return rank_watch

    def exit_status(self, error: BaseException) -> int | None:
        from lightrft.strategy.checkpoint import SaveError

        return CANNOT_SAVE if isinstance(error, SaveError) else None
