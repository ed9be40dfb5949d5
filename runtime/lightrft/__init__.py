"""A small LightRFT-compatible runtime on DeepSpeed, vLLM and torch.distributed, for CPU and GPU.

It provides the part of LightRFT 0.1.1's public interface that ``examples/r1_aqa`` uses, under the same names, so that
the example runs from PyPI alone. LightRFT itself takes its place where ``LIGHTRFT_HOME`` names a checkout.
"""

import os as _os

__version__ = "0.1.1"
HOST = "runtime"  # tells this package from the real LightRFT, which has no such name

for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the training process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else vLLM pins this process, training included, to its own cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_PLUGINS": "",
    "TOKENIZERS_PARALLELISM": "false",
    # OpenMP threads that wait soon sleep: spinning ones make steps several times slower on a machine with other work
    "GOMP_SPINCOUNT": "3000",
    # kernels that oneDNN keeps, one for each layer and number of tokens: a quarter of its default; steps take as long,
    # and a run on the CPU stops growing after some hundred steps, not thousands
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}.items():
    _os.environ.setdefault(_name, _value)
