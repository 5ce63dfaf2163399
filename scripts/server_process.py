"""Start a server, wait until it answers, and stop it with its children however the caller ends."""

import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from ports import free_port
from server_client import ServerError

GRACE_SECONDS = 20
ERROR = re.compile(r"\b\w*(Error|Exception)\b:? |\berror: |\[Errno \d")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ServerProcess:
    """A server in a process group of its own, with its output in a log."""

    def __init__(self, command: str, log: Path) -> None:
        """``command``: as for a shell, without a shell's syntax. Without --port it gets a free one."""
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise ServerError(f"--serve {command!r}: {error}") from error
        if not self._command:
            raise ServerError("--serve: got no command; needs one as 'vllm serve MODEL'")
        port = _port(self._command)
        if port is None:
            port = free_port()
            self._command += ["--port", str(port)]
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self.log = log
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                raise ServerError(
                    f"port {self._port} is in use: another server would answer; give --serve a free --port"
                )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                raise ServerError(f"--serve: {self._command[0]!r} cannot be run ({error.strerror})") from error

    async def wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            while time.monotonic() < deadline:
                self.check_alive()
                try:
                    # /health fails while the model loads; not every server has it.
                    health = await client.get(self.base_url.removesuffix("/v1") + "/health")
                    if health.status_code in (200, 404) and (await client.get(f"{self.base_url}/models")).is_success:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.5)
        raise self._failure(f"the server was not ready after {timeout:g} s")

    def check_alive(self) -> None:
        if self._process is not None and (status := self._process.poll()) is not None:
            raise self._failure(f"the server ended, with status {status}")

    def stop(self) -> None:
        """End the whole group: an engine and its workers are processes of their own. Blocks: nothing interrupts it."""
        if self._process is None:
            return
        # While it starts, vLLM lets a SIGTERM wait; on SIGINT all its processes end at once.
        for number in (signal.SIGINT, signal.SIGKILL):
            self._send(number)
            deadline = time.monotonic() + GRACE_SECONDS
            while self._send(0) and time.monotonic() < deadline:
                time.sleep(0.05)
        self._process.wait()
        self._process = None

    def _send(self, number: int) -> bool:
        """Whether the group had a process to receive the signal; 0 only asks."""
        assert self._process is not None
        self._process.poll()  # Reaps the leader, which would otherwise count.
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _failure(self, what: str) -> ServerError:
        """With the lines of the log that name errors, and its end: the first cause often lies far above the end."""
        lines = [line.rstrip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = list(dict.fromkeys(line for line in lines[:-15] if ERROR.search(line)))[-10:]
        return ServerError("\n".join([f"{what}. From its log, {self.log}:", *errors, *lines[-15:]]))


@asynccontextmanager
async def serving(command: str, log: Path, timeout: float) -> AsyncIterator[ServerProcess]:
    """A server that is ready, until the block ends or raises."""
    server = ServerProcess(command, log)
    try:
        server.start()
        await server.wait_until_ready(timeout)
        yield server
    finally:
        server.stop()


def run_until_signal(main: Coroutine[Any, Any, int]) -> int:
    """The coroutine's exit status; 128 + number if a signal cancelled it. Later signals do not disturb the ending."""

    async def guarded() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        received: list[int] = []

        def receive(number: int) -> None:
            if not received:
                task.cancel()
            received.append(number)

        for number in SIGNALS:
            loop.add_signal_handler(number, receive, number)
        try:
            return await main
        except asyncio.CancelledError:
            if not received:
                raise
            return 128 + received[0]

    return asyncio.run(guarded())


def _port(command: list[str]) -> int | None:
    """What --port says; the last one counts, as in argparse."""
    found = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--port" or word.startswith("--port="):
            value = following if word == "--port" else word.removeprefix("--port=")
            if not value.isdecimal() or not 0 < int(value) < 65536:
                raise ServerError(f"--serve: --port {value!r} is no port; needs 1 to 65535")
            found = int(value)
    return found
