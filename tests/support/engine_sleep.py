"""vLLM's sleep mode on a CPU, which has none: what a GPU gives back is filled with garbage.

    python tests/support/engine_sleep.py DROP|KEEP SCRIPT [ARGUMENTS ...]

runs a script so, where vLLM drops or keeps its weights.
"""

import functools
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

import lightrft_launcher


def discard(worker: Any, tags: tuple[str, ...]) -> None:
    """The GPU worker's ``discard``."""
    assert tuple(tags) == ("kv_cache",)
    lightrft_launcher.spoil(worker.model_runner.kv_caches)


def let_sleep(engine: Any, keep_weights: bool, put: Callable[[Any, str, Any], Any] = setattr) -> None:
    """Let an engine on a CPU sleep.

    :param put: Sets an attribute; a test's ``monkeypatch.setattr`` takes all back.
    """
    worker = engine.llm.collective_rpc(lambda wrapper: wrapper.worker)[0]
    put(worker, "sleep", functools.partial(lightrft_launcher.sleep, worker))
    put(worker, "discard", functools.partial(discard, worker))
    put(worker, "wake_up", lambda tags=None: None)
    put(engine, "_can_sleep", True)
    put(engine, "_keep_weights", keep_weights)


def main() -> None:
    """Run the script."""
    keep, script = {"DROP": False, "KEEP": True}[sys.argv[1]], os.path.abspath(sys.argv[2])
    sys.argv = [script, *sys.argv[3:]]
    sys.path.insert(0, os.path.dirname(script))
    sys.meta_path.insert(0, lightrft_launcher._Hooked())

    def make(original: Callable) -> Callable:
        @functools.wraps(original)
        def init(engine: Any, *args: Any, **kwargs: Any) -> None:
            original(engine, *args, **kwargs)
            let_sleep(engine, keep)

        return init

    module = "lightrft.engines.vllm_engine"
    lightrft_launcher.after_import(module)(lambda found: lightrft_launcher.wrap(found.VLLMEngine, "__init__", make))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
