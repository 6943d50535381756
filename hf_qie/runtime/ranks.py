"""The place of this process in its launch, by the environment that torchrun and `accelerate launch` set."""

import os


def rank() -> int:
    """Its number among all processes of the launch."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes the launch has."""
    return int(os.environ.get("WORLD_SIZE", "1"))
