"""What a decoding gave, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Decoded:
    """The decoded rows. L = longest prompt + generated length.

    Attributes:
        tokens: (B, L) int64, prompts (padded on the left) and answers.
        answer_start: column at which generation started.
        first: (B,) int64, column of each row's first real token.
        ends: (B,) int64, column after the last decoded token; what follows is filled with the end-of-sequence id.
        failed: (B,) bool, rows that a constraint or a scorer gave up; masks are left in them.
        nfe: (B,) int64, forward passes while the row was alive; a guided one counts 2.
        token_forwards: (B,) int64, positions evaluated in them.
        new_tokens: (B,) int64, decoded tokens up to and with the first end of sequence.
        steps: (B,) int64, iterations of the loop.
        reveal_step: (B, L) int64, step at which a position was committed last; -1 in the prompt.
        reveal_conf: (B, L) float64, its token's probability then; NaN in the prompt.
        exact: whether the tokens are those of this recipe with no cache: every logit that was read was there, and came
            from keys and values that a full evaluation would have given. Found out in each step, not taken on trust.
        kv_bytes: most bytes of keys and values that were kept at once.
        scorer_nfe: (B,) int64, forward passes of a scorer's own model, which ``nfe`` leaves out; None without one.
        scorer_token_forwards: (B,) int64, positions evaluated in them; None without a scorer.
    """

    tokens: Tensor
    answer_start: int
    first: Tensor
    ends: Tensor
    failed: Tensor
    nfe: Tensor
    token_forwards: Tensor
    new_tokens: Tensor
    steps: Tensor
    reveal_step: Tensor
    reveal_conf: Tensor
    exact: bool
    kv_bytes: int = 0
    scorer_nfe: Tensor | None = None
    scorer_token_forwards: Tensor | None = None

    @property
    def answers(self) -> Tensor:
        """(B, generated length), what follows the prompts."""
        return self.tokens[:, self.answer_start :]

    @property
    def tokens_per_forward(self) -> Tensor:
        """(B,) float64, new tokens per forward pass that the row took part in, as transformers counts them."""
        return self.new_tokens.double() / self.nfe.clamp(min=1)
