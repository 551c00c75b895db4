"""
A real systemd for a test: booted in namespaces of its own, beside everything else.

It is process 1 there, with a cgroup, a network and a /run of its own, so the real unit
files run as they are: ``/opt/taskd`` is put together out of this checkout. Needs root,
and a kernel that lets it; ``why_not`` says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from tests.integration.daemon import CHECKOUT, SAMPLE_TASKS, Connection, wait_until

__all__ = ["Manager", "why_not"]

_SYSTEMD: Final = Path("/lib/systemd/systemd")
_UNITS: Final = Path("/run/systemd/system")
_CLONE_NEWNET: Final = 0x40000000
_COMMAND_SECONDS: Final = 60.0
_PROGRAMS: Final = ("setpriv", "unshare", "nsenter", "mount", "systemctl")

_T = TypeVar("_T")

_BOOT: Final = """\
#!/bin/sh
# Runs as process 1 of the new namespaces, and becomes systemd.
set -e
here=$1 base=$2
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# Nothing of the machine's own is to change.
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys
for device in kmsg console; do
    if [ -e /dev/$device ]; then mount --bind /dev/null /dev/$device; fi
done
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir -p /opt/checkout /opt/python /opt/taskd/bin /opt/taskd/lib /opt/etc /run/systemd/system
mount --bind "$here/checkout" /opt/checkout
if [ "$base" = /usr ]; then rmdir /opt/python; ln -s /usr /opt/python
else mount --bind "$base" /opt/python; fi
mount --bind "$here/lib" /opt/taskd/lib
cp "$here/pyvenv.cfg" /opt/taskd/
cp "$here/twistd" /opt/taskd/bin/
ln -s "/opt/python/bin/$(cat "$here/python")" /opt/taskd/bin/python3
cp -r "$here/units/." /run/systemd/system/
# /etc is this machine's; only what is to be there is put over it.
mkdir -p /run/etc /run/etc.work
mount -t tmpfs -o mode=755 tmpfs /run/etc
cp -a /etc/passwd /etc/group /etc/nsswitch.conf /etc/hosts /run/etc/
cp -a /etc/ld.so.cache /etc/ld.so.conf /etc/ld.so.conf.d /etc/alternatives /run/etc/
cp -r "$here/etc/." /run/etc/
mount --bind /run/etc /etc
# Credentials come over a mount that systemd makes elsewhere.
mount --make-rshared /
exec env -i container=taskd PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    SYSTEMD_UNIT_PATH=/run/systemd/system /lib/systemd/systemd --system \\
    --unit=test.target --log-target=console --log-level=info --show-status=no
"""

_DROP_IN: Final = """\
[Service]
# A Python that is not Debian's may have a library of its own.
Environment=LD_LIBRARY_PATH=/opt/python/lib
StandardOutput=append:/run/taskd.log
StandardError=append:/run/taskd.log
"""

_TWISTD: Final = """\
#!/opt/taskd/bin/python3
import sys
sys.path.insert(0, "/opt/checkout")
from twisted.scripts.twistd import run
run()
"""


def _cgroups() -> Path | None:
    """Find where cgroups of the second version are mounted."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(where)
    return None


@cache
def why_not() -> str:
    """Tell what a systemd cannot be booted for here, or give ''."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if not _SYSTEMD.exists() or missing:
        return f"not installed: {', '.join(missing) or 'systemd'}"
    if os.getuid() != 0:
        return "only root may"
    if _cgroups() is None:
        return "no cgroup2 to write to"
    try:
        manager = Manager({})
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        return f"systemd does not come up: {error}"
    manager.stop()
    return ""


class Manager:
    """
    One systemd, and the units of ``etc``.

    Args:
        drop_ins: Further unit files, by their paths below the directory of units.
        files: Further files, by their paths below /etc.
    """

    def __init__(self, drop_ins: Mapping[str, str], files: Mapping[str, str] | None = None) -> None:
        cgroups = _cgroups()
        assert cgroups is not None
        self._cgroup = cgroups / f"taskd-test-{uuid.uuid4().hex}"
        self._cgroup.mkdir()
        self._directory = Path(tempfile.mkdtemp(prefix="taskd-test-"))
        self._prepare(drop_ins, files or {})
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(self._cgroup)),
                    # Should the test be killed, so is all of this.
                    *("setpriv", "--pdeathsig", "KILL"),
                    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("--cgroup", "--net", "--uts", "--ipc"),
                    *(str(self._directory / "boot"), str(self._directory), sys.base_prefix),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._first = wait_until(self._find_first, what="systemd")
            wait_until(lambda: self.systemctl("is-system-running") == "running", what="systemd")
        except BaseException as error:
            error.add_note((self._directory / "log").read_text(errors="replace"))
            self.stop()
            raise

    def _prepare(self, drop_ins: Mapping[str, str], files: Mapping[str, str]) -> None:
        here = self._directory
        units, etc = here / "units", here / "etc"
        for directory in (units, etc / "taskd"):
            directory.mkdir(parents=True)
        (here / "checkout").symlink_to(CHECKOUT)
        (here / "lib").symlink_to(Path(sys.prefix) / "lib")
        (here / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
        (here / "python").write_text(f"python{sys.version_info[0]}.{sys.version_info[1]}")
        for name, text in (("twistd", _TWISTD), ("boot", _BOOT)):
            (here / name).write_text(text)
            (here / name).chmod(0o755)
        shutil.copy(SAMPLE_TASKS, etc / "taskd" / "tasks.py")
        for name in ("taskd.service", "taskd.socket"):
            shutil.copy(CHECKOUT / "etc" / name, units)
        for name in ("test", "sysinit", "basic", "shutdown", "sockets", "network", "multi-user"):
            (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        drop_ins = {"taskd.service.d/00-test.conf": _DROP_IN, **drop_ins}
        for root, texts in ((units, drop_ins), (etc, files)):
            for name, text in texts.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")

    def _find_first(self) -> int:
        """Find process 1, as it is called here, once it is systemd."""
        if self._process.poll() is not None:
            raise AssertionError(f"unshare ended with status {self._process.returncode}")
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children or "systemd" not in Path(f"/proc/{children[0]}/comm").read_text():
            return 0
        return int(children[0])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program beside systemd."""
        return subprocess.run(
            ["nsenter", "-t", str(self._first), "-a", *command],
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )

    def systemctl(self, *words: str) -> str:
        """Run ``systemctl`` and give all that it says, without the last line's end."""
        done = self.run("systemctl", "--no-pager", *words)
        return (done.stdout + done.stderr).rstrip("\n")

    def show(self, name: str, unit: str = "taskd.service") -> str:
        """Give one property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit)

    def signal(self, number: signal.Signals, title: str) -> None:
        """Send a signal to every process of the service whose title begins like that."""
        for pid, found in self.processes().items():
            if found.startswith(title):
                os.kill(pid, number)

    def processes(self) -> dict[int, str]:
        """Give the titles of the service's processes, by their pids."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            procs = self._cgroup / "system.slice" / "taskd.service" / "cgroup.procs"
            for pid in procs.read_text().split():
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0")
                    found[int(pid)] = words.replace(b"\0", b" ").decode(errors="replace")
        return found

    @property
    def log(self) -> str:
        """Give what systemd has said, and the service, as far as it was started."""
        said = (self._directory / "log").read_text(errors="replace")
        path = Path(f"/proc/{self._first}/root/run/taskd.log")
        return said + (path.read_text(errors="replace") if path.exists() else "")

    def inside(self, act: Callable[[], _T]) -> _T:
        """Do something in a thread that is in systemd's network; sockets made there stay there."""
        results: list[_T] = []
        failures: list[BaseException] = []

        def body() -> None:
            try:
                fd = os.open(f"/proc/{self._first}/ns/net", os.O_RDONLY)
                try:
                    if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                finally:
                    os.close(fd)
                results.append(act())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return results[0]

    def connect(self) -> Connection:
        """Open a connection to the unit's port."""
        return self.inside(lambda: Connection("127.0.0.1", 12345))

    def ask(self, function: str, args: Any = (), **members: Any) -> Any:
        """Ask the daemon for one task."""
        with self.connect() as connection:
            return connection.ask(function, args, **members)

    def status_text(self) -> str:
        """Give the STATUS line that systemd shows."""
        return self.show("StatusText")

    def stop(self) -> None:
        """End systemd and all that it has started; the kernel does that for process 1."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, AttributeError):
                os.kill(self._first, signal.SIGKILL)
            self._process.kill()
        self._process.wait(_COMMAND_SECONDS)
        wait_until(self._remove_cgroups, what="an empty cgroup")
        shutil.rmtree(self._directory)

    def _remove_cgroups(self) -> bool:
        for path, _, _ in os.walk(self._cgroup, topdown=False):
            os.rmdir(path)
        return True
