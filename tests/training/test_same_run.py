"""Ranks that differ: in data, folders, flags or fate. All of them end, and say the same."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import EXAMPLE, ROOT, child_environment
from support.training import SMALL, end

from lightrft.utils import rank_watch
from lightrft.utils.console import console
from lightrft.utils.distributed import digest

TEN_SECONDS = 100  # tenths


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def group(rank: int, count: int, port: int) -> dict[str, str]:
    """A rank on a host of its own: nothing but themselves connects them."""
    values = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": ROOT / "runtime"}
    return {name: str(value) for name, value in values.items()}


def fate(tmp_path: Path, lost: int, deed: Callable[[], int], others: Callable[[], int]) -> tuple[list[int], list[str]]:
    """Statuses and outputs of three ranks of which one does something and the others something else."""
    port, children = free_port(), []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            try:
                out = os.open(tmp_path / f"rank{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                console.stream = sys.stderr = os.fdopen(out, "w", buffering=1)
                os.environ.update(group(rank, 3, port))
                rank_watch.GRACE = 0.5
                rank_watch.join()
                if rank == lost:
                    rank_watch._watch.complete.wait()
                    time.sleep(0.3)
                os._exit(deed() if rank == lost else others())
            finally:
                os._exit(99)
        children.append(child)
    statuses = []
    try:
        for child in children:
            for _ in range(TEN_SECONDS * 6):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses.append(os.waitstatus_to_exitcode(status))
                    break
                time.sleep(0.1)
            else:
                pytest.fail("still running")
    finally:
        for child in children[len(statuses) :]:
            os.kill(child, signal.SIGKILL)
    return statuses, [(tmp_path / f"rank{rank}").read_text() for rank in range(3)]


def work() -> int:
    time.sleep(120)
    return 0


def fail() -> int:
    rank_watch.leave(ValueError("row 7 is bad"))
    return 3


def follow() -> int:
    """What main() does with an error that may come of another's: a collective fails where a rank has gone."""
    return 7 + rank_watch.leave(RuntimeError("Connection closed by peer"), may_follow=True)


def follow_what_comes() -> int:
    rank_watch.GRACE = 60.0
    rank_watch._watch._learned.wait(60)
    return follow()


def done_later() -> int:
    time.sleep(2.5)
    return 2 if rank_watch.leave() or rank_watch._watch.lost else 0


@pytest.mark.parametrize("lost", [0, 2])
def test_a_rank_that_is_killed_is_named_by_all_others(tmp_path, lost):
    statuses, shown = fate(tmp_path, lost, lambda: os.kill(os.getpid(), signal.SIGKILL), work)
    for rank in {0, 1, 2} - {lost}:
        assert statuses[rank] == 1, shown
        assert f"ERROR: rank {lost} on {socket.gethostname()} is lost: its process ended without a word" in shown[rank]
    assert statuses[lost] == -signal.SIGKILL


@pytest.mark.parametrize("lost", [1])
def test_what_a_rank_died_of_is_what_the_others_say(tmp_path, lost):
    statuses, shown = fate(tmp_path, lost, fail, work)
    for rank in {0, 1, 2} - {lost}:
        assert statuses[rank] == 1, shown
        assert f"ERROR: rank {lost} on {socket.gethostname()} failed: ValueError: row 7 is bad" in shown[rank]
    assert statuses[lost] == 3 and "ERROR" not in shown[lost]


def test_an_error_that_follows_names_what_it_follows_from(tmp_path):
    statuses, shown = fate(tmp_path, 1, lambda: os._exit(9), follow_what_comes)
    for rank in (0, 2):
        assert statuses[rank] == 8
        assert shown[rank].count("ERROR: rank 1 on") == 1 and "Connection closed by peer" in shown[rank]
    # and one that follows from nothing is told
    statuses, shown = fate(tmp_path, 1, follow, work)
    assert statuses == [1, 7, 1]
    assert "failed: RuntimeError: Connection closed by peer" in shown[0]


def test_ranks_that_are_done_may_go_one_by_one(tmp_path):
    for first in (0, 2):
        statuses, shown = fate(tmp_path, first, lambda: rank_watch.leave() or 0, done_later)
        assert statuses == [0, 0, 0] and "ERROR" not in "".join(shown)


def speak() -> int:
    if rank_watch._watch.rank == 0:  # the store is its own, so it goes last
        rank_watch._watch.store.wait(["lightrft/spoken/1", "lightrft/spoken/2"], timedelta(seconds=30))
    first = rank_watch.first_to_speak()
    rank_watch.leave()
    return 10 + first


def test_one_rank_of_a_host_speaks_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # DeepSpeed sets it for the tests before
    statuses, shown = fate(tmp_path, 0, speak, speak)
    assert statuses == [11, 11, 11], shown  # a rank is a host here


def test_a_stranger_is_shown_the_door(monkeypatch):
    """Rank 0 listens to all the network: who does not know the secret counts for nothing."""
    monkeypatch.setattr(rank_watch.dist, "rendezvous", lambda *_, **__: iter([(rank_watch.dist.HashStore(), 0, 2)]))
    hub = rank_watch.RankWatch(0, 2)
    hub.connect()
    port, secret, _ = rank_watch.json.loads(hub.store.get("lightrft/rank_watch"))
    for words in (b'["guess", 1, "evil"]\n', b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000, b"[1, 2, 3]\n", b"null\n"):
        with socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.settimeout(5)
            stranger.sendall(words)
            assert stranger.recv(1) == b""
    assert not hub.complete.is_set()
    with socket.create_connection(("127.0.0.1", port), 5) as friend:
        for part in (f'["{secret}", 1', ', "node1"]\nnull\n'):  # in two pieces
            friend.sendall(part.encode())
            time.sleep(0.1)
        assert hub.complete.wait(5)
    time.sleep(0.2)
    assert hub.lost is None


def test_a_digest_shows_any_difference():
    rows = [{"a": "x", "n": 1}, {"a": "y", "n": 2}]
    assert digest(rows) == digest([dict(row) for row in rows])
    assert len({digest(rows), digest(rows[::-1]), digest(rows[:1]), digest([rows[0], {"a": "y", "n": 3}])}) == 4


# ------------------------------------------------------------------------------------------ through the whole script
def other_answer(folder: Path) -> None:
    table = pq.read_table(folder / "data" / "train.parquet").to_pylist()
    table[5]["reference"] += "s"
    pq.write_table(pa.Table.from_pylist(table), folder / "data" / "train.parquet")


CASES = {  # what is done to rank 1's folder, flags, what both say
    "other data": (other_answer, (), ("the ranks of this run differ", "train.parquet: ", "rank 1 (", "Give all hosts")),
    "no data": (lambda folder: (folder / "data" / "train.parquet").unlink(), (), ("data: holds no train.parquet",)),
    "folder not shared": (
        lambda folder: None,
        (),
        ("--ckpt_path ", "rank 1 (", "does not see what rank 0", "--disable_ds_ckpt"),
    ),
    "no checkpoint": (
        lambda folder: (folder / "out" / "_actor" / "latest").unlink(),
        ("--load_checkpoint",),
        ("--load_checkpoint: out holds no checkpoint",),
    ),
    "other flag": (lambda folder: None, ("--seed", "$RANK"), ("--seed: 0 on rank 0 (", "1 on rank 1 (", "same flags")),
}
SAMPLE = ("other data",)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.faults] * (case not in SAMPLE)) for case in CASES]
)
def test_ranks_that_see_something_else_all_say_so(tiny_model, demo_parquet, tmp_path, case):
    """Relative paths from two folders: what two hosts have that share no file system."""
    change, flags, expected = CASES[case]
    folders = [tmp_path / f"host{i}" for i in (0, 1)]
    for folder in folders:
        (folder / "data").mkdir(parents=True)
        (folder / "out" / "_actor").mkdir(parents=True)
        (folder / "out" / "_actor" / "latest").write_text("step_000001")
        (folder / "data" / "train.parquet").write_bytes((demo_parquet / "train.parquet").read_bytes())
    change(folders[1])
    shared = () if case in ("folder not shared", "no checkpoint") else ("--ckpt_path", tmp_path)
    where = ("--pretrain", tiny_model, "--prompt_data", "data", "--save_path", "out", *shared)
    command = " ".join(map(str, (sys.executable, EXAMPLE / "train_colocate.py", *where, *SMALL, *flags)))
    port = free_port()
    processes = [
        subprocess.Popen(
            ["sh", "-c", f"exec {command} --engine_type hf"],
            env=child_environment() | group(rank, 2, port),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    shown = [end(process, 240) for process in processes]
    assert all(process.returncode in (1, 2) for process in processes), shown
    for text in shown:
        for part in expected:
            assert part in text, text[-3000:]
        assert "Traceback" not in text
