"""What a request does to its logits before a token is chosen: bars, biases and penalties.

In the order of vLLM: allowed tokens, then bad words, biases and the bar on early ends (which are all
additions), then the penalties. Everything touches only the few columns it speaks of, never the whole
vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xllm.executor.sampling.slots import Slot

_BARRED = -torch.inf


class Additions:
    """Biases, tokens barred outright, and last tokens of bad words, for one batch of rows."""

    def __init__(self, slots: Sequence[Slot], young: Sequence[bool], device: torch.device):
        """`young[r]` says that row r may not end yet."""
        fixed: list[tuple[int, int, float]] = []  # row, token, what is added
        words: list[tuple[int, list[int]]] = []
        for row, (slot, is_young) in enumerate(zip(slots, young, strict=True)):
            fixed += [(row, token, bias) for token, bias in slot.bias.items()]
            if is_young:
                fixed += [(row, token, _BARRED) for token in slot.stop_ids]
            words += [(row, word) for word in slot.bad_words]
        length = max((len(word) for _, word in words), default=1) - 1
        rows = [row for row, _, _ in fixed] + [row for row, _ in words]
        tokens = [token for _, token, _ in fixed] + [word[-1] for _, word in words]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._tokens = torch.tensor(tokens, dtype=torch.int64, device=device)
        self._fixed = torch.tensor([value for _, _, value in fixed], dtype=torch.float32, device=device)
        # [words, length]: what must stand before the last token, filled from the left with -1 for "anything"
        heads = [[-1] * (length + 1 - len(word)) + word[:-1] for _, word in words]
        self._heads = torch.tensor(heads, dtype=torch.int64, device=device).reshape(len(words), length)
        self._word_rows = self._rows[len(fixed) :]
        self._back = torch.arange(-length, 0, device=device)

    def apply(self, logits_RV: Tensor, tokens_SL: Tensor, slots_R: Tensor, positions_R: Tensor) -> None:
        values = self._fixed
        if len(self._heads):
            at = positions_R[self._word_rows][:, None] + self._back
            stands = tokens_SL[slots_R[self._word_rows][:, None], at.clamp(min=0)]
            matches = ((stands == self._heads) & (at >= 0) | (self._heads < 0)).all(-1)
            values = torch.cat([values, torch.where(matches, _BARRED, 0.0)])
        # adding, not writing: one token may be named several times, by a bias and by two bad words
        logits_RV.index_put_((self._rows, self._tokens), values, accumulate=True)

    def __len__(self) -> int:
        return len(self._rows)


class AllowedTokens:
    """Bars everything but the tokens allowed, in the rows that have such a list."""

    def __init__(self, slots: Sequence[Slot], device: torch.device):
        rows = [row for row, slot in enumerate(slots) if slot.allowed is not None]
        pairs = [(row, token) for row in rows for token in slots[row].allowed or ()]
        self._limited = torch.tensor(rows, dtype=torch.int64, device=device)
        self._rows = torch.tensor([row for row, _ in pairs], dtype=torch.int64, device=device)
        self._tokens = torch.tensor([token for _, token in pairs], dtype=torch.int64, device=device)

    def apply(self, logits_RV: Tensor) -> None:
        kept = logits_RV[self._rows, self._tokens]
        logits_RV.index_fill_(0, self._limited, _BARRED)
        logits_RV[self._rows, self._tokens] = kept

    def __len__(self) -> int:
        return len(self._limited)


class Penalties:
    """Repetition over prompt and output, presence and frequency over output, in the P rows that ask for any.

    Only tokens that occur in a sequence can change, and they are at hand in its row of the token buffer.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device):
        rows = [row for row, slot in enumerate(slots) if slot.penalised]
        asked = [slots[row] for row in rows]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._repetition = torch.tensor([s.params.repetition_penalty for s in asked], device=device)[:, None]
        self._presence = torch.tensor([s.params.presence_penalty for s in asked], device=device)[:, None]
        self._frequency = torch.tensor([s.params.frequency_penalty for s in asked], device=device)[:, None]
        self._count_rows = torch.tensor([s.count_row for s in asked], dtype=torch.int64, device=device)[
            :, None
        ]
        self._counted = [row for row, slot in zip(rows, asked, strict=True) if slot.count_row >= 0]
        self._counted_rows = torch.tensor(self._counted, dtype=torch.int64, device=device)
        self._own_counts = self._count_rows[self._count_rows >= 0]

    def apply(
        self,
        logits_RV: Tensor,
        tokens_SL: Tensor,
        slots_R: Tensor,
        positions_R: Tensor,
        longest: int,
        counts: Tensor,
    ) -> None:
        """`longest` is the greatest position; `counts` [rows, V] int32 how often each token was put out."""
        ids = tokens_SL[slots_R[self._rows], :longest].to(torch.int64)
        beyond = torch.arange(longest, device=ids.device) >= positions_R[self._rows][:, None]
        ids = torch.where(
            beyond, ids[:, :1], ids
        )  # a token often named is written often, with the same value
        rows = self._rows[:, None]
        values = logits_RV[rows, ids]
        values = torch.where(values > 0, values / self._repetition, values * self._repetition)
        if self._counted:
            seen = counts[self._count_rows.clamp(min=0), ids] * (self._count_rows >= 0)
            values = values - self._frequency * seen - self._presence * (seen > 0)
        logits_RV[rows, ids] = values

    def count(self, token_ids_R: Tensor, counts: Tensor) -> None:
        """The tokens chosen are output now."""
        if self._counted:
            counts[self._own_counts, token_ids_R[self._counted_rows]] += 1

    def __len__(self) -> int:
        return len(self._rows)
