"""A server of SGLang's that starts, is asked, and stops."""

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

from server_process import ServerProcess


def ask_server(command: str, log: Path, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Logprobs of the prompts, and the ``tokens`` that follow each of them; and the server's log."""
    server = ServerProcess(command, log)
    try:
        server.start()
        asyncio.run(server.wait_until_ready(400))
        url = server.base_url.removesuffix("/v1")
        answers = [_ask(url, prompt, tokens) for prompt in prompts]
    finally:
        server.stop()
    return {
        "logprobs": [[at[0] for at in answer["meta_info"]["input_token_logprobs"][1:]] for answer in answers],
        "tokens": [answer["output_ids"] for answer in answers],
        "log": log.read_text(),
    }


def _ask(url: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        content: dict[str, Any] = json.load(answer)
    return content
