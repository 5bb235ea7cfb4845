"""What a request does to its logits before a token is chosen: bars, biases and penalties.

In the order of vLLM: allowed tokens, then bad words, biases and the bar on early ends (which are all
additions), then the penalties. Everything touches only the few columns it speaks of, never the whole
vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xllm.device.table import Device
from xllm.executor.packing import upload_all
from xllm.executor.sampling.slots import Slot

_BARRED = -torch.inf


class Additions:
    """Biases, tokens barred outright, and last tokens of bad words, for one batch of rows."""

    def __init__(self, slots: Sequence[Slot], young: Sequence[bool], device: Device):
        """`young[r]` says that row r may not end yet."""
        fixed: list[tuple[int, int, float]] = []  # row, token, what is added
        words: list[tuple[int, list[int]]] = []
        for row, (slot, is_young) in enumerate(zip(slots, young, strict=True)):
            fixed += [(row, token, bias) for token, bias in slot.bias.items()]
            if is_young:
                fixed += [(row, token, _BARRED) for token in slot.stop_ids]
            words += [(row, word) for word in slot.bad_words]
        self._count, self._words = len(fixed) + len(words), len(words)
        if not self._count:
            return
        length = max((len(word) for _, word in words), default=1) - 1
        rows = [row for row, _, _ in fixed] + [row for row, _ in words]
        tokens = [token for _, token, _ in fixed] + [word[-1] for _, word in words]
        # [words, length]: what must stand before the last token, filled from the left with -1 for "anything"
        heads = [[-1] * (length + 1 - len(word)) + word[:-1] for _, word in words]
        self._rows, self._tokens, self._fixed, self._heads, self._back = upload_all(
            device,
            np.array(rows, dtype=np.int64),
            np.array(tokens, dtype=np.int64),
            np.array([value for _, _, value in fixed], dtype=np.float32),
            np.array(heads, dtype=np.int64).reshape(len(words), length),
            np.arange(-length, 0, dtype=np.int64),
        )
        self._word_rows = self._rows[len(fixed) :]

    def apply(self, logits_RV: Tensor, tokens_SL: Tensor, slots_R: Tensor, positions_R: Tensor) -> None:
        values = self._fixed
        if self._words:
            at = positions_R[self._word_rows][:, None] + self._back
            stands = tokens_SL[slots_R[self._word_rows][:, None], at.clamp(min=0)]
            matches = ((stands == self._heads) & (at >= 0) | (self._heads < 0)).all(-1)
            values = torch.cat([values, torch.where(matches, _BARRED, 0.0)])
        # adding, not writing: one token may be named several times, by a bias and by two bad words
        logits_RV.index_put_((self._rows, self._tokens), values, accumulate=True)

    def __len__(self) -> int:
        return self._count


class AllowedTokens:
    """Bars everything but the tokens allowed, in the rows that have such a list."""

    def __init__(self, slots: Sequence[Slot], device: Device):
        rows = [row for row, slot in enumerate(slots) if slot.allowed is not None]
        self._count = len(rows)
        if not rows:
            return
        pairs = [(row, token) for row in rows for token in slots[row].allowed or ()]
        self._limited, self._rows, self._tokens = upload_all(
            device,
            np.array(rows, dtype=np.int64),
            np.array([row for row, _ in pairs], dtype=np.int64),
            np.array([token for _, token in pairs], dtype=np.int64),
        )

    def apply(self, logits_RV: Tensor) -> None:
        kept = logits_RV[self._rows, self._tokens]
        logits_RV.index_fill_(0, self._limited, _BARRED)
        logits_RV[self._rows, self._tokens] = kept

    def __len__(self) -> int:
        return self._count


class Penalties:
    """Repetition over prompt and output, presence and frequency over output, in the P rows that ask for any.

    Only tokens that occur in a sequence can change, and they are at hand in its row of the token buffer.
    """

    def __init__(self, slots: Sequence[Slot], device: Device):
        rows = [row for row, slot in enumerate(slots) if slot.penalised]
        asked = [slots[row] for row in rows]
        counted = [(row, slot.count_row) for row, slot in zip(rows, asked, strict=True) if slot.counted]
        self._count, self._counted = len(rows), len(counted)
        if not rows:
            return
        penalties = [
            (s.params.repetition_penalty, s.params.presence_penalty, s.params.frequency_penalty)
            for s in asked
        ]
        self._rows, count_rows, penalties_3P, self._counted_rows, self._own_counts = upload_all(
            device,
            np.array(rows, dtype=np.int64),
            np.array([s.count_row for s in asked], dtype=np.int64),
            np.array(penalties, dtype=np.float32).T.copy(),
            np.array([row for row, _ in counted], dtype=np.int64),
            np.array([count_row for _, count_row in counted], dtype=np.int64),
        )
        self._count_rows = count_rows[:, None]
        self._repetition, self._presence, self._frequency = penalties_3P[:, :, None]

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
        return self._count
