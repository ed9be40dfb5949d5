#!/usr/bin/env python3
"""What it costs to decode untrusted audio in a process with limits (``--sandbox_audio``) and not in one's own.

    python benchmarks/bench_sandbox.py

Work: the header of a clip of 10 s, and the whole of it, at 16 and at 44.1 kHz (16 bit, mono), a hundred times a round.
Baseline: the same functions in this process. Rounds are interleaved; the figures are medians. The samples must be
equal, or this ends with a message. No limit: it is what safety costs. Written to
``benchmarks/results/<date>_sandbox.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from harness import ROOT, Report, take_turns, timed

sys.path.insert(0, str(ROOT / "examples" / "r1_aqa"))

RATES, SECONDS, TIMES = (16_000, 44_100), 10, 100


def many(function: Callable[[Path], Any], path: Path) -> Callable[[], None]:
    """A round.

    :param function: Reads a file.
    :param path: File.
    """

    def work() -> None:
        for _ in range(TIMES):
            function(path)

    return work


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
    args = parser.parse_args()

    import audio_io
    from audio_sandbox import Sandbox

    report = Report("sandbox", __doc__, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        clips = {rate: Path(folder) / f"{rate}.wav" for rate in RATES}
        for rate, path in clips.items():
            noise = np.random.default_rng(0).uniform(-0.5, 0.5, SECONDS * rate)
            soundfile.write(path, noise, rate, subtype="PCM_16")
        starts = []
        for _ in range(args.rounds):
            sandbox = Sandbox()
            starts.append(timed(lambda sandbox=sandbox: sandbox.read_header(clips[RATES[0]]))[0].wall)
            sandbox.close()
        sandbox, ways = Sandbox(), {}
        for rate, path in clips.items():
            if not np.array_equal(sandbox.load(path), audio_io.load_audio(path)):
                raise SystemExit(f"the sandbox decodes {rate} Hz otherwise than this process")
            ways |= {
                f"decoded, {rate / 1000:g} kHz": many(audio_io.load_audio, path),
                f"decoded, {rate / 1000:g} kHz, sandbox": many(sandbox.load, path),
            }
        ways |= {
            "header": many(audio_io.read_header, clips[RATES[0]]),
            "header, sandbox": many(sandbox.read_header, clips[RATES[0]]),
        }
        for name, times in take_turns(ways, args.rounds).items():
            milliseconds = 1000 * statistics.median(each.wall for each in times) / TIMES
            report.judge(f"10 s of audio, {name}: milliseconds", milliseconds)
        report.judge("sandbox, start of its process: seconds", statistics.median(starts))
        sandbox.close()
    report.finish(times=TIMES)


if __name__ == "__main__":
    main()
