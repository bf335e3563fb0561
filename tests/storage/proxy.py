"""A proxy between a client and an S3 server that does what networks and overloaded servers do.

It stands at the level of HTTP requests: a fault is chosen for each by a plan, a function of
the request's number and kind, and the rest is handed on as it came, Host header included, so
that signatures stay valid.
"""

import contextlib
import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

FAULTS = ("busy", "broken", "cut request", "cut reply", "lost reply", "expired")


@dataclass(frozen=True)
class Request:
    """kind: put, part, create, complete, abort, get, head, list, uploads, delete."""

    kind: str
    key: str
    seen: int
    """How many requests of this kind for this key came before."""


Plan = Callable[[Request], str | None]


def kind_of(method: str, path: str) -> str:
    """What S3 operation a request is."""
    query = parse_qs(urlsplit(path).query, keep_blank_values=True)
    if "uploads" in query:
        return "create" if method == "POST" else "uploads"
    if "uploadId" in query:
        return {"PUT": "part", "POST": "complete", "DELETE": "abort"}[method]
    return "list" if "list-type" in query else method.lower()


def sometimes(share: float, faults: tuple[str, ...], seed: int) -> Plan:
    """Any of `faults` for a share of the requests, at random."""
    source, lock = random.Random(seed), threading.Lock()

    def plan(_: Request) -> str | None:
        with lock:
            return source.choice(faults) if source.random() < share else None

    return plan


def first(kind: str, fault: str, count: int = 1) -> Plan:
    """A fault for the first `count` requests of a kind, for every key."""
    return lambda request: fault if request.kind == kind and request.seen < count else None


def always(fault: str, *kinds: str) -> Plan:
    """A fault for each request of these kinds; of all if none is given."""
    return lambda request: fault if not kinds or request.kind in kinds else None


class Proxy:
    """Listens on loopback; `plan`, `latency_s` and `bandwidth` may change at any time."""

    def __init__(self, host: str, port: int) -> None:
        self.upstream = (host, port)
        self.plan: Plan = lambda _: None
        self.latency_s = 0.0
        self.counts: Counter[str] = Counter()
        """Requests by kind, and injected faults by name."""
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def choose(self, method: str, path: str) -> str | None:
        kind, key = kind_of(method, path), urlsplit(path).path
        with self._lock:
            request = Request(kind, key, self._seen[kind, key])
            self._seen[kind, key] += 1
            self.counts[kind] += 1
        fault = self.plan(request)
        if fault:
            with self._lock:
                self.counts[fault] += 1
        return fault

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def _serve(self) -> None:
                fault = proxy.choose(self.command, self.path)
                time.sleep(proxy.latency_s)
                length = int(self.headers.get("Content-Length") or 0)
                if fault == "cut request":
                    self.rfile.read(length // 2)
                    return self._hang_up()
                body = self.rfile.read(length)
                if fault == "busy":
                    return self._answer(503, "SlowDown")
                if fault == "broken":
                    return self._answer(500, "InternalError")
                if fault == "expired":
                    return self._answer(400, "ExpiredToken")
                if fault == "denied":
                    return self._answer(403, "AccessDenied")
                named = fault and fault.startswith("no checksums: ") and any(map(_is_checksum, self.headers.items()))
                if fault and named:
                    return self._answer(*_refusal(fault))
                try:
                    status, headers, content = self._forward(body)
                except OSError:  # the server has been stopped
                    return self._hang_up()
                if fault == "lost reply":
                    return self._hang_up()
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("connection", "transfer-encoding", "keep-alive"):
                        self.send_header(name, value)
                if not any(n.lower() == "content-length" for n, _ in headers):
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "HEAD":
                    return None
                if fault == "cut reply":
                    self.wfile.write(content[: len(content) // 2])
                    return self._hang_up()
                self.wfile.write(content)
                return None

            def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection(*proxy.upstream, timeout=60)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() not in ("connection", "expect"):
                            connection.putheader(name, value)
                    connection.putheader("Connection", "close")
                    connection.endheaders(body or None)
                    reply = connection.getresponse()
                    return reply.status, reply.getheaders(), reply.read()
                finally:
                    connection.close()

            def _answer(self, status: int, code: str) -> None:
                content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Type", "application/xml")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _hang_up(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        return Handler


def _is_checksum(header: tuple[str, str]) -> bool:
    """Whether a header is of those that older and smaller servers don't know."""
    name, value = header[0].lower(), header[1].lower()
    return name.startswith(("x-amz-checksum-", "x-amz-sdk-checksum-", "x-amz-trailer")) or "aws-chunked" in value


def _refusal(fault: str) -> tuple[int, str]:
    """Status and code of a fault such as "no checksums: 501 NotImplemented"."""
    status, code = fault.removeprefix("no checksums: ").split()
    return int(status), code


@contextlib.contextmanager
def proxy_to(host: str, port: int) -> Iterator[Proxy]:
    """A running proxy, gone at the end of the block."""
    proxy = Proxy(host, port)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()
