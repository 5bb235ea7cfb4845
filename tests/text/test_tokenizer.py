"""`Tokenizer` against the libraries it stands in for: `tokenizers` itself, and `transformers` for its set-up."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.text import trained
from xllm.core.errors import ConfigError, InvalidRequest
from xllm.text.tokenizer import Tokenizer, load_tokenizer

KINDS = list(trained.BACKENDS)
TOKENIZERS = {kind: Tokenizer(trained.backend(kind)) for kind in KINDS}
EXACT = [
    kind for kind in KINDS if kind != "wordpiece"
]  # WordPiece drops spaces: text -> ids -> text loses them
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_encodes_what_the_library_encodes(kind: str, text: str):
    tokenizer = TOKENIZERS[kind]
    for special in (True, False):
        assert (
            tokenizer.encode(text, special) == tokenizer.backend.encode(text, add_special_tokens=special).ids
        )


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_decodes_what_the_library_decodes(kind: str, text: str):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte-level", "unigram", "wordpiece"])
@given(data=st.data())
def test_any_ids_decode_as_in_the_library(kind: str, data: st.DataObject):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@given(data=st.data())
def test_any_ids_of_byte_fallback_decode_as_in_the_library_if_valid(data: st.DataObject):
    tokenizer = TOKENIZERS["metaspace"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    ours = tokenizer.decode(ids)
    theirs = tokenizer.backend.decode(ids)
    if "\ufffd" not in theirs:
        assert ours == theirs
    else:  # the same text around the invalid parts, which have other lengths
        assert "\ufffd" in ours
        assert ours[: theirs.index("\ufffd")] == theirs[: theirs.index("\ufffd")]


def test_invalid_byte_runs_keep_their_whole_characters():
    tokenizer = TOKENIZERS["metaspace"]
    ids = [trained.id_of(tokenizer.backend, f"<0x{byte:02X}>") for byte in "好".encode() + b"\xff"]
    assert tokenizer.decode(ids) == "好\ufffd"


@pytest.mark.parametrize("kind", EXACT)
def test_text_survives(kind: str):
    tokenizer = TOKENIZERS[kind]
    text = "The quick  brown fox\n  isn't 42" if kind != "unigram" else "The quick brown fox"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("bad", ["\ud800", "ok \udfff text"])
def test_half_a_surrogate_is_the_users_mistake(bad: str):
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        TOKENIZERS["byte-level"].encode(bad)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_ids_of_no_token_are_empty(token_id: int):
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode([token_id]) == ""
        assert tokenizer.token_bytes(token_id) == b""


def test_token_bytes_and_text():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("a 😀")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "a 😀".encode()
    lead = trained.id_of(tokenizer.backend, "ð")  # the stand-in of byte F0
    assert tokenizer.token_bytes(lead) == b"\xf0"
    assert tokenizer.token_text(lead) == "\ufffd"
    assert tokenizer.token_text(trained.id_of(tokenizer.backend, "<|im_end|>")) == "<|im_end|>"
    assert tokenizer.token_text(trained.id_of(tokenizer.backend, "two words")) == "two words"
    llama = TOKENIZERS["metaspace"]
    assert llama.token_text(trained.id_of(llama.backend, "▁the")) == " the"
    assert llama.token_bytes(trained.id_of(llama.backend, "<0xE4>")) == b"\xe4"


def test_vocab_size_is_above_every_id():
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.vocab_size == max(tokenizer.backend.get_vocab().values()) + 1


def test_other_threads_run_during_a_long_encoding():
    tokenizer = TOKENIZERS["byte-level"]
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    tokenizer.encode("some words and 12345 numbers " * 20_000)
    seconds = time.perf_counter() - begin
    done.set()
    thread.join()
    gaps = [b - a for a, b in zip([begin, *ticks], [*ticks, begin + seconds], strict=True)]
    assert max(gaps) < max(0.5 * seconds, 0.1)


# ---- how few tokens a text can have


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, repeat=st.integers(1, 20))
def test_the_lower_bound_is_one(kind: str, text: str, repeat: int):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.min_tokens(text * repeat) <= len(
        tokenizer.encode(text * repeat, add_special_tokens=False)
    )


@given(text=st.text("가각힣e\u0301\u1100\u1161ﬁ𝐀Å", min_size=1, max_size=40))
def test_the_lower_bound_holds_where_normalizing_shortens(text: str):
    for kind in ("NFC", "NFKC"):
        backend = trained.backend("byte-level")
        backend.normalizer = getattr(normalizers, kind)()
        tokenizer = Tokenizer(backend)
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text))


def test_a_hopeless_text_is_refused_before_any_work():
    tokenizer = TOKENIZERS["byte-level"]
    text = "x" * 10_000_000
    begin = time.thread_time()
    with pytest.raises(InvalidRequest, match="at most 4096") as caught:
        tokenizer.check_length(text, 4096)
    assert time.thread_time() - begin < 1.0
    assert caught.value.code == "context_length_exceeded"
    tokenizer.check_length("short", 4096)
    tokenizer.check_length("x" * 5000, 4096)  # may or may not fit: only encoding can tell


def test_no_bound_is_promised_where_text_may_vanish():
    assert TOKENIZERS["wordpiece"].min_tokens("x" * 10_000) == 0  # one unknown token may cover it all
    assert TOKENIZERS["unigram"].min_tokens("x" * 10_000) == 0
    stripping = trained.backend("byte-level")
    stripping.normalizer = normalizers.Strip()
    assert Tokenizer(stripping).min_tokens(" " * 10_000) == 0
    holes = Tokenizer(_bpe(["a", "b"]))  # bytes without a token are dropped
    assert holes.min_tokens("z" * 10_000) == 0
    assert TOKENIZERS["metaspace"].min_tokens("x" * 10_000) > 0


def test_spaces_eaten_by_an_added_token_are_not_counted():
    from tokenizers import AddedToken

    backend = trained.backend("byte-level")
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokenizer = Tokenizer(backend)
    text = " " * 10_000 + "<mask>"
    assert len(tokenizer.encode(text)) == 1
    assert tokenizer.min_tokens(text) <= 1


def _bpe(alphabet: list[str]) -> Backend:
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return backend


# ---- decoders


def test_unknown_decoders_are_refused_by_name():
    backend = trained.backend("byte-level")
    backend.decoder = decoders.CTC()
    with pytest.raises(ConfigError, match=r"CTC.*xLLM knows ByteLevel"):
        Tokenizer(backend)
    backend.decoder = decoders.Strip(" ", 0, 1)
    with pytest.raises(ConfigError, match="Strip"):
        Tokenizer(backend)


def test_a_tokenizer_without_plain_tokens_is_refused():
    backend = Backend(models.BPE(vocab={"!": 0}, merges=[]))
    backend.decoder = decoders.Fuse()
    with pytest.raises(ConfigError, match="plain letters"):
        Tokenizer(backend)


def test_no_decoder_joins_with_spaces_as_the_library_does():
    backend = Backend(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    assert Tokenizer(backend).decode([0, 1, 1]) == "one two two" == backend.decode([0, 1, 1])


# ---- loading a model directory


CONFIGS: dict[str, dict[str, object]] = {
    "plain": {},
    "named": {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}},
    "bos": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True},
    "bos and eos": {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True, "add_eos_token": True,
    },
    "explicitly none": {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False},
    "bos asked for but not named": {"add_bos_token": True},
    "new tokens": {
        "pad_token": "<|pad|>",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            "422": {"content": "<think>", "special": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "single_word": False},
        },
    },
    "truncating": {"model_max_length": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_loads_as_in_transformers(tmp_path: Path, kind: str, name: str):
    config = json.loads(json.dumps(CONFIGS[name]))
    if kind == "metaspace":
        config = json.loads(
            json.dumps(config)
            .replace("<|im_start|>", "<s>")
            .replace("<|im_end|>", "</s>")
            .replace("<|endoftext|>", "<unk>")
        )
    directory = trained.write_model_dir(tmp_path, kind, config)
    ours = load_tokenizer(directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    text = "Hello <think>world</think> <|pad|> <|im_end|></s> 好"
    for special in (True, False):
        assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special)
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


def test_stored_truncation_and_padding_do_not_touch_prompts(tmp_path: Path):
    backend = trained.backend("byte-level")
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "several words in a row, more than three"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_older_special_tokens_map_is_read(tmp_path: Path):
    trained.write_model_dir(tmp_path, "byte-level", {"eos_token": "<|im_end|>"})
    old = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|im_start|>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(old))
    assert load_tokenizer(tmp_path).special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_chat_templates_from_config_and_files(tmp_path: Path):
    directory = trained.write_model_dir(tmp_path, "byte-level", {"chat_template": "config"})
    assert load_tokenizer(directory).chat_templates == {"default": "config"}
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    trained.write_model_dir(tmp_path, "byte-level", {"chat_template": listed})
    assert load_tokenizer(directory).chat_templates == {"default": "a", "tool_use": "b"}
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("file tool")
    (directory / "chat_template.jinja").write_text("file")
    assert load_tokenizer(directory).chat_templates == {"default": "file", "tool_use": "file tool"}
    trained.write_model_dir(tmp_path / "none", "byte-level", {})
    assert load_tokenizer(tmp_path / "none").chat_templates == {}


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no model directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json, nor an older"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_an_older_format_is_converted(tmp_path: Path):
    backend = trained.backend("byte-level")
    state = json.loads(backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = [" ".join(merge) for merge in state["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The quick 你好")) == "The quick 你好"
    assert tokenizer.eos_token_id == backend.token_to_id("<|im_end|>")


def test_a_failing_conversion_is_one_sentence(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_loading_imports_neither_torch_nor_transformers(tmp_path: Path):
    directory = trained.write_model_dir(tmp_path, "byte-level", {"chat_template": "{{ messages }}"})
    code = (
        "import sys; from xllm.text.tokenizer import load_tokenizer; from xllm.text.chat import ChatTemplate;"
        f"t = load_tokenizer({str(directory)!r}); ChatTemplate.of(t); t.decode(t.encode('x'));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
