"""Two hosts on one machine: Linux namespaces for network, processes, mounts and name, joined by a virtual cable."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

CABLE = "veth0"  # the interface's name, on both hosts
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")


def cannot() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (util-linux, iproute2)"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"this user may not make namespaces: {tried.stderr.strip()}"
    command = ["unshare", "--net", "ip", "link", "add", CABLE, "type", "veth", "peer", "name", "veth1"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"no virtual cable can be made: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """A host: everything in it is a child of its first process, which ends when this process ends or lets go.

    The kernel then kills whatever runs in it, and takes its network down, whatever has happened here.

    :param address: Its address on the cable.
    :param hosts_file: Put in place of ``/etc/hosts``.
    """

    def __init__(self, name: str, address: str, hosts_file: Path) -> None:
        self.name, self.address = name, address
        self.started: list[subprocess.Popen] = []
        boot = f"hostname {name}; mount --bind {hosts_file} /etc/hosts; ip link set lo up; echo up; exec cat >/dev/null"
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-ec", boot]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._outside = subprocess.Popen(command, **pipes)
        if self._outside.stdout.readline() != "up\n":
            raise OSError(f"{name} did not start")
        (self.first,) = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children").read_text().split()
        self._inside = ["nsenter", "--target", self.first, *NAMESPACES]

    def ip(self, *arguments: str) -> None:
        """Run ``ip`` in its network."""
        self.run("ip", *arguments)

    def start(self, command: Sequence[object], folder: Path, **kwargs: Any) -> subprocess.Popen:
        """Start a command on it."""
        # nsenter leaves the folder when it enters the mounts
        command = [*self._inside, "env", f"--chdir={folder}", *map(str, command)]
        self.started.append(subprocess.Popen(command, **kwargs))
        return self.started[-1]

    def run(self, *command: object) -> str:
        """Run a command on it.

        :return: What it prints.
        """
        command = [*self._inside, *map(str, command)]
        return subprocess.run(command, check=True, timeout=20, capture_output=True, text=True).stdout

    def processes(self) -> list[str]:
        """Command lines of what runs on it, its first process aside."""
        mine = os.readlink(f"/proc/{self.first}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if entry.name != self.first and os.readlink(entry / "ns/pid") == mine:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue  # has ended meanwhile
        return [command for command in found if command]  # a zombie has none

    def listening(self) -> list[str]:
        """TCP ports that something listens on."""
        lines = self.run("ss", "--no-header", "--listening", "--tcp", "--numeric").splitlines()
        return [line.split()[3] for line in lines]

    def kill(self) -> None:
        """What a power cut does: everything on it is killed at once."""
        if self._outside.poll() is None:
            os.kill(int(self.first), signal.SIGKILL)
        self._outside.wait(20)

    def close(self) -> None:
        """Kill it, and wait for what was started."""
        self.kill()
        self._outside.stdin.close()
        self._outside.stdout.close()
        for process in self.started:
            process.wait(20)


class Pair:
    """``node0`` and ``node1``, a cable between them and to nowhere else. A context manager."""

    def __enter__(self) -> list[Host]:
        self._folder = tempfile.TemporaryDirectory()
        self.hosts: list[Host] = []
        try:
            for i, address in enumerate(ADDRESSES):
                # as Debian and Ubuntu have it: a host's own name is an address that no other host reaches
                lines = [f"{a if j != i else '127.0.1.1'} node{j}" for j, a in enumerate(ADDRESSES)]
                hosts_file = Path(self._folder.name) / f"hosts{i}"
                hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
                self.hosts.append(Host(f"node{i}", address, hosts_file))
            ends = [host.first for host in self.hosts]
            # made inside the two: this machine's own network never sees it
            cable = ("netns", ends[0], "type", "veth", "peer", "name", CABLE, "netns", ends[1])
            subprocess.run(["ip", "link", "add", CABLE, *cable], check=True, timeout=20)
            for host in self.hosts:
                host.ip("addr", "add", f"{host.address}/24", "dev", CABLE)
                host.ip("link", "set", CABLE, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self.hosts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.close()
        self._folder.cleanup()
