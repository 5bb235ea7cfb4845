"""How a step's token budget is shared between sequences that decode and prompts that are computed.

A policy is a pure function from the load to the stages of the step, in order: each stage takes what budget it needs and
leaves the rest to the next. A stage left out gets nothing, unless the others found nothing to do.
"""

import enum
from dataclasses import dataclass

PATIENCE = 8  # steps in a row that may leave somebody's kind out
BUSY_SHARE = 4  # a quarter of the slots decoding is worth a step of its own


class Stage(enum.Enum):
    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Load:
    decoding: int  # sequences past their prompt
    max_num_seqs: int
    decode_starved: int  # last steps in a row that had to leave a decoding sequence out
    prefill_starved: int  # last steps in a row in which prompts waited and none advanced


def chunked(load: Load) -> tuple[Stage, ...]:
    """Every decode gets its token, prompts fill the budget. Steady token times and full steps: the default."""
    return (Stage.DECODE, Stage.PREFILL)


def prefill_first(load: Load) -> tuple[Stage, ...]:
    """Prompts take the budget, decodes what is left: the shortest time to first token and the fullest batch soon, at
    the price of gaps in running streams, which last at most `PATIENCE` steps."""
    if load.decode_starved >= PATIENCE:
        return (Stage.DECODE, Stage.PREFILL)
    return (Stage.PREFILL, Stage.DECODE)


def decode_first(load: Load) -> tuple[Stage, ...]:
    """Steps of decodes alone once a quarter of the slots decode: the shortest token times, at the price of the time to
    first token. Prompts join every `PATIENCE` + 1 steps, and whenever fewer decode."""
    busy = load.decoding * BUSY_SHARE >= load.max_num_seqs and load.decoding > 0
    if busy and load.prefill_starved < PATIENCE:
        return (Stage.DECODE,)
    return (Stage.DECODE, Stage.PREFILL)
