"""Reading an image from a URL ends in time, in bounds, at an address that was checked; each failure has its reason."""

import errno
import http.client
import json
import socket
import ssl
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import load_from_disk
from image_server import answer, drip, image_server, raw
from small_recipes import write_recipe

from hf_qie import extract
from hf_qie.data import fetch as module
from hf_qie.data.fetch import BadUrl, close, fetch, is_public, is_url

IMAGE = bytes(range(256)) * 1000
CERTIFICATE = Path(__file__).with_name("images_example.pem")
PUBLIC, ALSO_PUBLIC = "93.184.215.14", "93.184.215.15"  # what the names of these tests resolve to
TRIES = 1 + len(module.PAUSES_S)


@pytest.fixture
def server():
    with image_server() as server:
        yield server


@pytest.fixture(autouse=True)
def own_client(monkeypatch):
    """No connection of another test, no proxy of this machine, short pauses."""
    monkeypatch.setattr(module, "PAUSES_S", tuple(pause / 100 for pause in module.PAUSES_S))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    close()
    yield
    close()


@pytest.fixture
def internet(monkeypatch, server):
    """A name server and an internet: `names` resolve in turn, PUBLIC is `server`; `connected` is what was tried."""

    internet = SimpleNamespace(names={}, looked_up=[], connected=[])
    peers = {}

    def getaddrinfo(host, port, *_, **__):
        host = host.decode() if isinstance(host, bytes) else host
        internet.looked_up.append(host)
        if host not in internet.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = internet.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    loopback = socket.socket.connect

    def connect(sock, address):
        internet.connected.append(address[0])
        peers.pop(sock.fileno(), None)
        if address[0] == ALSO_PUBLIC:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody is there")
        if address[0] == PUBLIC:
            peers[sock.fileno()] = address
            address = server.server_address
        return loopback(sock, address)

    peer_of = socket.socket.getpeername
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "getpeername", lambda sock: peers.get(sock.fileno()) or peer_of(sock))
    return internet


def get(url: str) -> bytes:
    return fetch(url, allow_private=True)


# --- what arrives

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("given", "body"),
    [
        (answer(IMAGE), IMAGE),
        (answer(IMAGE, content_type="application/octet-stream"), IMAGE),
        (raw(b"HTTP/1.1 200 OK\r\n\r\n" + IMAGE), IMAGE),
        (raw(CHUNKED), b"abcdefg"),
    ],
    ids=["with length", "of another type", "to the end of the connection", "chunked"],
)
def test_an_image_arrives_byte_for_byte(server, given, body):
    assert get(server.put("/a.png", given)) == body


def test_blanks_and_letters_beyond_ascii_are_encoded_and_what_is_encoded_stays(server):
    server.put("/a%20b/%C3%A9%2F.png?q=%E7%BA%A2&r=1", answer(IMAGE))
    assert get(server.url("/a b/é%2F.png?q=红&r=1#part")) == IMAGE


def test_urls_are_told_from_paths():
    assert all(map(is_url, ["http://a/b.png", "https://a/b.png", "HTTPS://A/b.png"]))
    assert not any(map(is_url, ["a/b.png", "/http://", "file:///a.png", "http:/a.png", "httpx://a"]))


# --- time and size


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"],
    ids=["headers", "body", "chunk"],
)
def test_what_drips_without_end_ends_at_the_deadline(server, monkeypatch, head):
    monkeypatch.setattr(module, "DEADLINE_S", 0.3)
    started = time.monotonic()
    with pytest.raises(BadUrl, match="the server is too slow"):
        get(server.put("/a.png", drip(head, every_s=0.01)))
    assert time.monotonic() - started < 10  # also where the machine is loaded; without a deadline it has no end


def test_a_silent_server_is_asked_again_until_the_tries_are_used_up(server, monkeypatch):
    monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.3)
    with pytest.raises(BadUrl, match="the server is too slow"):
        get(server.put("/a.png", drip(b"", every_s=10)))
    until = time.monotonic() + 30  # the server's threads may read a request after the client gave it up
    while len(server.asked) < TRIES and time.monotonic() < until:
        time.sleep(0.01)
    assert server.asked == ["/a.png"] * TRIES


def test_a_body_without_end_ends_at_the_size_limit(server, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)

    def pour(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not handler.server.closing.is_set():
            handler.wfile.write(bytes(10_000))

    with pytest.raises(BadUrl, match="more than 100,000 bytes"):
        get(server.put("/a.png", pour))


def test_a_body_that_says_it_is_too_large_is_not_read(server, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    with pytest.raises(BadUrl, match="more than 100,000 bytes"):
        get(server.put("/a.png", drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n", every_s=10)))


def test_a_body_of_just_the_limit_arrives(server, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", len(IMAGE))
    assert get(server.put("/a.png", answer(IMAGE))) == IMAGE


# --- tries


@pytest.mark.parametrize(
    "trouble",
    [answer(status=500), answer(status=503), answer(status=429), raw(b""), raw(b"nonsense\r\n\r\n")],
    ids=["500", "503", "429", "no answer", "no HTTP"],
)
def test_a_passing_trouble_is_tried_again(server, trouble):
    assert get(server.put("/a.png", trouble, trouble, answer(IMAGE))) == IMAGE
    assert server.asked == ["/a.png"] * 3


def test_a_trouble_that_stays_is_given_up_with_its_reason(server):
    with pytest.raises(BadUrl, match=r"^HTTP 500 Internal Server Error$"):
        get(server.put("/a.png", answer(status=500)))
    assert server.asked == ["/a.png"] * TRIES


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_the_client_did_wrong_is_not_tried_again(server, status):
    with pytest.raises(BadUrl, match=f"^HTTP {status} {http.client.responses[status]}$"):
        get(server.put("/a.png", answer(status=status)))
    assert server.asked == ["/a.png"]


CUT = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")


def test_a_body_cut_short_is_tried_again_and_never_taken(server):
    assert get(server.put("/a.png", CUT, answer(IMAGE))) == IMAGE
    with pytest.raises(BadUrl, match=r"the connection failed \(.*received 3 bytes, expected 10"):
        get(server.put("/b.png", CUT))
    with pytest.raises(BadUrl, match=r"the connection failed \(.*incomplete chunked read"):
        get(server.put("/c.png", raw(CHUNKED[:-14])))


def test_a_server_says_how_long_to_wait(server):
    started = time.monotonic()
    assert get(server.put("/a.png", answer(status=429, retry_after="1"), answer(IMAGE))) == IMAGE
    assert time.monotonic() - started >= 1


def test_a_wait_beyond_the_deadline_is_not_waited(server):
    started = time.monotonic()
    with pytest.raises(BadUrl, match="HTTP 429 Too Many Requests"):
        get(server.put("/a.png", answer(status=429, retry_after="3600"), answer(IMAGE)))
    assert time.monotonic() - started < 60


def test_a_wait_that_is_not_in_seconds_does_not_count(server):
    trouble = answer(status=503, retry_after="Wed, 21 Oct 2099 07:28:00 GMT")
    assert get(server.put("/b.png", trouble, answer(IMAGE))) == IMAGE


def test_a_host_that_does_not_exist_is_not_looked_up_again(internet):
    with pytest.raises(BadUrl, match="host not found"):
        get("http://images.example/a.png")
    assert internet.looked_up == ["images.example"]


def test_a_connection_is_kept_for_the_next_url_and_no_cookie_is(internet, server):
    internet.names = {"images.example": [[PUBLIC]]}
    seen = []

    def give(handler):
        seen.append(handler.headers["Cookie"])
        answer(IMAGE, set_cookie="a=1")(handler)

    server.put("/a.png", give)
    for _ in range(3):
        assert fetch("http://images.example/a.png", allow_private=False) == IMAGE
    assert (internet.connected, seen) == ([PUBLIC], [None] * 3)


def test_a_refused_connection_is_named_without_its_address(internet):
    internet.names = {"images.example": [[ALSO_PUBLIC]]}
    with pytest.raises(BadUrl, match=r"^the connection failed \(ConnectionRefusedError: Connection refused\)$"):
        get("http://images.example/a.png")


def test_the_second_address_of_a_host_is_tried_where_the_first_is_dead(internet, server):
    internet.names = {"images.example": [[ALSO_PUBLIC, PUBLIC]]}
    server.put("/a.png", answer(IMAGE))
    assert fetch("http://images.example/a.png", allow_private=False) == IMAGE
    assert internet.connected == [ALSO_PUBLIC, PUBLIC]


# --- redirects


def test_redirects_are_followed_to_a_limit(server):
    for i in range(module.MAX_REDIRECTS + 1):
        server.put(f"/{i}", answer(status=302, location=f"/{i + 1}"))  # relative to what redirects
    server.put(f"/{module.MAX_REDIRECTS + 1}", answer(IMAGE))
    assert get(server.url("/1")) == IMAGE
    server.asked.clear()
    with pytest.raises(BadUrl, match="more than 5 redirects"):
        get(server.url("/0"))
    assert len(server.asked) == 1 + module.MAX_REDIRECTS


def test_redirects_in_a_circle_end_at_the_limit(server):
    server.put("/a", answer(status=302, location="/b"))
    server.put("/b", answer(status=301, location="/a"))
    server.put("/c", answer(status=307, location="/c"))
    for path in ("/a", "/c"):
        server.asked.clear()
        with pytest.raises(BadUrl, match="more than 5 redirects"):
            get(server.url(path))
        assert len(server.asked) == 1 + module.MAX_REDIRECTS


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://a/b.png", "data:image/png;base64,AAAA", "https://"])
def test_a_redirect_leads_to_http_alone(server, location):
    with pytest.raises(BadUrl, match="only http and https URLs with a host are read"):
        get(server.put("/a.png", answer(status=302, location=location)))


def test_a_redirect_into_the_own_network_is_refused_before_a_request(internet, server):
    internet.names = {"images.example": [[PUBLIC]], "127.0.0.1": [["127.0.0.1"]]}
    secret = server.put("/secret", answer(IMAGE))
    server.put("/a.png", answer(status=302, location=secret))
    with pytest.raises(BadUrl, match=r"^127\.0\.0\.1 is not a public address"):
        fetch("http://images.example/a.png", allow_private=False)
    assert server.asked == ["/a.png"]


# --- where to


def test_a_name_that_resolves_anew_does_not_lead_inside(internet, server):
    internet.names = {"images.example": [[PUBLIC], ["127.0.0.1"]]}
    server.put("/a.png", answer(IMAGE))
    assert fetch("http://images.example/a.png", allow_private=False) == IMAGE
    close()
    with pytest.raises(BadUrl, match="not a public address"):
        fetch(f"http://images.example:{server.server_port}/a.png", allow_private=False)
    assert server.asked == ["/a.png"]


def test_what_another_recipe_may_read_is_not_open_to_this_one(server):
    url = server.put("/a.png", answer(IMAGE))
    assert get(url) == IMAGE
    with pytest.raises(BadUrl, match="not a public address"):
        fetch(url, allow_private=False)
    assert server.asked == ["/a.png"]


# --- through a proxy


def test_a_proxy_is_asked_for_what_it_can_resolve_and_not_for_an_own_address(server, internet, monkeypatch):
    internet.names = {"127.0.0.1": [["127.0.0.1"]], "inside.example": [["10.0.0.1"]]}
    monkeypatch.setenv("HTTP_PROXY", server.url(""))
    server.put("http://images.example/a.png", answer(status=302, location="http://inside.example/b.png"))
    server.put("http://images.example/c.png", answer(IMAGE))
    assert fetch("http://images.example/c.png", allow_private=False) == IMAGE
    with pytest.raises(BadUrl, match=r"^10\.0\.0\.1 is not a public address"):
        fetch("http://images.example/a.png", allow_private=False)
    assert server.asked == ["http://images.example/c.png", "http://images.example/a.png"]


def test_an_https_url_goes_through_its_proxy_and_one_of_no_proxy_does_not(server, internet, monkeypatch):
    internet.names = {"127.0.0.1": [["127.0.0.1"]], "near.example": [[PUBLIC]]}
    monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{server.server_port}")
    with pytest.raises(BadUrl, match=r"the connection failed \(ProxyError: 403"):
        fetch("https://images.example/a.png", allow_private=False)
    assert server.asked == ["images.example:443"] * TRIES
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "near.example")
    server.put("/a.png", answer(IMAGE))
    assert fetch("http://near.example/a.png", allow_private=False) == IMAGE


@pytest.mark.parametrize("host", "127.0.0.1 localhost 2130706433 0x7f.1".split())
def test_no_spelling_of_this_machine_is_let_in(server, host):
    server.put("/a.png", answer(IMAGE))
    with pytest.raises(BadUrl, match=r"is not a public address; extract\.allow_private_urls: true"):
        fetch(f"http://{host}:{server.server_port}/a.png", allow_private=False)
    assert server.asked == []


@pytest.mark.parametrize(
    "address",
    "0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 192.0.2.1 192.168.1.1 198.18.0.1 224.0.0.1 "
    "240.0.0.1 255.255.255.255 :: ::1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2001:db8::1 fc00::1 "
    "fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1".split(),
)
def test_addresses_of_a_network_of_ones_own_are_private(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", "8.8.8.8 93.184.215.14 ::ffff:8.8.8.8 64:ff9b::808:808 2606:4700::1".split())
def test_addresses_of_the_open_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://a/b.png",
        "data:image/png;base64,AAAA",
        "gopher://a",
        "a/b.png",
        "http:///b",
        "http://",
    ],
)
def test_only_http_is_fetched(url):
    with pytest.raises(BadUrl, match="only http and https URLs with a host are read"):
        get(url)


@pytest.mark.parametrize("url", ["http://[::1/a", "http://127.0.0.1:99999/b", "http://a:b/c", "http://\0/"])
def test_a_broken_url_is_named_as_such(url):
    with pytest.raises(BadUrl, match="invalid URL"):
        get(url)


def test_a_url_with_a_password_is_refused_and_not_repeated(server):
    server.put("/a.png", answer(IMAGE))
    with pytest.raises(BadUrl, match="holds a user name or password") as error:
        get(f"http://me:hunter2@127.0.0.1:{server.server_port}/a.png")
    assert "hunter2" not in str(error.value)
    assert server.asked == []


def test_a_web_page_is_named_as_such(server):
    page = answer(b"<!doctype html><p>Please log in", content_type="text/html; charset=utf-8")
    with pytest.raises(BadUrl, match="a web page"):
        get(server.put("/a.png", page))
    assert server.asked == ["/a.png"]


# --- a whole extraction


def test_rows_whose_urls_fail_are_listed_with_the_reason_in_bounded_time_and_the_others_kept(
    server, monkeypatch, tmp_path, tiny, edits
):
    monkeypatch.setattr(module, "DEADLINE_S", 2.0)
    monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.6)
    monkeypatch.setattr(module, "MAX_BYTES", 1_000_000)
    rows = [json.loads(line) for line in (edits / "edit.jsonl").read_text(encoding="utf-8").splitlines()]
    image = answer((edits / rows[0]["source_image"]).read_bytes())

    def pour(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not handler.server.closing.is_set():
            handler.wfile.write(bytes(100_000))

    faults = {
        "/slow.png": (drip(b"HTTP/1.1 200 OK\r\n\r\n", every_s=0.05), "the server is too slow"),
        "/silent.png": (drip(b"", every_s=10), "the server is too slow"),
        "/endless.png": (pour, "more than 1,000,000 bytes"),
        "/circle.png": (answer(status=302, location="/circle.png"), "more than 5 redirects"),
        "/page.png": (answer(b"<!doctype html>", content_type="text/html"), "a web page"),
        "/broken.png": (answer(b"no image", content_type="image/png"), "no image"),
        "/file.png": (answer(status=302, location="file:///etc/passwd"), "only http and https URLs"),
        "/gone.png": (answer(status=404), "HTTP 404 Not Found"),
    }
    urls = [server.put(path, fault) for path, (fault, _) in faults.items()]
    urls.append(server.put("/passing.png", answer(status=500), image))  # 500, then 200
    urls.append(server.put("/whole.png", image))
    targets = [str(edits / row["target_image"]) for row in rows]
    given = [rows[i] | {"source_image": url, "target_image": targets[i]} for i, url in enumerate(urls)]
    settings = {"allow_private_urls": True, "max_bad_share": 0.9, "chunk_rows": 4}
    started = time.monotonic()
    assert extract.main([str(write_recipe(tmp_path, tiny(), {"task": given}, extract=settings))]) == 0
    assert time.monotonic() - started < 30
    folder = tmp_path / "sets" / "task"
    bad = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["row"], row["path"], row["column"]) for row in bad] == [
        (place, url, "source_image") for place, url in enumerate(urls[: len(faults)])
    ]
    for row, (_, reason) in zip(bad, faults.values(), strict=True):
        assert reason in row["reason"]
    assert load_from_disk(folder)["row"][:] == [len(faults), len(faults) + 1]


# --- TLS


@pytest.fixture
def secure(internet, server, monkeypatch):
    """`server` with the certificate of images.example; other.example leads there too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    internet.names = {"images.example": [[PUBLIC]], "other.example": [[PUBLIC]]}
    server.put("/a.png", answer(IMAGE))
    return server


def test_https_holds_to_the_name_though_it_connects_to_an_address(secure, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    assert fetch("https://images.example/a.png", allow_private=False) == IMAGE
    with pytest.raises(BadUrl, match=r"its certificate is not trusted .*mismatch"):
        fetch("https://other.example/a.png", allow_private=False)


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(secure, internet):
    with pytest.raises(BadUrl, match="its certificate is not trusted"):
        fetch("https://images.example/a.png", allow_private=False)
    assert internet.connected == [PUBLIC]
