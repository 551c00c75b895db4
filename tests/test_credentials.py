"""The files that hold secrets, and what is made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.access import digest_of
from taskd.credentials import (
    Credentials,
    KeyPair,
    read_key_pair,
    read_pem,
    read_secret,
    read_tokens,
)
from taskd.errors import StartFailed
from tests.support import temporary_directory

TOKEN = "8f2b6c1d9e3a4f57"
OTHER = "another token, with spaces: and #"
DIGEST = digest_of(OTHER)


CERTIFICATE = "-----BEGIN CERTIFICATE-----"


class FileTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = temporary_directory(self) / "secrets"

    def write(self, content: str | bytes, mode: int = 0o600, path: Path | None = None) -> str:
        path = path or self.path
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)
        return str(path)

    def tokens(self, content: str | bytes) -> list[tuple[str, str]]:
        return list(read_tokens(self.write(content)))

    def refused(self, content: str | bytes) -> str:
        """Give the message with which a file of tokens is refused; it shows none."""
        message = str(self.assertRaises(StartFailed, self.tokens, content))
        self.assertTrue(message.startswith(f"--token-file {self.path}"), message)
        text = content if isinstance(content, str) else content.decode("latin-1")
        for word in text.replace(":", " ").split():
            if len(word) >= 8 and not word.startswith("#"):
                self.assertNotIn(word, message)
        return message


class TokenTests(FileTestCase):
    def test_a_token_alone(self) -> None:
        """A token that stands alone on its line is that of the identity ``token``."""
        for content in (TOKEN, f"{TOKEN}\n", f"  {TOKEN}\t\r\n"):
            self.assertEqual(self.tokens(content), [("token", digest_of(TOKEN))])

    def test_identities(self) -> None:
        """Before a token its identity may stand, with white space around both."""
        for identity in ("web", "_", "9", "ops.eu-1@example.org", "x" * 64):
            for line in (f"{identity}:{TOKEN}", f" {identity} : {TOKEN} "):
                self.assertEqual(self.tokens(line), [(identity, digest_of(TOKEN))])

    def test_what_is_in_a_token(self) -> None:
        """Behind the first colon everything is the token, colons, spaces and # included."""
        self.assertEqual(self.tokens(f"web:{OTHER}"), [("web", digest_of(OTHER))])

    def test_lines_for_people(self) -> None:
        """Blank lines, and those that begin with #, say nothing."""
        content = f"# tokens\n\n  # web:{OTHER}\n \t\nweb:{TOKEN}\n#\n"
        self.assertEqual(self.tokens(content), [("web", digest_of(TOKEN))])

    def test_several(self) -> None:
        """The order of the lines is kept; an identity may have several tokens."""
        content = f"web:{TOKEN}\nops:{TOKEN}x\nweb:{OTHER}\n{TOKEN}y\n"
        self.assertEqual(
            self.tokens(content),
            [
                ("web", digest_of(TOKEN)),
                ("ops", digest_of(TOKEN + "x")),
                ("web", DIGEST),
                ("token", digest_of(TOKEN + "y")),
            ],
        )

    def test_a_digest(self) -> None:
        """Instead of a token its digest may stand, behind an identity or alone."""
        self.assertEqual(self.tokens(f"web:sha256:{DIGEST}"), [("web", DIGEST)])
        self.assertEqual(self.tokens(f" sha256:{DIGEST} "), [("token", DIGEST)])

    def test_what_is_no_digest(self) -> None:
        """What begins like a digest and is none is refused, lest it pass for a token."""
        for digest in (DIGEST[:-1], DIGEST + "0", DIGEST.upper(), "g" * 64, " " + DIGEST, ""):
            for line in (f"web:sha256:{digest}", f"sha256:{digest}"):
                self.assertIn("line 1: a digest is", self.refused(line))

    def test_how_long_a_token_is(self) -> None:
        """A token has 16 to 1024 characters of ASCII."""
        for token in ("x" * 16, "x" * 1024):
            self.assertEqual(self.tokens(token), [("token", digest_of(token))])
        for token in ("x" * 15, "x" * 1025, "é" * 16, ""):
            self.assertIn(
                "line 1: give IDENTITY:TOKEN; a token has 16 to 1024", self.refused(f"web:{token}")
            )
        self.assertIn("line 1: give IDENTITY:TOKEN; a token has", self.refused("x" * 15))

    def test_what_is_no_identity(self) -> None:
        """An identity has letters, digits and little else, 64 at most, and is not empty."""
        for identity in ("", "a b", "-web", ".web", "wéb", "*", "a/b", "CN=web", "x" * 65):
            message = self.refused(f"{identity}:{TOKEN}")
            self.assertIn("line 1: give IDENTITY:TOKEN", message)

    def test_which_line(self) -> None:
        """The line that is wrong is named, counted as an editor does."""
        self.assertIn("line 4", self.refused(f"# one\n\nweb:{TOKEN}\nops:short\n"))
        self.assertIn("line 2", self.refused(f"web:{TOKEN}\r\n?:{TOKEN}\r\n"))

    def test_no_token(self) -> None:
        """A file without a token is refused: it would lock everybody out."""
        for content in ("", "\n", f"# web:{TOKEN}\n"):
            self.assertIn("there is no token in it", self.refused(content))

    def test_what_is_no_text(self) -> None:
        """A file that is no text is refused."""
        self.assertIn("it is no text", self.refused(b"\xff\xfe" + TOKEN.encode()))

    @given(st.text(max_size=200))
    def test_any_file(self, content: str) -> None:
        """Of any text either pairs of an identity and a digest are made, or it is refused."""
        try:
            found = self.tokens(content.encode(errors="replace"))
        except StartFailed:
            return
        for identity, digest in found:
            self.assertNotEqual(identity, "")
            self.assertEqual(len(digest), 64)


class PermissionTests(FileTestCase):
    def test_who_may_read(self) -> None:
        """The owner, and the group, may read a secret."""
        for mode in (0o400, 0o600, 0o640, 0o440, 0o700):
            path = self.write(TOKEN, mode)
            self.assertEqual(read_secret(path, "--key"), TOKEN)
            self.path.unlink()

    def test_who_may_not(self) -> None:
        """Where others may read or write, or the group may write, it is refused with the remedy."""
        for mode in (0o604, 0o602, 0o601, 0o660, 0o620, 0o644, 0o666):
            path = self.write(TOKEN, mode)
            error = self.assertRaises(StartFailed, read_tokens, path)
            self.assertIn(f"--token-file {path}: others may read or write it", str(error))
            self.assertIn(f"chmod 600 {path}", str(error))

    def test_what_is_no_secret(self) -> None:
        """Everybody may read a certificate."""
        self.assertEqual(read_pem(self.write(CERTIFICATE, 0o644), "--client-ca"), CERTIFICATE)

    def test_what_has_no_certificate(self) -> None:
        """A file without a certificate is refused: an empty authority would ask nobody."""
        for text in ("", "\n", "# none", "-----BEGIN PRIVATE KEY-----\n"):
            error = self.assertRaises(StartFailed, read_pem, self.write(text), "--client-ca")
            self.assertIn("there is no certificate in PEM in it", str(error))

    def test_a_pipe(self) -> None:
        """What is no regular file is refused at once: at a reload nobody may be there to write."""
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        os.write(writing, TOKEN.encode())
        os.close(writing)
        os.mkfifo(self.path, 0o600)
        for path in (f"/dev/fd/{reading}", str(self.path), os.devnull):
            for read in (read_secret, read_pem):
                error = self.assertRaises(StartFailed, read, path, "--key")
                self.assertEqual(
                    str(error), f"--key {path}: it is no regular file, so it cannot be read again"
                )

    def test_what_cannot_be_read(self) -> None:
        """A file that is not there, or is a directory, is refused with its option and why."""
        self.assertIn(
            f"--client-ca {self.path}: No such file",
            str(self.assertRaises(StartFailed, read_pem, str(self.path), "--client-ca")),
        )
        self.path.mkdir()
        self.assertIn(
            f"--key {self.path}: Is a directory",
            str(self.assertRaises(StartFailed, read_secret, str(self.path), "--key")),
        )


class MistakeTests(FileTestCase):
    def refused_file(self, text: str) -> str:
        return str(self.assertRaises(StartFailed, read_tokens, self.write(text)))

    def test_an_equals_sign(self) -> None:
        """A line of IDENTITY=TOKEN is no token alone, but that of an encoding's end is."""
        self.assertIn(
            "line 1: give IDENTITY:TOKEN, with a colon", self.refused_file(f"web={TOKEN}")
        )
        self.assertEqual(len(read_tokens(self.write(f"{TOKEN}=="))), 1)

    def test_one_token_of_two(self) -> None:
        """A token that two identities have is refused; one that an identity has twice is one."""
        self.assertIn("line 2: this token is bob's", self.refused_file(f"bob:{TOKEN}\neve:{TOKEN}"))
        self.assertEqual(len(read_tokens(self.write(f"bob:{TOKEN}\nbob:{TOKEN}"))), 1)


class KeyPairTests(FileTestCase):
    def test_both(self) -> None:
        """The certificate and its key are read, and what they were read from is kept."""
        key = self.path.with_name("key")
        pair = read_key_pair(self.write(CERTIFICATE, 0o644), self.write("KEY", path=key))
        self.assertEqual(pair, KeyPair(CERTIFICATE, "KEY", f"--tls {self.path}"))

    def test_a_key_that_is_no_secret(self) -> None:
        """A key that others may read is refused, by its own option."""
        key = self.write("KEY", 0o644, self.path.with_name("key"))
        error = self.assertRaises(StartFailed, read_key_pair, self.write(CERTIFICATE), key)
        self.assertTrue(str(error).startswith(f"--key {key}: others may read"), str(error))

    def test_one_is_missing(self) -> None:
        """Where one cannot be read its option is named."""
        there, missing = self.write(CERTIFICATE), str(self.path) + "2"
        for paths, option in (((missing, there), "--tls"), ((there, missing), "--key")):
            error = self.assertRaises(StartFailed, read_key_pair, *paths)
            self.assertIn(f"{option} {missing}: No such file", str(error))


class CredentialsTests(SynchronousTestCase):
    FULL = Credentials(
        tokens=(("web", DIGEST), ("ops", digest_of(TOKEN))),
        key_pairs=(None, KeyPair("CERTIFICATE", "SECRET KEY", "--tls cert.pem")),
        client_ca="AUTHORITY",
    )

    def test_another_process_gets_the_same(self) -> None:
        """Credentials that went through JSON are equal to what they were."""
        for made in (Credentials(), self.FULL):
            again = Credentials.from_json(json.loads(json.dumps(made.to_json())))
            self.assertEqual(again, made)
            self.assertEqual(hash(again), hash(made))

    def test_the_key_is_not_shown(self) -> None:
        """The private key stands in no text that is made from credentials."""
        for text in (repr(self.FULL), str(self.FULL), f"{self.FULL.key_pairs[1]!r}"):
            self.assertIn("--tls cert.pem", text)
            self.assertNotIn("SECRET", text)
