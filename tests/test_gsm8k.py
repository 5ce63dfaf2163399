"""scripts/gsm8k.py: the answers' rules, the statistics, and runs against servers that fail in every way."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import gsm8k
import gsm8k_answers
import gsm8k_data
import gsm8k_log
import gsm8k_statistics
import ports
import pytest
import server_client
from conftest import ROOT
from fake_server import FakeServer, Reply, completion

SCRIPT = ROOT / "scripts" / "gsm8k.py"


# --- answers ---------------------------------------------------------------------------------------------------------


# What lm-eval 0.4.13's filters of task gsm8k (version 3) give for these texts, before any comparison.
LM_EVAL = [
    ("She has 5 left.\n#### 5", "5", "5"),
    ("#### 1,234.50 in all, of 2", "1,234.50", "2"),
    ("So the total is $1,234.00", None, "$1,234.00"),
    ("It fell to -5 degrees", None, "-5"),
    ("He ate 1/2", None, "2"),
    ("I do not know", None, None),
    ("either 12 or 13", None, "13"),
    ("#### -7", "-7", "-7"),
    ("####7", None, "7"),
    ("#### 3\n#### 4", "3", "4"),
    ("10-3", None, "-3"),
    ("The answer is 18.", None, "18."),
    ("pay $-5", None, "-5"),
    ("100 % of them...", None, "..."),
    ("#### $20", None, "$20"),
    ("It is $", None, None),
    ("x2 and 3x", None, "3"),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), LM_EVAL)
def test_the_rules_find_what_lm_eval_finds(text: str, strict: str | None, flexible: str | None) -> None:
    assert (gsm8k_answers.strict(text), gsm8k_answers.flexible(text)) == (strict, flexible)


def test_grades_are_those_of_lm_eval_itself() -> None:
    """Its task's own filters and metric; only numbers written in two ways, as 18.0 for 18, are equal here alone."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install '.[lm-eval]')")
    import yaml
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    assert tuple(task["generation_kwargs"]["until"]) == gsm8k_answers.STOPS
    (metric,) = task["metric_list"]
    rules = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    for text, *_ in LM_EVAL:
        for gold in ("5", "18", "4", "1,234", "1234.50", "20"):
            graded = gsm8k_answers.grade(text, gold)
            for chain, ours in zip(task["filter_list"], (graded.strict_correct, graded.correct), strict=True):
                (regex, _) = chain["filter"]
                found = RegexFilter(**{k: v for k, v in regex.items() if k != "function"}).apply([[text]], [{}])[0]
                theirs = exact_match_fn(predictions=found, references=[f"So it is\n#### {gold}"], **rules)[
                    "exact_match"
                ]
                assert bool(theirs) == ours or (ours and found[0].rstrip(".") != gold), (text, gold, chain["name"])


@pytest.mark.parametrize(
    ("text", "gold", "outcome"),
    [
        ("$1,234.00", "1234", "correct"),
        ("$1,234.00", "1,234", "correct"),
        ("-5", "-5", "correct"),
        ("-5", "5", "wrong"),
        ("1/2", "0.5", "wrong"),
        ("none", "0", "invalid"),
        ("", "0", "invalid"),
        ("12 and 13", "13", "correct"),
        ("12 and 13", "12", "wrong"),
        ("18.0", "18", "correct"),
        ("18.", "18", "correct"),
        ("It is 18...", "18", "correct"),
        ("018", "18", "correct"),
        ("1.2.3", "123", "invalid"),
        ("many ...", "0", "invalid"),
        ("-$40", "-40", "correct"),
        (".5", "0.5", "correct"),
        ("He has 48 / 2 = 2", "24", "wrong"),  # cut off in the middle of a number: nothing tells
        ("#### 5\n\nQuestion: and 6?\nAnswer: #### 6", "5", "correct"),
        ("#### 5</s>#### 6", "5", "correct"),
        ("5<|im_end|> Question: 7", "5", "correct"),
    ],
)
def test_numbers_are_compared_as_numbers_and_text_past_the_stops_is_cut(text: str, gold: str, outcome: str) -> None:
    graded = gsm8k_answers.grade(text, gold)
    assert ("correct" if graded.correct else "invalid" if graded.invalid else "wrong") == outcome


def test_strict_and_flexible_are_graded_apart() -> None:
    graded = gsm8k_answers.grade("#### 5, that is 6 less 1", "5")
    assert (graded.strict_correct, graded.correct) == (True, False)
    for text in ("The answer is 5", "The answer is 5\n\nQuestion: or\n#### 5"):
        graded = gsm8k_answers.grade(text, "5")
        assert (graded.strict_correct, graded.correct) == (False, True)


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("3*6=<<3*6=18>>18\n#### 18", "18"),
        ("#### 114,200", "114,200"),
        ("#### -3", "-3"),
        ("#### 1 #### 2", "2"),
        ("18", "18"),
        ("#### ten", None),
        ("", None),
    ],
)
def test_gold_answers(solution: str, gold: str | None) -> None:
    assert gsm8k_answers.gold_answer(solution) == gold


def test_number_keeps_the_value_exactly() -> None:
    assert gsm8k_answers.number("$2,125.50") == Decimal("2125.5")
    assert gsm8k_answers.number("123456789012345678901") == 123456789012345678901
    assert gsm8k_answers.number("1e5") is None


# --- questions -------------------------------------------------------------------------------------------------------


def write_questions(path: Path, count: int, start: int = 0, **extra: str) -> Path:
    """Question i asks for i + 1000."""
    rows = [
        {"question": f"What is {i} + 1000?", "answer": f"Add.\n#### {i + 1000:,}", **extra}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Arguments: 20 questions and 10 examples."""
    questions = write_questions(tmp_path / "test.jsonl", 20)
    shots = write_questions(tmp_path / "train.jsonl", 10, start=100)
    return ["--data", str(questions), "--shots-data", str(shots)]


def test_a_seed_fixes_the_order_and_another_changes_it(tmp_path: Path) -> None:
    questions = gsm8k_data.load_questions(str(write_questions(tmp_path / "q.jsonl", 50)), "test")
    whole = gsm8k_data.draw(questions, None, 3)
    assert whole == gsm8k_data.draw(questions, None, 3)
    assert whole != gsm8k_data.draw(questions, None, 4)
    assert sorted(whole) == sorted(questions)
    assert gsm8k_data.draw(questions, 7, 3) == whole[:7]
    assert [q.gold for q in whole[:3]] == ["1,015", "1,037", "1,034"], "the order of Python's generator, everywhere"


def test_examples_are_never_the_questions_asked(tmp_path: Path) -> None:
    questions = gsm8k_data.load_questions(str(write_questions(tmp_path / "q.jsonl", 12)), "test")
    asked = gsm8k_data.draw(questions, 4, 0)
    assert not {*gsm8k_data.draw_shots(questions, 8, 0, asked)} & {*asked}
    with pytest.raises(gsm8k_data.InputError, match="holds only 8 examples"):
        gsm8k_data.draw_shots(questions, 9, 0, asked)


def test_prompts_are_lm_evals() -> None:
    shot = gsm8k_data.Question("1 + 1?", "It is 2.\n#### 2", "2")
    question = gsm8k_data.Question("2 + 2?", "#### 4", "4")
    assert gsm8k_data.build_prompt([shot, shot], question, chat=False) == (
        "Question: 1 + 1?\nAnswer: It is 2.\n#### 2\n\nQuestion: 1 + 1?\nAnswer: It is 2.\n#### 2\n\n"
        "Question: 2 + 2?\nAnswer:"
    )
    assert gsm8k_data.build_prompt([shot], question, chat=True) == [
        {"role": "user", "content": "Question: 1 + 1?\nAnswer:"},
        {"role": "assistant", "content": "It is 2.\n#### 2"},
        {"role": "user", "content": "Question: 2 + 2?\nAnswer:"},
    ]


def test_the_platinum_set_and_unusual_lines_are_read(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "platinum.jsonl", 2, cleaning_status="consensus")
    # A line separator inside a string is no end of a line; empty lines are none.
    extra = {"question": "a\u2028b?", "answer": "#### 7"}
    path.write_text(path.read_text() + "\n" + json.dumps(extra, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert [q.gold for q in gsm8k_data.load_questions(str(path), "test")] == ["1,000", "1,001", "7"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no question in it"),
        ('{"question": "a", "answer": "#### 1"}\n{"quest', "line 2: not JSON"),
        ("[1]", "line 1: got list, needed an object"),
        ('{"question": "a"}', "line 1: 'answer' is None, needed a string"),
        ('{"question": "a", "answer": 3}', "'answer' is 3, needed a string"),
        ('{"question": "a", "answer": "#### ?"}', "no number after '####'"),
        ('{"question": "a", "answer": "1"}\n{"question": "a", "answer": "1"}', "line 2: the question is there twice"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(gsm8k_data.InputError, match=message):
        gsm8k_data.load_questions(str(path), "test")
    with pytest.raises(gsm8k_data.InputError, match="cannot be read"):
        gsm8k_data.load_questions(str(tmp_path / "absent.jsonl"), "test")


def test_the_hubs_data_set_and_split_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    class Datasets:
        @staticmethod
        def load_dataset(name: str, config: str, split: str) -> list[dict[str, str]]:
            asked.append((name, config, split))
            if "absent" in name:
                raise FileNotFoundError("no such data set")
            return [{"question": "a", "answer": "#### 1"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    gsm8k_data.load_questions("hub", "train")
    gsm8k_data.load_questions("hub:madrylab/gsm8k-platinum", "test")
    assert asked == [("openai/gsm8k", "main", "train"), ("madrylab/gsm8k-platinum", "main", "test")]
    with pytest.raises(gsm8k_data.InputError, match="a/absent, split test, cannot be loaded"):
        gsm8k_data.load_questions("hub:a/absent", "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(gsm8k_data.InputError, match="pip install datasets"):
        gsm8k_data.load_questions("hub", "test")


# --- statistics ------------------------------------------------------------------------------------------------------


def test_wilson() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert gsm8k_statistics.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_standard_error_is_that_of_a_mean() -> None:
    # Values 1, 1, 1, 0: variance with n - 1 is 0.25, over 4 values.
    assert gsm8k_statistics.standard_error(3, 4) == pytest.approx(math.sqrt(0.25 / 4))
    assert gsm8k_statistics.standard_error(1, 1) == 0


def test_mcnemar() -> None:
    assert gsm8k_statistics.mcnemar(0, 0) == 1
    assert gsm8k_statistics.mcnemar(5, 5) == 1
    assert gsm8k_statistics.mcnemar(0, 5) == gsm8k_statistics.mcnemar(5, 0) == 2 / 32
    # 2 * (1 + 10 + 45) / 1024
    assert gsm8k_statistics.mcnemar(8, 2) == 112 / 1024
    assert gsm8k_statistics.mcnemar(5, 15) == pytest.approx(0.04138947)
    assert gsm8k_statistics.mcnemar(700, 800) == pytest.approx(0.0105, abs=2e-4), "no overflow"


def test_paired_difference() -> None:
    # By hand: (16 - 6) / 102 -+ 1.959964 * sqrt((16/102 + 6/102 - (10/102)^2) / 102)
    assert gsm8k_statistics.paired_difference(15, 5, 100) == pytest.approx((0.0099424, 0.1861360), abs=1e-6)
    low, high = gsm8k_statistics.paired_difference(0, 0, 50)
    assert low == -high < 0


def test_paired_difference_covers() -> None:
    generator = random.Random(0)
    n, up, down, inside = 200, 0.10, 0.04, 0
    for _ in range(1000):
        flips = [generator.random() for _ in range(n)]
        low, high = gsm8k_statistics.paired_difference(
            sum(x < up for x in flips), sum(up <= x < up + down for x in flips), n
        )
        inside += low <= up - down <= high
    assert 930 <= inside <= 975


@pytest.mark.parametrize(("n", "flips"), [(300, 30), (300, 3), (60, 30)])
def test_smallest_difference_is_found_as_often_as_stated(n: int, flips: int) -> None:
    """A simulation of the exact test at the stated difference rejects in 80 % of runs, and clearly less below it."""
    least = gsm8k_statistics.smallest_difference(n, flips)
    assert least is not None
    generator = random.Random(1)

    def share_found(difference: float, runs: int = 1500) -> float:
        rate = max(flips / n, difference)
        weights = [(rate + difference) / 2, (rate - difference) / 2, 1 - rate]
        found = 0
        for _ in range(runs):
            drawn = Counter(generator.choices("ud-", weights, k=n))
            found += gsm8k_statistics.mcnemar(drawn["u"], drawn["d"]) <= gsm8k_statistics.ALPHA
        return found / runs

    assert share_found(least) == pytest.approx(gsm8k_statistics.POWER, abs=0.035)
    assert share_found(0.7 * least) < gsm8k_statistics.POWER - 0.15


def test_too_few_questions_can_show_nothing() -> None:
    # Five flips the same way have p = 0.0625.
    assert gsm8k_statistics.smallest_difference(5, 2) is None
    assert gsm8k_statistics.smallest_difference(6, 2) is not None


# --- runs ------------------------------------------------------------------------------------------------------------


def right(path: str, body: dict[str, Any]) -> Reply:
    return completion(f" Add.\n#### {asked(body) + 1000}")


def asked(body: dict[str, Any]) -> int:
    """The number in the question that a request ends with."""
    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    return int(text.rpartition("What is ")[2].partition(" ")[0])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_DELAY", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(server: FakeServer, out: Path, *arguments: str) -> int:
    return gsm8k.main(["--base-url", server.url, "--out", str(out), *arguments])


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_run(tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply:
        i = asked(body)
        if i < 10:
            return right(path, body)
        return completion("no idea" if i < 13 else "#### 1", "length" if i == 19 else "stop")

    out = tmp_path / "out.json"
    with FakeServer(answer).running() as server:
        assert run(server, out, *data, "--num-shots", "2", "--max-tokens", "99", "--seed", "5") == 0
        path, body = server.requests[0]
    assert path == "/v1/completions"
    assert body["prompt"].count("Question: ") == 3
    assert {key: body[key] for key in ("model", "max_tokens", "temperature", "seed", "stop")} == {
        "model": "fake",
        "max_tokens": 99,
        "temperature": 0.0,
        "seed": 5,
        "stop": ["Question:", "</s>", "<|im_end|>"],
    }
    found = result(out)
    assert (found["accuracy"], found["invalid"], found["answered"], found["failed"]) == (0.5, 0.15, 20, 0)
    assert found["cut_off"] == 1
    assert found["standard_error"] == pytest.approx(math.sqrt(0.25 / 19))
    assert found["confidence_interval"] == pytest.approx(gsm8k_statistics.wilson(10, 20))
    assert Counter(row["outcome"] for row in found["answers"]) == {"correct": 10, "wrong": 7, "invalid": 3}
    assert found["output_tokens"] == 140
    assert found["output_throughput"] == pytest.approx(140 / found["latency_seconds"])
    assert found["settings"]["server"] == {
        "model": "fake",
        "root": "org/fake",
        "max_model_len": 2048,
        "engine": "vllm",
        "version": "0.32.0",
        "quantization": None,
    }
    assert len(found["settings"]["prompt_sha256"]) == 64
    assert found["versions"]["python"]
    printed = capsys.readouterr()
    for line in ("Accuracy: 0.500", "Invalid: 0.150", "Latency: ", "Output throughput: "):
        assert f"\n{line}" in "\n" + printed.out
    assert "question" not in printed.err, "no progress bar where stderr is no terminal"


def test_chats(tmp_path: Path, data: list[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply:
        reply = right(path, body)
        if asked(body) == 0:  # All tokens went into the reasoning.
            reply.body["choices"][0]["message"]["content"] = None
        return reply

    out = tmp_path / "out.json"
    with FakeServer(answer).running() as server:
        assert run(server, out, *data, "--num-shots", "1", "--chat") == 0
        path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    assert (result(out)["accuracy"], result(out)["invalid"]) == (0.95, 0.05)


def test_what_sglang_and_vllm_say_of_themselves(tmp_path: Path, data: list[str]) -> None:
    with FakeServer(right).running() as server:
        server.routes["/v1/models"]["data"][0]["owned_by"] = "sglang"
        del server.routes["/version"]
        server.routes["/server_info"] = {"version": "0.5.16", "quantization": "modelopt_fp4", "api_key": "secret"}
        assert run(server, tmp_path / "sglang.json", *data) == 0
        server.routes["/server_info"] = {"vllm_config": {"model_config": {"quantization": "nvfp4_4over6"}}}
        server.routes["/version"] = {"version": "0.33.0"}
        assert run(server, tmp_path / "vllm.json", *data) == 0
    facts = result(tmp_path / "sglang.json")["settings"]["server"]
    assert (facts["engine"], facts["version"], facts["quantization"]) == ("sglang", "0.5.16", "modelopt_fp4")
    facts = result(tmp_path / "vllm.json")["settings"]["server"]
    assert (facts["version"], facts["quantization"]) == ("0.33.0", "nvfp4_4over6")
    assert "secret" not in (tmp_path / "sglang.json").read_text()


def test_no_proxy_stands_before_the_loopback(tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FakeServer(right).running() as server:
        assert run(server, tmp_path / "out.json", *data, "--retries", "0") == 0


FAULTS = {
    "500": Reply({"error": {"message": "boom"}}, 500),
    "503 in HTML": Reply(status=503, raw=b"<html>"),
    "rate limit": Reply({"message": "slow down"}, 429, {"Retry-After": "0"}),
    "half-written body": Reply(raw=b'{"choices": [{"te', promised=500),
    "half-written JSON": Reply(raw=b'{"choices": [{"te'),
    "no object": Reply([1]),
    "not UTF-8": Reply(raw=b"\xff\xfe\xfa"),
    "timeout": Reply({}, delay=3),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_passing_faults_are_retried(tmp_path: Path, data: list[str], fault: Reply) -> None:
    """Each question fails twice, then the answer comes: the figures are as if nothing had been."""
    seen: Counter[int] = Counter()

    def answer(path: str, body: dict[str, Any]) -> Reply:
        seen[asked(body)] += 1
        return fault if seen[asked(body)] <= 2 and asked(body) < 4 else right(path, body)

    patience = "1.5" if fault.delay else "30"  # a busy machine is slow without any fault
    with FakeServer(answer).running() as server:
        assert run(server, tmp_path / "out.json", *data, "--timeout", patience) == 0
    assert result(tmp_path / "out.json")["accuracy"] == 1
    assert [seen[i] for i in range(5)] == [3, 3, 3, 3, 1]


def test_the_server_decides_how_long_to_wait(tmp_path: Path, data: list[str]) -> None:
    times: list[float] = []

    def answer(path: str, body: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        return right(path, body) if len(times) > 1 else Reply({}, 429, {"Retry-After": "1"})

    with FakeServer(answer).running() as server:
        assert run(server, tmp_path / "out.json", *data, "--num-questions", "1") == 0
    assert 1 <= times[1] - times[0] < 3


def test_failed_requests_are_neither_wrong_nor_invalid_and_only_they_are_asked_again(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = True

    def answer(path: str, body: dict[str, Any]) -> Reply:
        if asked(body) in (1, 2) and broken:
            return Reply({"error": {"message": "the prompt is too long"}}, 400)
        return completion("none") if asked(body) == 3 else right(path, body)

    out = tmp_path / "out.json"
    with FakeServer(answer).running() as server:
        assert run(server, out, *data) == 1
        assert len(server.requests) == 20, "status 400 is not retried"
        found = result(out)
        assert (found["answered"], found["failed"]) == (18, 2)
        assert (found["accuracy"], found["invalid"]) == (17 / 18, 1 / 18)
        assert "2 of 20 requests failed" in (said := capsys.readouterr().err)
        assert "the prompt is too long" in said
        broken = False
        assert run(server, out, *data) == 0
        assert sorted(asked(body) for _, body in server.requests[20:]) == [1, 2]
    assert (result(out)["accuracy"], result(out)["failed"]) == (19 / 20, 0)


def test_a_server_that_goes_away_ends_the_run(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "many.jsonl", 60)
    arguments = ["--data", str(questions), "--num-shots", "0", "--parallel", "4", "--retries", "1"]
    with FakeServer(lambda path, body: Reply({}, 500)).running() as server:
        assert run(server, tmp_path / "out.json", *arguments) == 1
        assert 2 * gsm8k.FAILURES_IN_A_ROW <= len(server.requests) <= 2 * gsm8k.FAILURES_IN_A_ROW + 8
        url = server.url
    assert "16 requests in a row failed" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    assert gsm8k.main(["--base-url", url, "--out", str(tmp_path / "out.json"), *arguments]) == 1
    assert "ConnectError" in capsys.readouterr().err


def test_failures_between_answers_do_not_end_the_run(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "many.jsonl", 2 * gsm8k.FAILURES_IN_A_ROW + 2)

    def answer(path: str, body: dict[str, Any]) -> Reply:
        return Reply({}, 400) if len(server.requests) % 2 else right(path, body)

    with FakeServer(answer).running() as server:
        arguments = ["--data", str(questions), "--num-shots", "0", "--parallel", "1"]
        assert run(server, tmp_path / "out.json", *arguments) == 1
    assert result(tmp_path / "out.json")["failed"] == gsm8k.FAILURES_IN_A_ROW + 1


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in ("latency_seconds", "output_throughput")}


def test_an_interrupted_run_resumes_to_the_same_result(tmp_path: Path, data: list[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply:
        return right(path, body) if asked(body) % 3 else completion("none")

    with FakeServer(answer).running() as server:
        assert run(server, tmp_path / "whole.json", *data) == 0
        log = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
        # As if the process had been killed while it wrote its eighth answer.
        (tmp_path / "cut.jsonl").write_bytes(b"".join(log[:8]) + log[8][:20])
        del server.requests[:]
        assert run(server, tmp_path / "cut.json", *data) == 0
        assert len(server.requests) == 13
        del server.requests[:]
        assert run(server, tmp_path / "cut.json", *data) == 0
        assert not server.requests, "a finished run is only summarized again"
    assert without_times(result(tmp_path / "cut.json")) == without_times(result(tmp_path / "whole.json"))
    attempts = Counter(json.loads(line)["attempt"] for line in (tmp_path / "cut.jsonl").read_text().splitlines()[1:])
    assert attempts == {1: 7, 2: 13}


def test_latency_adds_up_the_attempts(tmp_path: Path) -> None:
    with gsm8k_log.RunLog(tmp_path / "log.jsonl", {}) as log:
        for question, attempt, seconds in (("a", 1, 2.0), ("b", 1, 5.0), ("c", 2, 3.0)):
            log.add(gsm8k_log.Answer(question, "", None, None, attempt, seconds))
    with gsm8k_log.RunLog(tmp_path / "log.jsonl", {}) as log:
        assert (log.seconds(), log.attempt) == (8.0, 3)


def test_a_log_of_other_settings_is_refused(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    with FakeServer(right).running() as server:
        assert run(server, out, *data) == 0
        before = out.with_suffix(".jsonl").read_bytes()
        for changed, named in (
            (["--max-tokens", "7"], "max_tokens: 512 there, 7 here"),
            (["--seed", "1"], "prompt_sha256"),
            (["--chat"], "mode: 'completion' there, 'chat' here"),
        ):
            del server.requests[:]
            assert run(server, out, *data, *changed) == 1
            assert named in capsys.readouterr().err
            assert not server.requests
        server.routes["/v1/models"]["data"][0]["root"] = "org/other"
        assert run(server, out, *data) == 1
        assert "'org/fake'" in capsys.readouterr().err
    assert out.with_suffix(".jsonl").read_bytes() == before
    out.with_suffix(".jsonl").write_text("[1, 2]\n")
    with pytest.raises(gsm8k_data.InputError, match="no log of this script"):
        gsm8k_log.RunLog(out.with_suffix(".jsonl"), {})


@pytest.mark.parametrize("text", ['{"question": "1 + 1", "answer": "#### 2"}', '{"question": 1}\n{"question": 2}', "{"])
def test_a_file_of_somebody_else_is_written_to(tmp_path: Path, text: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    if text == "{":  # as a run begins that ended at once
        gsm8k_log.RunLog(path, {})
        assert path.read_text() == '{"settings": {}}\n'
        return
    with pytest.raises(gsm8k_data.InputError, match="no log of this script"):
        gsm8k_log.RunLog(path, {})
    assert path.read_text() == text


def test_two_runs_cannot_write_one_log(tmp_path: Path) -> None:
    with gsm8k_log.RunLog(tmp_path / "log.jsonl", {}), pytest.raises(gsm8k_data.InputError, match="another run"):
        gsm8k_log.RunLog(tmp_path / "log.jsonl", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--base-url": "127.0.0.1:8000"}, "needs http://"),
        ({"--base-url": "http://127.0.0.1:x/v1"}, "needs http://"),
        ({"--shots-data": None}, "needs --shots-data"),
        ({"--num-questions": "21"}, "needs 1 to 20"),
        ({"--num-shots": "11"}, "holds only 10 examples"),
        ({"--model": "other"}, "does not serve 'other'; it serves fake"),
    ],
)
def test_bad_input_gets_one_clear_error(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str], change: dict[str, str | None], message: str
) -> None:
    with FakeServer(right).running() as server:
        options = {
            "--base-url": server.url,
            "--out": str(tmp_path / "o.json"),
            "--data": data[1],
            "--shots-data": data[3],
        }
        words = [word for name, value in {**options, **change}.items() if value is not None for word in (name, value)]
        assert gsm8k.main(words) == 1
        assert not server.requests
    assert message in (said := capsys.readouterr().err)
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        "--data a --out b.json",
        "--base-url x --out b.json",
        "--base-url x --data a",
        "--base-url x --data a --out b.txt",
        "--base-url x --data a --out b.json --parallel 0",
        "--base-url x --data a --out b.json --num-shots -1",
        "--base-url x --data a --out b.json --temperature nan",
        "--compare a.json",
    ],
)
def test_wrong_usage(words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        gsm8k.main(words.split())
    assert ended.value.code == 2


# --- a server started and stopped ------------------------------------------------------------------------------------

# A server with a child of its own in its process group, as engines have; the child ignores SIGINT, as stuck ones do.
SERVER = """
import os, subprocess, sys, time
sys.path[:0] = [{tests!r}]
from fake_server import FakeServer, completion
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open({pids!r}, "w").write(str(child.pid))
print("INFO starting", flush=True)
if {mode!r} == "broken":
    print("ValueError: the cause", flush=True)
    print("\\n".join(f"line {{i}}" for i in range(40)), flush=True)
    sys.exit(3)
def answer(path, body):
    open({pids!r} + ".asked", "w").close()
    if {mode!r} == "dies":
        os._exit(7)
    time.sleep(0.001 if {mode!r} == "works" else 60)
    return completion("#### 1000")
FakeServer(answer, int(sys.argv[sys.argv.index("--port") + 1])).serve()
"""
CHILD = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"


def serve_command(tmp_path: Path, mode: str) -> str:
    script = tmp_path / "server.py"
    script.write_text(
        SERVER.format(tests=str(ROOT / "tests"), child=CHILD, pids=str(tmp_path / "child.pid"), mode=mode)
    )
    return f"{sys.executable} {script}"


def child_is_gone(tmp_path: Path) -> bool:
    """Whether the server's child ended (one that nobody has reaped yet has ended too)."""
    stat = Path("/proc") / (tmp_path / "child.pid").read_text() / "stat"
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    import server_process

    monkeypatch.setattr(server_process, "GRACE_SECONDS", 0.3)


@pytest.mark.usefixtures("_short_grace")
def test_serve_starts_and_stops_a_server_with_its_children(tmp_path: Path, data: list[str]) -> None:
    out = tmp_path / "out.json"
    assert gsm8k.main(["--serve", serve_command(tmp_path, "works"), "--out", str(out), *data]) == 0
    assert result(out)["answered"] == 20
    assert "starting" in (tmp_path / "out.server.log").read_text()
    assert child_is_gone(tmp_path)


@pytest.mark.usefixtures("_short_grace")
def test_a_server_that_does_not_start_shows_its_log(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "out.json"), *data]
    assert gsm8k.main(["--serve", serve_command(tmp_path, "broken"), *arguments]) == 1
    said = capsys.readouterr().err
    assert "the server ended, with status 3" in said
    assert "ValueError: the cause" in said
    assert "line 39" in said
    assert child_is_gone(tmp_path)
    assert gsm8k.main(["--serve", "no-such-program-here", *arguments]) == 1
    assert "'no-such-program-here' cannot be run" in capsys.readouterr().err
    mute = f"{sys.executable} -c 'import time; time.sleep(60)'"
    assert gsm8k.main(["--serve", mute, "--serve-timeout", "0.4", *arguments]) == 1
    assert "not ready after 0.4 s" in capsys.readouterr().err


@pytest.mark.usefixtures("_short_grace")
def test_a_server_that_dies_during_the_run_ends_it(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gsm8k.main(["--serve", serve_command(tmp_path, "dies"), "--out", str(tmp_path / "out.json"), *data]) == 1
    assert "the server ended, with status 7" in capsys.readouterr().err
    assert child_is_gone(tmp_path)


def test_a_port_in_use_is_refused(tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        arguments = ["--out", str(tmp_path / "out.json"), *data]
        assert gsm8k.main(["--serve", f"python never.py --port={port}", *arguments]) == 1
    assert f"port {port} is in use" in capsys.readouterr().err
    assert gsm8k.main(["--serve", "python never.py --port many", *arguments]) == 1
    assert "--port 'many' is no port" in capsys.readouterr().err


def test_a_port_is_free_and_none_that_systems_hand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert ports.free_port() < min(22000, taken)
        monkeypatch.setattr(ports, "PORTS", range(taken, taken + 1))
        with pytest.raises(OSError, match=f"none of the ports {taken} to {taken} is free"):
            ports.free_port()
    assert ports.free_port() == taken


def test_a_server_that_loses_its_port_says_so(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "late.py"
    program.write_text("""
import socket, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
with socket.socket() as other, socket.socket() as own:
    other.bind(("127.0.0.1", port))
    other.listen()
    try:
        own.bind(("127.0.0.1", port))
    except OSError as error:
        print("ERROR:   ", error, *["stopping"] * 20, sep="\\n")
        sys.exit(3)
""")
    command = f"{sys.executable} {program}"
    assert gsm8k.main(["--serve", command, "--out", str(tmp_path / "out.json"), *data]) == 1
    error = capsys.readouterr().err
    assert "the server ended, with status 3" in error
    assert "Address already in use" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_and_its_children(tmp_path: Path, data: list[str], number: int) -> None:
    # The grace is shortened in the script's own process, where the signal arrives.
    code = "import server_process, gsm8k, sys; server_process.GRACE_SECONDS = 0.3; sys.exit(gsm8k.main(sys.argv[1:]))"
    arguments = ["--serve", serve_command(tmp_path, "hangs"), "--out", str(tmp_path / "out.json"), *data]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "child.pid.asked").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    assert child_is_gone(tmp_path)


# --- comparisons -----------------------------------------------------------------------------------------------------


def answers_right_below(limit: int, start: int = 0) -> FakeServer:
    return FakeServer(lambda path, body: right(path, body) if start <= asked(body) < limit else completion("none"))


def test_compare(tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = {"a.json": answers_right_below(12), "b.json": answers_right_below(16, start=10)}
    for name, fake in names.items():
        with fake.running() as server:
            assert run(server, tmp_path / name, *data) == 0
    paths = [str(tmp_path / name) for name in names]
    out = tmp_path / "c.json"
    assert gsm8k.main(["--compare", *paths, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Flips: 4 wrong to right, 10 right to wrong" in printed
    assert "power 80%, alpha 5%" in printed
    (found,) = result(out)["pairs"]
    assert (found["n"], found["gained"], found["lost"], found["difference"]) == (20, 4, 10, -0.3)
    # 2 * (1 + 14 + 91 + 364 + 1001) / 2^14
    assert found["p_value"] == 2 * 1471 / 2**14
    assert found["confidence_interval"] == pytest.approx(gsm8k_statistics.paired_difference(4, 10, 20))
    assert found["smallest_difference"] == gsm8k_statistics.smallest_difference(20, 14)
    from matplotlib.image import imread

    height, width = imread(tmp_path / "c.png").shape[:2]
    assert height > 300
    assert width > 1000


def test_failed_requests_are_left_out_of_a_comparison(tmp_path: Path, data: list[str]) -> None:
    with answers_right_below(12).running() as server:
        assert run(server, tmp_path / "a.json", *data) == 0
    broken = FakeServer(lambda path, body: Reply({}, 400) if asked(body) < 5 else right(path, body))
    with broken.running() as server:
        assert run(server, tmp_path / "b.json", *data) == 1
    assert (
        gsm8k.main(["--compare", *(str(tmp_path / f"{x}.json") for x in "ab"), "--out", str(tmp_path / "c.json")]) == 0
    )
    (found,) = result(tmp_path / "c.json")["pairs"]
    assert (found["n"], found["gained"], found["lost"]) == (15, 8, 0)


def test_results_of_different_questions_are_not_compared(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(right).running() as server:
        assert run(server, tmp_path / "a.json", *data) == 0
        assert run(server, tmp_path / "b.json", *data, "--seed", "9") == 0
    a, b, other = (str(tmp_path / f"{name}.json") for name in ("a", "b", "other"))
    assert gsm8k.main(["--compare", a, b]) == 1
    assert "a and b cannot be compared: their prompt_sha256 differ" in capsys.readouterr().err
    Path(other).write_text(json.dumps(result(tmp_path / "a.json") | {"settings": {}}))
    assert gsm8k.main(["--compare", a, other]) == 1
    assert "is not what gsm8k.py --out writes" in capsys.readouterr().err
    assert gsm8k.main(["--compare", a, str(tmp_path / "absent.json")]) == 1
    assert "cannot be read" in capsys.readouterr().err
