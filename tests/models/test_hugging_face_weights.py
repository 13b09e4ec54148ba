"""Weights of transformers' models under our names: the same logits in every layout; what does not fit is named."""

import json
import struct
from dataclasses import replace

import pytest
import torch

from models.families import open_directory
from models.generation import Sampling, generate
from models.gpt import build_meta_model
from models.hugging_face_weights import HuggingFaceWeights
from parallel.config import ParallelConfig
from parallel.data_parallel import shard_data_parallel
from parallel.mesh import ParallelMesh
from parallel.sharding import logical_shapes
from runtime.errors import HuggingFaceError
from tests.models.hugging_face_models import MODELS, TOLERANCES, reference, rewrite, save, stored
from verification.local_ranks import run_ranks

CPU = torch.device("cpu")


def load(path, dtype):
    directory = open_directory(path)
    model = build_meta_model(directory.model, dtype)
    model.to_empty(device="cpu")
    HuggingFaceWeights(directory, logical_shapes(model)).copy_to(dict(model.named_parameters()))
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(theirs, ours)"""
    theirs = reference(request.param)
    path = save(theirs, tmp_path_factory.mktemp("model") / "saved")
    return theirs, load(path, theirs.dtype)


@torch.no_grad()
def test_logits_and_loss_are_the_same(pair):
    theirs, ours = pair
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    scale, tolerance = expected.abs().max(), TOLERANCES[theirs.dtype]
    for length in (1, 7, 40):
        assert (ours.next_token_logits(ids[:, :length]) - expected[:, length - 1]).abs().max() <= tolerance * scale
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert abs(ours(ids[:, :-1], ids[:, 1:]) - loss) <= tolerance * loss


@torch.no_grad()
def test_greedy_generation_is_the_same_token_for_token(pair):
    theirs, ours = pair
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        prompt = torch.randint(0, 97, (1, int(torch.randint(1, 12, (), generator=generator))), generator=generator)
        expected = theirs.generate(
            prompt, max_new_tokens=12, do_sample=False, eos_token_id=96, pad_token_id=0,
            attention_mask=torch.ones_like(prompt),
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        expected = expected[: expected.index(96)] if 96 in expected else expected
        for use_cache in (True, False):
            found = generate(ours, prompt[0].tolist(), 12, Sampling(temperature=0), 96, use_cache)
            assert list(found) == expected


LAYOUTS = {"tp2": ParallelConfig(tp=2, dp_shard=1), "shard2": ParallelConfig(dp_shard=2)}


def load_shards(rank, world_size, path, layout):
    mesh = ParallelMesh(layout, "cpu")
    directory = open_directory(path)
    model = build_meta_model(directory.model, torch.float64, mesh.tensor)
    shard_data_parallel(model, model.sharding_units(), mesh, 3, torch.float64)
    shapes = logical_shapes(model)
    model.to_empty(device="cpu")
    HuggingFaceWeights(directory, shapes).copy_to(dict(model.named_parameters()))
    whole = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    return {name: value[: shapes[name][0]].clone() for name, value in whole.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2_untied", "llama"])
def test_each_rank_takes_its_own_part(tmp_path, name, layout):
    path = save(reference(name), tmp_path / "saved")
    expected = dict(load(path, torch.float64).named_parameters())
    for found in run_ranks(2, load_shards, path, LAYOUTS[layout]):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def opened(path):
    directory = open_directory(path)
    return HuggingFaceWeights(directory, logical_shapes(build_meta_model(directory.model, torch.float32)))


@pytest.fixture
def gpt2(tmp_path):
    return save(reference("gpt2"), tmp_path / "saved")


def test_names_without_prefix_and_buffers_are_understood(gpt2):
    tensors = stored(gpt2)
    expected = {name: opened(gpt2)[name].clone() for name in ("block.layers.1.attention.key.weight", "final_norm.bias")}
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    found = opened(rewrite(gpt2, bare | buffers))
    assert found.base == ""
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_head_that_is_tied_may_be_stored_if_it_is_the_embedding(gpt2):
    tensors = stored(gpt2)
    repeated = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    assert opened(rewrite(gpt2, repeated)).repeats_head
    repeated["lm_head.weight"] += 1
    with pytest.raises(HuggingFaceError, match=r"lm_head\.weight differs from the embedding"):
        opened(rewrite(gpt2, repeated))


def test_what_does_not_fit_is_named(gpt2):
    tensors = stored(gpt2)
    name = "transformer.h.1.mlp.c_fc.weight"
    for changed, message in (
        ({key: value for key, value in tensors.items() if key != name}, rf"{name} is missing"),
        (tensors | {"transformer.h.3.ln_1.weight": torch.ones(48)}, r"transformer\.h\.3\.ln_1\.weight is unknown"),
        (tensors | {name: tensors[name].t()}, rf"{name} has shape \[192, 48\], config.json asks for \[48, 192\]"),
        (tensors | {name: tensors[name].to(torch.int8)}, rf"{name} is of dtype I8"),
        ({}, r"is missing.*\(and 35 more\)"),
    ):
        with pytest.raises(HuggingFaceError, match=message):
            opened(rewrite(gpt2, changed))


def write_header(path, header, data=b"\0" * 64):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_damaged_and_hostile_files_are_refused(gpt2):
    file = gpt2 / "model.safetensors"
    whole = file.read_bytes()
    item = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for spoil in (
        lambda: file.write_bytes(whole[: len(whole) // 2]),
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(b"\xff" * 64),
        lambda: write_header(file, {"a": item, "b": item}),
        lambda: write_header(file, {"a": item | {"data_offsets": [0, 10**12]}}),
        lambda: write_header(file, {"a": item | {"shape": [5]}}),
    ):
        spoil()
        with pytest.raises(HuggingFaceError, match=r"model\.safetensors is damaged"):
            opened(gpt2)


def test_an_index_names_plain_files_that_are_there(tmp_path):
    path = save(reference("llama"), tmp_path / "saved", max_shard_size="50KB")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert len(set(content["weight_map"].values())) > 2
    opened(path)
    first = next(iter(content["weight_map"]))
    for value, message in (
        ("../x.safetensors", "'../x.safetensors' is no plain file name"),
        ("/etc/passwd", "no plain file name"),
        ("x\0.safetensors", "no plain file name"),
        (7, "'7' is no plain file name"),
        (["a"], "no plain file name"),
        ("model-9.safetensors", "has no model-9.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {first: value}}))
        with pytest.raises(HuggingFaceError, match=message):
            open_directory(path)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", "\xff"):
        index.write_text(text, encoding="latin-1")
        with pytest.raises(HuggingFaceError, match=r"index\.json"):
            open_directory(path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    path = save(reference("llama"), tmp_path / "saved", max_shard_size="50KB")
    files = sorted(path.glob("*.safetensors"))
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(HuggingFaceError, match="as another file of the index does"):
        opened(path)


def test_pickled_weights_are_not_read(gpt2):
    (gpt2 / "model.safetensors").rename(gpt2 / "pytorch_model.bin")
    with pytest.raises(HuggingFaceError, match=r"has no model\.safetensors; pickled weights"):
        open_directory(gpt2)


def test_a_model_of_other_parts_has_no_names(gpt2):
    directory = open_directory(gpt2)
    shapes = logical_shapes(build_meta_model(replace(directory.model, activation="swiglu"), torch.float32))
    with pytest.raises(HuggingFaceError, match=r"gpt2 has no tensor for block\.layers\.0\.mlp\.gate\.bias"):
        HuggingFaceWeights(directory, shapes)
