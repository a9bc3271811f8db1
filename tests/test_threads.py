"""Threads of kernels and of torch: limits of one thread do not reach others, and tasks are shared out once each."""

import threading

import pytest
import torch

from fastmerge import _native


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_limit_is_of_its_thread_and_ends_with_its_block(two_threads, monkeypatch):
    monkeypatch.setattr(_native, "_affinity", lambda: 4)
    seen = []
    other = threading.Thread(target=lambda: (ready.wait(5), seen.append((_native.threads(), torch.get_num_threads()))))
    ready = threading.Event()
    torch.get_num_threads()
    with _native.limit_threads(1):
        assert (_native.threads(), torch.get_num_threads()) == (1, 1)
        with _native.limit_threads(3):  # more than torch has: torch keeps its own
            assert (_native.threads(), torch.get_num_threads()) == (3, 1)
        assert (_native.threads(), torch.get_num_threads()) == (1, 1)
    assert (_native.threads(), torch.get_num_threads()) == (2, 2)
    other.start()
    ready.set()
    other.join()
    assert seen == [(2, 2)]
    with pytest.raises(KeyError), _native.limit_threads(1):
        raise KeyError
    assert (_native.threads(), torch.get_num_threads()) == (2, 2)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_runs_every_task_once_with_one_thread(two_threads, monkeypatch, threads):
    done, inside = [], []
    with monkeypatch.context() as patch:
        limited = _native.threads
        patch.setattr(_native, "threads", lambda: threads)

        def task(i):
            inside.append(limited())
            done.append(i)

        _native.each(50, task)
        _native.each(0, task)
    assert sorted(done) == list(range(50))
    assert threads == 1 or set(inside) == {1}
    assert (_native.threads(), torch.get_num_threads()) == (2, 2)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_stops_the_others_and_is_raised(monkeypatch, threads):
    monkeypatch.setattr(_native, "threads", lambda: threads)
    done = []

    def task(i):
        if i == 5:
            raise ValueError("five")
        done.append(i)

    with pytest.raises(ValueError, match="five"):
        _native.each(10**6, task)
    assert len(done) < 10**6
