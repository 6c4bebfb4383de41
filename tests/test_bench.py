"""The benchmarks measure a real step and count real bytes (tools/bench.py)."""
import time
import warnings
from dataclasses import replace

import pytest
import torch

import train
from helpers import SMALL, draw_pairs, small_config
from tools import bench


def test_the_bytes_that_live_are_counted():
    with bench.Live() as live:
        x = torch.ones(1000) + 1        # 8,000 bytes while it is made
        y = x.view(10, 100)
        del x
        assert (live.now, live.peak) == (4000, 8000)
        del y
        assert (live.now, live.peak) == (0, 8000)


def test_things_take_turns_and_ratios_are_printed(capsys):
    calls = []
    bench.compare("title", dict(own=lambda: 3.0, a=lambda: calls.append("a"),
                                b=lambda: calls.append("b") or 2.0), rounds=2, warm=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert "1.50 (1.50 to 1.50)" in capsys.readouterr().out


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A small run, as the benchmarks are given it."""
    monkeypatch.setitem(train.models.PRESETS, "tiny", SMALL)
    monkeypatch.setattr(bench, "make_tokenizer", lambda *_: bench.Tokenizer([]))
    return small_config(draw_pairs(tmp_path, 32), tmp_path / "run", log_every=1000)


def test_a_step_is_timed_in_the_training_loop_itself(config, monkeypatch):
    ends = []
    ema_update = train.models.ema_update

    def counting(*arguments):
        ends.append(time.perf_counter())
        ema_update(*arguments)

    monkeypatch.setattr(train.models, "ema_update", counting)
    seconds = bench.step_seconds(bench.train_on, config, bench.make_tokenizer(), warm=1, n=1)
    assert len(ends) == 2
    assert 0 < seconds < 2 * (ends[1] - ends[0]) + 1


def test_waits_are_counted_between_the_lines_of_the_log(config, monkeypatch):
    modes = []

    def waiting(*_):
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    monkeypatch.setattr(bench, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(train.models, "ema_update", waiting)
    assert bench.waits(replace(config, epochs=9)) == 2 and modes[-1] == "default"


@pytest.mark.slow
def test_memory_is_counted_in_the_training_loop_itself(config):
    before, peak = bench.step_memory(config)
    weights = sum(p.nbytes for p in train.models.build(train.models.PRESETS["tiny"]).parameters())
    assert 4 * weights < before < peak  # weights, gradients, AdamW's two moments, the teacher
