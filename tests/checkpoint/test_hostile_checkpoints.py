"""Checkpoints made to harm: refused with a word, having run nothing, written nothing, held little, and soon."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from checkpoint.load import choose_checkpoint, load_checkpoint, read_manifest
from core.config import ModelConfig
from models.families import open_directory
from models.gpt2 import GPT2
from models.hugging_face_weights import HuggingFaceWeights
from monitoring.run_directory import RunDirectory
from runtime.errors import DataPathError, HuggingFaceError, RunError, StorageError
from runtime.files import read_object
from settings.stored import restore_config

WEIGHT = torch.arange(24.0).reshape(4, 6)
FIRST, SECOND = "rank_00000.safetensors", "rank_00001.safetensors"
CHUNKS = ("tensors", "weight", "chunks")
MEMORY = 2**29


class Bomb:
    """Makes a file wherever it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def bombs(marker):
    """It in the forms in which checkpoints were ever stored."""
    zipped = io.BytesIO()
    torch.save(Bomb(marker), zipped)
    return {"pickle": pickle.dumps(Bomb(marker)), "text": pickle.dumps(Bomb(marker), 0), "torch": zipped.getvalue()}


@contextlib.contextmanager
def contained(folder):
    """Fails where what is done inside writes in `folder`, takes half a GiB more, or half a minute."""

    def state():
        return {
            path: (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
        }

    def late(number, frame):
        raise TimeoutError("it hangs")

    before, limits = state(), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert state() == before


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_manifest(path, document):
    """One that vouches for itself and for the files that are there, whatever it says."""
    for name, entry in document["files"].items() if isinstance(document["files"], dict) else ():
        if (path / name).is_file() and "sha256" not in entry:
            content = (path / name).read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    document.pop("sha256", None)
    document["sha256"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(document))


def checkpoint(run_dir, step):
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    save_file({"weight": WEIGHT[:, :3].contiguous(), "step": torch.tensor(float(step))}, path / FIRST)
    save_file({"weight": WEIGHT[:, 3:].contiguous()}, path / SECOND)
    halves = [
        {"file": name, "key": "weight", "offsets": [0, start], "lengths": [4, 3]}
        for name, start in ((FIRST, 0), (SECOND, 3))
    ]
    counter = [{"file": FIRST, "key": "step", "offsets": [], "lengths": []}]
    tensors = {
        "weight": {"dtype": "F32", "shape": [4, 6], "chunks": halves},
        "step": {"dtype": "F32", "shape": [], "chunks": counter},
    }
    files = {FIRST: {}, SECOND: {}}
    write_manifest(path, {"format": 1, "step": step, "state": {"a": 1}, "files": files, "tensors": tensors})
    return path


@pytest.fixture
def run_dir(tmp_path):
    """A run with a good checkpoint and, after it, one to spoil."""
    checkpoint(tmp_path / "run", 10)
    checkpoint(tmp_path / "run", 20)
    return tmp_path / "run"


def load(run_dir, resume, mode="full"):
    found = {"weight": torch.zeros(4, 6), "step": torch.zeros(())}
    with contained(run_dir):
        path, manifest = choose_checkpoint(run_dir, resume, mode)
        load_checkpoint(path, manifest, found)
    assert torch.equal(found["weight"], WEIGHT)
    return found["step"].item()


def refused(run_dir, message, mode="full"):
    """Whether the later one is refused where it is asked for, and passed over where it is not."""
    with pytest.raises(StorageError, match=message):
        load(run_dir, "20", mode)
    with contextlib.suppress(StorageError):
        # What shows in a sealed file's header shows once its pages are mapped, and ends the start.
        assert load(run_dir, "auto", mode) == 10
        return "passed over"
    return "ended"


def change(*path_and_value):
    *path, last, value = path_and_value

    def apply(document):
        for key in path:
            document = document[key]
        document[last] = value

    return apply


def rename_file(name):
    def apply(document):
        document["files"][name] = document["files"].pop(SECOND)
        document["tensors"]["weight"]["chunks"][1]["file"] = name

    return apply


def chunks(*boxes):
    listed = [
        {"file": FIRST, "key": f"k{n}", "offsets": offsets, "lengths": lengths}
        for n, (offsets, lengths) in enumerate(boxes)
    ]
    return change(*CHUNKS, listed)


def everywhere(value, message="not whole numbers"):
    """A number in all places that hold one."""
    places = [
        *(("step",), ("files", FIRST, "bytes"), ("tensors", "weight", "shape", 0)),
        *((*CHUNKS, 0, "offsets", 0), (*CHUNKS, 0, "lengths", 0)),
    ]
    return [(change(*place, value), message) for place in places]


ENORMOUS = {"file": FIRST, "key": "weight", "offsets": [0, 0], "lengths": [2**40, 2**40]}
MANIFESTS = [
    *(
        (rename_file(name), "is not a plain one")
        for name in ("../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "", "a\0")
    ),
    *((rename_file(name), "is not a plain one") for name in (".metadata", "~", "-x", "a\n", "ü", "step_1/x", "C:x")),
    (change(*CHUNKS, 0, "file", "../../../x"), "not among the files"),
    (change(*CHUNKS, 0, "file", ["x"]), "not a valid manifest"),
    (change(*CHUNKS, 0, "key", 7), "key 7 is no string"),
    (change(*CHUNKS, 0, "key", None), "key None is no string"),
    (change(*CHUNKS, 1, "file", FIRST), "is another chunk already"),
    *everywhere(-1),
    *everywhere(1.0),
    *everywhere(True),
    *everywhere(None),
    *everywhere("1"),
    *everywhere([1]),
    *everywhere(2**63),
    *everywhere(10**4000),
    *everywhere(float("nan"), "NaN is no JSON number"),
    *everywhere(float("inf"), "Infinity is no JSON number"),
    (chunks(([0, 0], [4, 3]), ([0, 3], [2, 3]), ([1, 3], [2, 3])), "do not fill"),
    (chunks(([0, 0], [3, 4]), ([1, 2], [3, 4])), "do not fill"),
    (chunks(([0, 0], [4, 3]), ([0, 0], [4, 3])), "do not fill"),
    (chunks(([0, 0], [4, 6]), ([0, 0], [4, 6])), "do not fill"),
    (chunks(([0, 0], [4, 5])), "do not fill"),
    (chunks(([0, 0], [4, 7])), "reaches beyond"),
    (chunks(([0], [24])), "not a valid manifest"),
    (change("tensors", "weight", {"dtype": "F32", "shape": [2**40, 2**40], "chunks": []}), "do not fill"),
    (
        change("tensors", "weight", {"dtype": "F32", "shape": [2**40, 2**40], "chunks": [ENORMOUS]}),
        "and its chunks have",
    ),
    (change("tensors", "weight", "shape", [1] * 10**6), "not whole numbers"),
    (change("tensors", "weight", "shape", [2**62] * 64), "not a valid manifest"),
    (change("tensors", "weight", "dtype", "F7"), "has dtype 'F7'"),
    (change("tensors", "weight", "dtype", "object"), "has dtype 'object'"),
    (change("tensors", "weight", "dtype", ["F32"]), "not a valid manifest"),
    (change("files", FIRST, {"bytes": 2**62, "sha256": ""}), f"expected {2**62} bytes"),
    (change("files", FIRST, {"bytes": 0, "sha256": ""}), "has 0 bytes, and its chunks have"),
    (change("format", 2), "format 2; this version reads format 1"),
    (change("format", "posix"), "this version reads format 1"),
    (change("step", 10), "its manifest is of step 10"),
    (change("state", [1]), "state is no object"),
    *(
        (change(key, value), "not a valid manifest")
        for key in ("files", "tensors")
        for value in ([], "x", {"x": 1}, None)
    ),
]


@pytest.mark.parametrize(("spoil", "message"), MANIFESTS)
def test_a_manifest_that_vouches_for_harm_is_passed_over(run_dir, spoil, message):
    path = run_dir / "checkpoints" / "step_00000020"
    document = json.loads((path / "manifest.json").read_bytes())
    spoil(document)
    write_manifest(path, document)
    assert refused(run_dir, message) == "passed over"


def nested(text):
    return text.replace('{"a": 1}', '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace('"step": 20', '"step": 10, "step": 20'), "key 'step' is there twice"),
        (lambda text: text.replace('"shape": [4, 6]', '"shape": [2], "shape": [4, 6]'), "key 'shape' is there twice"),
        (lambda text: text.replace('{"a": 1}', '{"a": {}, "a": 1}'), "key 'a' is there twice"),
        (nested, "not a valid manifest"),
        (lambda text: text.replace('"step": 20', '"step": 1e999'), "not a valid manifest"),
        (lambda text: text.replace('"step": 20', '"step": ' + "9" * 10**6), "not a valid manifest"),
        (lambda text: text[:-1], "not a valid manifest"),
        (lambda text: text + text, "not a valid manifest"),
        (lambda text: "\0" + text, "not a valid manifest"),
    ],
)
def test_text_that_readers_may_take_in_two_ways_is_passed_over(run_dir, spoil, message):
    manifest = run_dir / "checkpoints" / "step_00000020" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(spoil(before))
    assert manifest.read_text() != before
    assert refused(run_dir, message) == "passed over"


def test_a_manifest_of_absurd_size_is_not_read(run_dir):
    with (run_dir / "checkpoints" / "step_00000020" / "manifest.json").open("r+b") as file:
        file.truncate(2**40)
    assert refused(run_dir, rf"it is of {2**40} bytes") == "passed over"


def test_a_directory_of_another_step_is_passed_over(run_dir):
    (run_dir / "checkpoints" / "step_00000020").rename(run_dir / "checkpoints" / "step_00000030")
    assert load(run_dir, "auto") == 10
    with pytest.raises(StorageError, match="its manifest is of step 20"):
        load(run_dir, "30")


def link(path, target):
    path.rename(target)
    path.symlink_to(target)


def pipe(path, target):
    path.unlink()
    os.mkfifo(path)


def folder(path, target):
    path.unlink()
    path.mkdir()


def endless(path, target):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("mode", ["full", "sizes", "off"])
@pytest.mark.parametrize("name", ["manifest.json", FIRST])
@pytest.mark.parametrize("spoil", [link, pipe, folder, endless])
def test_what_is_no_regular_file_is_not_opened(run_dir, tmp_path, spoil, name, mode):
    spoil(run_dir / "checkpoints" / "step_00000020" / name, tmp_path / "elsewhere")
    how = refused(run_dir, rf"{name}: is (a symbolic link|no regular file)", mode)
    assert how == ("ended" if mode == "off" and name == FIRST else "passed over")


def test_a_checkpoint_behind_a_link_is_passed_over(run_dir, tmp_path):
    link(run_dir / "checkpoints" / "step_00000020", tmp_path / "elsewhere")
    assert refused(run_dir, "is a symbolic link; copy the checkpoint there") == "passed over"


ITEM = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
OTHER = {"dtype": "F32", "shape": [1], "data_offsets": [48, 52]}
TWICE = f'{{"weight": {json.dumps(ITEM | {"shape": [12]})}, "weight": {json.dumps(ITEM)}}}'


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + bytes(64),
        struct.pack("<Q", 10**8) + bytes(64),
        struct.pack("<Q", 2**64 - 1) + bytes(64),
        *(
            struct.pack("<Q", len(text)) + text + bytes(48)
            for text in (
                TWICE.encode(),
                b"[" * 10**5,
                b'{"weight":' * 1000,
                b"\x80\x04N.",
                json.dumps({"weight": ITEM, "other": ITEM}).encode(),
                json.dumps({"weight": ITEM, "other": OTHER | {"data_offsets": [44, 48]}}).encode(),
                *(
                    json.dumps({"weight": ITEM | wrong}).encode()
                    for wrong in (
                        *(
                            {"data_offsets": offsets}
                            for offsets in ([0, 10**12], [-48, 0], [48, 0], [0.0, 48], [0, True])
                        ),
                        *(
                            {"shape": shape}
                            for shape in ([4, 4], [12], [2**62, 2**62, 3], [-4, -3], [4.0, 3], [True, 12])
                        ),
                        *({"dtype": dtype} for dtype in ("F64", "I32", "F7", "O", None, 7)),
                        {"dtype": "F4", "shape": [8, 12]},
                        {"dtype": "F8_E4M3", "shape": [4, 12]},
                    )
                ),
            )
        ),
    ],
)
def test_a_sealed_file_with_a_hostile_header_is_refused(run_dir, content):
    path = run_dir / "checkpoints" / "step_00000020"
    (path / SECOND).write_bytes(content)
    document = json.loads((path / "manifest.json").read_bytes())
    document["files"][SECOND] = {}
    write_manifest(path, document)
    assert refused(run_dir, rf"{SECOND}: damaged header") == "ended"


@pytest.mark.parametrize("form", ["pickle", "text", "torch"])
@pytest.mark.parametrize("name", ["manifest.json", FIRST])
def test_a_pickle_in_the_place_of_a_file_is_not_run(run_dir, tmp_path, form, name):
    path, marker = run_dir / "checkpoints" / "step_00000020", tmp_path / "marker"
    (path / name).write_bytes(bombs(marker)[form])
    if name != "manifest.json":
        document = json.loads((path / "manifest.json").read_bytes())
        document["files"][name] = {}
        (path / name).write_bytes(bombs(marker)[form].ljust(4096, b"\0"))  # as long as its tensors need
        write_manifest(path, document)
    refused(run_dir, "not a valid manifest" if name == "manifest.json" else "damaged header")
    assert not marker.exists()
    pickle.loads(bombs(marker)["pickle"])  # noqa: S301
    assert marker.exists(), "the bomb is none"


def test_pickles_beside_a_checkpoint_are_not_looked_at(run_dir, tmp_path):
    marker, path = tmp_path / "marker", run_dir / "checkpoints" / "step_00000020"
    for form, content in bombs(marker).items():
        for name in (
            "data.pt",
            "model.bin",
            "state.pkl",
            ".metadata",
            "__0_0.distcp",
            "latest",
            "config.yaml",
            "a.npy",
        ):
            (path / name).write_bytes(content)
        (run_dir / "checkpoints" / "latest").write_bytes(content)
        (run_dir / "config.yaml").write_bytes(content)
        assert load(run_dir, "auto") == 20
        with contained(run_dir), pytest.raises(RunError):
            restore_config(RunDirectory(run_dir).saved_config())
        (run_dir / "status.json").write_bytes(content)
        with contained(run_dir), pytest.raises(StorageError, match="is not a status"):
            RunDirectory(run_dir)
        (run_dir / "status.json").unlink()
        assert not marker.exists(), form


def test_the_good_ones_are_good(run_dir):
    assert load(run_dir, "auto") == 20
    assert load(run_dir, "10", "off") == 10
    assert read_manifest(run_dir / "checkpoints" / "step_00000020").tensors["weight"].shape == (4, 6)


# Directories of Hugging Face.


@pytest.fixture
def hugging_face(tmp_path):
    path = tmp_path / "hf"
    path.mkdir()
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=16, max_position_embeddings=4)
    (path / "config.json").write_text(json.dumps(GPT2.config_json(model)))
    save_file({"wte.weight": torch.zeros(16, 8)}, path / "model.safetensors")
    return path


def opened(path):
    with contained(path):
        return HuggingFaceWeights(open_directory(path), {})


def test_pickles_of_hugging_face_are_never_opened(hugging_face, tmp_path):
    marker = tmp_path / "marker"
    for content in bombs(marker).values():
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (hugging_face / name).write_bytes(content)
        with contained(hugging_face):
            assert [file.name for file in open_directory(hugging_face).files] == ["model.safetensors"]
    (hugging_face / "model.safetensors").unlink()
    with pytest.raises(HuggingFaceError, match=r"pickled weights \(\.bin\) are not read"):
        opened(hugging_face)
    (hugging_face / "model.safetensors").write_bytes(bombs(marker)["torch"])
    with pytest.raises(HuggingFaceError, match="is damaged"):
        opened(hugging_face)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "..", ".", "", "a/b.safetensors", "a\\b.safetensors"),
        *("x\0.safetensors", "pytorch_model.bin", "x.safetensors\n", ".safetensors", None, ["x"], True),
    ],
)
def test_an_index_that_leads_out_is_refused(hugging_face, name):
    (hugging_face / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(HuggingFaceError, match="is no plain file name"):
        opened(hugging_face)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_hugging_face_files_may_be_links_to_regular_files_only(hugging_face, tmp_path, name):
    link(hugging_face / name, tmp_path / "blob")
    assert len(open_directory(hugging_face).files) == 1
    for spoil in (endless, pipe):
        spoil(hugging_face / name, None)
        with pytest.raises(HuggingFaceError, match=r"no regular file|has no model\.safetensors"):
            opened(hugging_face)


def test_a_tensor_that_is_there_twice_is_refused(hugging_face):
    text = TWICE.encode()
    (hugging_face / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    with pytest.raises(HuggingFaceError, match="key 'weight' is there twice"):
        opened(hugging_face)


def test_an_index_of_absurd_size_is_not_read(tmp_path):
    with (tmp_path / "index.json").open("wb") as file:
        file.truncate(2**40)
    with contained(tmp_path), pytest.raises(DataPathError, match="no regular file of up to"):
        read_object(tmp_path / "index.json")
