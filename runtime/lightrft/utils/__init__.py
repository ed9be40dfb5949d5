"""Flags, data loading, console and metrics.

Names that need transformers or datasets are loaded on first use, so that ``--help`` and a refused configuration do not
wait for them.
"""

from importlib import import_module

from lightrft.utils.cli_args import add_arguments

_LAZY = {"blending_datasets": "data", "get_tokenizer_processor_vl": "processor"}

__all__ = ["add_arguments", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
