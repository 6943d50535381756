"""Ports for launches on this machine that a test starts and that meet there."""

import itertools
import os
import random
import socket

# below those that the system hands out on its own, which the other worker of the tests does all the time, and apart
# for each worker
PER_WORKER = 2000
FIRST = 20000 + PER_WORKER * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 6)
_places = itertools.count(random.SystemRandom().randrange(PER_WORKER))


def free_port() -> int:
    """A port that nobody listens on, another one each time."""
    while True:
        port = FIRST + next(_places) % PER_WORKER
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
