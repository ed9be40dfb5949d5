"""When one rank ends, all ranks end soon, and they print which rank it was, on which host and why.

Collectives do not provide this: when a host falls silent, gloo and NCCL wait for many minutes, and when a process dies
they name a network address at best. So every rank keeps a TCP connection to rank 0, and a thread watches it. There are
three ways to notice that a rank is lost:

- it fails: it sends its error before it ends;
- its process is killed: its kernel closes the connection at once;
- its host loses power or network: the host no longer answers the keep-alive probes of the other kernel.

Kernels answer these probes, so a process that is merely slow does not count as lost. Rank 0 forwards what it learns to
all ranks. A rank that learns of a lost rank has :data:`GRACE` seconds to end by itself; then its watcher ends it.

Messages are JSON lines. The first one of a connection is ``[secret, rank, host]``; then come ``[rank, host, cause,
reported]`` for each lost rank, and ``null`` as the goodbye of a rank that ends as planned.
"""

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
from dataclasses import astuple, dataclass, field
from datetime import timedelta

import torch.distributed as dist

from lightrft.utils.console import console

SILENCE = 30  # seconds without an answer after which a host counts as lost
PROBE_EVERY = 5  # seconds
JOIN_SECONDS = 300  # for all ranks to connect; torchrun starts them together, but importing takes some of them longer
GRACE = 5.0  # seconds
CAUSE_LENGTH = 2000  # characters
SILENT = f"no answer for {SILENCE} s; its host is down, or the network is"
GONE = "its process ended without a word (killed? out of memory?); its own host may show more"


@dataclass(frozen=True)
class LostRank:
    """A rank that has ended before the run did.

    :param reported: It sent the cause itself and has printed it on its own host's terminal.
    """

    rank: int
    host: str
    cause: str
    reported: bool = False


@dataclass
class _Connection:
    socket: socket.socket
    rank: int = -1  # unknown until its greeting arrives
    host: str = "an unknown host"
    received: bytes = b""

    def send(self, message: tuple | list | None) -> None:
        with contextlib.suppress(OSError):  # the other rank has ended
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[list | None]:
        """The complete messages that have arrived.

        :raises OSError: if the connection broke.
        :raises EOFError: if the other end closed it.
        """
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        *lines, self.received = (self.received + data).split(b"\n")
        return [json.loads(line) for line in lines]


@dataclass
class RankWatch:
    """This rank's connections, and the first lost rank that it has learned of. Made by :func:`join`."""

    rank: int
    world: int
    store: dist.Store | None = None
    lost: LostRank | None = None
    complete: threading.Event = field(default_factory=threading.Event)  # all ranks are connected
    leaving: bool = False  # this rank ends by itself
    _learned: threading.Event = field(default_factory=threading.Event)  # lost is set
    _connections: dict[int, _Connection] = field(default_factory=dict)  # by rank
    _printed: threading.Lock = field(default_factory=threading.Lock)  # taken by the thread that prints

    # ------------------------------------------------------------ connecting
    def connect(self) -> None:
        """Connect to rank 0; rank 0 itself waits for the others in its thread.

        :raises SystemExit: if torchrun's store or rank 0 cannot be reached.
        """
        host = socket.gethostname()
        # with an agent's store torchrun has just used it on every host, so it answers at once or not at all
        reached = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            timeout = timedelta(seconds=SILENCE if reached else JOIN_SECONDS)
            self.store = store = next(dist.rendezvous("env://", timeout=timeout))[0]
            store.set_timeout(timedelta(seconds=JOIN_SECONDS))
            if self.rank == 0:
                dual = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
                server = socket.create_server(("", 0), backlog=self.world, **dual)
                secret = secrets.token_hex(16)
                store.set("lightrft/rank_watch", json.dumps([server.getsockname()[1], secret, host]))
                self._start_thread(self._accept, server, secret)
                return
            port, secret, host_of_0 = json.loads(store.get("lightrft/rank_watch"))
            to_0 = socket.create_connection((os.environ["MASTER_ADDR"], port), JOIN_SECONDS)
        except (OSError, RuntimeError) as error:  # the store raises torch's DistError, a RuntimeError
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise SystemExit(f"rank {self.rank} on {host} and the others do not meet at {address}: {error}") from None
        keep_alive(to_0)
        self._connections[0] = _Connection(to_0, 0, host_of_0)
        self._connections[0].send([secret, self.rank, host])
        self.complete.set()
        selector = selectors.DefaultSelector()
        selector.register(to_0, selectors.EVENT_READ, self._connections[0])
        self._start_thread(self._watch, selector)

    @staticmethod
    def _start_thread(target: object, *args: object) -> None:
        threading.Thread(target=target, args=args, name="rank_watch", daemon=True).start()

    def _accept(self, server: socket.socket, secret: str) -> None:
        """At rank 0: accept the connections of the other ranks, then watch all of them."""
        deadline = time.monotonic() + JOIN_SECONDS
        with selectors.DefaultSelector() as selector, server:
            selector.register(server, selectors.EVENT_READ)
            while len(self._connections) < self.world - 1:
                if time.monotonic() > deadline:
                    missing = sorted(set(range(1, self.world)) - self._connections.keys())
                    cause = f"it has not come within {JOIN_SECONDS} s; missing are {', '.join(map(str, missing))}"
                    return self._learn(LostRank(missing[0], "an unknown host", cause))
                for key, _ in selector.select(1.0):
                    if key.fileobj is server:
                        accepted, _ = server.accept()
                        keep_alive(accepted)
                        selector.register(accepted, selectors.EVENT_READ, _Connection(accepted))
                    elif key.data.rank < 0:
                        self._greet(selector, key.data, secret)
                    else:
                        self._read(selector, key.data)
            self.complete.set()
            selector.unregister(server)
            self._watch(selector)

    def _greet(self, selector: selectors.BaseSelector, connection: _Connection, secret: str) -> None:
        """Read a connection's first message; close the connection if it does not hold the secret."""
        try:
            messages = list(connection.read())
            if not messages and len(connection.received) < CAUSE_LENGTH:
                return  # the rest is still on its way
            received, rank, host = messages[0]
            if not secrets.compare_digest(received, secret):
                raise ValueError
        except (OSError, EOFError, ValueError, TypeError, IndexError):  # not a rank of this run
            selector.unregister(connection.socket)
            connection.socket.close()
            return
        connection.rank, connection.host = rank, host
        self._connections[rank] = connection
        self._handle(selector, connection, messages[1:])

    # ------------------------------------------------------------ watching
    def _watch(self, selector: selectors.BaseSelector) -> None:
        """Handle what arrives, until every connection has ended."""
        while selector.get_map():
            for key, _ in selector.select():
                self._read(selector, key.data)

    def _read(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        try:
            self._handle(selector, connection, connection.read())
        except (EOFError, ConnectionResetError, BrokenPipeError):
            selector.unregister(connection.socket)
            self._learn(LostRank(connection.rank, connection.host, GONE))
        except OSError:  # timed out, or no route
            selector.unregister(connection.socket)
            self._learn(LostRank(connection.rank, connection.host, SILENT))

    def _handle(self, selector: selectors.BaseSelector, connection: _Connection, messages: list[list | None]) -> None:
        for message in messages:
            if message is not None:
                self._learn(LostRank(*message))
            if message is None or message[0] == connection.rank:  # ignore anything after a rank's own last message
                selector.unregister(connection.socket)
                return

    def _learn(self, lost: LostRank) -> None:
        if self.lost is not None or self.leaving:
            return
        if self.rank == 0:
            self._send_to_all(lost)
        self.lost = lost
        self._learned.set()
        self._start_thread(self._end_after_grace)

    def _send_to_all(self, lost: LostRank) -> None:
        for connection in self._connections.values():
            connection.send(astuple(lost))

    def _end_after_grace(self) -> None:
        time.sleep(GRACE)
        if not self.leaving:
            self.print_lost()
            os._exit(1)

    # ------------------------------------------------------------ leaving
    def print_lost(self) -> None:
        """Print the lost rank once on each host, but not on its own host if it has printed the cause itself."""
        ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        lost, node = self.lost, self.rank // ranks_per_host
        on_this_host = lost.rank // ranks_per_host == node
        first_left = node * ranks_per_host + (lost.rank == node * ranks_per_host)  # first rank of the host that is left
        if not self._printed.acquire(blocking=False) or self.rank != first_left or (on_this_host and lost.reported):
            return
        console.fail(
            f"rank {lost.rank} on {lost.host} {'failed' if lost.reported else 'is lost'}: {lost.cause}\n"
            f"This run ends, also on {socket.gethostname()}. Started again on all hosts, it goes on from its newest "
            "checkpoint with --load_checkpoint (RESUME=1)."
        )

    def leave(self, cause: str | None, may_follow: bool) -> bool:
        """See the module's :func:`leave`.

        :param cause: Of a failure; None if all is well or all ranks end for the same reason.
        """
        if may_follow and self._learned.wait(2.0):
            self.leaving = True
            self.print_lost()
            return True
        self.leaving = True
        if cause is None:
            for connection in self._connections.values():
                connection.send(None)
            return False
        if self.rank == 0:
            self.complete.wait(JOIN_SECONDS)  # ranks that connect late must learn of the failure, too
        self._send_to_all(LostRank(self.rank, socket.gethostname(), cause[:CAUSE_LENGTH], reported=True))
        return False


_watch: RankWatch | None = None
_tried = False


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel probe the other host: :data:`SILENCE` seconds after its last answer, reading fails."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, PROBE_EVERY),
        (socket.TCP_KEEPINTVL, PROBE_EVERY),
        (socket.TCP_KEEPCNT, SILENCE // PROBE_EVERY - 1),
        (socket.TCP_USER_TIMEOUT, SILENCE * 1000),  # milliseconds, for data that was sent and is not acknowledged
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def join() -> None:
    """Connect with the other ranks, if there are any; only the first call does something.

    Call it before anything that can fail, so that no failure goes unnoticed.

    :raises SystemExit: if torchrun's store or rank 0 cannot be reached.
    """
    global _watch, _tried
    if not _tried and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _tried = True
        watch = RankWatch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        watch.connect()
        _watch = watch
        atexit.register(leave)


def own_address() -> str | None:
    """This host's address on the network that leads to the other hosts, once all ranks have connected.

    None if all ranks are on one host.
    """
    if _watch is None or _watch.world == int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return None
    _watch.complete.wait()  # if a rank never connects, the watcher ends this process
    highest = max(_watch._connections)  # at rank 0 this one leads to the last host, not to its own
    return _watch._connections[highest].socket.getsockname()[0].removeprefix("::ffff:")


def first_to_speak() -> bool:
    """True for the first rank of each host that asks: it prints errors that all its host's ranks have in common."""
    if _watch is None:
        return True
    node = _watch.rank // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _watch.store.compare_set(f"lightrft/spoken/{node}", "", str(_watch.rank)).decode() == str(_watch.rank)


def leave(error: BaseException | None = None, may_follow: bool = False) -> bool:
    """Tell the other ranks how this one ends; the last thing that it does.

    :param error: What ended it. A SystemExit with a number is one that all ranks have agreed on, and no failure.
    :param may_follow: The error may only be the consequence of a lost rank, such as a collective that failed. If so,
        the lost rank is named on the terminal, and the error goes to standard error, which is the log file.
    :return: Whether it was such a consequence.
    """
    if _watch is None or _watch.leaving:
        return False
    cause = None
    if error is not None and not (isinstance(error, SystemExit) and isinstance(error.code, int | None)):
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        cause = f"{kind}{error}"
    followed = _watch.leave(cause, may_follow)
    if followed:
        traceback.print_exception(error, file=sys.stderr)
    return followed
