"""Serve the demo's models in NVFP4 with vLLM on this machine's CPU, ask them questions, and report what was stored."""

import argparse
import atexit
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import demo_model
from ending import Signals
from openai import OpenAI, OpenAIError
from ports import check_free, free_port
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/serve/vllm-cpu.yaml"
# The cache of one short conversation fits in 1 GiB. The model is local, so nothing has to be looked up or reported.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
# Easy ones: a model of 135 million parameters with weights and activations in four bits answers few others.
QUESTIONS = ["What is the capital of France?", "What is the largest ocean on Earth?", "What is 2 + 3?"]
START_SECONDS = 240
GRACE_SECONDS = 15
LOADED = re.compile(
    r"fouroversix: loaded (?P<layers>\d+) layers, (?P<weights>\d+) weights, "
    r"(?P<bits>[\d.]+) bits per weight, (?P<fours>[\d.]+) % of blocks chose 4"
)
ERROR = re.compile(r"^(?!.* WARNING ).*(\b\w*(Error|Exception):| error[:,] )")

console = Console(highlight=False)


class DemoError(Exception):
    """What the user is told before the demo ends with status 1."""


class Result(NamedTuple):
    model: str
    ready_seconds: float
    tokens_per_second: float
    bits_per_weight: str
    share_of_four: str


class Server:
    """`vllm serve` in a process group of its own, with its output in a log."""

    def __init__(self, model: Path, port: int, signals: Signals) -> None:
        self.model = model
        self.url = f"http://127.0.0.1:{port}"
        self.log = ROOT / ".cache" / "logs" / f"demo-{model.name}.log"
        self._command = ["vllm", "serve", str(model.relative_to(ROOT)), "--quantization", "nvfp4_4over6"]
        self._command += ["--config", CONFIG, "--port", str(port)]
        self._signals = signals
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def group(self) -> int:
        assert self._process is not None
        return self._process.pid

    def command_line(self) -> str:
        """What start() runs, for a shell in the repository's root."""
        variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        return f'PATH="$PWD/.venv/bin:$PATH" {variables} {shlex.join(self._command)}'

    def start(self) -> None:
        path = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log, self._signals.hold():
            try:
                self._process = subprocess.Popen(
                    self._command,
                    cwd=ROOT,
                    env={**os.environ, **ENVIRONMENT, "PATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise DemoError(
                    f"vllm cannot be run ({error.strerror}); remove .venv and run scripts/demo.sh"
                ) from error

    def wait_until_ready(self, progress: Callable[[float], None]) -> float:
        """Seconds until /health answered."""
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < START_SECONDS:
            self._check_alive()
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return elapsed
            except (urllib.error.URLError, OSError):
                progress(elapsed)
                time.sleep(0.5)
        raise self.failure(f"the server was not ready after {START_SECONDS} s")

    def ask(self, question: str) -> tuple[str, int]:
        """The answer and how many tokens it took."""
        # A key is demanded by the client and ignored by the server.
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0)
        try:
            reply = client.chat.completions.create(
                model=self._command[2],
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=64,
            )
        except OpenAIError as error:
            self._check_alive()
            raise self.failure(f"the server did not answer: {error}".rstrip(".")) from error
        if not reply.choices or reply.usage is None:
            raise self.failure("the server gave an empty answer")
        return " ".join((reply.choices[0].message.content or "").split()), reply.usage.completion_tokens

    def stored(self) -> re.Match[str]:
        """What the plugin logged about the weights it made."""
        found = LOADED.search(self.log.read_text(errors="replace"))
        if found is None:
            raise self.failure("the plugin did not log what it loaded, so the weights may not be NVFP4")
        return found

    def stop(self) -> None:
        """End the whole group: vLLM's engine and workers are processes of their own."""
        if self._process is None:
            return
        with self._signals.hold():
            # While it starts, vLLM lets a SIGTERM wait; on SIGINT all its processes end at once.
            for number in (signal.SIGINT, signal.SIGKILL):
                self._send(number)
                deadline = time.monotonic() + GRACE_SECONDS
                while self._send(0) and time.monotonic() < deadline:
                    time.sleep(0.1)
            self._process.wait()
            self._process = None

    def failure(self, what: str) -> DemoError:
        lines = [line.rstrip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        relevant = list(dict.fromkeys(line for line in lines if ERROR.search(line)))[-8:] or lines[-8:]
        return DemoError("\n".join([f"{what}. From its log, {self.log.relative_to(ROOT)}:", *relevant]))

    def _send(self, number: int) -> bool:
        """Whether the group had a process to receive the signal; 0 only asks."""
        assert self._process is not None
        self._process.poll()  # Reaps the leader, which would otherwise count.
        try:
            os.killpg(self.group, number)
        except ProcessLookupError:
            return False
        return True

    def _check_alive(self) -> None:
        assert self._process is not None
        if (status := self._process.poll()) is not None:
            raise self.failure(f"the server ended early, with status {status}")


def progress_line() -> Callable[[float], None]:
    """A line every few seconds, for output that is not a terminal."""
    last = 0.0

    def report(elapsed: float) -> None:
        nonlocal last
        if elapsed - last >= 10:
            last = elapsed
            print(f"  starting, {elapsed:.0f} s", flush=True)

    return report


def run(server: Server) -> Result:
    print(f"\n{server.model.name}\n$ {server.command_line()}", flush=True)
    server.start()
    if console.is_terminal:
        with console.status("starting") as status:
            ready = server.wait_until_ready(lambda elapsed: status.update(f"starting, {elapsed:.0f} s"))
    else:
        ready = server.wait_until_ready(progress_line())
    print(f"  ready after {ready:.0f} s", flush=True)
    tokens, seconds = 0, 0.0
    for question in QUESTIONS:
        start = time.monotonic()
        answer, count = server.ask(question)
        seconds += time.monotonic() - start
        tokens += count
        print(f"  Q: {question}\n  A: {answer}", flush=True)
    stored = server.stored()
    print(
        f"  {tokens} tokens, {tokens / seconds:.1f} a second. {stored['layers']} layers, {stored['weights']} weights: "
        f"{stored['bits']} bits per weight, {stored['fours']} % of blocks chose 4.",
        flush=True,
    )
    return Result(server.model.name, ready, tokens / seconds, stored["bits"], stored["fours"])


def port_for(wanted: int | None) -> int:
    """The wanted port if it is free, else one that is; 0 wants any."""
    if wanted:
        try:
            check_free(wanted)
        except (OSError, OverflowError) as error:
            print(f"port {wanted} cannot be used ({error}); taking another")
        else:
            return wanted
    return free_port()


def summarize(results: list[Result]) -> None:
    table = Table("model", "bits/weight", "chose 4", "tokens/s", "ready")
    for r in results:
        speed, ready = f"{r.tokens_per_second:.1f}", f"{r.ready_seconds:.0f} s"
        table.add_row(r.model, r.bits_per_weight, f"{r.share_of_four} %", speed, ready)
    console.print()
    console.print(table)


def keep(server: Server) -> None:
    body = '{"model": "%s", "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": "%s"}]}'
    body %= (server.model.relative_to(ROOT), QUESTIONS[0])
    print(
        f"\nThe server stays. Ask it:\n$ curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' \\"
    )
    print(f"    -d '{body}'\nStop it:\n$ kill -INT -- -{server.group}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, help="port of the server (default: a free one)")
    parser.add_argument("--keep", action="store_true", help="serve only the dense model, and leave the server up")
    args = parser.parse_args()
    signals = Signals()
    os.environ["no_proxy"] = "127.0.0.1"
    results = []
    for build in [demo_model.dense] if args.keep else [demo_model.dense, demo_model.moe]:
        server = Server(build(demo_model.DEFAULT_CACHE), port_for(args.port), signals)
        atexit.register(server.stop)  # However the demo ends. Before the start, so that no signal comes in between.
        results.append(run(server))
        if not args.keep:
            server.stop()
    summarize(results)
    if args.keep:
        atexit.unregister(server.stop)
        keep(server)


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"demo: {error}")
