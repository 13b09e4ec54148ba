"""Copies of tensors in host memory, where training does not touch them: one piece of memory, kept from copy to copy."""

import contextlib
import warnings
from collections.abc import Mapping

import torch

ALIGNMENT = 64
"""Bytes; every copy starts at a multiple of it."""


class HostCopy:
    """Memory for copies of the same tensors, time after time."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of the tensors, which take the place of those of the call before; names, shapes and types are the same
        at every call. Nothing needs to be waited for."""
        starts, size = {}, 0
        for name, tensor in tensors.items():
            starts[name] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if self._memory is None:
            self._memory = torch.empty(size, dtype=torch.uint8)
            if on_gpu:
                lock_pages(self._memory)
        copies = {}
        for name, tensor in tensors.items():
            place = self._memory[starts[name] : starts[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[name] = place.copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def lock_pages(memory: torch.Tensor) -> None:
    """Let a GPU copy into host memory by itself, at full speed.

    torch's own pinned memory comes in powers of two, up to twice what is needed, and stays with the process for good.
    Where the system does not lock so much memory, a warning says so, and copies are slower.
    """
    portable = 1
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable))
    if code == 0:
        return
    warnings.warn(
        f"{memory.nbytes / 1e9:.2f} GB of host memory cannot be locked (CUDA error {code}): saving a checkpoint holds "
        "training up for longer; `ulimit -l` says how much may be",
        stacklevel=2,
    )
    # CUDA reports the error once more, at whatever comes next.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
