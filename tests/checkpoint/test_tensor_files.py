"""The safetensors files: laid out as the safetensors library reads them, and refused where they are not as written."""

import json
import struct
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint.plan import Claim, share_out
from checkpoint.tensor_files import DTYPE_NAMES, SafetensorsFile, safetensors_layout, write_parts
from parallel.sharding import Box, tensor_part
from runtime.errors import StorageError

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.sampled_from(["a", "a.b", "b", "ü"])
TENSORS = st.lists(st.tuples(NAMES, st.sampled_from(list(DTYPE_NAMES)), SHAPES), unique_by=lambda tensor: tensor[0])


def _random_bytes(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    limit = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, limit, (count,), generator=generator, dtype=torch.uint8)
    return raw.numpy().tobytes()


@settings(deadline=None)
@given(TENSORS)
def test_the_library_reads_what_is_laid_out(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("layout") / "file.safetensors"
    tensors = sorted(tensors, key=lambda tensor: tensor[1].itemsize, reverse=True)
    header, size = safetensors_layout(tensors)
    contents = [_random_bytes(dtype, shape, seed) for seed, (_, dtype, shape) in enumerate(tensors)]
    path.write_bytes(header + b"".join(contents))
    assert path.stat().st_size == size
    assert len(header) % 8 == 0
    by_library, ours = load_file(path), SafetensorsFile(path, size)
    assert by_library.keys() == {name for name, _, _ in tensors}
    for (key, dtype, shape), content in zip(tensors, contents, strict=True):
        library = by_library[key]
        assert (library.dtype, tuple(library.shape)) == (dtype, shape)
        assert library.reshape(-1).view(torch.uint8).numpy().tobytes() == content
        if content:
            tensor = ours.tensor(key, DTYPE_NAMES[dtype], shape)
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == content


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "file.safetensors"
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    save_file({"x": tensor}, path)
    file = SafetensorsFile(path, path.stat().st_size)
    found = file.tensor("x", "BF16", (2, 3))
    assert torch.equal(found, tensor)
    found.zero_()
    assert torch.equal(load_file(path)["x"], tensor), "changing a mapped tensor must not change the file"


@pytest.mark.parametrize(
    ("key", "dtype", "shape"), [("y", "F32", (2, 3)), ("x", "F64", (2, 3)), ("x", "F32", (3, 2)), ("x", "F32", (6,))]
)
def test_another_tensor_than_the_manifest_says_is_refused(tmp_path, key, dtype, shape):
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(2, 3)}, path)
    with pytest.raises(StorageError, match=r"file\.safetensors: damaged header: tensor '[xy]'"):
        SafetensorsFile(path, path.stat().st_size).tensor(key, dtype, shape)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 3) + b"{no",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 10) + b'{"x": "y"}',
        *(
            struct.pack("<Q", len(text)) + text + bytes(8)
            for offsets in ([8, 16], [-8, 0], [0, 4], ["0", "8"], [0])
            for text in [json.dumps({"x": ENTRY | {"data_offsets": offsets}}).encode()]
        ),
    ],
)
def test_damaged_files_are_storage_errors(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"file\.safetensors"):
        SafetensorsFile(path, len(content)).tensor("x", "F32", (2,))


def test_another_length_than_the_manifest_says_is_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(2, 3)}, path)
    with pytest.raises(StorageError, match=r"expected 10 bytes, found \d+"):
        SafetensorsFile(path, 10)


def test_ranks_write_each_part_once_and_about_as_much():
    def claim(name, size, offset=0):
        return Claim(name, "F32", (100,), Box((offset,), (size,)), 4 * size)

    replicated = [claim(f"replicated.{size}", size) for size in (40, 30, 20, 10)]
    claimed = [[claim("cut", 10, 10 * rank), claim("empty", 0, 100), *replicated] for rank in range(3)]
    shares = share_out(claimed)
    assert sorted(name for share in shares for name in share) == sorted(
        ["cut"] * 3 + [part.name for part in replicated]
    )
    sizes = {own.name: own.nbytes for own in claimed[0]}
    assert [sum(sizes[name] for name in share) for share in shares] == [200, 160, 160]


def test_a_folder_that_another_host_has_made_may_appear_late(tmp_path):
    threading.Timer(0.5, (tmp_path / "step").mkdir).start()
    file = write_parts(tmp_path / "step" / "file.safetensors", {"x": tensor_part(torch.ones(2), torch.Size([2]))})
    assert (tmp_path / "step" / file.name).is_file()
