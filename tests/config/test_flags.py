import argparse
from dataclasses import dataclass, field

import pytest

from xllm.config.flags import add_flags, from_namespace, read_config, to_argv
from xllm.config.options import EngineOptions, knob, option_fields
from xllm.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FruitOptions:
    """What to put in the bowl."""

    model: str = "bowl"  # positional: no flag
    apples: int | None = knob(None, "how many apples (default: enough)", short="-a")
    weight: float = knob(0.5, "50% of a kilogram")
    washed: bool = knob(True, "wash first")
    kind: str = knob("red", "colour", choices=("red", "green"))
    labels: tuple[str, ...] = knob((), "stickers")
    extra: str | None = knob(None, "anything else", metavar="JSON")


@dataclass(frozen=True, kw_only=True)
class BowlOptions:
    size: int = knob(3, "litres", flag="--bowl-size")
    lids: list[int] = field(default_factory=list, metadata={"help": "lid sizes"})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="fruit")
    made.add_argument("model", nargs="?")
    add_flags(made, FruitOptions, BowlOptions)
    return made


def parsed(*argv: str) -> tuple[FruitOptions, BowlOptions]:
    namespace = parser().parse_args(argv)
    return from_namespace(FruitOptions, namespace), from_namespace(BowlOptions, namespace)


def test_nothing_typed_gives_the_dataclass_defaults():
    assert parsed() == (FruitOptions(), BowlOptions())


def test_every_kind_of_flag_reaches_its_field():
    argv = "dish -a 4 --weight 1.5 --no-washed --kind green --labels x y --bowl-size 9 --lids 1 2".split()
    fruit, bowl = parsed(*argv)
    assert fruit == FruitOptions(
        model="dish", apples=4, weight=1.5, washed=False, kind="green", labels=("x", "y")
    )
    assert bowl == BowlOptions(size=9, lids=[1, 2])


def test_fixed_values_win_over_what_was_typed():
    namespace = parser().parse_args(["--weight", "2"])
    assert from_namespace(FruitOptions, namespace, weight=3.0).weight == 3.0


@pytest.mark.parametrize("argv", [["--apples", "many"], ["--kind", "blue"], ["--nonsense"]])
def test_wrong_flags_end_the_program_with_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    assert "usage: fruit" in capsys.readouterr().err


def test_help_groups_flags_by_dataclass_and_shows_defaults():
    text = " ".join(parser().format_help().split())
    assert "fruit options: What to put in the bowl." in text
    assert "bowl options:" in text
    assert "50% of a kilogram (default: 0.5)" in text
    assert "wash first (default: yes)" in text
    assert "enough) --weight" in text  # says its own default, and None is not shown
    assert "BowlOptions(" not in text


def test_command_line_wins_over_file_wins_over_default_in_any_order(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "apples: 7\nkind: green\nbowl-size: 5\nlids: [8]\nwashed: false\nmodel: plate\nextra: {a: 1}\n"
    )
    for argv in (["--config", str(path), "--apples", "1"], ["--apples", "1", "--config", str(path)]):
        fruit, bowl = parsed(*argv)
        assert (fruit.apples, fruit.kind, fruit.washed, fruit.model) == (1, "green", False, "plate")
        assert fruit.extra == '{"a":1}'
        assert (bowl.size, bowl.lids) == (5, [8])
    assert parsed("dish", "--config", str(path))[0].model == "dish"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aples: 1", "unknown key `aples`; did you mean `apples`"),
        ("zzz: 1", "unknown key `zzz`; --help lists the known ones"),
        ("apples: some", "`apples`: Expected `int`, got `str`"),
        ("kind: blue", "`kind` must be one of red, green; not 'blue'"),
        ("weight:", "`weight` needs a value"),
        ("- 1", "must hold `flag: value` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_reason(tmp_path, text, message, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as refused:
        read_config(path, [FruitOptions])
    assert message in refused.value.message
    with pytest.raises(SystemExit):
        parsed("--config", str(path))
    assert message in capsys.readouterr().err


def test_an_empty_or_absent_file(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert read_config(tmp_path / "empty.yaml", [FruitOptions]) == {}
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "absent.yaml", [FruitOptions])


def test_null_is_allowed_where_the_default_is_null(tmp_path):
    (tmp_path / "c.yaml").write_text("apples: null")
    assert read_config(tmp_path / "c.yaml", [FruitOptions]) == {"apples": None}


def test_a_knob_of_two_types_is_refused():
    @dataclass
    class Odd:
        value: int | str = knob(1, "either")

    with pytest.raises(TypeError, match="one type"):
        add_flags(argparse.ArgumentParser(), Odd)


def test_every_engine_option_is_a_flag():
    made = argparse.ArgumentParser()
    add_flags(made, EngineOptions)
    text = made.format_help()
    for name, _ in option_fields():
        assert "--" + name.replace("_", "-") in text
    assert from_namespace(EngineOptions, made.parse_args([])) == EngineOptions()


@pytest.mark.parametrize(
    "options",
    [
        FruitOptions(),
        FruitOptions(apples=4, weight=1.5, washed=False, kind="green", labels=("x", "y z"), extra='{"a": 1}'),
        BowlOptions(size=9, lids=[1, 2]),
        EngineOptions(dtype="float32", enable_prefix_caching=False, max_num_seqs=3),
    ],
)
def test_options_survive_a_command_line(options):
    made = argparse.ArgumentParser()
    add_flags(made, type(options))
    assert from_namespace(type(options), made.parse_args(to_argv(options))) == options


def test_defaults_need_no_flags():
    assert to_argv(EngineOptions()) == []
