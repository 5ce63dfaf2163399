"""Batch invariance: whom it is asked of."""

import threading
from collections.abc import Iterator

import pytest

from fouroversix_plugin import kernels
from fouroversix_plugin.kernels.invariance import is_batch_invariant
from fouroversix_plugin.serving import layer


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    kernels.set_batch_invariant(False)
    layer._log_batch_invariance.cache_clear()


def elsewhere() -> bool:
    """What another thread has."""
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(is_batch_invariant()))
    thread.start()
    thread.join()
    return seen[0]


def test_it_holds_unasked_or_in_other_threads() -> None:
    assert not is_batch_invariant()
    with kernels.batch_invariant(True):
        assert is_batch_invariant()
        assert not elsewhere()
        with kernels.batch_invariant(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
    assert not is_batch_invariant()


def test_a_thread_does_without_what_its_process_has() -> None:
    kernels.set_batch_invariant(True)
    assert is_batch_invariant()
    assert elsewhere()
    with kernels.batch_invariant(False):
        assert not is_batch_invariant()
        assert elsewhere()
    kernels.set_batch_invariant(False)
    assert not is_batch_invariant()


def test_an_engines_switch_is_passed_over_or_goes_unsaid(log: pytest.LogCaptureFixture) -> None:
    layer.follow_batch_invariance(False, "--a-switch")
    assert not is_batch_invariant()
    assert not log.records
    for _ in range(2):
        layer.follow_batch_invariance(True, "--a-switch")
        assert is_batch_invariant()
    assert [r.message for r in log.records] == ["fouroversix: products are batch-invariant, as --a-switch asks"]
    layer.follow_batch_invariance(False, "--another")
    assert is_batch_invariant(), "somebody has asked for it"
