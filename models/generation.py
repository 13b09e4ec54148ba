"""Continuing a prompt: greedy, or sampled with temperature, top-k and top-p, from a seed of its own."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from models.gpt import GPTModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (arXiv:1904.09751)."""
    seed: int = 0
    """Seed of the draws."""


def generate(
    model: GPTModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    end_of_document: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield the tokens that follow the prompt, until `end_of_document` or `max_new_tokens`.

    Args:
        model: whole, on one device, unsharded.
        prompt: at least one token id.
        use_cache: keep keys and values of earlier positions rather than computing them again.

    Raises:
        ValueError: the prompt is empty, or prompt and continuation exceed the model's positions.
    """
    room = model.config.max_position_embeddings - len(prompt)
    if not prompt or max_new_tokens > room:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens leaves room for {room} of {model.config.max_position_embeddings} "
            f"positions, {max_new_tokens} asked for; the prompt needs at least one token"
        )
    device = model.embedding.word.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    caches = model.new_caches(1, len(prompt) + max_new_tokens) if use_cache else None
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        seen = caches[0].length if caches else 0
        logits = model.next_token_logits(torch.tensor([tokens[seen:]], device=device), caches)
        token = choose_token(logits[0].cpu(), sampling, generator)
        if token == end_of_document:
            return
        tokens.append(token)
        yield token


def choose_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits `[vocabulary]`."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    sorted_logits, order = (logits.double() / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        sorted_logits, order = sorted_logits[: sampling.top_k], order[: sampling.top_k]
    probabilities = sorted_logits.softmax(0)
    # A token stays while those before it have not reached top_p, so that one always does.
    kept = probabilities.cumsum(0) - probabilities < sampling.top_p
    draw = torch.multinomial(probabilities * kept, 1, generator=generator)
    return int(order[draw])
