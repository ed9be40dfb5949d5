"""Sound out of videos: ffmpeg in parallel, one clip a process, 16 kHz mono 16-bit WAV.

A clip is written to a draft, which is renamed only after training's own decoder has read it. A file with the clip's
name is therefore whole, and a run that was interrupted or killed goes on where it was.
"""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from aqa.common.files import draft_of, remove_drafts
from aqa.data.rows import RowError, wav_name_of_video

SECONDS = 120.0  # a clip of 10 s takes a tenth of a second; the rest is for a slow network file system
SLACK = 0.5  # s by which sound may be shorter than its container says
SLACK_SHARE = 0.05  # the same as a share of its length
MIN_FREE = 64 * 2**20  # bytes; with less room than this, a failure is blamed on the disk and not on the clip
TOOLS = ("ffmpeg", "ffprobe")
VIDEO = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".ts", ".3gp", ".wmv")
SOUND = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus")


class ExtractError(RuntimeError):
    """The whole extraction cannot go on, whatever the clip; the message says why."""


class Outcome(NamedTuple):
    """What became of one clip; ``kind`` is None if it is there.

    :param name: File name of the clip's WAV.
    :param kind: ``missing``, ``no_audio_stream``, ``broken``, ``cut_short``, ``timeout`` or ``unusable`` (silence, too
        short, not finite: training refuses it).
    :param source: The file that it was to come from.
    :param skipped: Whether it was there before.
    """

    name: str
    kind: str | None = None
    reason: str = ""
    source: str | None = None
    skipped: bool = False


class ClipError(ValueError):
    """One file does not give its clip."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def missing_tools() -> list[str]:
    """The programs of :data:`TOOLS` that are not here."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def index_media(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """Find the files of all clips below a folder.

    :param folder: Videos or sounds named ``<youtube id>_<second>.<suffix>``, with or without zeros before the second,
        in any subfolders.
    :return: Files by the name of the clip's WAV, several in the order of their paths; and the number of files with
        other names.
    """
    found: dict[str, list[Path]] = {}
    others = 0
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            try:
                key = wav_name_of_video(stem) if suffix.lower() in VIDEO + SOUND else None
            except RowError:
                key = None
            if key is None:
                others += 1
            else:
                found.setdefault(key, []).append(Path(parent, name))
    return found, others


def extract_all(
    names: Iterable[str],
    media: dict[str, list[Path]],
    folder: Path,
    workers: int,
    advance: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Make every clip that is not there yet.

    :param names: File names of the WAVs.
    :param media: From :func:`index_media`.
    :param workers: ffmpeg processes at a time.
    :param advance: Called after each clip.
    :return: One outcome for each name, in order.
    :raises ExtractError: if the disk is full or ffmpeg cannot be started.
    """
    remove_drafts(folder.glob(".*"))
    pool = ThreadPoolExecutor(workers)

    def one(name: str) -> Outcome:
        outcome = extract(name, media.get(name, []), folder)
        advance()
        return outcome

    try:
        return list(pool.map(one, names))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: those that are running end, no more begin


def extract(name: str, sources: list[Path], folder: Path) -> Outcome:
    """Make one clip, from the first of its files that holds it.

    :param sources: Files to try, in order.
    :raises ExtractError: if the disk is full or ffmpeg cannot be started.
    """
    target = folder / name
    if is_whole(target):
        return Outcome(name, skipped=True)
    if not sources:
        return Outcome(name, "missing", "no file of this clip below the media folder")
    draft = draft_of(target)  # an ffmpeg that outlived a killed run may still write to that run's draft
    problems = []
    for source in sources:
        try:
            convert(source, draft)
            os.replace(draft, target)
            return Outcome(name, source=str(source))
        except ClipError as error:
            problems.append(Outcome(name, error.kind, error.reason, str(source)))
        except OSError as error:
            raise ExtractError(f"{target}: {error.strerror or error}") from error
        finally:
            draft.unlink(missing_ok=True)
    return problems[0]


def is_whole(path: Path) -> bool:
    """Whether a WAV that :func:`convert` may have written is there in full.

    That it has its name is not enough: after a power cut a file may lack its end.
    """
    try:
        with path.open("rb") as file:
            head = file.read(44)
            return (
                len(head) == 44
                and head[:4] == b"RIFF"
                and head[36:40] == b"data"
                and int.from_bytes(head[40:44], "little") == os.fstat(file.fileno()).st_size - 44 > 0
            )
    except FileNotFoundError:
        return False


def convert(source: Path, draft: Path) -> None:
    """Decode the first audio stream of a file, 30 s at most, which is what the model hears.

    :param draft: Where the WAV goes.
    :raises ClipError: if the file gives no sound that can be used.
    :raises ExtractError: if the disk is full or ffmpeg cannot be started.
    """
    from aqa.audio.decode import MAX_SECONDS, SAMPLING_RATE, AudioError, load_audio

    promised = probe_seconds(source)
    # file: names that begin with - or hold a colon; bitexact: no encoder's name in the WAV
    command = [
        *("ffmpeg", "-nostdin", "-hide_banner", "-loglevel", "error", "-threads", "1"),
        *("-i", f"file:{source.absolute()}", "-map", "0:a:0", "-vn", "-sn", "-dn"),
        *("-map_metadata", "-1", "-fflags", "+bitexact", "-flags:a", "+bitexact"),
        *("-t", f"{MAX_SECONDS:g}", "-ac", "1", "-ar", str(SAMPLING_RATE), "-c:a", "pcm_s16le", "-f", "wav"),
        *("-y", f"file:{draft.absolute()}"),
    ]
    done = run(command)
    if done.returncode != 0:
        if shutil.disk_usage(draft.parent).free < MIN_FREE:
            raise ExtractError(f"{draft.parent}: the disk is full; make room and give the same command again")
        raise ClipError("broken", how_it_ended(done))
    try:
        seconds = len(load_audio(draft)) / SAMPLING_RATE
    except AudioError as error:
        raise ClipError("unusable", str(error).removeprefix(f"{draft}: ")) from error
    expected = min(promised, MAX_SECONDS)
    if seconds < expected - max(SLACK, SLACK_SHARE * expected):
        raise ClipError("cut_short", f"{seconds:.1f} s of sound, where the file promises {expected:.1f} s")


def probe_seconds(source: Path) -> float:
    """How long the sound of a file should be.

    :return: Seconds by the audio stream, or by the container where the stream does not say; 0 if neither does.
    :raises ClipError: if the file cannot be read, or has no audio stream.
    """
    entries = "stream=duration:format=duration"
    command = ["ffprobe", "-v", "error", "-select_streams", "a:0"]
    done = run([*command, "-show_entries", entries, "-of", "json", f"file:{source.absolute()}"])
    if done.returncode != 0:
        raise ClipError("broken", how_it_ended(done))
    found = json.loads(done.stdout)
    if not found.get("streams"):
        raise ClipError("no_audio_stream", "has no audio stream")
    for part in (found["streams"][0], found.get("format", {})):
        try:
            seconds = float(part.get("duration", "nan"))
        except ValueError:  # "N/A"
            continue
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return 0.0


def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg or ffprobe, in a process group of its own, because a Ctrl-C on the terminal is ours to handle.

    :raises ClipError: if it takes longer than :data:`SECONDS`.
    :raises ExtractError: if it cannot be started.
    """
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, process_group=0, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ClipError("timeout", f"{command[0]} took more than {SECONDS:g} s and was stopped") from error
    except OSError as error:
        raise ExtractError(f"{command[0]} cannot be started: {error.strerror or error}") from error


def how_it_ended(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    # leave out who says it, as in "[mov,mp4 @ 0x5581] moov atom not found" and "file:/path: Invalid data"
    said = "; ".join(re.sub(r"^(\[.*? @ \w+\]|file:.*:(?= )) *", "", line.strip()) for line in lines[-2:])
    said = "".join(character if character.isprintable() else "?" for character in said)[:200]
    status = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return f"{done.args[0]} ended with {status}" + (f": {said}" if said else "")
