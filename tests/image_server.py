"""A small HTTP server on loopback for tests: what it answers by path, and what it was asked."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Gives the answers of the server's `answers`: of a list the next one, the last for ever."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        answers = self.server.answers.get(self.path) or [answer(b"not found", status=404)]
        try:
            (answers.pop(0) if len(answers) > 1 else answers[0])(self)
        except OSError:  # the client has had enough
            self.close_connection = True

    def do_CONNECT(self):
        self.server.asked.append(self.path)
        answer(status=403)(self)

    def log_message(self, *args):
        pass


class ImageServer(ThreadingHTTPServer):
    """`put` an answer under a path, `url` it, and read in `asked` which paths were asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def put(self, path: str, *answers: Answer) -> str:
        """The URL under which the first of `answers` is given to the first question, and so on."""
        self.answers[path] = list(answers)
        return self.url(path)

    def put_folder(self, folder: Path) -> None:
        """Every file under `folder` by its path from there."""
        for path in folder.rglob("*.*"):
            self.put(f"/{path.relative_to(folder).as_posix()}", answer(path.read_bytes()))

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is no news


@contextmanager
def image_server() -> Iterator[ImageServer]:
    with ImageServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def answer(body: bytes = b"", *, status: int = 200, **headers: str) -> Answer:
    """`body` whole, with `headers` (`content_type` for Content-Type) over the usual ones."""

    def give(handler: Handler) -> None:
        usual = {"content_type": "image/png", "content_length": str(len(body))}
        handler.send_response(status)
        for name, value in (usual | headers).items():
            handler.send_header(name.replace("_", "-").title(), value)
        handler.end_headers()
        handler.wfile.write(body)

    return give


def drip(head: bytes, *, every_s: float) -> Answer:
    """`head`, then one letter at a time until the client hangs up."""

    def give(handler: Handler) -> None:
        handler.wfile.write(head)
        while not handler.server.closing.wait(every_s):
            handler.wfile.write(b"x")

    return give


def raw(content: bytes) -> Answer:
    """`content` as it is, status line and all, then the end of the connection."""

    def give(handler: Handler) -> None:
        handler.wfile.write(content)
        handler.close_connection = True

    return give
