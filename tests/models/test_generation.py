"""Generation: the cache changes nothing, sampling keeps what it says, a seed decides everything."""

import pytest
import torch

from core.config import ModelConfig
from models.generation import Sampling, choose_token, generate
from models.gpt import build_meta_model
from parallel.initialization import materialize

CONFIGS = [
    ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_position_embeddings=24,
                init_std=0.5),
    ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=50,
                max_position_embeddings=24, normalization="rmsnorm", activation="swiglu", position_embedding="rope",
                bias=False, tie_embeddings=False, init_std=0.5),
    ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=50,
                max_position_embeddings=24, activation="relu2", position_embedding="rope", rope_scaling="llama3",
                rope_original_length=8, qk_norm=True, sliding_window=6, init_std=0.5),
]  # fmt: skip
LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.9])


def build(config):
    model = build_meta_model(config, torch.float64)
    materialize(model, 5, torch.device("cpu"))
    return model


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(seed=3), Sampling(temperature=0.7, top_k=5, top_p=0.9)]
)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_cache_changes_no_token(config, sampling):
    model = build(config)
    cached = list(generate(model, [1, 2, 3], 20, sampling))
    assert cached == list(generate(model, [1, 2, 3], 20, sampling, use_cache=False))
    assert len(cached) == 20


def test_greedy_takes_the_likeliest_token_each_time():
    model = build(CONFIGS[0])
    tokens = [7]
    for token in generate(model, [7], 10, Sampling(temperature=0)):
        assert token == int(model.next_token_logits(torch.tensor([tokens])).argmax())
        tokens.append(token)


def test_it_stops_at_the_end_of_a_document():
    model = build(CONFIGS[0])
    tokens = list(generate(model, [1], 20, Sampling(seed=1)))
    end = tokens[6]
    assert list(generate(model, [1], 20, Sampling(seed=1), end_of_document=end)) == tokens[: tokens.index(end)]


def test_seeds_decide():
    model = build(CONFIGS[1])
    first, again, other = (list(generate(model, [1], 20, Sampling(seed=seed))) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=0), {1}),
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=3), {1, 2, 4}),
        (Sampling(top_p=0.01), {1}),
        (Sampling(top_p=0.6), {1, 4}),
        (Sampling(), {0, 1, 2, 3, 4}),
    ],
)
def test_top_k_and_top_p_keep_exactly_the_likeliest(sampling, allowed):
    generator = torch.Generator().manual_seed(0)
    assert {choose_token(LOGITS, sampling, generator) for _ in range(600)} == allowed


def test_sampling_follows_the_softmax_at_the_temperature():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose_token(LOGITS, Sampling(temperature=2.0), generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=5) / len(draws)
    torch.testing.assert_close(shares, (LOGITS / 2).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize(("prompt", "new"), [([], 1), ([1] * 20, 5), ([1] * 25, 1)])
def test_what_does_not_fit_is_refused_with_the_room_there_is(prompt, new):
    with pytest.raises(ValueError, match=f"leaves room for {24 - len(prompt)} of 24"):
        list(generate(build(CONFIGS[0]), prompt, new, Sampling()))
