"""The wheel: what is in it, and that it works where the checkout is out of sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.daemon import CHECKOUT, SAMPLE_TASKS, Daemon, temporary_directory
from tests.integration.gateway import Gateway

LONGEST_RUN_SECONDS = 300.0
"""Long enough to fetch and install the dependencies over a slow line."""

NOT_SOURCE = shutil.ignore_patterns(
    ".git", "*.egg-info", "build", "dist", "__pycache__", ".*_cache", "_trial_temp*", "dropin.cache"
)


def run(*command: str | Path, directory: Path) -> str:
    """
    Run a program to its end, without the checkout on its import path.

    Returns:
        What it wrote to stdout.

    Raises:
        AssertionError: It failed; the message holds what it wrote.
    """
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=directory,
        env=environ,
        capture_output=True,
        text=True,
        timeout=LONGEST_RUN_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


class WheelTests(SynchronousTestCase):
    def test_wheel(self) -> None:
        """A wheel built from the tree holds the package alone, and is all that a daemon needs."""
        directory = temporary_directory(self)
        wheel = self.build(directory)
        self.check_files(wheel)
        programs = self.install(wheel, directory)
        self.check_in_use(programs)
        self.check_without_web(programs)
        run(programs / "pip", "install", "--quiet", f"{wheel}[web]", directory=directory)
        self.check_gateway(programs)

    def build(self, directory: Path) -> Path:
        source = directory / "source"
        shutil.copytree(CHECKOUT, source, ignore=NOT_SOURCE)
        run(
            *(sys.executable, "-m", "build", "--wheel", "--outdir", directory, source),
            directory=directory,
        )
        (wheel,) = directory.glob("*.whl")
        shutil.rmtree(source)
        return wheel

    def check_files(self, wheel: Path) -> None:
        names = set(zipfile.ZipFile(wheel).namelist())
        metadata = {name for name in names if ".dist-info/" in name}
        package = CHECKOUT / "taskd"
        files = [*package.rglob("*.py"), *(package / "gateway" / "dashboard").iterdir()]
        self.assertEqual(
            names - metadata,
            {str(path.relative_to(CHECKOUT)) for path in files}
            | {"taskd/py.typed", "twisted/plugins/taskd_plugin.py"},
        )
        self.assertIn("METADATA", {name.rpartition("/")[2] for name in metadata})

    def install(self, wheel: Path, directory: Path) -> Path:
        """Install the wheel into an environment of its own, and give that one's programs."""
        venv.create(directory / "venv", with_pip=True)
        programs = directory / "venv" / "bin"
        run(programs / "pip", "install", "--quiet", wheel, directory=directory)
        return programs

    def check_in_use(self, programs: Path) -> None:
        root = Path("/")
        where = run(
            programs / "python", "-c", "import taskd; print(taskd.__file__)", directory=root
        )
        self.assertTrue(where.startswith(str(programs.parent)), where)
        self.assertIn("taskd", run(programs / "twistd", "--help", directory=root))
        self.assertIn("--procs", run(programs / "twistd", "taskd", "--help", directory=root))
        daemon = Daemon(
            procs=2,
            tasks="tasks.py",
            files={"tasks.py": SAMPLE_TASKS.read_text(encoding="utf-8")},
            twistd=programs / "twistd",
        )
        self.addCleanup(daemon.stop)
        daemon.start()
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertEqual(daemon.ask("later", ["é"]), "é")
        where = daemon.ask("taskd_file")
        self.assertTrue(where.startswith(str(programs.parent)), where)
        daemon.stop()

    def check_without_web(self, programs: Path) -> None:
        """Without the extra the gateway says in one line what it lacks."""
        done = subprocess.run(
            [programs / "twistd", "-n", "taskd-gateway"],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=LONGEST_RUN_SECONDS,
            check=False,
        )
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertIn("pip install 'taskd[web]'", done.stderr)

    def check_gateway(self, programs: Path) -> None:
        """With it the gateway serves the page and a call."""
        self.assertIn("taskd-gateway", run(programs / "twistd", "--help", directory=Path("/")))
        daemon = Daemon(procs=1, twistd=programs / "twistd")
        self.addCleanup(daemon.stop)
        daemon.start()
        gateway = Gateway(daemon, twistd=programs / "twistd")
        self.addCleanup(gateway.stop)
        gateway.start()
        self.assertEqual(gateway.http("GET", "/dashboard.js").status, 200)
        self.assertEqual(gateway.call("echo", ["é"]).json, {"result": "é"})
        gateway.stop()
        daemon.stop()
