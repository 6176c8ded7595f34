from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llava_train.use.fetch import FetchError, fetch, is_public

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1%eth0",
    "fc00::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "ff02::1",
    "fec0::1",
    "::127.0.0.1",
    "::a9fe:a9fe",
    "::ffff:0:127.0.0.1",
    "64:ff9b:1::a00:1",
    "3fff::1",
    "5f00::1",
    "192.0.0.8",
    "2001:0:53aa:64c:0:fbff:fefe:1",
]


class Handler(http.server.BaseHTTPRequestHandler):
    seen: list[str] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/cut":
            self.send_header("Content-Length", "100")
        self.end_headers()
        try:
            if self.path == "/slow":
                while True:  # until the other end is cut
                    self.wfile.write(b".")
                    time.sleep(0.02)
            self.wfile.write(b"x" * (1000 if self.path == "/large" else 10))
        except OSError:
            pass

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def anywhere(address: str) -> bool:
    return True


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_told(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses_are_told(address: str) -> None:
    assert is_public(address)


def test_what_stands_at_an_address_is_fetched(server: str) -> None:
    assert fetch(f"{server}/picture", allowed=anywhere) == b"x" * 10
    assert fetch(f"{server}/to//to//picture", allowed=anywhere) == b"x" * 10


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "127.1"])
def test_a_private_address_is_never_connected_to_however_it_is_written(server: str, host: str) -> None:
    port = server.rpartition(":")[2]
    with pytest.raises(FetchError, match="belongs to a private network|cannot be fetched"):
        fetch(f"http://{host}:{port}/picture")


def test_a_redirect_leads_to_no_private_address(server: str) -> None:
    seen: list[str] = []

    def only_first(address: str) -> bool:
        seen.append(address)
        return len(seen) == 1

    with pytest.raises(FetchError, match="belongs to a private network"):
        fetch(f"{server}/to/{server}/picture", allowed=only_first)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a.png", "http://", "gopher://x"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(FetchError, match="only http:// and https:// addresses are fetched"):
        fetch(url)


def test_a_redirect_to_another_scheme_is_refused(server: str) -> None:
    with pytest.raises(FetchError, match="only http:// and https://"):
        fetch(f"{server}/to/file:///etc/passwd", allowed=anywhere)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/large", "larger than 100 bytes"),
        ("/missing", "the server answers 404"),
        ("/to//to//to//to//to//to//picture", "more than 5 redirects"),
        ("/cut", "cannot be fetched|broke off"),
    ],
)
def test_what_goes_wrong_is_said(server: str, path: str, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        fetch(server + path, max_bytes=100, allowed=anywhere)


def test_a_server_that_drips_for_ever_is_left(server: str) -> None:
    with pytest.raises(FetchError, match="no answer within 0.5 seconds"):
        fetch(f"{server}/slow", timeout_s=0.5, allowed=anywhere)


def test_a_slow_look_up_counts_and_what_begins_too_late_is_cut(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def slow(*arguments: Any, **more: Any) -> Any:
        time.sleep(0.4)
        return look_up(*arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    for timeout_s, path in ((0.2, "/picture"), (0.6, "/slow")):
        with pytest.raises(FetchError, match="no answer within"):
            fetch(server + path, timeout_s=timeout_s, allowed=anywhere)


def test_an_address_is_escaped_as_browsers_do(server: str) -> None:
    assert fetch(f"{server}/über einen hund.jpg?a=1&b=%20ü", allowed=anywhere) == b"x" * 10
    assert Handler.seen[-1] == "/%C3%BCber%20einen%20hund.jpg?a=1&b=%20%C3%BC"
