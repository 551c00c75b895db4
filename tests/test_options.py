"""The table of options, the file of options, and the example of one."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Final

from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import SettingsError
from taskd.options import OPTIONS, Option, read_file
from taskd.tap import Options
from tests.support import temporary_directory

EXAMPLE: Final = Path(__file__).parent.parent / "etc" / "taskd.toml"
ABOVE: Final = "--check", "--config", "--help", "--version"
"""What the command line has and a file cannot have."""


class FileTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)

    def file(self, text: str | bytes, name: str = "taskd.toml") -> str:
        """Write a file of options, and give its path."""
        path = self.directory / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    def read(self, text: str) -> dict[str, Any]:
        return read_file(self.file(text))

    def refused(self, text: str | bytes) -> str:
        """Give the one line with which a file is refused."""
        with self.assertRaises(SettingsError) as caught:
            read_file(self.file(text))
        message = str(caught.exception)
        self.assertNotIn("\n", message)
        self.assertIn("taskd.toml: ", message)
        return message


class ReadTests(FileTestCase):
    def test_every_kind(self) -> None:
        """What a file says has the form that the command line gives."""
        said = self.read(
            "procs = 3\ngrace = 2\nmax-rss = 1.5\ndebug = true\ninsecure = false\n"
            'interface = "::1"\nlisten = ["tcp:1", "unix:/x"]\n'
            '[allow]\nweb = ["send_mail", " echo "]\n"O=acme" = ["*"]\n'
        )
        self.assertEqual(
            said,
            {
                "procs": 3,
                "grace": 2.0,
                "max-rss": 1.5,
                "debug": True,
                "insecure": False,
                "interface": "::1",
                "listen": ["tcp:1", "unix:/x"],
                "allow": [("web", ("send_mail", "echo")), ("O=acme", ("*",))],
            },
        )

    def test_an_empty_file(self) -> None:
        """A file that says nothing is one."""
        self.assertEqual(self.read("# nothing\n"), {})

    def test_relative_paths(self) -> None:
        """A relative path is relative to the file; modules' names and endpoints are no paths."""
        path = self.file(
            'tasks = ["tasks.py", "my.tasks", "/srv/mail.py", "a/b.py"]\ntls = "server.pem"\n'
            'key = "../server.key"\nclient-ca = "/etc/ca.pem"\ntoken-file = "tokens"\n'
            'smtp-login = "login"\nsmtp = "mail:25"\nlisten = ["unix:socket.py"]\n'
        )
        directory = str(self.directory)
        os.chdir("/")
        for named in (path, os.path.relpath(path)):
            self.assertEqual(
                read_file(named),
                {
                    "tasks": [
                        f"{directory}/tasks.py",
                        "my.tasks",
                        "/srv/mail.py",
                        f"{directory}/a/b.py",
                    ],
                    "tls": f"{directory}/server.pem",
                    "key": f"{directory}/../server.key",
                    "client-ca": "/etc/ca.pem",
                    "token-file": f"{directory}/tokens",
                    "smtp-login": f"{directory}/login",
                    "smtp": "mail:25",
                    "listen": ["unix:socket.py"],
                },
            )

    def test_what_is_no_option(self) -> None:
        """A key that is no option is named, and where a hint is possible there is one."""
        for text, words in (
            ("thread = 1", "there is no option 'thread'"),
            ("max_line = 2048", "there is no option 'max_line'; it is written max-line"),
            ("[taskd]\nport = 1", "what stands under [taskd] belongs above every table"),
            ("config = 'x'", "'config'"),
            ("check = true", "'check'"),
        ):
            self.assertIn(words, self.refused(text))

    def test_a_password(self) -> None:
        """There is no place for a password, and one that is there all the same is not shown."""
        for text in ("smtp-password = 'hunter2'", "smtp_login = 'me:hunter2'"):
            self.assertNotIn("hunter2", self.refused(text))

    def test_wrong_types(self) -> None:
        """A value of another type is refused, with the key and what is needed."""
        for text, words in (
            ('threads = "4"', 'threads: a whole number is needed, not "4"'),
            ("threads = true", "threads: a whole number is needed, not true"),
            ("threads = 1.0", "threads: a whole number is needed, not 1.0"),
            ("grace = true", "grace: a number is needed, not true"),
            ("grace = '1'", 'grace: a number is needed, not "1"'),
            ("debug = 1", "debug: true or false is needed, not 1"),
            ("interface = 1", "interface: a string is needed, not 1"),
            ("smtp = 1979-05-27", "smtp: a string is needed, not 1979-05-27"),
            ("tasks = 'a'", 'tasks: an array of strings is needed, not "a"'),
            ("tasks = [1]", "tasks: an array of strings is needed, not [1]"),
            ("allow = ['a']", "allow: a table of arrays, such as"),
            ("[allow]", "[allow] is empty"),
            ('token-file = ""', "token-file: a value is needed"),
            ("allow.web = 'echo'", "allow: 'web' needs the names of functions"),
            ("allow.web = []", "allow: 'web' needs"),
            ("allow.web = [' ']", "allow: 'web' needs"),
            ("allow.'' = ['a']", "allow: '' needs"),
            ("[allow]\nweb = ['a']\nthreads = 3", "allow: 'threads' needs"),
        ):
            self.assertIn(words, self.refused(text))

    def test_what_is_no_toml(self) -> None:
        """A file that is no TOML, or says something twice, is refused with the line."""
        self.assertIn("at line 2", self.refused("port = 1\nport = 2\n"))
        self.assertIn("at line 1", self.refused("port 1"))
        self.assertIn("utf-8", self.refused(b"\xff"))
        self.refused("a = " + "[" * 100_000)

    def test_files_that_cannot_be_read(self) -> None:
        """A file that is not there, or is none, is named with the reason."""
        for path, why in (("nowhere", "No such file"), (".", "Is a directory")):
            with self.assertRaises(SettingsError) as caught:
                read_file(path)
            self.assertIn(f"--config {path}: {why}", str(caught.exception))


class TableTests(SynchronousTestCase):
    def test_every_option_of_the_command_line(self) -> None:
        """The table has every option that the command line has, but for what is above a file."""
        usage = re.findall(r"(--[a-z-]+)", Options().getUsage(width=1000))
        named = [f"--{option.name}" for option in OPTIONS]
        self.assertEqual(set(usage) - set(named), set(ABOVE))
        self.assertEqual(len(named), len(set(named)))
        self.assertEqual(set(named) - set(usage), set())

    def test_help(self) -> None:
        """The help says what each option is, and its default, where there is one."""
        usage = " ".join(Options().getUsage().split())
        for option in OPTIONS:
            self.assertIn(" ".join(option.usage.split()), usage)
        for words in ("[default: 1048576]", "[default: 127.0.0.1]", "[default: 10 x the cores]"):
            self.assertIn(words, usage)
        self.assertNotIn("None", usage)


class ExampleTests(SynchronousTestCase):
    """``etc/taskd.toml`` says what is so."""

    def blocks(self) -> dict[str, tuple[str, Any]]:
        """Give each option with the comment above it, and its value."""
        found = {}
        for block in EXAMPLE.read_text().split("\n\n"):
            comment = ""
            lines = block.splitlines()
            for n, line in enumerate(lines):
                if re.match(r"#?([a-z-]+) = |#\[", line):
                    text = "\n".join(lines[n:]) if line == "#[allow]" else line
                    value = tomllib.loads(re.sub("(?m)^#", "", text))
                    found.update({key: (comment, said) for key, said in value.items()})
                    comment = ""
                    if line == "#[allow]":
                        break
                else:
                    comment += line.removeprefix("#") + "\n"
        return found

    def test_every_option(self) -> None:
        """Every option is there."""
        self.assertEqual(sorted(self.blocks()), sorted(option.name for option in OPTIONS))

    def test_defaults(self) -> None:
        """A value is the option's default, unless the comment says what is so without it."""
        for option in OPTIONS:
            comment, value = self.blocks()[option.name]
            if "Default:" in comment:
                self.assertIsNone(option.default, option.name)
            elif option.kind is bool:
                self.assertEqual((option.default, value), (None, False), option.name)
            else:
                self.assertEqual((value, type(value)), (option.default, option.kind), option.name)

    def test_ranges(self) -> None:
        """Where there is a number its range is told, and both of its ends are what they are."""
        for option in OPTIONS:
            comment, _ = self.blocks()[option.name]
            bounds = re.search(r"From ([\d.]+) to (\d+(?:\.\d+)?)\.", " ".join(comment.split()))
            self.assertEqual(bounds is not None, option.kind in (int, float), option.name)
            if bounds is not None:
                self.check_range(option, *bounds.groups())

    def check_range(self, option: Option, least: str, most: str) -> None:
        tls = ("--tls", "cert.pem", "--key", "key.pem") if option.name == "tls-port" else ()
        for text in (least, most):
            Options().parseOptions((*tls, f"--{option.name}", text))
        step = 0.05 if option.kind is float else 1
        for value in (option.kind(least) - step, option.kind(most) + step):
            with self.assertRaises(SystemExit) as caught:
                Options().parseOptions((*tls, f"--{option.name}", str(value)))
            self.assertIn(f"--{option.name}: a number from", str(caught.exception))

    def test_as_it_stands(self) -> None:
        """As it stands it says nothing, so it changes nothing; with all of it, it can be read."""
        self.assertEqual(read_file(str(EXAMPLE)), {})
        directory = temporary_directory(self)
        full = re.sub(r'(?m)^#(?=[a-z-]+ = |\[|"report)', "", EXAMPLE.read_text())
        (directory / "full.toml").write_text(full)
        said = read_file(str(directory / "full.toml"))
        self.assertEqual(sorted(said), sorted(option.name for option in OPTIONS))
