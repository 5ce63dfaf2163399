"""Ask an OpenAI-compatible server over HTTP: retries with back-off, and what the server says about itself."""

import asyncio
import json
import os
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
# No proxy stands between this machine and itself, whatever the environment says.
LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")


class ServerError(Exception):
    """The server cannot be used: what it did, and what to do."""


class RequestError(ServerError):
    """This request failed for good; others may not."""


class Facts(NamedTuple):
    """What a server says about itself; None where it does not say."""

    model: str
    root: str | None
    """The folder or the name on the hub that was loaded."""
    max_model_len: int | None
    engine: str | None
    version: str | None
    quantization: str | None


class Client:
    """An asynchronous context manager: one pool of connections to one server."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout: float = 600,
        retries: int = 6,
        check_alive: Callable[[], None] = lambda: None,
    ) -> None:
        """``timeout``: seconds for one try. ``check_alive`` is called after a failed one; it raises to give up."""
        try:
            parts = urlsplit(base_url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # an unfinished IPv6 address, a port that is no number
            valid = False
        if not valid:
            raise ServerError(
                f"base URL {base_url!r}: needs http:// or https:// and a host, as http://127.0.0.1:8000/v1"
            )
        self.base_url = base_url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self._root = self.base_url.removesuffix("/v1")
        self._retries, self._check_alive = retries, check_alive
        key = os.environ.get("OPENAI_API_KEY")
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            mounts=dict.fromkeys(LOOPBACK),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object the server answers. ``path`` below the base URL, or from the server's root with a '/'."""
        return await self._send("POST", self._url(path), body)

    async def describe(self, model: str | None = None) -> Facts:
        """What is served; ``model`` chooses where there are several."""
        listed = (await self._send("GET", self._url("models"))).get("data")
        served = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        names = [str(entry.get("id")) for entry in served]
        if model is None and len(names) != 1:
            raise ServerError(
                f"{self.base_url}/models lists {len(names)} models ({', '.join(names)}): name one (--model)"
            )
        if model is not None and model not in names:
            raise ServerError(f"{self.base_url} does not serve {model!r}; it serves {', '.join(names) or 'nothing'}")
        entry = served[names.index(model or names[0])]
        version = await self._optional("/version")
        info = await self._optional("/server_info?config_format=json")
        # vLLM shows its configuration only with VLLM_SERVER_DEV_MODE=1; SGLang's arguments are the object itself.
        config = info.get("vllm_config")
        details = config.get("model_config") if isinstance(config, dict) else info
        return Facts(
            model=model or names[0],
            root=_text(entry.get("root")),
            max_model_len=entry["max_model_len"] if isinstance(entry.get("max_model_len"), int) else None,
            engine=_text(entry.get("owned_by")),
            version=_text(version.get("version")) or _text(info.get("version")),
            quantization=_text(details.get("quantization")) if isinstance(details, dict) else None,
        )

    def _url(self, path: str) -> str:
        return self._root + path if path.startswith("/") else f"{self.base_url}/{path}"

    async def _optional(self, path: str) -> dict[str, Any]:
        """The object at a route that not every server has; empty where it has not."""
        try:
            response = await self._http.get(self._url(path), timeout=30)
            found = response.json() if response.is_success else {}
        except (httpx.HTTPError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    async def _send(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        delay = FIRST_DELAY
        for left in range(self._retries, -1, -1):
            wanted = 0.0
            try:
                response = await self._http.request(method, url, json=body)
                if response.is_success:
                    answer = response.json()
                    if isinstance(answer, dict):
                        return answer
                    problem = f"answered {type(answer).__name__}, needed a JSON object"
                else:
                    problem = f"status {response.status_code}: {_message(response)}"
                    if response.status_code not in RETRIED:
                        raise RequestError(f"{url}: {problem}")
                    wanted = _retry_after(response)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                problem = f"the answer is not whole JSON ({error})"
            self._check_alive()
            if left:
                await asyncio.sleep(max(wanted, delay * random.uniform(0.5, 1)))
                delay = min(2 * delay, LONGEST_DELAY)
        raise RequestError(f"{url}: {problem}, after {self._retries + 1} tries")


async def run_together(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run them at the same time; the first error ends all and is raised as it is."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _message(response: httpx.Response) -> str:
    """The error's text in the forms that vLLM, SGLang and OpenAI give it, or the start of the body."""
    try:
        body = response.json()
        error = body.get("error", body)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, AttributeError, KeyError):
        return response.text[:300]


def _retry_after(response: httpx.Response) -> float:
    """Seconds the server asks to wait (a date, which no inference server sends, counts as 0)."""
    value = response.headers.get("retry-after", "")
    return min(float(value), 2 * LONGEST_DELAY) if value.isdecimal() else 0.0
