"""What a gateway reads from files that others must not read, and passes to its processes."""

from __future__ import annotations

import json
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from taskd.access import digest_of
from taskd.errors import StartFailed
from taskd.gateway.secrets import Secrets
from taskd.gateway.settings import GatewaySettings
from tests.support import temporary_directory, write_secret
from tests.test_tls import PAIR

TOKEN = "a caller's token 0123"
WATCHING = "a watcher's token 0123"


class SecretsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)

    def file(self, name: str, text: str, mode: int = 0o600) -> str:
        path = Path(self.directory, name)
        write_secret(path, text, mode)
        return str(path)

    def test_none(self) -> None:
        """Where no file is named nothing is read."""
        self.assertEqual(Secrets.read(GatewaySettings()), Secrets())

    def all_of_them(self) -> Secrets:
        return Secrets.read(
            GatewaySettings(
                token_file=self.file("tokens", f"web:{TOKEN}\n"),
                dashboard_token_file=self.file("watchers", f"ops:{WATCHING}\n"),
                tasks_token_file=self.file("own", "the gateway's own\n"),
                certificate=self.file("cert.pem", PAIR.certificate, 0o644),
                key=self.file("key.pem", PAIR.key),
            )
        )

    def test_all(self) -> None:
        """Each file's content finds its place; of others' tokens only the digests are kept."""
        secrets = self.all_of_them()
        self.assertEqual(secrets.tokens, (("web", digest_of(TOKEN)),))
        self.assertEqual(secrets.watchers, (("ops", digest_of(WATCHING)),))
        self.assertEqual(secrets.own_token, "the gateway's own")
        assert secrets.pair is not None
        self.assertEqual((secrets.pair.certificate, secrets.pair.key), (PAIR.certificate, PAIR.key))

    def test_to_another_process(self) -> None:
        """They are the same again when they have been JSON, also where there are none."""
        for secrets in (Secrets(), self.all_of_them()):
            self.assertEqual(Secrets.from_json(json.loads(json.dumps(secrets.to_json()))), secrets)

    def test_what_is_shown(self) -> None:
        """Whoever prints them prints neither the gateway's token nor the private key."""
        shown = repr(self.all_of_them())
        self.assertNotIn("the gateway's own", shown)
        self.assertNotIn(PAIR.key.splitlines()[1], shown)

    def refused(self, **settings: str) -> str:
        with self.assertRaises(StartFailed) as caught:
            Secrets.read(GatewaySettings(**settings))  # type: ignore[arg-type]
        return str(caught.exception)

    def test_the_gateways_own_token(self) -> None:
        """What is not one token on one line is refused, and not told."""
        for text in ("", "\n", " \n", "secret one\nsecret two\n", "secret\x00\n", "a\tsecret"):
            path = self.file("own", text)
            told = self.refused(tasks_token_file=path)
            self.assertTrue(told.startswith(f"--tasks-token {path}: "), told)
            self.assertNotIn("secret", told.removeprefix(f"--tasks-token {path}"))
        path = self.file("own", "  the gateway's own \n\n")
        self.assertEqual(
            Secrets.read(GatewaySettings(tasks_token_file=path)).own_token, "the gateway's own"
        )

    def test_its_line(self) -> None:
        """It may stand as in a token file, but not as a digest, which nobody could show."""
        path = self.file("own", f"gateway:{TOKEN}\n")
        self.assertEqual(Secrets.read(GatewaySettings(tasks_token_file=path)).own_token, TOKEN)
        for text in (f"sha256:{'a' * 64}", f"gateway:sha256:{'a' * 64}", "gateway:"):
            self.refused(tasks_token_file=self.file("own", text))

    def test_what_others_may_read(self) -> None:
        """A secret that others may read is none, whichever it is."""
        certificate = self.file("cert.pem", PAIR.certificate, 0o644)
        for name, text in (
            ("token_file", f"web:{TOKEN}"),
            ("dashboard_token_file", f"ops:{WATCHING}"),
            ("tasks_token_file", "the gateway's own"),
            ("key", PAIR.key),
        ):
            path = self.file(name, text, 0o644)
            more = {"certificate": certificate} if name == "key" else {}
            self.assertIn("others may read", self.refused(**{name: path}, **more))

    def test_what_is_not_there(self) -> None:
        """A file that is missing is named."""
        for name in ("token_file", "dashboard_token_file", "tasks_token_file"):
            self.assertIn("/nowhere: No such file", self.refused(**{name: "/nowhere"}))
