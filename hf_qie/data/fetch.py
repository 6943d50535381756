"""A picture over http(s): bounded in time and bytes, and from the machine's own network only where that is allowed.

Through http.client, because it reads from what it is handed: a socket connected to the very address that was checked
(a name that resolves anew gains nothing), each read of which keeps the deadline. So no proxy is asked either.
"""

import functools
import http.client
import io
import ipaddress
import math
import re
import socket
import ssl
import string
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import SplitResult, quote, urljoin, urlsplit

PORTS = {"http": 80, "https": 443}  # by scheme; no other is fetched
STARTS = tuple(f"{scheme}://" for scheme in PORTS)
MAX_BYTES = 64 << 20
DEADLINE_S = 120.0  # of one URL in all, redirects, pauses and further tries included
CONNECT_TIMEOUT_S = 10.0  # of one address
READ_TIMEOUT_S = 30.0  # of silence
MAX_REDIRECTS = 5
PAUSES_S = (1.0, 2.0, 4.0)  # before each further try
REDIRECTS = (301, 302, 303, 307, 308)
TOO_MANY_REQUESTS = 429
PASSWORD = "the URL holds a user name or password, which would be stored with the row; leave it out"
HEADERS = {"User-Agent": "hf_qie", "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that is open internet in IPv6
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address


class BadUrl(ValueError):
    """A URL that gives no picture; the message says why and does not repeat the URL."""


class Passing(Exception):
    """A trouble that may be over at the next try, after `pause_s` at least."""

    def __init__(self, reason: str, *, pause_s: float = 0.0):
        super().__init__(reason)
        self.pause_s = pause_s


def is_url(path: str) -> bool:
    """Whether a picture is to be fetched rather than opened."""
    return path[: len("https://")].lower().startswith(STARTS)


def holds_password(url: str) -> bool:
    """Whether a URL names a user before its host."""
    return re.match(r"[^/?#]*//[^/?#]*@", url) is not None


def fetch(url: str, *, allow_private: bool) -> bytes:
    """What lies at an http(s) `url`, at most 64 MB, within two minutes.

    Server errors, 429, timeouts and broken connections are tried again. `allow_private` also lets in addresses that
    are not on the open internet: this machine's, its network's, a cloud's metadata server.

    Raises:
        BadUrl: it is not to be had, too large, too slow, a web page, or lies where it must not.
    """
    deadline = time.monotonic() + DEADLINE_S
    pauses_s = iter(PAUSES_S)
    while True:
        try:
            return follow(url, allow_private=allow_private, deadline=deadline)
        except Passing as trouble:
            pause_s = max(next(pauses_s, math.inf), trouble.pause_s)
            if time.monotonic() + pause_s >= deadline:
                raise BadUrl(str(trouble)) from trouble
            time.sleep(pause_s)


def follow(url: str, *, allow_private: bool, deadline: float) -> bytes:
    """The body at the end of the redirects, each of which is checked like the first URL. One try.

    Raises:
        BadUrl: another try would not help.
        Passing: another try may.
    """
    for _ in range(1 + MAX_REDIRECTS):
        parts = split(url)
        try:
            with connect(parts, allow_private=allow_private, deadline=deadline) as connection:
                response = ask(connection, parts, deadline=deadline)
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    return body_of(response)
                url = urljoin(url, response.headers["Location"])
        except ssl.SSLCertVerificationError as error:
            raise BadUrl(f"its certificate is not trusted ({error.verify_message})") from error
        except TimeoutError as error:
            raise Passing("the server is too slow") from error
        except (OSError, http.client.HTTPException) as error:
            raise Passing(f"the connection broke ({type(error).__name__}: {error})") from error
    raise BadUrl(f"more than {MAX_REDIRECTS} redirects")


def split(url: str) -> SplitResult:
    """The parts of a URL that may be fetched; raises BadUrl."""
    try:
        parts = urlsplit(url)
        allowed = parts.scheme in PORTS and bool(parts.hostname) and parts.port != 0  # `port` raises too
    except ValueError as error:
        raise BadUrl("no valid URL") from error
    if not allowed:
        raise BadUrl(f"only {' and '.join(PORTS)} URLs with a host are fetched")
    if holds_password(url):
        raise BadUrl(PASSWORD)
    return parts


def connect(parts: SplitResult, *, allow_private: bool, deadline: float) -> socket.socket:
    """A connection to the host of a URL, with TLS for https; raises BadUrl, or OSError of the last address tried."""
    error: OSError = OSError("no address")
    for family, kind, protocol, _, address in resolve(parts, allow_private=allow_private):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(min(CONNECT_TIMEOUT_S, left_of(deadline)))
            connection.connect(address)
            if parts.scheme == "https":
                return tls().wrap_socket(connection, server_hostname=parts.hostname)
            return connection
        except OSError as failure:
            connection.close()
            error = failure
    raise error


def resolve(parts: SplitResult, *, allow_private: bool) -> list[tuple]:
    """What `socket.getaddrinfo` gives for the host of a URL; raises BadUrl where any address must not be asked."""
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or PORTS[parts.scheme], type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise BadUrl("no valid host name") from error
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise
        raise BadUrl(f"no such host ({error.strerror})") from error
    for *_, address in found:
        if not (allow_private or is_public(address[0])):
            raise BadUrl(
                f"{address[0]} is no address of the open internet; extract.allow_private_urls: true lets it in"
            )
    return found


def is_public(address: str) -> bool:
    """Whether an address is on the open internet; one in IPv6 that stands for one in IPv4 counts as that."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None:
            return ip in GLOBAL_UNICAST and ip.is_global
        ip = inner
    return ip.is_global and not ip.is_multicast


@functools.cache
def tls() -> ssl.SSLContext:
    """The system's certificates ($SSL_CERT_FILE names others), read once: that takes milliseconds."""
    return ssl.create_default_context()


class Stream(io.RawIOBase):
    """A connection as http.client uses one; however slowly bytes drip in, no read goes past the deadline."""

    def __init__(self, connection: socket.socket, *, deadline: float):
        self.connection, self.deadline = connection, deadline

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Read what is there; raises TimeoutError."""
        self.connection.settimeout(min(READ_TIMEOUT_S, left_of(self.deadline)))
        return self.connection.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        """Send all of `data`; raises TimeoutError."""
        self.connection.settimeout(min(READ_TIMEOUT_S, left_of(self.deadline)))
        self.connection.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """A buffered reader of this stream."""
        return io.BufferedReader(self)

    def close(self) -> None:
        """Nothing: http.client closes before the body is read; the connection's owner closes it."""


def left_of(deadline: float) -> float:
    """Seconds until `deadline`; raises TimeoutError where it has passed."""
    if (left_s := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left_s


def ask(connection: socket.socket, parts: SplitResult, *, deadline: float) -> http.client.HTTPResponse:
    """GET the path and query of a URL over `connection`; the body is still to be read."""
    host, port = parts.hostname, parts.port or PORTS[parts.scheme]
    if parts.scheme == "https":  # for the Host header, which leaves out a scheme's own port
        client = http.client.HTTPSConnection(host, port, context=tls())
    else:
        client = http.client.HTTPConnection(host, port)
    client.sock = Stream(connection, deadline=deadline)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # blanks and letters beyond ASCII are encoded, what is encoded already stays
    client.request("GET", quote(target, safe=string.punctuation), headers=HEADERS | {"Connection": "close"})
    return client.getresponse()


def body_of(response: http.client.HTTPResponse) -> bytes:
    """The body of an answer that is one; raises BadUrl or Passing for any other."""
    status = f"HTTP {response.status} {http.client.responses.get(response.status, '')}".strip()
    if response.status == TOO_MANY_REQUESTS or response.status >= 500:
        raise Passing(status, pause_s=retry_after_s(response.headers.get("Retry-After", "")))
    if response.status != http.client.OK:
        raise BadUrl(status)
    if response.headers.get_content_type() == "text/html":
        raise BadUrl("a web page (text/html), no picture")
    length = response.length  # None where the server does not say
    body = b"" if length and length > MAX_BYTES else response.read(MAX_BYTES + 1)
    if max(length or 0, len(body)) > MAX_BYTES:
        raise BadUrl(f"more than {MAX_BYTES:,} bytes")
    if length is not None and len(body) < length:
        raise Passing(f"the connection broke ({len(body):,} of {length:,} bytes)")
    return body


def retry_after_s(header: str) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 where it holds neither."""
    if header.strip().isdecimal():
        return float(header)
    try:
        return (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
