"""Training on PyTorch's FSDP2: parameters, gradients and optimizer states are sharded over all ranks."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from lightrft.strategy import checkpoint
from lightrft.strategy.strategy_base import StrategyBase, is_usable

# torch 2.13 warns of the old name; 2.11, which some GPU images have, has no other. To be deleted with support for 2.12.
all_gather = dist.all_gather_single if torch.__version__ >= (2, 13) else dist.all_gather_into_tensor


class FSDPEngine(nn.Module):
    """A sharded model that trains, with the calls of a DeepSpeed engine.

    The optimizer works on this rank's shards as plain tensors: its state is an ordinary one.
    """

    def __init__(self, module: nn.Module, strategy: StrategyBase, max_steps: int) -> None:
        super().__init__()
        self.module = module
        trained = [(name, p, nn.Parameter(p.to_local())) for name, p in module.named_parameters() if p.requires_grad]
        self._shards = [(parameter, shard) for _, parameter, shard in trained]
        self.optimizer, self.scheduler = strategy.optimizer_and_schedule(
            ((name, shard) for name, _, shard in trained), max_steps
        )
        self.accumulation, self.max_norm, self.device = strategy.accumulation, strategy.args.max_norm, strategy.device
        self.micro_steps = 0
        self.applied = False  # whether the last optimizer step was made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the optimizer steps after the present micro-batch."""
        return (self.micro_steps + 1) % self.accumulation == 0

    def backward(self, loss: torch.Tensor) -> None:
        """Add to the gradients, which are averaged over micro-batches and ranks."""
        (loss / self.accumulation).backward()

    def step(self, discard: bool = False) -> float:
        """End a micro-batch: at a boundary, clip, step the optimizer and drop the gradients.

        :param discard: Leave weights and moments unchanged.
        :return: The gradient's norm over all ranks, before clipping; if it is not finite, weights and moments are
            unchanged. NaN where no step was due.
        """
        due = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        if not due:
            return math.nan
        for parameter, shard in self._shards:
            shard.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None
        gradients = [shard.grad for _, shard in self._shards if shard.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).to(self.device, torch.float64).square()
        dist.all_reduce(square)
        norm = float(square.sqrt())
        self.applied = is_usable(norm) and not discard
        if self.applied:
            if 0 < self.max_norm < norm:
                for gradient in gradients:
                    gradient.mul_(self.max_norm / (norm + 1e-6))
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return norm

    def state(self) -> dict[str, Any]:
        """What this rank needs to go on: its shards, optimizer and schedule."""
        return {
            "world_size": dist.get_world_size(),
            "model": {name: parameter.to_local() for name, parameter in self.module.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take back a :meth:`state`.

        :param state: Of the same rank, among as many.
        :raises ValueError: if it is another model's, or from another number of ranks.
        """
        if state["world_size"] != dist.get_world_size():
            raise ValueError(f"{state['world_size']} ranks wrote it, these are {dist.get_world_size()}: use as many")
        own = {name: parameter.to_local() for name, parameter in self.module.named_parameters()}
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (own, state["model"])]
        if shapes[0] != shapes[1]:
            raise ValueError("its parameters are not this model's (another model, or other LoRA flags)")
        for name, tensor in own.items():
            tensor.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


class FSDPStrategy(StrategyBase):
    """See :class:`~lightrft.strategy.strategy_base.StrategyBase`.

    With bf16, forward and backward run in bfloat16; what trains is kept, reduced and updated in float32.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.mesh = init_device_mesh(self.device.type, (self.world_size,))

    def shard(self, model: nn.Module) -> None:
        """Shard a model in place: each layer, embedding and head by itself, and what is left.

        :param model: transformers model, in CPU memory and :attr:`dtype`.
        """
        offload = OffloadPolicy()
        if self.args.fsdp_cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        if ends[0].weight is ends[1].weight:
            ends = []  # tied: one weight cannot be sharded with two modules
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        layers = [layer for modules in lists for layer in modules]
        for unit in (*reversed(layers), *ends, model):  # FSDP2 wants inner modules sharded before outer ones
            for parameter in unit.parameters():
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            # reshard everything after a forward pass, the root's own parameters too
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=offload)
        # the first module to run becomes FSDP2's root: run the model itself, before the hf engine runs only parts of it
        model.run_nothing = lambda: None
        register_fsdp_forward_method(model, "run_nothing")
        model.run_nothing()
        del model.run_nothing

    def prepare_training(self, model: nn.Module, max_steps: int) -> tuple[FSDPEngine, Any, Any]:
        self.shard(model)
        engine = FSDPEngine(model, self, max_steps)
        return engine, engine.optimizer, engine.scheduler

    def prepare_model(self, model: nn.Module) -> nn.Module:
        model.model.requires_grad_(False)
        self.shard(model.model)
        return model.eval()

    def step_guard(self, engine: FSDPEngine) -> FSDPEngine:
        return engine

    def offload_model(self, model: nn.Module) -> None:
        """Nothing to move: the model is sharded, and with ``--fsdp_cpu_offload`` in CPU memory already."""

    def reload_model(self, model: nn.Module) -> None:
        """Nothing to move."""

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        module = self.unwrap_model(model)
        units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
        module.set_reshard_after_forward(False)
        for unit in units:
            unit.unshard()
        try:
            yield module
        finally:
            for unit in units:
                unit.reshard()
            module.set_reshard_after_forward(True)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        yield self._gather(parameters)

    def bytes_of(self, parameter: nn.Parameter) -> int:
        """As the base class, with this rank's shard where it is cast before it is gathered."""
        size = super().bytes_of(parameter)
        return size if parameter.dtype == self.dtype else size + size // self.world_size

    @torch.no_grad()
    def _gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        shards = [parameter.to_local().to(self.device, self.dtype) for parameter in parameters]
        if self.world_size == 1:
            return shards
        whole, works = [], []
        for parameter, shard in zip(parameters, shards, strict=True):
            rows, *rest = parameter.shape
            most = -(-rows // self.world_size)  # rows of a rank; the last ones have fewer, or none
            if len(shard) < most:
                shard = torch.cat([shard, shard.new_empty(most - len(shard), *rest)])
            room = shard.new_empty(most * self.world_size, *rest)
            works.append(all_gather(room, shard.contiguous(), async_op=True))
            whole.append(room[:rows])
        for work in works:
            work.wait()
        return whole

    def write_ckpt(self, engine: FSDPEngine, save_dir: str, tag: str, client_state: dict[str, Any]) -> dict[str, str]:
        path = Path(save_dir) / tag / f"rank{self.rank}.pt"
        return {path.name: checkpoint.write_state(engine.state() | {"client_state": client_state}, path)}

    def read_ckpt(self, engine: FSDPEngine, load_dir: str, tag: str) -> dict[str, Any]:
        path = Path(load_dir) / tag / f"rank{self.rank}.pt"
        if not path.is_file():
            raise SystemExit(
                f"--load_checkpoint: {path} does not exist: another number of ranks or, without --fsdp, DeepSpeed "
                "wrote this checkpoint; go on as it was begun"
            )
        state = checkpoint.read_state(path)
        try:
            engine.load_state(state)
        except ValueError as error:
            raise SystemExit(f"--load_checkpoint: {path}: {error}") from None
        return state["client_state"]
