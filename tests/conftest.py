"""What every test shares: no network, few threads, tiny checkpoints built once, real photos where there are any."""

import os
import socket
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # two workers on two cores; one thread gives the same bits on every machine


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails, whatever library it does it through."""
    connect = socket.socket.connect

    def refuse(sock, address):
        if sock.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for {address}; build what it needs in hf_qie/tiny.py instead")
        return connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT
