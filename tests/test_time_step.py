"""Where a step's time goes: the clock by hand, and that it changes nothing of what it watches."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, assert_same_model, settings_of

sys.path.insert(0, str(ROOT / "results/step"))
import time_step


def test_a_part_s_time_is_without_what_it_calls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time_step.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    clock = time_step.Clock()
    inner = clock.timed(lambda: spend(3), "Adam", [])
    maker = clock.timed(lambda: SimpleNamespace(step=lambda: spend(5), other=lambda: spend(7)), "environment", ["step"])

    def outer():
        spend(1)
        inner()
        spend(10)
        raise ValueError

    with pytest.raises(ValueError):
        clock.timed(outer, "Polyak averages", [])()
    thing = maker()
    thing.step()
    thing.other()
    clock.switch("the end")
    spent = {part: seconds for part, seconds in clock.seconds.items() if seconds}
    assert spent == {"Adam": 3, "Polyak averages": 11, "environment": 5, time_step.REST: 7}


def test_the_parts_of_a_run(rnm, monkeypatch, tmp_path):
    train, update = rnm.train, rnm.update_critics
    monkeypatch.setattr(rnm, "train", lambda args: train(args) and Path(args.runs_dir).rename(tmp_path / "timed"))
    settings = {k: v for k, v in settings_of(rnm).items() if k not in ("learning_starts", "total_timesteps", "track")}
    settings |= {"n": 1, "m": 4, "mask_update_interval": 30}
    found = time_step.measure(rnm, 100, warm=150, **settings)
    assert rnm.update_critics is update and set(found) == {part for part, _ in time_step.PARTS.values()} | {
        time_step.REST
    }
    assert all(value > 0 for value in found.values())  # each is a part of a step
    plain = {"learning_starts": 150, "total_timesteps": 401, "eval_interval": 401, "eval_episodes": 1}
    train(rnm.Args(**settings | plain, track=False, runs_dir=str(tmp_path / "plain")))
    assert_same_model(*(next((tmp_path / name).iterdir()) for name in ("timed", "plain")))


def test_what_the_page_concludes_from_its_tables():
    page = (ROOT / "results/step/README.md").read_text()
    zen, xeon = map(read_table, re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE))
    products, step = zen["sparse products in C"], zen["a step"]
    free, now = (
        [f"{step['dense'] / (step[x] - spent[x]):.1f}" for x in ("1:8", "RLx2 96/88")]
        for spent in (products, dict.fromkeys(step, 0))
    )
    said = "1:8 would train {} times as fast as dense in this run, not {}, and RLx2 {} times, not {}."
    assert said.format(free[0], now[0], free[1], now[1]) in page
    more = xeon["sparse products in C"]["1:8"] / products["1:8"]
    rest = (xeon["a step"]["1:8"] - xeon["sparse products in C"]["1:8"]) / (step["1:8"] - products["1:8"])
    assert f"products take {more:.1f} times as long as on the Zen 4, all else of a step {rest:.1f} times" in page
    assert f"A dense step takes {xeon['a step']['dense'] / step['dense']:.1f} times as long" in page
    assert f"1:8 trains {xeon['a step']['dense'] / xeon['a step']['1:8']:.1f} times as fast as dense" in page


def read_table(text):
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return {
        name: {x: float(cell.replace(",", "") or 0) for x, cell in zip(head[1:], cells, strict=True)}
        for name, *cells in rows
    }
