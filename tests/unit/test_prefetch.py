"""Clips decoded ahead and kept: the same batches as without, files as they are now, bounds, errors, no thread left."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_dataset import AudioPromptDataset
from conftest import run_code
from support.processors import make_dataset, training_row
from torch.utils.data import DataLoader, Dataset

from aqa.audio.decode import SAMPLING_RATE as RATE
from aqa.audio.decode import AudioError, load_audio
from aqa.audio.prefetch import DECODE_THREADS, PrefetchLoader, WaveformCache
from aqa.audio.reader import AudioReader
from lightrft.trainer.spmd_ppo_trainer import timed
from lightrft.utils.distributed import ResumableSampler

SECONDS = 20.0  # to wait for another thread, on a machine that does other things too
MEBIBYTE = 2**20


class Counting:
    """``load_audio`` that remembers what it was asked for."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, path: str) -> np.ndarray:
        self.paths.append(path)
        return load_audio(path)


class Rows(Dataset):
    """Rows that are their own number; row ``bad`` fails."""

    def __init__(self, count: int, bad: int | None = None) -> None:
        self.count, self.bad = count, bad
        self.asked: list[int] = []
        self.changed = threading.Condition()

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> list[int]:
        with self.changed:
            self.asked += indices
            self.changed.notify_all()
        if self.bad in indices:
            raise AudioError(f"sounds/{self.bad}.wav: does not exist")
        return indices

    def wait_for(self, rows: int) -> bool:
        """Until so many rows were asked for."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.asked) >= rows, SECONDS)


def write(path: Path, seed: int, seconds: float = 1.0) -> str:
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    return str(path)


def make_loader(rows: Dataset, batch_size: int = 3, world: int = 1, rank: int = 0) -> DataLoader:
    sampler = ResumableSampler(rows, world, rank, shuffle=True, seed=7, drop_last=True)
    return DataLoader(rows, batch_size, sampler=sampler, collate_fn=tuple, drop_last=True)


def helpers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("prefetch", "decode"))]


def no_helper_left() -> bool:
    end = time.monotonic() + SECONDS
    while helpers() and time.monotonic() < end:
        time.sleep(0.01)
    return not helpers()


# ---------------------------------------------------------------------------------------------------------------- cache
def test_a_clip_is_decoded_once_and_nobody_can_change_it(tmp_path):
    load = Counting()
    cache, path = WaveformCache(load, MEBIBYTE), write(tmp_path / "a.wav", 1)
    first = cache(path)
    np.testing.assert_array_equal(first, load_audio(path))
    assert cache(path) is first
    assert load.paths == [path]
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1.0


def change_size(path: Path) -> None:
    before = path.stat()
    write(path, 2, seconds=1.5)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_time(path: Path) -> None:
    before = path.stat()
    write(path, 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def change_file(path: Path) -> None:
    """Another file of the same size and time under the name, as ``cp -p`` and ``mv`` leave it."""
    before = path.stat()
    other = path.with_name("other.wav")
    write(other, 2)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [change_size, change_time, change_file])
def test_a_file_that_has_changed_is_read_again(tmp_path, change):
    cache, path = WaveformCache(load_audio, MEBIBYTE), write(tmp_path / "a.wav", 1)
    old = cache(path)
    change(Path(path))
    new = cache(path)
    assert not np.array_equal(old, new)
    np.testing.assert_array_equal(new, load_audio(path))
    assert cache.size == new.nbytes


def test_a_file_that_is_gone_or_broken_is_not_served(tmp_path):
    cache, path = WaveformCache(load_audio, MEBIBYTE), write(tmp_path / "a.wav", 1)
    cache(path)
    Path(path).write_bytes(b"")
    with pytest.raises(AudioError, match=r"a\.wav: is empty"):
        cache(path)
    assert cache.size == 0
    Path(path).unlink()
    with pytest.raises(AudioError, match=r"a\.wav: does not exist"):
        cache(path)


def test_the_bound_is_kept_and_what_is_there_stays(tmp_path):
    load = Counting()
    paths = [write(tmp_path / f"{i}.wav", i) for i in range(3)]
    limit = 2 * RATE * 4 + 100  # two clips of a second, 4 bytes a sample
    cache = WaveformCache(load, limit)
    for _ in range(2):
        for path in paths:
            cache(path)
            assert cache.size <= limit
    assert cache.size == 2 * RATE * 4
    assert load.paths == [*paths, paths[2]]  # the third finds no room
    write(Path(paths[0]), 9, seconds=0.25)  # frees most of its place, which the third does not fit into
    for path in paths:
        cache(path)
    assert cache.size == RATE * 4 + RATE
    cache = WaveformCache(load, 0)
    cache(paths[0])
    assert cache.size == 0


# -------------------------------------------------------------------------------------------------------------- dataset
def make_rows(paths: list[str], **kwargs) -> AudioPromptDataset:
    rows = [training_row(path) | {"reference": f"answer {i}"} for i, path in enumerate(paths)]
    return make_dataset({name: [row[name] for row in rows] for name in rows[0]}, **kwargs)


def test_a_batch_is_decoded_in_parallel_in_order_and_each_file_once(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{i}.wav", i) for i in range(2 * DECODE_THREADS)]
    together = threading.Barrier(DECODE_THREADS)
    load = Counting()

    def load_together(path: str, silence_ok: bool, seconds: float) -> np.ndarray:
        together.wait(SECONDS)  # breaks unless so many decode at the same time
        return load(path)

    monkeypatch.setattr("aqa.audio.reader.load_audio", load_together)
    dataset = make_rows(paths + paths[:1], cache_bytes=10 * MEBIBYTE)
    order = [len(paths), 0, *range(len(paths) - 1, 0, -1)]  # the first two ask for the same file
    for _ in range(2):  # the second time from memory
        rows = dataset.__getitems__(order)
        assert [row[2] for row in rows] == [f"answer {i}" for i in order]
        for index, (_, (wave, rate), _, _) in zip(order, rows, strict=True):
            np.testing.assert_array_equal(wave, load_audio(dataset.audio_paths[index]))
            assert rate == RATE
        assert rows[0][1][0] is rows[1][1][0] is dataset[0][1][0]
    assert sorted(load.paths) == paths
    assert not helpers()


def test_a_kept_clip_is_refused_where_its_link_leads_out(tmp_path):
    root = tmp_path / "audio"
    root.mkdir()
    write(tmp_path / "secret.wav", 1)
    (root / "link.wav").symlink_to(write(root / "clip.wav", 2))
    dataset = make_rows([str(root / "link.wav")], reader=AudioReader(folder=str(root)), cache_bytes=MEBIBYTE)
    assert len(dataset[0][1][0]) == RATE
    (root / "link.wav").unlink()
    (root / "link.wav").symlink_to(tmp_path / "secret.wav")
    with pytest.raises(AudioError, match=r"link\.wav: leads to .*secret\.wav"):
        dataset[0]


# ------------------------------------------------------------------------------------------------------------- prefetch
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_batches_and_their_order_are_the_loaders(world, rank):
    plain = make_loader(Rows(20), world=world, rank=rank)
    ahead = PrefetchLoader(make_loader(Rows(20), world=world, rank=rank))
    assert len(ahead) == len(plain) and ahead.batch_size == 3
    episodes = []
    for episode in range(3):
        for loader in (plain, ahead):
            loader.sampler.set_epoch(episode)
        episodes.append(list(ahead))
        assert episodes[-1] == list(plain)
        assert len(episodes[-1]) == len(plain)
    assert episodes[0] != episodes[1] != episodes[2]
    ahead.remaining = len(plain) + 1  # --max_steps ends inside the second of these episodes
    assert [len(list(ahead)) for _ in range(3)] == [len(plain), 1, 0]


def test_a_run_goes_on_inside_an_episode_where_it_was_left():
    def train(loader: PrefetchLoader, step: int, last: int) -> list[tuple]:
        """The runtime's loop over two episodes, left after a step."""
        done = []
        for episode in range(step // len(loader), 2):
            loader.sampler.set_epoch(episode)
            loader.sampler.start = step % len(loader) * loader.batch_size
            for batch in loader:
                step += 1
                done.append(batch)
                if step == last:
                    return done
            loader.sampler.start = 0
        return done

    whole = train(PrefetchLoader(make_loader(Rows(20))), 0, 12)
    assert len(whole) == 12
    for last in (1, 4, 6, 7, 11):  # six batches an episode; one more was prepared when the run was left
        first = train(PrefetchLoader(make_loader(Rows(20))), 0, last)
        assert first + train(PrefetchLoader(make_loader(Rows(20))), last, 12) == whole


def test_the_next_batch_is_prepared_meanwhile_and_no_other():
    rows = Rows(12)
    loader = PrefetchLoader(make_loader(rows))
    assert rows.wait_for(3)  # a new run's first rows, before anything asks for a batch
    first = list(loader.sampler)[:3]
    assert rows.asked == first
    batches = iter(loader)
    assert next(batches) == tuple(first)
    assert rows.wait_for(9)
    time.sleep(0.1)  # a third batch would show up now
    assert len(rows.asked) == 9
    batches.close()


def test_what_goes_wrong_is_raised_with_the_batch_that_it_belongs_to():
    order = list(make_loader(Rows(12)).sampler)
    rows = Rows(12, bad=order[7])
    batches = iter(PrefetchLoader(make_loader(rows)))
    assert next(batches) == tuple(order[:3])
    assert next(batches) == tuple(order[3:6])
    assert rows.wait_for(12)  # it has failed, or is about to
    with pytest.raises(AudioError, match=rf"sounds/{order[7]}\.wav: does not exist"):
        next(batches)
    assert no_helper_left()


def test_a_run_that_ends_inside_an_episode_needs_no_further_batch():
    order = list(make_loader(Rows(12)).sampler)
    rows = Rows(12, bad=order[7])
    loader = PrefetchLoader(make_loader(rows))
    loader.remaining = 2
    assert list(loader) == [tuple(order[:3]), tuple(order[3:6])] and order[7] not in rows.asked
    assert list(loader) == []


@pytest.mark.parametrize("way", ["to the end", "left", "closed", "failed"])
def test_no_thread_is_left(tmp_path, way):
    rows = Rows(12, bad=0 if way == "failed" else None)
    batches = iter(PrefetchLoader(make_loader(rows)))
    if way in ("to the end", "failed"):
        with pytest.raises(AudioError if way == "failed" else StopIteration):
            while True:
                next(batches)
    else:
        next(batches)
        assert helpers()
        if way == "closed":
            batches.close()
        else:
            del batches
    assert no_helper_left()


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(os.getpid(), signal.SIGINT)"])
def test_a_process_that_is_left_in_the_middle_ends(tmp_path, end):
    """Also with the iterator still in use, as LightRFT's loop leaves it."""
    code = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
from aqa.audio.prefetch import PrefetchLoader
from torch.utils.data import DataLoader
class Rows(list):
    def __getitems__(self, indices):
        time.sleep(0.2)
        return indices
batches = iter(PrefetchLoader(DataLoader(Rows(range(100)), 2)))
next(batches)
print("stepping", flush=True)
{end}
time.sleep(60)
"""
    done = run_code(code, check=False)
    assert done.stdout == "stepping\n"
    assert done.returncode == (3 if "exit" in end else -2), done.stderr


def test_what_is_waited_for_is_measured():
    class Slow(Rows):
        def __getitems__(self, indices: list[int]) -> list[int]:
            time.sleep(0.3)
            return indices

    loader = PrefetchLoader(make_loader(Slow(9)))
    waits = []
    for _, waited in timed(loader):
        assert waited == pytest.approx(loader.seconds_waited, abs=0.1)
        waits.append(waited)
        time.sleep(1.0)  # the step
    assert waits[0] > 0.25
    assert max(waits[1:]) < 0.25  # the next batch was ready
    assert [waited > 0.25 for _, waited in timed(make_loader(Slow(9)))] == [True] * 3
