"""Copies of tensors in host memory: as large as they must be, one piece, kept, and locked for a GPU."""

from types import SimpleNamespace

import pytest
import torch

from checkpoint.host_copy import ALIGNMENT, HostCopy, lock_pages


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(5, 7, generator=generator).t(),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "double": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        "step": torch.tensor(4.0),
        "nothing": torch.zeros(0, 4),
    }


def test_copies_are_equal_lie_in_one_piece_of_memory_and_are_taken_again():
    host, originals = HostCopy(), tensors()
    copies = host.take(originals)
    for name, original in originals.items():
        assert torch.equal(copies[name], original)
        assert copies[name].dtype == original.dtype
        original += 1
        assert original.numel() == 0 or not torch.equal(copies[name], original)
    again = host.take(originals)
    assert all(torch.equal(again[name], originals[name]) for name in originals)
    assert [part.data_ptr() for part in again.values()] == [part.data_ptr() for part in copies.values()]
    size = sum(part.nbytes for part in originals.values())
    assert len({part.untyped_storage().data_ptr() for part in copies.values()}) == 1
    assert size <= copies["step"].untyped_storage().nbytes() <= size + ALIGNMENT * len(originals)


@pytest.mark.parametrize("code", [0, 2])
def test_memory_is_locked_once_for_a_gpu_or_a_warning_says_why_not(code, monkeypatch, recwarn):
    locked, touched = [], []

    def register(pointer, size, flags):
        locked.append((pointer, size, flags))
        return code

    def raise_once_more(*_, **__):
        touched.append(True)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    memory = torch.empty(1000, dtype=torch.uint8)
    monkeypatch.setattr(torch, "zeros", raise_once_more)
    lock_pages(memory)
    assert locked == [(memory.data_ptr(), 1000, 1)]
    assert bool(touched) == bool(recwarn) == (code != 0)
