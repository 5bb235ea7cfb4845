import pytest

from xllm.scheduler.batching import PATIENCE, Load, Stage, chunked, decode_first, prefill_first

DECODE, PREFILL = Stage.DECODE, Stage.PREFILL


def load(decoding: int = 8, decode_starved: int = 0, prefill_starved: int = 0) -> Load:
    return Load(decoding, 16, decode_starved, prefill_starved)


@pytest.mark.parametrize("starved", [0, 100])
def test_chunked_is_decode_then_prefill_always(starved):
    assert chunked(load(8, starved, starved)) == (DECODE, PREFILL)


def test_prefill_first_until_patience_ends():
    assert prefill_first(load()) == (PREFILL, DECODE)
    assert prefill_first(load(decode_starved=PATIENCE - 1)) == (PREFILL, DECODE)
    assert prefill_first(load(decode_starved=PATIENCE)) == (DECODE, PREFILL)


def test_decode_first_decodes_alone_until_patience_ends():
    assert decode_first(load()) == (DECODE,)
    assert decode_first(load(prefill_starved=PATIENCE - 1)) == (DECODE,)
    assert decode_first(load(prefill_starved=PATIENCE)) == (DECODE, PREFILL)


def test_decode_first_lets_prompts_join_while_few_decode():
    assert decode_first(load(0)) == (DECODE, PREFILL)
    assert decode_first(load(3)) == (DECODE, PREFILL)
    assert decode_first(load(4)) == (DECODE,)
