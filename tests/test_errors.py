"""The tree of exceptions, and its way over the wire and back."""

from __future__ import annotations

import inspect
import json
import re

from twisted.trial.unittest import SynchronousTestCase

from taskd import errors
from taskd.errors import CallError, ConnectionLost, InternalError, WorkerLost, error_from_wire
from taskd.wire import encode_error

DRAWN = re.compile(r"(?P<indent>[ |]*)\+-- (?P<name>\w+) +(?P<words>.*)")

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.TaskdError)
}

CODES = {
    "malformed",
    "line-too-long",
    "unknown-function",
    "bad-arguments",
    "task-failed",
    "time-limit",
    "cancelled",
    "worker-lost",
    "overloaded",
    "shutting-down",
    "unauthorized",
    "internal",
}

ON_THE_WIRE = {
    kind
    for kind in CLASSES.values()
    if issubclass(kind, CallError) and kind not in (CallError, ConnectionLost)
}


def drawn_tree() -> dict[str, tuple[str, str]]:
    """Read the module's drawing: each class with its parent, and the words beside it."""
    assert errors.__doc__ is not None
    tree = {}
    above = ["TaskdError"]
    for line in errors.__doc__.splitlines():
        if found := DRAWN.match(line.removeprefix("    ")):
            depth = len(found["indent"]) // 5 + 1
            del above[depth:]
            tree[found["name"]] = (above[-1], found["words"])
            above.append(found["name"])
    return tree


class TreeTests(SynchronousTestCase):
    """The drawing in the module's docstring."""

    def test_every_class_is_drawn_under_its_base(self) -> None:
        """The drawing shows every exception, and each under the class it is made from."""
        bases = {
            name: kind.__bases__[0].__name__
            for name, kind in CLASSES.items()
            if name != "TaskdError"
        }
        self.assertEqual({name: parent for name, (parent, _) in drawn_tree().items()}, bases)

    def test_the_drawn_codes_are_true(self) -> None:
        """Beside each error of the wire stands its code, and whether it ends the connection."""
        tree = drawn_tree()
        for kind in ON_THE_WIRE:
            words = tree[kind.__name__][1]
            self.assertEqual(words.split()[0], kind.code)
            self.assertEqual("connection closes" in words, kind.closes_connection, kind)

    def test_all_of_them_are_exported(self) -> None:
        """Every exception of the module can be imported from it by name."""
        self.assertEqual(set(errors.__all__), {*CLASSES, "error_from_wire"})


class CallErrorTests(SynchronousTestCase):
    """What each error says of itself."""

    def test_codes(self) -> None:
        """The errors of the wire have the protocol's twelve codes, one each."""
        self.assertEqual(sorted(kind.code for kind in ON_THE_WIRE), sorted(CODES))

    def test_what_may_be_tried_again(self) -> None:
        """A call may succeed later as it is if no worker took it, or the worker was lost."""
        again = {kind.code for kind in ON_THE_WIRE if kind.retryable}
        self.assertEqual(again, {"worker-lost", "overloaded", "shutting-down"})

    def test_what_closes_the_connection(self) -> None:
        """The connection closes after a line that is not understood, and for strangers."""
        closing = {kind.code for kind in ON_THE_WIRE if kind.closes_connection}
        self.assertEqual(closing, {"malformed", "line-too-long", "unauthorized"})

    def test_message_and_details(self) -> None:
        """An error's text is its message alone, and its further members are its details."""
        error = errors.TaskFailed("no such file", type="OSError", traceback="line 3")
        self.assertEqual(str(error), "no such file")
        self.assertEqual(error.message, "no such file")
        self.assertEqual(error.details, {"type": "OSError", "traceback": "line 3"})
        self.assertEqual((error.type, error.traceback), ("OSError", "line 3"))

    def test_details_that_were_not_told(self) -> None:
        """Type, traceback and seconds to wait are empty where the daemon did not tell them."""
        error = errors.TaskFailed("no")
        self.assertEqual((error.type, error.traceback), ("", ""))
        self.assertEqual(errors.Overloaded("full").retry_after, 0.0)
        self.assertEqual(errors.Overloaded("full", retry_after=2).retry_after, 2.0)

    def test_seconds_to_wait_that_are_no_number(self) -> None:
        """Seconds to wait that a strange daemon tells as something else count as not told."""
        for told in (None, "soon", "1.5", [2], {}):
            self.assertEqual(errors.Overloaded("full", retry_after=told).retry_after, 0.0)

    def test_what_is_no_detail(self) -> None:
        """The id of a malformed line, and whether a lost task may have run, are not sent."""
        malformed = errors.Malformed("what?", id_json="7")
        lost = WorkerLost("gone", may_have_started=False)
        self.assertEqual((malformed.id_json, malformed.details), ("7", {}))
        self.assertEqual((lost.may_have_started, lost.details), (False, {}))
        self.assertEqual(errors.Malformed("what?").id_json, "")
        self.assertTrue(WorkerLost("gone").may_have_started)


class ErrorFromWireTests(SynchronousTestCase):
    """Errors that come back from the daemon."""

    def test_every_error_survives_the_wire(self) -> None:
        """What the daemon sends becomes the same class with the same message and details."""
        for kind in ON_THE_WIRE:
            sent = kind("a sentence", type="T", retry_after=1.5)
            fields = json.loads(encode_error("", sent))["error"]
            got = error_from_wire(fields)
            self.assertIs(type(got), kind)
            self.assertEqual((got.message, str(got)), ("a sentence", "a sentence"))
            self.assertEqual(got.details, {"type": "T", "retry_after": 1.5})

    def test_a_lost_connection_is_a_lost_worker_on_the_wire(self) -> None:
        """``ConnectionLost`` is never told to others as such."""
        fields = json.loads(encode_error("", ConnectionLost("EOF")))["error"]
        self.assertIs(type(error_from_wire(fields)), WorkerLost)

    def test_an_unknown_code(self) -> None:
        """A newer daemon's code becomes an internal error that names it."""
        error = error_from_wire({"code": "quota", "message": "spent", "limit": 3})
        self.assertIs(type(error), InternalError)
        self.assertEqual(error.message, "quota: spent")
        self.assertEqual(error.details, {"limit": 3})

    def test_an_empty_error(self) -> None:
        """An error object without any member is an internal error too."""
        self.assertIs(type(error_from_wire({})), InternalError)

    def test_whether_a_lost_task_may_have_started(self) -> None:
        """Only a plain ``false`` says that a lost task certainly did not run."""
        for told, expected in ((False, False), (True, True), (None, True), (0, True)):
            error = error_from_wire({"code": "worker-lost", "may_have_started": told})
            assert isinstance(error, WorkerLost)
            self.assertIs(error.may_have_started, expected)
        silent = error_from_wire({"code": "worker-lost", "message": ""})
        assert isinstance(silent, WorkerLost)
        self.assertTrue(silent.may_have_started)
