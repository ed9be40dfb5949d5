#!/usr/bin/env python3
"""Run a script that trains on LightRFT, on a machine without a GPU. For tests; nothing of it is used on a GPU.

    LIGHTRFT_HOME=/path/to/LightRFT python tests/lightrft_launcher.py [--hook FILE.py ...] SCRIPT [ARGUMENTS ...]

LightRFT needs CUDA in three ways: it imports packages (flash-attn and SGLang, though it does not use them here), names
devices, and calls ``torch.cuda``. The launcher puts empty packages in the place of the first, makes every device name
mean the CPU, and lets the calls do nothing; it replaces NCCL by gloo and vLLM's GPU worker by its CPU worker. All of
this is patched at run time. Training, rollouts and the example's own patches run as on a GPU.

A hook is a file that is executed before the script. Tests use it to change one thing in the middle of a run: it
registers functions with :func:`after_import`.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import runpy
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "GOMP_SPINCOUNT": "3000",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
STAND_INS = {"flash_attn", "sglang"}
_hooks: dict[str, list[Callable[[Any], None]]] = {}


def after_import(name: str) -> Callable[[Callable], Callable]:
    """Decorator: call the function with a module, right after its first import.

    :param name: Full name of the module.
    """

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        _hooks.setdefault(name, []).append(function)
        return function

    return register


class _Hooked(importlib.abc.MetaPathFinder):
    """Calls a module's hooks once the module has been executed. First on ``sys.meta_path``; the others find it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _hooks:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        functions, execute = _hooks.pop(name), spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            for function in functions:
                function(module)

        spec.loader.exec_module = exec_module
        return spec


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes up a package that is not installed: any module of it, any class in them. Last on ``sys.meta_path``."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to execute."""


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a function by what is made of it.

    :param make: Gets the original, returns the replacement.
    """
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def redirect_devices() -> None:
    """Make every CUDA device mean the CPU."""
    import torch
    import torch.utils._device

    # `with torch.device("meta")` knows the factories by identity, from a set made at first use. Wrapped before that,
    # they are not in that set, and from_pretrained() leaves the rotary embeddings uninitialised.
    torch.utils._device._device_constructors()

    def on_cpu(device: Any) -> Any:
        if isinstance(device, bool):
            return device
        if isinstance(device, int) or str(device).startswith("cuda"):
            return torch.device("cpu")
        return device

    def with_device(original: Callable, positional: bool) -> Callable:
        def redirected(*args: Any, **kwargs: Any) -> Any:
            if positional and len(args) > 1:
                args = (args[0], on_cpu(args[1]), *args[2:])
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            return original(*args, **kwargs)

        return redirected

    for owner in (torch.Tensor, torch.nn.Module):
        wrap(owner, "to", functools.partial(with_device, positional=True))
        owner.cuda = lambda self, *_, **__: self
    wrap(torch.nn.Module, "to_empty", functools.partial(with_device, positional=False))
    factories = (
        "tensor as_tensor zeros ones empty full arange rand randn randint zeros_like ones_like empty_like full_like"
    )
    for name in factories.split():
        wrap(torch, name, functools.partial(with_device, positional=False))

    def returns(value: Any) -> Callable:
        return lambda *_, **__: value  # a function of its own each time: Dynamo refuses one under two names

    actions = "synchronize empty_cache set_device manual_seed manual_seed_all ipc_collect"
    for name in (*actions.split(), "reset_max_memory_allocated", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, returns(None))
    for name in ("current_device", "memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(torch.cuda, name, returns(0))
    torch.cuda.mem_get_info = returns((1, 1))
    torch.cuda.memory_summary = returns("")


def redirect_communication() -> None:
    """Make every process group a gloo group, and device meshes ones of the CPU."""
    import torch.distributed as dist
    from torch.distributed import device_mesh, distributed_c10d

    def with_gloo(original: Callable) -> Callable:
        def redirected(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], str):
                args = ("gloo", *args[1:])
            if kwargs.get("backend") is not None:
                kwargs["backend"] = "gloo"
            return original(*args, **kwargs)

        return redirected

    for name in ("init_process_group", "new_group", "new_subgroups_by_enumeration"):
        wrap(distributed_c10d, name, with_gloo)
        setattr(dist, name, getattr(distributed_c10d, name))
    wrap(device_mesh, "init_device_mesh", lambda original: lambda _, *args, **kw: original("cpu", *args, **kw))
    dist.init_device_mesh = device_mesh.init_device_mesh

    @after_import("deepspeed")
    def _(deepspeed: Any) -> None:
        wrap(deepspeed, "init_distributed", lambda original: lambda dist_backend=None, **kw: original("gloo", **kw))

    @after_import("deepspeed.ops.adam")
    def _(adam: Any) -> None:
        import torch

        adam.FusedAdam = torch.optim.AdamW  # the same update; the fused one would have to be compiled


def spoil(tensors: Iterable[Any]) -> None:
    """Fill tensors with what is wrong in any of them."""
    for tensor in tensors:
        tensor.data.fill_(7.0)


def sleep(worker: Any, level: int) -> None:
    """The GPU worker's ``sleep``: KV cache and parameters are lost, buffers stay. Level 1 would copy the weights."""
    assert level == 2
    model = worker.get_model()
    spoil([*worker.model_runner.kv_caches, *model.parameters()])
    for layer in model.modules():
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = None  # it holds the weight of a linear layer, repacked


def redirect_vllm() -> None:
    """Give LightRFT's worker vLLM's CPU worker as its base, and load weights as that one can."""

    @after_import("lightrft.strategy.vllm_utils")
    def _(module: Any) -> None:
        import vllm.v1.worker.gpu_worker as gpu_worker
        from vllm.v1.worker.cpu_worker import CPUWorker

        gpu_worker.Worker = CPUWorker

        def on_cpu(original: Callable) -> Callable:
            def get_vllm_engine(*args: Any, **kwargs: Any) -> Any:
                kwargs["enable_sleep"] = False  # refused on the CPU
                return original(*args, enforce_eager=True, **kwargs)

            return get_vllm_engine

        wrap(module, "get_vllm_engine", on_cpu)

    @after_import("lightrft.strategy.vllm_utils.vllm_worker_wrap_no_ray")
    def _(module: Any) -> None:
        def update_weight(self: Any, name: str, dtype: Any, shape: Any, weight: Any, empty_cache: bool = False) -> None:
            """Load all weights with the last: the CPU build repacks linear weights, so single ones would be lost."""
            assert dtype == self.model_config.dtype and tuple(shape) == tuple(weight.shape), (name, dtype, shape)
            received = self.__dict__.setdefault("_received", [])
            received.append((name, weight.detach().clone()))
            if empty_cache:
                self._received = []
                if "weights_iterator" in inspect.signature(self.model_runner.reload_weights).parameters:
                    self.model_runner.reload_weights(weights_iterator=iter(received))
                else:
                    self.model_runner.model.load_weights(received)

        module.WorkerWrap.update_weight, module.WorkerWrap.sleep = update_weight, sleep


def main() -> None:
    """Redirect, then run the script as if it had been started directly."""
    arguments = sys.argv[1:]
    hooks = []
    while arguments[:1] == ["--hook"]:
        hooks.append(arguments[1])
        arguments = arguments[2:]
    script = os.path.abspath(arguments[0])
    sys.argv = [script, *arguments[1:]]
    sys.path.insert(0, os.path.dirname(script))
    sys.dont_write_bytecode = True  # leaves no files in the checkout
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.meta_path.insert(0, _Hooked())
    sys.meta_path.append(_StandIns())
    redirect_devices()
    redirect_communication()
    redirect_vllm()
    sys.modules["lightrft_launcher"] = sys.modules["__main__"]  # hooks import after_import from it
    for hook in hooks:
        runpy.run_path(hook)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
