"""A picture from the web, for those who allow it: within limits of size and time, and never from a private network.

A server that fetches addresses for its users can be made to fetch from its own network, where routers and metadata
services answer without a password. So every host, also that of a redirect, is looked up first, and the connection goes
to the very address that was looked up and found public. Proxies are not used: they would do the looking up.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from llava_train.errors import UserError

MAX_BYTES = 20 * 1024 * 1024
TIMEOUT_S = 20.0
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_PORTS = {"http": 80, "https": 443}
_WRITTEN_AS_THEY_ARE = "%/:=&?~#+!$,;'@()*[]"
"""Characters of a path and query that are not escaped, those of earlier escapes among them."""

Address = str
"""An IP address as text."""

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "::/3",  # loopback, IPv4 inside of IPv6, NAT64
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
        "4000::/2",
        "8000::/1",
    )
)
"""What Python, by its version, may call global, or what a router may lead elsewhere."""


class FetchError(UserError):
    """An address that is not fetched. The message names it."""


def is_url(value: object) -> bool:
    """Whether a value is written as an address of the web."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def is_public(address: Address) -> bool:
    """Whether an IP address belongs to the open internet.

    Of IPv6 only what is given out for it (2000::/3), less what leads to IPv4 or is set apart.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    outside = (network for network in _NOT_PUBLIC if network.version == ip.version)
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in outside)


def fetch(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = TIMEOUT_S,
    allowed: Callable[[Address], bool] = is_public,
) -> bytes:
    """What stands at an http(s) address.

    Args:
        max_bytes: of the content.
        timeout_s: for all of it, redirects included.
        allowed: whether an IP address may be connected to.

    Raises:
        FetchError: another scheme, a private address, too large, too slow, or not there.
    """
    deadline = _Deadline(timeout_s)
    try:
        return _follow(url, max_bytes, deadline, allowed)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, FetchError):
            raise
        slow = deadline.is_over or isinstance(error, TimeoutError)
        reason = f"no answer within {timeout_s:g} seconds" if slow else f"{type(error).__name__}: {error}"
        raise FetchError(f"{url:.200}: cannot be fetched: {reason}") from error
    finally:
        deadline.close()


class _Deadline:
    """A time by which all is done. What still runs then has its connection cut, whatever it waits for."""

    def __init__(self, timeout_s: float) -> None:
        self._ends_s, self._sockets = time.monotonic() + timeout_s, list[socket.socket]()
        self._timer = threading.Timer(timeout_s, self._cut)
        self._timer.daemon = True
        self._timer.start()

    @property
    def is_over(self) -> bool:
        return self.left_s() <= 0

    def left_s(self) -> float:
        return self._ends_s - time.monotonic()

    def check(self) -> None:
        """Raises TimeoutError when it is over."""
        if self.is_over:
            raise TimeoutError

    def watch(self, connected: socket.socket) -> None:
        self._sockets.append(connected)
        self.check()  # the timer may have looked before

    def close(self) -> None:
        self._timer.cancel()
        for each in self._sockets:
            each.close()

    def _cut(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _follow(url: str, max_bytes: int, deadline: _Deadline, allowed: Callable[[Address], bool]) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        connection, target = _connect(url, deadline, allowed)
        connection.request("GET", target, headers={"User-Agent": "llava_train", "Accept": "image/*"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            url = urljoin(url, location)
            continue
        if response.status != 200:
            raise FetchError(f"{url:.200}: the server answers {response.status} {response.reason}")
        return _read(response, url, max_bytes, deadline)
    raise FetchError(f"{url:.200}: more than {_MAX_REDIRECTS} redirects")


def _read(response: http.client.HTTPResponse, url: str, max_bytes: int, deadline: _Deadline) -> bytes:
    content = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        content += chunk
        if len(content) > max_bytes:
            raise FetchError(f"{url:.200}: larger than {max_bytes:,} bytes")
    deadline.check()  # a connection that was cut looks like one that ended
    if response.length:
        raise FetchError(f"{url:.200}: the connection broke off before the end")
    return bytes(content)


def _connect(
    url: str, deadline: _Deadline, allowed: Callable[[Address], bool]
) -> tuple[http.client.HTTPConnection, str]:
    """A connection to the host of an address, and what to ask it for. Raises FetchError."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise FetchError(f"{url:.200}: only http:// and https:// addresses are fetched")
    host, port = parts.hostname, parts.port or _PORTS[parts.scheme]
    addresses = _look_up(host, port, deadline)
    private = [address for address in addresses if not allowed(address)]
    if private:
        raise FetchError(f"{url:.200}: {private[0]} belongs to a private network, from which nothing is fetched")
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = _PORTS[parts.scheme]
    connection.sock = socket.create_connection((addresses[0], port), deadline.left_s())
    deadline.watch(connection.sock)
    if parts.scheme == "https":
        context = ssl.create_default_context()
        secured = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
        deadline.watch(secured)
        secured.do_handshake()
        connection.sock = secured
    return connection, quote(urlunsplit(("", "", parts.path or "/", parts.query, "")), safe=_WRITTEN_AS_THEY_ARE)


def _look_up(host: str, port: int, deadline: _Deadline) -> list[Address]:
    """The addresses of a host; a server of names that does not answer is left waiting. Raises OSError."""
    found: list[Address | OSError] = []

    def look_up() -> None:
        try:
            found.extend(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(OSError(f"{host}: {error}"))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline.left_s()))
    deadline.check()
    for each in found:
        if isinstance(each, OSError):
            raise each
    return list(dict.fromkeys(str(each) for each in found))
