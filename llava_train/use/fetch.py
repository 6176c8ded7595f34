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
from urllib.parse import urljoin, urlsplit

from llava_train.errors import UserError

MAX_BYTES = 20 * 1024 * 1024
TIMEOUT_S = 20.0
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16

Address = str
"""An IP address as text."""


class FetchError(UserError):
    """An address that is not fetched. The message names it."""


def is_url(value: object) -> bool:
    """Whether a value is written as an address of the web."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def is_public(address: Address) -> bool:
    """Whether an IP address belongs to the open internet, the IPv4 address inside of an IPv6 one included."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inside.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not all(is_public(str(each)) for each in inside if each is not None):
            return False
    return ip.is_global and not ip.is_multicast


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
    sockets: list[socket.socket] = []
    expired = threading.Event()

    def give_up() -> None:
        expired.set()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        content = _follow(url, max_bytes, time.monotonic() + timeout_s, allowed, sockets)
        if expired.is_set():  # a connection that was shut down looks like one that ended
            raise TimeoutError
        return content
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, FetchError):
            raise
        slow = expired.is_set() or isinstance(error, TimeoutError)
        reason = f"no answer within {timeout_s:g} seconds" if slow else f"{type(error).__name__}: {error}"
        raise FetchError(f"{url:.200}: cannot be fetched: {reason}") from error
    finally:
        timer.cancel()
        for each in sockets:
            each.close()


def _follow(
    url: str,
    max_bytes: int,
    deadline: float,
    allowed: Callable[[Address], bool],
    sockets: list[socket.socket],
) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        connection, target = _connect(url, deadline - time.monotonic(), allowed)
        sockets.append(connection.sock)
        connection.request("GET", target, headers={"User-Agent": "llava_train", "Accept": "image/*"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            url = urljoin(url, location)
            continue
        if response.status != 200:
            raise FetchError(f"{url:.200}: the server answers {response.status} {response.reason}")
        return _read(response, url, max_bytes)
    raise FetchError(f"{url:.200}: more than {_MAX_REDIRECTS} redirects")


def _read(response: http.client.HTTPResponse, url: str, max_bytes: int) -> bytes:
    content = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        content += chunk
        if len(content) > max_bytes:
            raise FetchError(f"{url:.200}: larger than {max_bytes:,} bytes")
    if response.length:
        raise FetchError(f"{url:.200}: the connection broke off before the end")
    return bytes(content)


def _connect(url: str, timeout_s: float, allowed: Callable[[Address], bool]) -> tuple[http.client.HTTPConnection, str]:
    """A connection to the host of an address, and what to ask it for. Raises FetchError."""
    if timeout_s <= 0:
        raise TimeoutError
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError(f"{url:.200}: only http:// and https:// addresses are fetched")
    host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    private = [address for address in addresses if not allowed(address)]
    if private:
        raise FetchError(f"{url:.200}: {host} is {private[0]}, an address of a private network, which is never fetched")
    plain = http.client.HTTPConnection(host, port, timeout=timeout_s)
    plain.sock = socket.create_connection((addresses[0], port), timeout_s)
    if parts.scheme == "https":
        plain.sock = ssl.create_default_context().wrap_socket(plain.sock, server_hostname=host)
    return plain, f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
