"""The host in use, after :func:`aqa.hosts.locate.find_host` has put it on ``sys.path``."""

from aqa.common.versions import commit_of
from aqa.hosts.base import Host
from aqa.hosts.lightrft.contract import TESTED
from aqa.hosts.lightrft.host import LightRFTHost
from aqa.hosts.locate import host_folder, host_version
from aqa.hosts.runtime import RuntimeHost

_RUNTIME, _LIGHTRFT = RuntimeHost(), LightRFTHost()


def current_host() -> Host:
    """The runtime of this repository if ``lightrft`` is that, else LightRFT itself."""
    import lightrft  # here, because find_host() decides which one is found

    return _RUNTIME if getattr(lightrft, "HOST", None) == "runtime" else _LIGHTRFT


def describe_host() -> str:
    """Name, version and path of the LightRFT in use; of LightRFT itself also its commit and the one that was tested."""
    host, folder = current_host(), host_folder()
    commit = f" at commit {commit_of(folder)} (tested: {TESTED})" if host is _LIGHTRFT else ""
    return f"{host.name} {host_version()}{commit}, {folder}"
