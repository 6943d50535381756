"""The place of this process in its launch, by the environment that torchrun and `accelerate launch` set.

What rank 0 alone finds out reaches the others through the launch's key-value store. That is no collective: a rank that
has read it depends on no other rank.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hf_qie.errors import InputError

KEY, READERS = "hf_qie/from_rank_0", "hf_qie/readers"


def rank() -> int:
    """Its number among all processes of the launch."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launch has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def from_rank_0(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, of JSON's types; other ranks wait for it, at any length.

    Raises on rank 0 what `make` raises, on the others InputError with its message.
    """
    if world_size() == 1:
        return make()
    from torch import distributed

    # the agent of torchrun and of accelerate hosts the store; without one rank 0 does
    store, *_ = next(distributed.rendezvous("env://", timeout=timedelta(weeks=4)))
    if rank() == 0:
        message = {}
        try:
            message["made"] = make()
        except BaseException as error:
            message["error"] = str(error) or repr(error)
            raise
        finally:
            store.set(KEY, json.dumps(message))
            is_host = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            while is_host and store.add(READERS, 0) < world_size() - 1:
                time.sleep(0.1)
    else:
        try:
            while not store.check([KEY]):
                time.sleep(1)
            message = json.loads(store.get(KEY))
            store.add(READERS, 1)
        except distributed.DistError as error:
            raise InputError(f"rank 0 ended before it had read the data ({error}); see its output") from error
        if "error" in message:
            raise InputError(message["error"])
    return message["made"]
