"""A server of SGLang's that starts, is asked, and stops."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server_process import ServerProcess


def ask_server(
    command: str,
    log: Path,
    prompts: list[list[int]],
    tokens: int,
    left: Callable[[], float] = lambda: 400,
    update: Path | None = None,
    together: bool = False,
) -> dict[str, Any]:
    """Logprobs of the prompts; the ``tokens`` that follow each, and theirs as "generated"; and the server's log.

    Args:
        left: says how many seconds there are until it must be ready, and for each answer.
        update: a checkpoint whose weights it is asked to load before the last prompt; what it says to that is "update".
        together: whether it is asked all prompts once more, in one request; what it says then is "together".
    """
    said: dict[str, Any] = {}
    server = ServerProcess(command, log)
    try:
        server.start()
        asyncio.run(server.wait_until_ready(left()))
        url = server.base_url.removesuffix("/v1")
        answers = [_ask(url, prompt, tokens, left()) for prompt in prompts[:-1]]
        if update is not None:
            said = {"update": _update(url, update, left())}
        answers.append(_ask(url, prompts[-1], tokens, left()))
        if together:
            said["together"] = _said_in(_ask(url, prompts, tokens, left()))
    finally:
        server.stop()
    return said | _said_in(answers) | {"log": log.read_text()}


def _said_in(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "logprobs": [[at[0] for at in answer["meta_info"]["input_token_logprobs"][1:]] for answer in answers],
        "tokens": [answer["output_ids"] for answer in answers],
        "generated": [[at[0] for at in answer["meta_info"]["output_token_logprobs"]] for answer in answers],
    }


def _ask(url: str, prompts: list[int] | list[list[int]], tokens: int, seconds: float) -> Any:
    """What the server says to a prompt, or to each of several in a list."""
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return _post(f"{url}/generate", body, seconds)


def _post(url: str, body: dict[str, Any], seconds: float) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return json.load(answer)


def _update(url: str, checkpoint: Path, seconds: float) -> dict[str, Any]:
    try:
        said: dict[str, Any] = _post(f"{url}/update_weights_from_disk", {"model_path": str(checkpoint)}, seconds)
    except urllib.error.HTTPError as refusal:
        said = json.load(refusal)
    return said
