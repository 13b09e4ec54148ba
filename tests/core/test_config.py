"""The count of parameters, against the models that are built."""

import pytest
import torch

from core.config import ModelConfig
from models.gpt import GPTModel, build_meta_model
from parallel.tensor import TensorParallel
from settings.compose import compose
from settings.keys import presets
from settings.resolve import resolve

OTHERS = [
    "model=tiny model.normalization=layernorm",
    "model=tiny model.num_query_groups=2 model.bias=true model.tie_embeddings=false model.head_dim=16",
    "model=gpt2_small model.num_query_groups=4 model.vocab_size=50258",
    "model=tiny model.qk_norm=true model.num_query_groups=2 model.activation=relu2",
]
PRESETS = {
    "tiny": 3_210_768,
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "gpt3_175b": 174_604_259_328,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_8b": 8_190_735_360,
}


def preset(words: str) -> ModelConfig:
    return resolve(compose(words.split()), {}).model


@pytest.mark.parametrize("name", presets()["model"])
def test_presets_have_their_known_size(name):
    assert preset(f"model={name}").parameter_count() == PRESETS[name]


@pytest.mark.parametrize("words", [*(f"model={name}" for name in PRESETS), *OTHERS])
def test_the_count_is_that_of_the_model_that_is_built(words):
    model = preset(words)
    built = build_meta_model(model, torch.float32)
    assert model.parameter_count() == sum(parameter.numel() for parameter in built.parameters())
    embedding = sum(parameter.numel() for parameter in built.embedding.parameters())
    assert model.embedding_parameters == embedding


class Cut(TensorParallel):
    """Makes the parameters of one rank out of several, without the others."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def parameter(self, *shape: int, shard: int | None = None) -> torch.nn.Parameter:
        return torch.nn.Parameter(
            torch.empty([length // self.size if index == shard else length for index, length in enumerate(shape)])
        )


@pytest.mark.parametrize("words", ["model=tiny", "model=gpt2_small", "model=qwen3_8b", *OTHERS])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_tensor_parallel_rank_holds_what_is_counted(words, tp):
    model = preset(words)
    with torch.device("meta"):
        built = GPTModel(model, Cut(tp))
    assert model.parameter_count(tp) == sum(parameter.numel() for parameter in built.parameters())


def test_an_unknown_vocabulary_cannot_be_counted():
    with pytest.raises(ValueError, match="vocab_size is null"):
        ModelConfig().parameter_count()
