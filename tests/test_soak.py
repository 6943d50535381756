"""The soak tells growth from noise, and draws what it saw."""

import os
import random
import signal
import subprocess
import time

import pytest
from soak import BEAT_S, LINES, MEASURED, Sample, family_of, sample, soak_chart, what_grew


def samples(**gains) -> list[Sample]:
    """Half an hour that is flat but for noise; `gains`, by name, is what a value gains over each half."""
    rng, found = random.Random(0), []
    number = int(1800 / BEAT_S)
    for i in range(number):
        part = list(LINES)[2 * i // number]
        done = (2 * i % number) / number  # of the half
        values = {"memory_mb": 1000 + rng.gauss(0, 30), "threads": rng.choice((9, 15)), "files": 13 + i % 3}
        values = {name: value + gains.get(name, 0) * done for name, value in values.items()}
        found.append(Sample(part=part, minute=i * BEAT_S / 60, done=i, **values))
    return found


def test_noise_is_no_growth():
    assert what_grew(samples()) == []


@pytest.mark.parametrize(("name", "gain"), [("memory_mb", 100), ("threads", 4), ("files", 4)])
def test_growth_is_named_by_part_and_kind(name, gain):
    grew = what_grew(samples(**{name: gain}))
    assert len(grew) == 2  # both halves
    for part, line in zip(LINES, grew, strict=True):
        assert line.startswith(f"{part}: {MEASURED[name].split(',')[0]} grew ")


def test_what_only_the_warm_up_takes_is_no_growth():
    found = samples()
    for i, one in enumerate(found[:80]):
        found[i] = Sample(**{**vars(one), "memory_mb": one.memory_mb - 5 * (80 - i)})
    assert what_grew(found) == []


def test_a_process_and_its_descendants_are_sampled():
    """Of a process of its own: threads of this one come and go."""
    with subprocess.Popen(["sh", "-c", "read line; sleep 60 & wait"], stdin=subprocess.PIPE) as parent:
        before = sample("extraction", parent.pid, 0.0, 0)
        parent.stdin.close()  # which read waits for
        until = time.monotonic() + 60
        while len(found := [*family_of(parent.pid)]) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        during = sample("extraction", parent.pid, 0.0, 0)
        for one in found:
            os.kill(int(one.name), signal.SIGKILL)
    assert (before.threads, during.threads) == (1, 2)
    assert during.files > before.files


def test_the_chart_has_a_line_for_each_half():
    chart = soak_chart(samples())
    colours = {colour for _, colour in chart.getcolors(1 << 24)}
    for line in LINES.values():
        assert tuple(bytes.fromhex(line[1:])) in colours
    assert chart.width <= 760
