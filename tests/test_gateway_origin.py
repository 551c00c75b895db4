"""Whose pages may call: the headers Origin and Host, as browsers and others send them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import SettingsError
from taskd.gateway.origin import Origins

examples = settings(max_examples=300, deadline=None)

NO_ORIGINS = (
    *("", "null", "NULL", "file://", "about:blank", "data:,", "example.org", "//example.org"),
    *("http:", "http:/", "http://", "http:///", "http:example.org", "http:/example.org"),
    *("http://example.org/", "http://example.org/a", "http://example.org?", "http://example.org#"),
    *("http://example.org:", "http://example.org:x", "http://example.org:-1", "http://[::1"),
    *("http://example.org:65536", "http://example.org:080000", "http://example.org:\uff18\uff10"),
    *("http://me@example.org", "http://me:pw@example.org", "http://@example.org"),
    *("http://evil@127.0.0.1:8080", "http://127.0.0.1:8080@evil.example"),
    *(" http://example.org", "http://example.org ", "http://example.org\n", "\thttp://example.org"),
    *("http://exam ple.org", "http://exa\tmple.org", "http://a,b", "http://example.org\\"),
    *("HTTP://example.org", "ws://example.org", "wss://example.org", "ftp://example.org"),
    *("https://*", "https://*.example.org", "http://exämple.org", "http://::1", "http://[::1]x"),
    *("http://a http://b", "javascript://example.org", "chrome-extension://abcdef"),
)


class OwnTests(SynchronousTestCase):
    """Pages that were served from here."""

    def setUp(self) -> None:
        self.origins = Origins([], needs_one=True)

    def assertAdmits(self, expected: bool, *pairs: tuple[str | None, str | None]) -> None:
        for origin, host in pairs:
            self.assertIs(self.origins.admits(origin, host), expected, (origin, host))

    def test_the_same_host_and_port(self) -> None:
        """A page calls where it came from, by whatever name and scheme."""
        self.assertAdmits(
            True,
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://localhost:8080", "localhost:8080"),
            ("https://localhost:8080", "localhost:8080"),
            ("http://example.org:1", "example.org:1"),
            ("http://a-b_c.example:65535", "a-b_c.example:65535"),
            ("http://xn--bcher-kva.example:8080", "xn--bcher-kva.example:8080"),
        )

    def test_usual_ports(self) -> None:
        """The port that a scheme has by itself can be left out on either side."""
        self.assertAdmits(
            True,
            ("http://localhost", "localhost"),
            ("https://localhost", "localhost"),
            ("http://localhost:80", "localhost"),
            ("http://localhost", "localhost:80"),
            ("https://localhost:443", "localhost"),
            ("https://localhost", "localhost:443"),
        )

    def test_the_usual_port_of_the_other_scheme(self) -> None:
        """What is left out is the port of the page's own scheme, and no other."""
        self.assertAdmits(
            False,
            ("http://localhost", "localhost:443"),
            ("https://localhost", "localhost:80"),
            ("http://localhost:443", "localhost"),
            ("https://localhost:80", "localhost"),
            ("http://localhost", "localhost:8080"),
            ("http://localhost:8080", "localhost"),
        )

    def test_other_ports_of_the_machine(self) -> None:
        """A page that another server of this machine has served may not call."""
        self.assertAdmits(
            False,
            ("http://localhost:3000", "localhost:8080"),
            ("http://127.0.0.1:8081", "127.0.0.1:8080"),
            ("http://[::1]:8081", "[::1]:8080"),
        )

    def test_other_names_of_the_machine(self) -> None:
        """Another name is another place, even if both lead here."""
        self.assertAdmits(
            False,
            ("http://localhost:8080", "127.0.0.1:8080"),
            ("http://127.0.0.1:8080", "[::1]:8080"),
            ("http://localhost.:8080", "localhost:8080"),
            ("http://localhost:8080", "localhost.:8080"),
            ("http://a.localhost:8080", "localhost:8080"),
        )

    def test_upper_case(self) -> None:
        """A host is the same in upper case."""
        self.assertAdmits(
            True,
            ("http://LocalHost:8080", "localhost:8080"),
            ("http://localhost:8080", "LOCALHOST:8080"),
            ("http://[2001:DB8::A]:1", "[2001:db8::a]:1"),
        )

    def test_ipv6(self) -> None:
        """An IPv6 address stands in brackets."""
        self.assertAdmits(
            True,
            ("http://[::1]:8080", "[::1]:8080"),
            ("http://[::1]", "[::1]"),
            ("https://[::ffff:192.0.2.1]", "[::ffff:192.0.2.1]:443"),
        )
        self.assertAdmits(
            False,
            ("http://[::1]:8080", "[::2]:8080"),
            ("http://::1:8080", "::1:8080"),
            ("http://[::1]:8080", "::1:8080"),
        )

    def test_port_zero(self) -> None:
        """Port 0 is a port of its own, which is no usual one."""
        self.assertAdmits(True, ("http://localhost:0", "localhost:0"))
        self.assertAdmits(
            False,
            ("http://localhost:0", "localhost"),
            ("http://localhost:0", "localhost:80"),
            ("http://localhost", "localhost:0"),
        )

    def test_what_is_no_origin(self) -> None:
        """What names no page of a web server's may not call, whatever host it names."""
        hosts = (
            None,
            "",
            "null",
            "example.org",
            "example.org:80",
            "127.0.0.1:8080",
            "evil",
            "[::1]",
        )
        for origin in NO_ORIGINS:
            self.assertAdmits(False, *((origin, host) for host in hosts))

    def test_no_host(self) -> None:
        """Without a host that can be read no page is of here."""
        for host in (None, "", ":80", "localhost:", "localhost:x", "a b", "localhost:80 ", "a,a"):
            self.assertAdmits(False, ("http://localhost", host), ("http://a", host))

    def test_foreign_pages(self) -> None:
        """Somebody else's page may not call, however much its name looks like ours."""
        self.assertAdmits(
            False,
            ("http://evil.example", "127.0.0.1:8080"),
            ("http://127.0.0.1:8080.evil.example", "127.0.0.1:8080"),
            ("http://127.0.0.1.evil.example:8080", "127.0.0.1:8080"),
            ("http://evil127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://localhost.evil.example", "localhost"),
            ("http://notlocalhost", "localhost"),
        )


class NoOriginTests(SynchronousTestCase):
    def test_programs(self) -> None:
        """What names no origin may call only where the operator has said so."""
        for needs_one in (True, False):
            origins = Origins(["https://example.org"], needs_one=needs_one)
            for host in (None, "localhost", "example.org", "evil.example"):
                self.assertIs(origins.admits(None, host), not needs_one)

    def test_an_origin_that_is_named(self) -> None:
        """Where none is needed, one that is named must still be one that may."""
        origins = Origins([], needs_one=False)
        for origin in ("http://evil.example", "null", "", "file://"):
            self.assertFalse(origins.admits(origin, "localhost:8080"), origin)


class AllowedTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.origins = Origins(
            ["https://Example.org", "http://app.example:3000", "https://[2001:DB8::1]:8443"],
            needs_one=True,
        )

    def test_named_ones(self) -> None:
        """Pages of a named origin may call, by whatever name they reach this place."""
        for origin in (
            *("https://example.org", "https://EXAMPLE.org:443", "http://app.example:3000"),
            "https://[2001:db8::1]:8443",
        ):
            for host in ("127.0.0.1:8080", "example.org", "localhost", "evil.example"):
                self.assertTrue(self.origins.admits(origin, host), (origin, host))

    def test_near_misses(self) -> None:
        """A named origin is one scheme, one host and one port."""
        for origin in (
            *("http://example.org", "https://example.org:8443", "https://example.org."),
            *("https://www.example.org", "https://example.org.evil.example"),
            *("http://app.example", "https://app.example:3000", "http://app.example:30000"),
            *("https://[2001:db8::1]", "https://2001:db8::1:8443", "https://example.org/"),
            *("https://evilexample.org", "https://example.orgg", "null"),
        ):
            self.assertFalse(self.origins.admits(origin, "127.0.0.1:8080"), origin)

    def test_what_is_no_origin(self) -> None:
        """An operator who names what is no origin is told so, and how one looks."""
        for text in NO_ORIGINS:
            with self.assertRaises(SettingsError) as caught:
                Origins([text], needs_one=True)
            told = str(caught.exception)
            self.assertTrue(told.startswith(f"--origin {text}: "), told)
            self.assertIn("such as https://example.org", told)


class SecureTests(SynchronousTestCase):
    """Pages that whoever is on the way could have made."""

    def test_where_tls_is_spoken(self) -> None:
        """Where TLS is spoken a plain page of the same host is somebody else's, on any port."""
        origins = Origins(["http://other.example"], needs_one=True, is_secure=True)
        for origin, host, may in (
            ("https://localhost", "localhost", True),
            ("https://localhost:8443", "localhost:8443", True),
            ("http://localhost", "localhost", False),
            ("http://localhost:443", "localhost", False),
            ("http://localhost:8443", "localhost:8443", False),
            ("http://other.example", "localhost", True),
        ):
            self.assertIs(origins.admits(origin, host), may, (origin, host))

    def test_where_a_proxy_speaks_it(self) -> None:
        """So it is with a host that is named by https alone, for which a proxy speaks TLS."""
        both = ["https://b.example", "http://b.example:8080"]
        origins = Origins(["https://a.example", *both], needs_one=True)
        for origin, host, may in (
            ("https://a.example", "a.example", True),
            ("http://a.example", "a.example", False),
            ("http://A.example:80", "a.example", False),
            ("http://b.example", "b.example", True),
            ("http://localhost", "localhost", True),
        ):
            self.assertIs(origins.admits(origin, host), may, (origin, host))


class HostTests(SynchronousTestCase):
    """Names of this place; others lead here by DNS rebinding."""

    def setUp(self) -> None:
        self.origins = Origins(["https://Example.org:8443", "http://[2001:db8::1]"], needs_one=True)

    def test_names_of_here(self) -> None:
        """Numbers, localhost, and the hosts of named origins are names of this place."""
        for host in (
            *("127.0.0.1", "127.0.0.1:8080", "192.0.2.1:1", "0.0.0.0", "[::1]", "[::1]:8080"),
            *("[::ffff:127.0.0.1]:8080", "[2001:DB8::5]", "localhost", "LOCALHOST:8080"),
            *("example.org", "EXAMPLE.ORG", "example.org:8443", "example.org:1"),
        ):
            self.assertTrue(self.origins.admits_host(host), host)

    def test_other_names(self) -> None:
        """Somebody else's name is none, nor what only looks like a number."""
        for host in (
            *(None, "", ":8080", "evil.example", "evil.example:8080", "localhost.evil.example"),
            *("127.0.0.1.evil.example", "127.0.0.1.nip.io:8080", "a.localhost", "localhost."),
            *("www.example.org", "example.org.", "xexample.org", "127.1", "2130706433"),
            *("0x7f.0.0.1", "0177.0.0.1", "127.0.0.1.", "127.0.0.256", "1.2.3.4.5", "::1", "[::1"),
            *("[localhost]", "[::1]]", "[[::1]]", "[::g]", "[fe80::1%25eth0]", "localhost:"),
            *("localhost:x", "localhost:123456", "me@localhost", "localhost/", "localhost, evil"),
            *("localhost\n", " localhost", "localhost evil", "*", "null", "_"),
        ):
            self.assertFalse(self.origins.admits_host(host), host)


labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=8)
hosts = st.one_of(
    st.lists(labels, min_size=1, max_size=4).map(".".join),
    st.sampled_from(["localhost", "127.0.0.1", "[::1]", "example.org", "evil.example"]),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map("[{}]".format),
)
ports = st.one_of(st.none(), st.sampled_from([0, 80, 443, 8080]), st.integers(0, 65535))
schemes = st.sampled_from(["http", "https"])


def written(host: str, port: int | None) -> str:
    return host if port is None else f"{host}:{port}"


class PropertyTests(SynchronousTestCase):
    allowed = ("https://example.org", "http://app.example:3000")

    @examples
    @given(schemes, hosts, ports, hosts, ports)
    def test_who_may(
        self, scheme: str, name: str, port: int | None, host: str, host_port: int | None
    ) -> None:
        """A page may call if scheme, host and port say so, and only then."""
        origins = Origins(self.allowed, needs_one=True)
        usual = {"http": 80, "https": 443}[scheme]
        number = usual if port is None else port
        is_own = name == host and number == (usual if host_port is None else host_port)
        # A plain page of a host that is named by https alone is somebody else's.
        is_own = is_own and (scheme, name) != ("http", "example.org")
        is_named = (scheme, name, number) in {
            ("https", "example.org", 443),
            ("http", "app.example", 3000),
        }
        may = origins.admits(f"{scheme}://{written(name, port)}", written(host, host_port))
        self.assertIs(may, is_own or is_named)

    @examples
    @given(st.text(max_size=40), hosts, ports)
    def test_whatever_is_sent(self, text: str, host: str, port: int | None) -> None:
        """Whatever stands in Origin: it may call if it is the one spelling of our own place."""
        origins = Origins([], needs_one=True)
        here = written(host, port)
        for origin in (text, f"http://{text}", f"http://{here}{text}", f"http://{text}{here}"):
            if origins.admits(origin, here):
                name = origin.partition("://")[2]
                place, colon, number = name.rpartition(":")
                if not (colon and number.isascii() and number.isdigit()):
                    place, number = name, ""
                self.assertEqual(place.lower(), host)
                usual = "443" if origin.startswith("https:") else "80"
                wanted = int(usual) if port is None else port
                self.assertEqual(int(number or usual), wanted)

    @examples
    @given(hosts, ports)
    def test_a_foreign_name(self, host: str, port: int | None) -> None:
        """A host is let in if it is a number, localhost or named; no other can be."""
        origins = Origins(self.allowed, needs_one=True)
        is_number = host.startswith("[") or (
            host.count(".") == 3
            and all(
                part.isdigit() and str(int(part)) == part and int(part) < 256
                for part in host.split(".")
            )
        )
        is_named = host in ("localhost", "example.org", "app.example")
        self.assertIs(origins.admits_host(written(host, port)), is_number or is_named)
