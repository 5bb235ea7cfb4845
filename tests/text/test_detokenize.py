"""Incremental decoding against decoding the whole, over every way to cut the ids into pushes."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text import trained
from xllm.text.detokenize import IncrementalDetokenizer
from xllm.text.tokenizer import Tokenizer

# one of these completes any beginning of a character: some leads take only some second bytes
ENDS = [second + rest for second in (b"\x80", b"\x90", b"\xa0") for rest in (b"", b"\x80", b"\x80\x80")]
KINDS = list(trained.BACKENDS)
TOKENIZERS = {kind: Tokenizer(trained.backend(kind)) for kind in KINDS}
BYTES = [trained.id_of(TOKENIZERS["metaspace"].backend, f"<0x{byte:02X}>") for byte in range(256)]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "a é好😀👩\u200d🇩\u0301\ufffd\n<|im_end|>", max_size=40
)


def pieces(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], cuts: list[int], skip: bool = True
) -> list[str]:
    """What each push of ids cut at `cuts`, and the finish, return."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    shown = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(borders)]
    return [*shown, detokenizer.finish()]


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool = True) -> str:
    return "".join(pieces(tokenizer, prompt, ids, list(range(len(ids))), skip))


def ids_of(tokenizer: Tokenizer, data: st.DataObject, max_size: int = 20) -> list[int]:
    """Either a text's, or any at all."""
    if data.draw(st.booleans()):
        return tokenizer.encode(data.draw(texts), add_special_tokens=False)
    return data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=max_size))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_chunking_gives_the_whole(kind: str, data: st.DataObject):
    tokenizer = TOKENIZERS[kind]
    ids = ids_of(tokenizer, data)
    cuts = data.draw(st.lists(st.integers(0, 20), max_size=8))
    skip = data.draw(st.booleans())
    assert "".join(pieces(tokenizer, [], ids, cuts, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5000)
@given(data=st.data())
def test_every_chunking_gives_the_whole_at_length(kind: str, data: st.DataObject):
    tokenizer = TOKENIZERS[kind]
    ids = [id for _ in range(4) for id in ids_of(tokenizer, data)]
    cuts = data.draw(st.lists(st.integers(0, 120), max_size=40))
    assert "".join(pieces(tokenizer, [], ids, cuts)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_behind_a_prompt_it_is_what_the_output_adds(kind: str, data: st.DataObject):
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode(data.draw(texts))  # whole characters
    ids = ids_of(tokenizer, data)
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    assert whole.startswith(before)
    assert stream(tokenizer, prompt, ids) == whole[len(before) :]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@given(data=st.data())
def test_never_half_a_character(kind: str, data: st.DataObject):
    """For valid text every push shows whole characters only, and the finish has nothing left."""
    tokenizer = TOKENIZERS[kind]
    text = data.draw(texts.filter(lambda text: "\ufffd" not in text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = pieces(tokenizer, [], ids, list(range(len(ids))))
    assert all("\ufffd" not in piece for piece in shown)
    assert shown[-1] == ""


@given(text=texts, cut=st.integers(0, 60), rest=st.binary(max_size=4))
def test_a_prompt_that_ends_inside_a_character(text: str, cut: int, rest: bytes):
    """Byte by byte: what the output completes is shown, the prompt's own loose bytes never are."""
    tokenizer = TOKENIZERS["metaspace"]
    data = text.encode()
    cut = min(cut, len(data))
    prompt, output = data[:cut], data[cut:] + rest
    shown = stream(tokenizer, [BYTES[byte] for byte in b"x" + prompt], [BYTES[byte] for byte in output])
    head = loose_end(prompt)
    completed = (head + output).decode("utf-8", "replace")
    alone = output.decode("utf-8", "replace")
    joins = head and output and can_follow(head, output[:1])
    assert shown == (completed if joins else alone)


def loose_end(data: bytes) -> bytes:
    """The last bytes that begin a character without ending it."""
    for size in (3, 2, 1):
        tail = data[-size:]
        if len(tail) == size and any(can_begin(tail, rest) for rest in ENDS):
            return tail
    return b""


def can_begin(head: bytes, rest: bytes) -> bool:
    try:
        return len((head + rest).decode()) == 1
    except UnicodeDecodeError:
        return False


def can_follow(head: bytes, byte: bytes) -> bool:
    return any(can_begin(head + byte, rest) for rest in (b"", *ENDS))


def test_the_straddling_character_is_shown_once_whole():
    tokenizer = TOKENIZERS["metaspace"]
    ids = [BYTES[byte] for byte in "好".encode()]
    assert pieces(tokenizer, ids[:1], ids[1:], [1]) == ["", "好", ""]
    assert pieces(tokenizer, ids[:2], [BYTES[ord("A")]], []) == ["A", ""]
    assert pieces(tokenizer, ids[:2], [], []) == ["", ""]
    assert pieces(tokenizer, ids[:1], ids[1:2], []) == [
        "",
        "\ufffd",
    ]  # two of three bytes, one of them output


def test_llama_keeps_the_space_behind_a_prompt_and_drops_it_at_the_start():
    tokenizer = TOKENIZERS["metaspace"]
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    assert stream(tokenizer, tokenizer.encode("over"), ids) == " the dog"
    assert stream(tokenizer, [trained.id_of(tokenizer.backend, "<s>")], ids) == "the dog"
    assert stream(tokenizer, [], ids) == "the dog"


def test_special_tokens_show_only_if_asked_for():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("a<|im_end|>b<tool_call>")
    assert stream(tokenizer, [], ids, skip=True) == "ab<tool_call>"
    assert stream(tokenizer, [], ids, skip=False) == "a<|im_end|>b<tool_call>"


def test_a_cut_off_character_is_one_replacement_at_the_end():
    tokenizer = TOKENIZERS["metaspace"]
    ids = [BYTES[byte] for byte in "😀".encode()]
    assert pieces(tokenizer, [], ids[:3], [1, 2]) == ["", "", "", "\ufffd"]


def test_cost_per_token_does_not_grow():
    """Endless invalid bytes, which a decoder that waits for valid text would collect."""
    tokenizer = TOKENIZERS["metaspace"]
    detokenizer = IncrementalDetokenizer(tokenizer)

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        for _ in range(tokens):
            detokenizer.push((BYTES[0xFF],))
        return time.perf_counter() - begin

    seconds(1000)
    early = min(seconds(2000) for _ in range(3))
    seconds(50_000)
    late = min(seconds(2000) for _ in range(3))
    assert late < 5 * early + 0.01
