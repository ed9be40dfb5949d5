"""vLLM and training in one process: the stream and the linear function of each (stand-ins for a GPU and for vLLM)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import functional

from lightrft.engines.base import Sampling
from lightrft.engines.vllm_engine import VLLMEngine, _load


class Stream:
    """What was on it when another stream began to wait for it is done for that one."""

    def __init__(self) -> None:
        self.work: set[str] = set()

    def wait_stream(self, other: Stream) -> None:
        self.work |= other.work


class GPU:
    """``torch.cuda`` as far as it is used; work is noted on the present stream."""

    def __init__(self) -> None:
        self.default = self.present = Stream()
        self.functions: list[object] = []

    def current_stream(self) -> Stream:
        return self.present

    def set_stream(self, stream: Stream) -> None:
        self.present = stream

    def run(self, work: str) -> None:
        self.present.work.add(work)
        self.functions.append(functional.linear)


class LLM:
    """As vLLM 0.32 with ranks that share an engine: the first use of NCCL sets another stream, for good."""

    def __init__(self, **_: object) -> None:
        self.side = Stream()
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(reset_encoder_cache=lambda: None))
        self.reset_prefix_cache = self.reset_mm_cache = lambda: None
        self.gpu.run("load")
        self.side.wait_stream(self.gpu.present)
        self.gpu.set_stream(self.side)

    def generate(self, *_: object, **__: object) -> list:
        assert self.gpu.present is self.side
        assert {"load", "train", "weights"} <= self.side.work  # it sees what training has done
        self.gpu.run("generate")
        if self.fails:
            raise RuntimeError("no room")
        return []

    def collective_rpc(self, function: Callable, **_: object) -> list:
        if function is _load:  # the other one replaces a method, and computes nothing
            self.gpu.run("weights")
        return [(set(), {})]

    def sleep(self, level: int) -> None:
        self.gpu.run("sleep")

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.gpu.run("wake")


@pytest.mark.parametrize("fails", [False, True])
def test_training_keeps_its_stream_and_sees_what_vllm_has_done(tiny_model, monkeypatch, fails):
    gpu = GPU()
    for name in ("current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(functional, "linear", zero3_linear_wrap)  # as zero.Init leaves it
    LLM.gpu, LLM.fails = gpu, fails
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **_: None))

    engine = VLLMEngine(str(tiny_model), torch.bfloat16, max_model_len=64, tensor_parallel_size=2)
    assert gpu.present is gpu.default and "load" in gpu.default.work
    gpu.run("train")
    engine.load_weights([])
    assert "weights" in gpu.default.work and "weights" not in engine.llm.side.work
    if fails:
        with pytest.raises(RuntimeError, match="no room"):
            engine.generate([[1, 2]], [Sampling()])
    else:
        engine.generate([[1, 2]], [Sampling()])
    engine.sleep()
    engine.wake_up()
    assert gpu.present is gpu.default
    assert {"generate", "sleep", "wake"} <= gpu.default.work
    assert functional.linear is zero3_linear_wrap
    plain = torch._C._nn.linear
    assert gpu.functions == [plain, zero3_linear_wrap, zero3_linear_wrap, plain, plain, plain]
