"""Training on DeepSpeed: ZeRO 0, 2 and 3.

DeepSpeed is imported inside functions, because it reads DS_ACCELERATOR, which is set just before the first import.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft.models.four_bit import unpacked
from lightrft.strategy.export import layout_of
from lightrft.strategy.strategy_base import StrategyBase


class DeepspeedStrategy(StrategyBase):
    """See :class:`~lightrft.strategy.strategy_base.StrategyBase`."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        import deepspeed

        if self.device.type == "cpu":
            # DeepSpeed would compile, with the machine's C++ compiler, a shared-memory reduction that only inference
            # uses; on a GPU this question alone would probe all its operators
            getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)  # it takes the process group that is there
        self._on_host: dict[nn.Parameter, torch.Tensor] = {}  # the reference model, pinned, unless it is sharded

    def get_ds_train_config(self, is_actor: bool = True) -> dict[str, Any]:
        """DeepSpeed configuration of the trained model.

        :param is_actor: Kept for LightRFT's signature; there is one trained model, the actor.
        """
        args, pinned = self.args, self.device.type == "cuda"
        zero: dict[str, Any] = {"stage": args.zero_stage, "overlap_comm": pinned}
        if args.adam_offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        if args.param_offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
        return {
            "train_micro_batch_size_per_gpu": args.micro_train_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": zero,
            "bf16": {"enabled": args.bf16},
            # micro-batches add up in float32; stage 0 refuses the first of these, see prepare_training
            "data_types": {"grad_accum_dtype": "fp32" if args.zero_stage else None},
            "communication_data_type": None if args.zero_stage else "fp32",
            "gradient_clipping": args.max_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def get_ds_eval_config(self, offload: bool = False) -> dict[str, Any]:
        """DeepSpeed configuration of a model that is only read.

        :param offload: Keep its parameters in CPU memory (ZeRO-3 only), as ``--param_offload`` does.
        """
        zero: dict[str, Any] = {"stage": 3 if self.args.zero_stage == 3 else 0}
        if (offload or self.args.param_offload) and zero["stage"] == 3:
            zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": self.args.micro_train_batch_size,
            "zero_optimization": zero,
            "bf16": {"enabled": self.args.bf16},
            "steps_per_print": 10**9,
        }

    def prepare_training(self, model: nn.Module, max_steps: int) -> tuple[Any, Any, Any]:
        import deepspeed

        from lightrft.strategy.deepspeed_hooks import Storage

        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        optimizer, scheduler = self.optimizer_and_schedule(trained, max_steps)
        engine, optimizer, _, scheduler = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=self.get_ds_train_config()
        )
        Storage(engine)
        if self.args.zero_stage == 0:
            for parameter in engine.module.parameters():
                if parameter.requires_grad:
                    parameter.grad_dtype = torch.float32  # autograd itself adds up in it, whatever the weights are
        return engine, optimizer, scheduler

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """See the base class. A whole model stays in the machine's memory until :meth:`reload_model`."""
        model.model.requires_grad_(False)
        if self.args.zero_stage == 3:
            import deepspeed

            model.model, *_ = deepspeed.initialize(model=model.model, config=self.get_ds_eval_config())
        elif self.device.type != "cpu":
            self._on_host = {parameter: parameter.data.pin_memory() for parameter in model.model.parameters()}
            self.offload_model(model)
            for buffer in model.model.buffers():
                buffer.data = buffer.data.to(self.device)
        return model.eval()

    def step_guard(self, engine: Any) -> Any:
        from lightrft.strategy.deepspeed_hooks import StepGuard

        return StepGuard(engine)

    def offload_model(self, model: nn.Module) -> None:
        """See the base class. Its weights never change: those on the GPU are dropped, not copied back."""
        for parameter, value in self._on_host.items():
            parameter.data = value

    def reload_model(self, model: nn.Module) -> None:
        for parameter, value in self._on_host.items():
            parameter.data = value.to(self.device, non_blocking=True)

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        module = self.unwrap_model(model)
        with self.whole(list(module.parameters())):
            yield module

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        import deepspeed

        sharded = self.args.zero_stage == 3
        with deepspeed.zero.GatheredParameters(list(parameters)) if sharded else nullcontext():
            yield [unpacked(parameter) for parameter in parameters]

    def bytes_of(self, parameter: nn.Parameter) -> int:
        return getattr(parameter, "ds_numel", parameter.numel()) * self.dtype.itemsize

    def write_ckpt(self, engine: Any, save_dir: str, tag: str, client_state: dict[str, Any]) -> dict[str, str]:
        storage = engine.checkpoint_engine
        storage.failure, storage.hashes = None, {}
        engine.save_checkpoint(save_dir, tag=tag, client_state=client_state, save_latest=False)
        if storage.failure:
            raise OSError(storage.failure)
        return {str(path.relative_to(Path(save_dir) / tag)): digest for path, digest in storage.hashes.items()}

    def read_ckpt(self, engine: Any, load_dir: str, tag: str) -> dict[str, Any]:
        folder = Path(load_dir) / tag
        stage, ranks = layout_of(folder)
        problem = None
        if stage is None:
            problem = "DeepSpeed cannot load it; if --fsdp wrote it, go on with --fsdp"
        elif stage != self.args.zero_stage:
            problem = f"ZeRO-{stage} wrote it: go on with --zero_stage {stage}"
        elif ranks not in (None, self.world_size):
            problem = f"{ranks} ranks wrote it, these are {self.world_size}: use as many"
        if problem:
            raise SystemExit(f"--load_checkpoint: {folder}: {problem}")
        return engine.load_checkpoint(load_dir, tag=tag)[1]
