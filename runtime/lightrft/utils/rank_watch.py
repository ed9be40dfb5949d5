"""The end of one rank ends all, soon, and they say which it was, where and why.

Collectives do not do that by themselves: when a host falls silent, gloo and NCCL wait for many minutes, and when a
process dies they name an address at best. Here every rank holds a TCP connection to rank 0 and a thread that waits for
what happens to it:

- an error is told before its rank ends;
- the kernel of a process that is killed closes its connection at once;
- a host without power or network no longer answers the keep-alive probes of the other's kernel.

It is kernels that answer the probes, so a process that only takes long is not taken for a dead one. Rank 0 passes on
what it learns. A rank that learns of a loss has a few seconds to end by itself; then it is ended.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from lightrft.utils.console import console

SILENCE = 30  # seconds without an answer after which a host counts as lost
PROBE_EVERY = 5  # seconds
JOIN_SECONDS = 300  # for all ranks to come; torchrun starts them together, but they read Python's files first
GRACE = 5.0  # seconds that a rank has to end by itself
CAUSE_LENGTH = 2000  # characters
SILENT = f"no answer for {SILENCE} s; its host is down, or the network is"
GONE = "its process ended without a word (killed? out of memory?); its own host may show more"


@dataclass(frozen=True)
class Loss:
    """A rank that is no longer there.

    :param rank: Which.
    :param host: Where it ran.
    :param cause: Why.
    :param told: It has said so itself, also on its own host's terminal.
    """

    rank: int
    host: str
    cause: str
    told: bool = False


@dataclass
class _Line:
    """A connection, and who is at its other end."""

    socket: socket.socket
    rank: int = -1  # not known yet
    host: str = "an unknown host"
    received: bytes = b""

    def send(self, message: list | None) -> None:
        with contextlib.suppress(OSError):  # who is not there any more need not know
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[list | None]:
        """Messages that are there.

        :raises OSError: if the connection broke.
        :raises EOFError: if the other end closed it.
        """
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        *lines, self.received = (self.received + data).split(b"\n")
        return [json.loads(line) for line in lines]


@dataclass
class Peers:
    """This rank's connections, and what it has learned. Made by :func:`join`.

    :param rank: This rank.
    :param world: Ranks of the run.
    """

    rank: int
    world: int
    store: dist.Store | None = None
    loss: Loss | None = None
    complete: threading.Event = field(default_factory=threading.Event)  # all connections stand
    _lost: threading.Event = field(default_factory=threading.Event)
    _lines: dict[int, _Line] = field(default_factory=dict)  # by rank
    left: bool = False  # or about to
    _said: threading.Lock = field(default_factory=threading.Lock)

    # ------------------------------------------------------------ connecting
    def connect(self) -> None:
        """Open the connections; rank 0 waits for them in its thread.

        :raises SystemExit: if rank 0 is not there, or torchrun's store.
        """
        host = socket.gethostname()
        # torchrun's store has just been there, on all hosts
        there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            patience = timedelta(seconds=SILENCE if there else JOIN_SECONDS)
            self.store = store = next(dist.rendezvous("env://", timeout=patience))[0]
            store.set_timeout(timedelta(seconds=JOIN_SECONDS))
            if self.rank == 0:
                everywhere = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
                server = socket.create_server(("", 0), backlog=self.world, **everywhere)
                secret = secrets.token_hex(16)
                store.set("lightrft/peers", json.dumps([server.getsockname()[1], secret, host]))
                self._run(self._gather, server, secret)
                return
            port, secret, hub = json.loads(store.get("lightrft/peers"))
            line = _Line(socket.create_connection((os.environ["MASTER_ADDR"], port), JOIN_SECONDS), 0, hub)
        except (OSError, RuntimeError) as error:  # the store's errors are torch's DistError, a RuntimeError
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise SystemExit(f"rank {self.rank} on {host} and the others do not meet at {where}: {error}") from None
        watch_kernel(line.socket)
        line.send([secret, self.rank, host])
        self._lines[0] = line
        self.complete.set()
        self._run(self._watch)

    def _run(self, target: object, *args: object) -> None:
        threading.Thread(target=target, args=args, name="peers", daemon=True).start()

    def _gather(self, server: socket.socket, secret: str) -> None:
        """Rank 0: take the others' connections, then watch all of them."""
        deadline = time.monotonic() + JOIN_SECONDS
        with selectors.DefaultSelector() as selector, server:
            selector.register(server, selectors.EVENT_READ)
            while len(self._lines) < self.world - 1:
                if time.monotonic() > deadline:
                    missing = sorted(set(range(1, self.world)) - self._lines.keys())
                    cause = f"it has not come within {JOIN_SECONDS} s; missing are {', '.join(map(str, missing))}"
                    return self._learn(Loss(missing[0], "an unknown host", cause))
                for key, _ in selector.select(1.0):
                    if key.fileobj is server:
                        connection, _ = server.accept()
                        watch_kernel(connection)
                        selector.register(connection, selectors.EVENT_READ, _Line(connection))
                    elif key.data.rank < 0:
                        self._greet(selector, key.data, secret)
                    else:
                        self._read(selector, key.data)
            self.complete.set()
            selector.unregister(server)
            self._watch(selector)

    def _greet(self, selector: selectors.BaseSelector, line: _Line, secret: str) -> None:
        try:
            messages = list(line.read())
            if not messages and len(line.received) < CAUSE_LENGTH:
                return  # not all of it is there yet
            secret_of_it, rank, host = messages[0]
            if not secrets.compare_digest(secret_of_it, secret):
                raise ValueError
        except (OSError, EOFError, ValueError, TypeError, IndexError):  # not one of ours
            selector.unregister(line.socket)
            line.socket.close()
            return
        line.rank, line.host = rank, host
        self._lines[line.rank] = line
        self._handle(selector, line, messages[1:])

    # ------------------------------------------------------------ watching
    def _watch(self, selector: selectors.BaseSelector | None = None) -> None:
        """Wait for what happens to the connections.

        :param selector: With the connections; made for this rank's only one if not given.
        """
        selector = selector or selectors.DefaultSelector()
        if self.rank:
            selector.register(self._lines[0].socket, selectors.EVENT_READ, self._lines[0])
        while selector.get_map():
            for key, _ in selector.select():
                self._read(selector, key.data)

    def _read(self, selector: selectors.BaseSelector, line: _Line) -> None:
        try:
            self._handle(selector, line, line.read())
        except (EOFError, ConnectionResetError, BrokenPipeError):
            selector.unregister(line.socket)
            self._learn(Loss(line.rank, line.host, GONE))
        except OSError:  # timed out, no route
            selector.unregister(line.socket)
            self._learn(Loss(line.rank, line.host, SILENT))

    def _handle(self, selector: selectors.BaseSelector, line: _Line, messages: list[list | None]) -> None:
        for message in messages:
            if message is None or message[0] == line.rank:  # what comes after its last word is no news
                selector.unregister(line.socket)
                if message is not None:
                    self._learn(Loss(*message))
                return
            self._learn(Loss(*message))

    def _learn(self, loss: Loss) -> None:
        if self.loss is not None or self.left:
            return
        if self.rank == 0:
            self._tell(loss)
        self.loss = loss
        self._lost.set()
        self._run(self._end)

    def _tell(self, loss: Loss) -> None:
        for line in self._lines.values():
            line.send([loss.rank, loss.host, loss.cause, loss.told])

    def _end(self) -> None:
        time.sleep(GRACE)
        if not self.left:
            self.say()
            os._exit(1)

    # ------------------------------------------------------------ leaving
    def say(self) -> None:
        """Print the loss: one rank a host does, and not where it has been printed already."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        loss, node = self.loss, self.rank // local
        here = loss.rank // local == node
        speaker = node * local + (loss.rank == node * local)  # the host's first rank that is left
        if not self._said.acquire(blocking=False) or self.rank != speaker or (here and loss.told):
            return
        console.fail(
            f"rank {loss.rank} on {loss.host} {'failed' if loss.told else 'is lost'}: {loss.cause}\n"
            f"This run ends, also on {socket.gethostname()}. Started again on all hosts, it goes on from its newest "
            "checkpoint with --load_checkpoint (RESUME=1)."
        )

    def leave(self, cause: str | None, may_follow: bool) -> bool:
        """Tell the others, the last thing that this rank does.

        :param cause: Of a failure; None if all is well or all ranks end for the same reason.
        :param may_follow: The failure may be what another rank's loss has led to: that one is then named instead.
        :return: Whether it was.
        """
        if may_follow and self._lost.wait(2.0):
            self.left = True
            self.say()
            return True
        self.left = True
        if self.rank == 0 and cause is not None:
            self.complete.wait(JOIN_SECONDS)  # those that come late shall hear of it, too
        if cause is None:
            for line in self._lines.values():
                line.send(None)
        else:
            self._tell(Loss(self.rank, socket.gethostname(), cause[:CAUSE_LENGTH], told=True))
        return False


_mine: Peers | None = None
_tried = False


def watch_kernel(connection: socket.socket) -> None:
    """Let the kernel find out when the host at the other end is no longer there.

    :param connection: A read of it then fails, :data:`SILENCE` seconds after the last answer.
    """
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = SILENCE // PROBE_EVERY - 1
    for option, value in (
        (socket.TCP_KEEPIDLE, PROBE_EVERY),
        (socket.TCP_KEEPINTVL, PROBE_EVERY),
        (socket.TCP_KEEPCNT, probes),
        (socket.TCP_USER_TIMEOUT, SILENCE * 1000),  # for what was sent and is not acknowledged
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def join() -> None:
    """Connect with the other ranks, if there are any. Called first of all, so that nothing goes unnoticed; tries once.

    :raises SystemExit: if rank 0 is not there, or torchrun's store.
    """
    global _mine, _tried
    if not _tried and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _tried = True
        peers = Peers(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        peers.connect()
        _mine = peers
        atexit.register(leave)


def own_address() -> str | None:
    """This host's address on the network that leads to the other hosts; None if there is but one host.

    Waits until all ranks have come.
    """
    if _mine is None or _mine.world == int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return None
    _mine.complete.wait()  # or this process is ended
    other = max(_mine._lines)  # of rank 0: on the last host, not on its own
    return _mine._lines[other].socket.getsockname()[0].removeprefix("::ffff:")


def first_to_speak() -> bool:
    """Whether no other rank of this host has asked before: what all have to say is said once."""
    if _mine is None:
        return True
    node = _mine.rank // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _mine.store.compare_set(f"lightrft/spoken/{node}", "", str(_mine.rank)).decode() == str(_mine.rank)


def leave(error: BaseException | None = None, may_follow: bool = False) -> bool:
    """Tell the other ranks how this one ends, the last thing that it does.

    :param error: What ended it; an exit status alone is one that all ranks have agreed on.
    :param may_follow: The error may be what another rank's loss has led to: that one is then named on the terminal
        instead, and the error goes to standard error, which is the log file.
    :return: Whether it was.
    """
    if _mine is None or _mine.left:
        return False
    cause = None
    if error is not None and not (isinstance(error, SystemExit) and isinstance(error.code, int | None)):
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        cause = f"{kind}{error}"
    followed = _mine.leave(cause, may_follow)
    if followed:
        traceback.print_exception(error, file=sys.stderr)
    return followed
