"""What children write, as lines."""

import logging

from xllm.server.log_lines import LONGEST, LogLines, Splitter, ToLines, colour


def lines(*chunks: bytes) -> list[str]:
    splitter = Splitter()
    return [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.end()


def test_lines_come_whole_however_they_were_cut():
    text = "ein Käse\nzwei\n\nletzte".encode()
    for cut in range(len(text) + 1):
        assert lines(text[:cut], text[cut:]) == ["ein Käse", "zwei", "letzte"]


def test_of_a_progress_bar_the_last_state_remains():
    assert lines(b"  0%|  \r 50%|# \r100%|##\nnext\n") == ["100%|##", "next"]
    assert lines(b" 10%\r", b" 20%\r", b"") == [" 20%"]


def test_colours_titles_and_control_characters_are_taken_out():
    assert lines(b"\x1b[1;32mgreen\x1b[0m \x1b]0;title\x07and\x08 \x1b[2Kmore\n") == ["green and more"]


def test_what_is_not_text_is_shown_as_such():
    assert lines(b"a\xffb\n") == ["a\ufffdb"]


def test_a_line_without_an_end_is_cut_and_a_bar_without_one_costs_no_memory():
    splitter = Splitter()
    found = splitter.feed(b"x" * (3 * LONGEST))
    assert [len(line) for line in found] == [LONGEST + 2] and splitter.end() == []
    for i in range(3000):
        assert splitter.feed(f"\rstate {i}".encode()) == []
    assert len(splitter._rest) <= LONGEST + 20 and splitter.end() == ["state 2999"]


def test_files_one_for_each_speaker_and_added_to(tmp_path):
    shown: list[tuple[str, str]] = []
    for _ in range(2):
        log = LogLines(shown.append, tmp_path)
        log.add("a", "one")
        log.add("b", "two")
        log.close()
    assert (tmp_path / "a.log").read_text() == "one\none\n" and (tmp_path / "b.log").exists()
    assert shown == [("a", "one"), ("b", "two")] * 2 and list(log.kept) == [("a", "one"), ("b", "two")]


def test_our_own_log_is_one_more_speaker():
    shown: list[tuple[str, str]] = []
    logger = logging.Logger("some")
    logger.addHandler(ToLines(LogLines(shown.append), "up"))
    logger.warning("etcd is %s", "away")
    assert shown == [("up", "etcd is away")]


def test_neighbours_have_different_colours_and_keep_them():
    names = [f"instance-{i}" for i in range(1, 6)]
    assert len({colour(name) for name in names}) == 5
    assert [colour(name) for name in names] == [colour(name) for name in names]
