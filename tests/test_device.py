"""What encoder and VAE compute in, by what the device has units for; and the thread that runs them."""

import pytest
import torch

from hf_qie.extraction.chunk_writer import use_device
from hf_qie.runtime import device
from hf_qie.runtime.device import compute_dtype, computes_bfloat16, own_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cpu_with_units(monkeypatch, caplog):
    """`cpu_with_units(bool)` makes this CPU one of that kind; only the question to the library is answered."""
    device.log_once.cache_clear()
    caplog.set_level("INFO")

    def simulate(units: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: units)

    return simulate


@pytest.mark.parametrize(("units", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_cpu_has_units_for_it_and_the_log_says_why(cpu_with_units, caplog, units, dtype):
    cpu_with_units(units)
    assert {compute_dtype("auto", CPU), compute_dtype("auto", CPU)} == {dtype}
    name, has = str(dtype).removeprefix("torch."), "has units for it" if units else "has no units for bfloat16"
    assert caplog.messages == [f"extract.dtype: auto: {name}, as this cpu device {has}"]


@pytest.mark.parametrize(("units", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_asks_a_gpu_for_units_and_not_for_emulation(monkeypatch, units, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or units)
    assert compute_dtype("auto", CUDA) == dtype


def test_a_named_bfloat16_is_obeyed_with_one_warning_of_what_it_costs(cpu_with_units, caplog):
    cpu_with_units(False)
    assert {compute_dtype("bfloat16", CPU), compute_dtype("bfloat16", CPU)} == {torch.bfloat16}
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", device.EMULATED)]
    assert "60 times" in device.EMULATED
    caplog.clear()
    cpu_with_units(True)
    compute_dtype("bfloat16", CPU)
    assert compute_dtype("float32", CPU) == torch.float32 and not caplog.messages


def test_this_machine_answers_the_question():
    assert computes_bfloat16(CPU) in (True, False)
    assert own_device().type == "cpu" or torch.accelerator.is_available()


@pytest.mark.parametrize(("name", "set_to"), [("cuda", []), ("cuda:1", [1]), ("cpu", [])])
def test_the_models_thread_starts_with_and_without_an_index_of_its_device(monkeypatch, name, set_to):
    seen = []
    monkeypatch.setattr(torch._C, "_accelerator_setDeviceIndex", seen.append)
    use_device(torch.device(name))
    assert seen == set_to
