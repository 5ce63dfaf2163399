"""An OpenAI-compatible server on the loopback whose every reply a test decides."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

MODEL = "fake"


class Reply(NamedTuple):
    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    delay: float = 0.0
    """Seconds before the answer."""
    raw: bytes | None = None
    """Sent instead of the body as JSON."""
    promised: int | None = None
    """Content-Length, where it is to differ from what is sent."""


def completion(text: str, finish_reason: str = "stop", tokens: int = 7) -> Reply:
    choice = {"text": text, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Reply({"choices": [choice], "usage": {"completion_tokens": tokens}})


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # With 5, the default, a burst of connections waits a second to be repeated.

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # A client that gave up is none of the server's errors.
            super().handle_error(request, client_address)


class FakeServer:
    """``answer(path, body)`` gives the reply to every POST; requests are kept in the order in which they came."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Reply], port: int = 0) -> None:
        self.answer = answer
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.routes: dict[str, Any] = {
            "/health": {},
            "/v1/models": {"data": [{"id": MODEL, "owned_by": "vllm", "root": "org/fake", "max_model_len": 2048}]},
            "/version": {"version": "0.32.0"},
        }
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or every reply waits 40 ms for an acknowledgement

            def do_GET(self) -> None:
                found = outer.routes.get(self.path.partition("?")[0])
                self._send(Reply({"detail": "Not Found"}, 404) if found is None else Reply(found))

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                sent = self.rfile.read(length)
                if len(sent) < length:
                    raise ConnectionError("the client gave up while it sent its request")
                body = json.loads(sent)
                with outer._lock:
                    outer.requests.append((self.path, body))
                    reply = outer.answer(self.path, body)
                time.sleep(reply.delay)
                self._send(reply)

            def _send(self, reply: Reply) -> None:
                sent = json.dumps(reply.body).encode() if reply.raw is None else reply.raw
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(sent) if reply.promised is None else reply.promised))
                self.end_headers()
                self.wfile.write(sent)
                self.close_connection = reply.promised is not None

            def log_message(self, *_: object) -> None:
                pass

        self._server = Listener(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def serve(self) -> None:
        # The default of half a second between looks at the shutdown flag would be most of a test's time.
        self._server.serve_forever(poll_interval=0.01)

    @contextmanager
    def running(self) -> Iterator["FakeServer"]:
        thread = threading.Thread(target=self.serve, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
