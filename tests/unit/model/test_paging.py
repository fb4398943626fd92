import platform
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from locft.model.paging import give_back_freed, page_out

NUM_BYTES = 64 * 2**20


def resident_bytes(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells, and takes advice")
def test_mapped_tensors_leave_memory_and_keep_their_values(tmp_path: Path) -> None:
    values = torch.arange(NUM_BYTES // 4, dtype=torch.float32)
    save_file({"a": values, "b": values.flip(0)}, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    assert torch.equal(tensors["a"], values)
    assert torch.equal(tensors["b"], values.flip(0))
    before = resident_bytes("RssFile")
    page_out([tensors["a"]])
    assert before - resident_bytes("RssFile") > 0.9 * NUM_BYTES
    assert torch.equal(tensors["a"], values)
    assert torch.equal(tensors["b"], values.flip(0))


def test_values_written_over_a_mapped_file_stay(tmp_path: Path) -> None:
    values = torch.arange(100_000, dtype=torch.float32)
    save_file({"a": values}, tmp_path / "x.safetensors")
    mapped = load_file(tmp_path / "x.safetensors")["a"]
    mapped += 1
    page_out([mapped])
    assert torch.equal(mapped, values + 1)


def test_other_tensors_are_left_alone() -> None:
    own = torch.arange(100_000)
    page_out([own, own[:0], torch.zeros(0), torch.empty(5, device="meta")])
    assert torch.equal(own, torch.arange(100_000))


def test_a_system_without_such_a_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.arange(100_000)
    monkeypatch.setattr(sys, "platform", "darwin")
    page_out([own])
    assert torch.equal(own, torch.arange(100_000))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators give back by themselves")
def test_memory_that_was_freed_under_what_is_in_use_is_given_back() -> None:
    pieces = [torch.ones(16_000) for _ in range(NUM_BYTES // 64_000)]  # small enough for the heap
    last = torch.ones(16_000)
    before = resident_bytes("RssAnon")
    del pieces
    give_back_freed()
    assert before - resident_bytes("RssAnon") > 0.7 * NUM_BYTES
    assert last.sum() == 16_000
