"""
Several machines in one: a network namespace for each daemon, and a bridge between them.

The test itself, its callers and a balancer are in a namespace of their own, the lab,
so that nothing of the real network is touched. Threads that are to be in it say so.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from typing import Final

__all__ = ["BALANCER", "Lab", "why_no_lab"]

BALANCER: Final = "10.77.0.100"
"""The lab's own address, at which a balancer may listen."""

_CLONE_NEWNET: Final = 0x40000000
_SECONDS: Final = 10


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)


def _enter(fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def why_no_lab() -> str:
    """Tell why this machine lets us have no lab, or give ''."""
    if shutil.which("ip") is None:
        return "there is no ip command: apt-get install iproute2"
    try:
        lab = Lab(1)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode(errors='replace').strip()}"
    lab.close()
    return ""


class Lab:
    """
    The namespaces; the thread that makes it is in the lab until ``close``.

    Args:
        nodes: How many there are beside the lab's own.

    Raises:
        CalledProcessError: It is not permitted here.
    """

    def __init__(self, nodes: int) -> None:
        self._name = f"taskd-{os.getpid()}"
        self._names = [self._name]
        self._is_away = False
        self._home_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _run("ip", "netns", "add", self._name)
            self._ip("link", "set", "lo", "up")
            self._ip("link", "add", "bridge", "type", "bridge")
            self._ip("addr", "add", f"{BALANCER}/24", "dev", "bridge")
            self._ip("link", "set", "bridge", "up")
            for number in range(1, nodes + 1):
                self._add(number)
            self.enter()
            self._is_away = True
        except BaseException:
            self.close()
            raise

    def _ip(self, *words: str) -> None:
        _run("ip", "-n", self._name, *words)

    def _add(self, number: int) -> None:
        name, link = f"{self._name}-{number}", f"node{number}"
        _run("ip", "netns", "add", name)
        self._names.append(name)
        self._ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("link", "set", link, "master", "bridge", "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.address(number)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            _run("ip", "-n", name, *words)

    def address(self, number: int) -> str:
        """Give a node's address; nodes count from 1."""
        return f"10.77.0.{number}"

    def unplug(self, number: int) -> None:
        """Cut a node off from the network, so that nobody hears of it."""
        self._ip("link", "set", f"node{number}", "down")

    def plug_in(self, number: int) -> None:
        """Let a node be heard again."""
        self._ip("link", "set", f"node{number}", "up")

    def under(self, number: int) -> tuple[str, ...]:
        """Give what runs a command on a node; 0 is the lab itself."""
        return ("ip", "netns", "exec", self._name if not number else f"{self._name}-{number}")

    def enter(self) -> None:
        """Have the sockets that this thread makes from now on be in the lab."""
        fd = os.open(f"/run/netns/{self._name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Go home, and remove it; what runs in it is to have ended."""
        if self._is_away:
            _enter(self._home_fd)
        os.close(self._home_fd)
        for name in self._names:
            subprocess.run(
                ["ip", "netns", "del", name], capture_output=True, timeout=_SECONDS, check=False
            )
