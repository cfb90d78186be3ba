"""What ends a response besides its stop tokens: its own limit, and stop strings."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.types import FinishReason

Decode = Callable[[Sequence[int]], str]
"""Token ids -> what they spell, special tokens included."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Limits and stop strings; plain values, so that it travels."""

    max_tokens: int
    """Longest response, tokens."""
    strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of them."""
    limits: tuple[int, int] | None = None
    """Range of each response's own limit, tokens, the upper end excluded; None: all have
    ``max_tokens``."""

    def limit(self, seed: int) -> int:
        """Longest that the response with this seed may be, tokens: the same whoever samples it."""
        if self.limits is None:
            return self.max_tokens
        return random.Random(f"length/{seed}").randrange(*self.limits)

    def finish_reason(
        self, token_ids: Sequence[int], limit: int, rule: SamplingRule, decode: Decode
    ) -> FinishReason | None:
        """Why a response ends with the last of its tokens; None: it goes on.

        Args:
            token_ids: of the response so far, at least one.
            limit: its own, tokens.
            rule: by which they were drawn; before its ``min_tokens`` no stop string counts.
            decode: of the model's tokenizer.
        """
        if token_ids[-1] in rule.stop_token_ids:
            return "stop"
        if len(token_ids) > rule.min_tokens and self.is_completed(token_ids, decode):
            return "stop"
        return "length" if len(token_ids) == limit else None

    def is_completed(self, token_ids: Sequence[int], decode: Decode) -> bool:
        """Whether the last of the tokens completes a stop string; it may spell more than that."""
        if not self.strings:
            return False
        # A character of which only some bytes are there is spelt as replacement characters.
        before, text = decode(token_ids[:-1]).rstrip("\ufffd"), decode(token_ids)
        return any(
            text.find(string, max(0, len(before) - len(string) + 1)) >= 0 for string in self.strings
        )
