"""A pruned language model that drafts for its parent (assisted generation): is it worth it?"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.errors import ModelError
from sosp_hub.modes import evaluating

PROMPTS = (
    "The weather today is",
    "Once upon a time there was",
    "The most important thing about science is",
    "To make bread you need",
)


@dataclass(frozen=True)
class Drafting:
    """What a draft gives its parent, greedy.

    Attributes:
        num_tokens: New tokens that were generated, over all prompts.
        acceptance_length: Tokens that one pass of the parent yields: one, and what it accepts.
        alone_tokens_per_s: Of the parent alone.
        drafted_tokens_per_s: With the draft.
        identical: Whether both wrote the same tokens.
        differs_at: The prompt where they did not.
    """

    num_tokens: int
    acceptance_length: float
    alone_tokens_per_s: float
    drafted_tokens_per_s: float
    identical: bool
    differs_at: str | None = None

    def __str__(self) -> str:
        gain = self.drafted_tokens_per_s / self.alone_tokens_per_s
        same = "identical" if self.identical else f"DIFFERS at {self.differs_at!r}"
        return (
            f"as a draft: {self.acceptance_length:.2f} tokens a pass of the parent; "
            f"{self.drafted_tokens_per_s:.3g} tokens/s, {self.alone_tokens_per_s:.3g} without "
            f"({gain:.2f} x); output of {self.num_tokens} tokens {same}"
        )


@torch.no_grad()
def measure_drafting(
    parent: nn.Module,
    draft: nn.Module,
    prompts: Sequence[Tensor],
    *,
    num_tokens: int = 64,
    names: Sequence[str] = PROMPTS,
) -> Drafting:
    """Generates greedily with and without a draft.

    Args:
        parent: Whose tokens count.
        draft: The smaller model, with the same vocabulary.
        prompts: Tokens of each, ``(1, length)``.
        num_tokens: New tokens of each.
        names: Of the prompts, for what differs; one without a name is told by its number.

    Raises:
        ModelError: Models of different vocabularies, or that do not generate.
    """
    sizes = [_vocabulary(model) for model in (parent, draft)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"--draft-for: the draft has {sizes[1]} tokens, its parent {sizes[0]}; a draft needs "
            "the same vocabulary"
        )
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    alone, drafted, seconds = list[Tensor](), list[Tensor](), [0.0, 0.0]
    with evaluating(parent, draft):
        _generate(parent, prompts[0], 2, None)  # warms up
        _generate(parent, prompts[0], 4, draft)
        for prompt in prompts:
            start = time.perf_counter()
            alone.append(_generate(parent, prompt, num_tokens, None))
            seconds[0] += time.perf_counter() - start
            handle = parent.register_forward_pre_hook(count)
            try:
                start = time.perf_counter()
                drafted.append(_generate(parent, prompt, num_tokens, draft))
                seconds[1] += time.perf_counter() - start
            finally:
                handle.remove()
    new = [sum(len(out) for out in outs) for outs in (alone, drafted)]
    differs = next(
        (i for i, pair in enumerate(zip(alone, drafted, strict=True)) if not torch.equal(*pair)),
        None,
    )
    return Drafting(
        num_tokens=new[1],
        acceptance_length=new[1] / max(passes[0], 1),
        alone_tokens_per_s=new[0] / seconds[0],
        drafted_tokens_per_s=new[1] / seconds[1],
        identical=differs is None,
        differs_at=None if differs is None else _name(differs, names),
    )


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"prompt {number}"


def _generate(parent: Any, prompt: Tensor, num_tokens: int, draft: nn.Module | None) -> Tensor:
    """The new tokens."""
    if not hasattr(parent, "generate"):
        raise ModelError(f"--draft-for: a {type(parent).__name__} does not generate")
    given = {} if draft is None else {"assistant_model": draft}
    out = parent.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        **given,
    )
    return out[0, prompt.shape[1] :]


def _vocabulary(model: Any) -> int:
    config = getattr(model, "config", None)
    return 0 if config is None else config.get_text_config().vocab_size
