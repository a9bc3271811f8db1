"""Threads of kernels and of torch: limits of one thread do not reach others, and tasks are shared out once each."""

import ctypes
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import save

import fastmerge as fm
from fastmerge import _native
from fastmerge.ops import highpass_filter


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_new_thread(f):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(f()))
    thread.start()
    thread.join()
    return seen[0]


def test_a_limit_is_of_its_thread_and_ends_with_its_block(two_threads, monkeypatch):
    monkeypatch.setattr(_native, "_affinity", lambda: 4)
    x = torch.randn(64, 4096)
    with _native.limit_threads(1):
        assert _native.threads() == 1
        torch.fft.rfft(x)  # MKL's transforms set OpenMP's threads
        assert in_new_thread(lambda: (_native.threads(), torch.get_num_threads())) == (2, 2)
        with _native.limit_threads(3):
            assert _native.threads() == 3
        assert _native.threads() == 1
    assert (_native.threads(), torch.get_num_threads()) == (2, 2)
    with pytest.raises(KeyError), _native.limit_threads(1):
        raise KeyError
    assert (_native.threads(), torch.get_num_threads()) == (2, 2)


def test_new_threads_keep_torchs_default_whatever_runs_beside_them(two_threads, tmp_path):
    """Threads that first touch torch during a merge, or while others filter."""
    x = torch.randn(2, 600, 512)
    states = [{"w": torch.randn(900, 700)} for _ in range(3)]
    paths = [str(save(tmp_path / str(i), state)) for i, state in enumerate(states)]

    def work():
        highpass_filter(x)
        return torch.get_num_threads()

    def merge():
        fm.run(fm.Recipe.from_call("fr", paths[0], paths[1:], {}), tmp_path / "out", threads=2)

    merging = threading.Thread(target=merge)
    merging.start()
    seen = []
    while merging.is_alive() or len(seen) < 20:
        seen.append(in_new_thread(work))
    merging.join()
    assert set(seen) == {2}
    assert torch.get_num_threads() == 2


def test_transforms_keep_to_the_limit(two_threads):
    if _native._limit_mkl() is None:
        assert not torch.backends.mkl.is_available()
        return
    held = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert held.MKL_Get_Max_Threads() == 2
    with _native.limit_threads(1):
        assert held.MKL_Get_Max_Threads() == 1
        assert in_new_thread(held.MKL_Get_Max_Threads) == 2
    assert held.MKL_Get_Max_Threads() == 2


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
