"""As many threads as pay for a model and find a free core."""

import os

import pytest
import torch

from experiments.harness import hardware


@pytest.mark.parametrize(
    ("width", "tokens", "free", "threads"),
    [(16, 64, 8, 1), (16, 512, 8, 1), (32, 512, 8, 2), (256, 2048, 8, 8), (256, 2048, 3, 3), (256, 2048, 0, 1)],
)
def test_a_thread_needs_work_and_a_core(monkeypatch, width, tokens, free, threads):
    monkeypatch.setattr(hardware, "MOST_THREADS", 8)
    monkeypatch.setattr(hardware, "free_cores", lambda: free)
    assert hardware.best_threads(width, tokens) == threads


def test_no_more_threads_are_taken_than_openmp_was_given(monkeypatch):
    monkeypatch.setattr(hardware, "MOST_THREADS", 1)
    monkeypatch.setattr(hardware, "free_cores", lambda: pytest.fail("looked though there is no choice"))
    assert hardware.best_threads(256, 2048) == 1


@pytest.mark.parametrize(("idle", "free"), [(0.0, 0), (0.96, 1), (1.9, 2), (300.0, 4)])
def test_free_cores_are_those_that_were_idle_and_that_this_process_may_use(monkeypatch, idle, free):
    ticks = iter([7, 7 + idle * hardware.LOOK * os.sysconf("SC_CLK_TCK")])
    monkeypatch.setattr(hardware, "_idle_ticks", lambda: next(ticks))
    monkeypatch.setattr(hardware.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4), raising=False)
    assert hardware.free_cores() == free


def test_the_peak_is_that_of_the_threads_that_there_are(monkeypatch):
    asked = []
    monkeypatch.setattr(hardware, "_peak_flops", lambda device, precision, threads: asked.append(threads) or 1.0)
    for threads in (2, 1):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        hardware.peak_flops(torch.device("cpu"), "float32")
    assert asked == [2, 1]
