"""Read an image over http(s), bounded in time and bytes; private addresses only where the recipe allows them.

The client runs on an event loop in a thread of its own, so that one timeout covers name resolution, redirects, retries
and bytes that drip in. `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` are honoured. Without a proxy the address that a
connection went to is checked before anything is sent, so a name that resolves anew gains nothing. A proxy resolves
names itself: there the addresses that the host has from here are checked, and a host without any is left to the proxy.
"""

import asyncio
import atexit
import functools
import ipaddress
import math
import os
import re
import socket
import ssl
import threading
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urljoin
from urllib.request import getproxies, proxy_bypass

import httpx2

STARTS = ("http://", "https://")
MAX_BYTES = 64 << 20
DEADLINE_S = 120.0  # of one URL in all, redirects, pauses and retries included
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0  # READ: of silence
MAX_REDIRECTS = 5
PAUSES_S = (1.0, 2.0, 4.0)  # before each retry
PASSWORD = "the URL holds a user name or password, which would be stored with the row; leave it out"
PRIVATE = "{} is not a public address; extract.allow_private_urls: true allows it"
HEADERS = {"User-Agent": "hf_qie", "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
IPV6_UNICAST, NAT64 = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")

_clients: dict[tuple[str | None, bool], httpx2.AsyncClient] = {}  # by proxy and `allow_private`
_starting = threading.Lock()


class BadUrl(ValueError):
    """A URL that gives no image; the message says why and does not repeat the URL."""


class _Retry(Exception):
    """Reason, and seconds to wait at least."""


def is_url(path: str) -> bool:
    """Whether an image is read over http(s) rather than from a file."""
    return path[: len("https://")].lower().startswith(STARTS)


def holds_password(url: str) -> bool:
    """Whether a URL names a user before its host."""
    return re.match(r"[^/?#]*//[^/?#]*@", url) is not None


def is_public(address: str) -> bool:
    """Whether an IP address is on the open internet; one of IPv6 that stands for one of IPv4 counts as that."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip in NAT64 or ip.ipv4_mapped):
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast and (ip.version == 4 or (ip in IPV6_UNICAST and not ip.sixtofour))


def fetch(url: str, *, allow_private: bool) -> bytes:
    """Read the image at an http(s) `url`, at most 64 MB, within two minutes.

    Server errors, 429, timeouts and broken connections are tried again. `allow_private` also allows addresses that are
    not public: this machine's, its network's, a cloud's metadata server. Raises BadUrl.
    """
    with _starting:
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(_fetch(url, allow_private), loop).result()


def close() -> None:
    """Close the connections that are kept for further URLs; done at exit, too."""

    async def close_clients() -> None:
        while _clients:
            await _clients.popitem()[1].aclose()

    asyncio.run_coroutine_threadsafe(close_clients(), _loop()).result()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fetch", daemon=True).start()
    atexit.register(close)
    return loop


async def _fetch(url: str, allow_private: bool) -> bytes:
    reason = "the server is too slow"
    with suppress(TimeoutError):
        async with asyncio.timeout(DEADLINE_S) as timeout:
            for pause_s in (*PAUSES_S, math.inf):
                try:
                    return await _follow(url, allow_private)
                except _Retry as error:
                    reason, least_s = error.args
                if asyncio.get_running_loop().time() + max(pause_s, least_s) >= timeout.when():
                    break
                await asyncio.sleep(max(pause_s, least_s))
    raise BadUrl(reason)


async def _follow(url: str, allow_private: bool) -> bytes:
    """The body at the end of the redirects, each of which is checked like the first URL. One try."""
    for _ in range(1 + MAX_REDIRECTS):
        if holds_password(url):
            raise BadUrl(PASSWORD)
        try:
            parsed = httpx2.URL(url)
            if f"{parsed.scheme}://" not in STARTS or not parsed.host:
                raise BadUrl("only http and https URLs with a host are read")
            if (parsed.port or 0) >= 1 << 16:
                raise BadUrl("invalid URL")
            proxy = await _proxy(parsed, allow_private)
            extensions = {} if proxy or allow_private else {"trace": _check_peer}
            async with _client(proxy, allow_private).stream("GET", parsed, extensions=extensions) as response:
                if not response.has_redirect_location:
                    return await _body(response)
                url = urljoin(url, response.headers["Location"])
        except (httpx2.InvalidURL, UnicodeError) as error:  # Unicode: a host name that DNS cannot have
            raise BadUrl("invalid URL") from error
        except httpx2.TimeoutException as error:
            raise _Retry("the server is too slow", 0) from error
        except httpx2.TransportError as error:
            raise _explained(error) from error
    raise BadUrl(f"more than {MAX_REDIRECTS} redirects")


async def _proxy(url: httpx2.URL, allow_private: bool) -> str | None:
    proxies = getproxies()
    proxy = None if proxy_bypass(url.netloc.decode()) else proxies.get(url.scheme) or proxies.get("all")
    if proxy and not allow_private:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(url.host, None)
        except socket.gaierror:
            found = []
        if private := [address[0] for *_, address in found if not is_public(address[0])]:
            raise BadUrl(PRIVATE.format(private[0]))
    return proxy and (proxy if "://" in proxy else f"http://{proxy}")


def _client(proxy: str | None, allow_private: bool) -> httpx2.AsyncClient:
    if (key := (proxy, allow_private)) not in _clients:
        _clients[key] = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(proxy=proxy),
            timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=None),
            headers=HEADERS,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none: a URL gives the same after any other
        )
    return _clients[key]


async def _check_peer(event: str, info: dict) -> None:
    """Close a new connection to a private address before TLS and before the request; a `trace` of httpx2."""
    if event == "connection.connect_tcp.complete":
        stream = info["return_value"]
        if not is_public(address := stream.get_extra_info("server_addr")[0]):
            await stream.aclose()
            raise BadUrl(PRIVATE.format(address))


def _explained(error: BaseException) -> BadUrl | _Retry:
    while cause := error.__cause__ or error.__context__:
        error = cause
    if isinstance(error, ssl.SSLCertVerificationError):
        return BadUrl(f"its certificate is not trusted ({error.verify_message})")
    if isinstance(error, socket.gaierror):
        reason = f"host not found ({error.strerror})"
        return _Retry(reason, 0) if error.errno == socket.EAI_AGAIN else BadUrl(reason)
    text = str(error)
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        text = os.strerror(error.errno)  # asyncio's own text holds the address
    return _Retry(f"the connection failed ({type(error).__name__}: {text})", 0)


async def _body(response: httpx2.Response) -> bytes:
    status = f"HTTP {response.status_code} {httpx2.codes.get_reason_phrase(response.status_code)}".strip()
    if response.status_code == httpx2.codes.TOO_MANY_REQUESTS or response.is_server_error:
        pause = response.headers.get("Retry-After", "")
        raise _Retry(status, int(pause) if pause.isdecimal() else 0)  # in place of seconds it may hold a date
    if response.status_code != httpx2.codes.OK:
        raise BadUrl(status)
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise BadUrl("a web page (text/html), not an image")
    body = bytearray()
    if int(response.headers.get("Content-Length", 0)) <= MAX_BYTES:
        async for part in response.aiter_raw():
            body += part
            if len(body) > MAX_BYTES:
                break
        else:
            return bytes(body)
    raise BadUrl(f"more than {MAX_BYTES:,} bytes")
