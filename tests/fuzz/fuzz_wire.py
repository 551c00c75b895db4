"""
The long run: libFuzzer, guided by which lines of taskd each input reaches.

::

    python tests/fuzz/fuzz_wire.py tests/fuzz/corpus -max_total_time=60
    python tests/fuzz/fuzz_wire.py --client tests/fuzz/corpus_client -max_total_time=60

Arguments are libFuzzer's; new inputs go to the first directory, so give an empty
one before the corpus to leave that alone. An input that breaks a promise is
written to ``crash-…``; put it into the corpus, where ``test_fuzz`` replays it.
Needs ``pip install '.[fuzz]'``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import atheris

_ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT))

# What is loaded before is not instrumented, and the test itself never is.
from twisted.logger import globalLogBeginner  # noqa: E402

with atheris.instrument_imports(include=["taskd"]):
    import taskd.client
    import taskd.server  # noqa: F401

from tests.fuzz.answers import answer  # noqa: E402
from tests.fuzz.conversation import converse  # noqa: E402

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Fuzz until libFuzzer has enough."""
    target: Callable[[bytes], None] = converse
    if "--client" in arguments:
        arguments.remove("--client")
        target = answer
    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False, discardBuffer=True)
    dictionary = f"-dict={Path(__file__).with_name('wire.dict')}"
    atheris.Setup([arguments[0], dictionary, "-max_len=4096", *arguments[1:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
