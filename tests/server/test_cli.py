"""The command line itself: quick, helpful, and nothing heavy on the way to --help."""

import subprocess
import sys
import time

import pytest

from xllm.cli import COMMANDS, main


def run(*arguments, code=""):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_is_quick_and_names_every_command():
    times = []
    for _ in range(3):
        begin = time.monotonic()
        done = run("-m", "xllm.cli", "--help")
        times.append(time.monotonic() - begin)
    assert done.returncode == 0
    for name in (*COMMANDS, "collect-env"):
        assert f"    {name} " in done.stdout
    assert min(times) < 0.3


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["chat", "--help"], ["complete", "--help"]]
)
def test_nothing_heavy_is_imported(arguments):
    code = (
        "import sys\nfrom xllm.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'transformers', 'numpy', 'httpx', 'rich', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("xllm ")


@pytest.mark.parametrize(
    "arguments", [[], ["sing"], ["serve", "demo", "--nonsense"], ["serve", "--port", "x"]]
)
def test_wrong_words(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: xllm" in capsys.readouterr().err


def test_a_wrong_key_in_the_config_file(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("prt: 1\n")
    with pytest.raises(SystemExit) as stop:
        main(["serve", "demo", "--config", str(tmp_path / "c.yaml")])
    assert stop.value.code == 2
    assert "did you mean `port`" in capsys.readouterr().err


def test_serve_knows_every_engine_flag(capsys):
    from xllm.config.options import option_fields

    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for name, _ in option_fields():
        assert f"--{name.replace('_', '-')}" in text
    for flag in (
        "--host",
        "--port",
        "--api-key",
        "--chat-template",
        "--shutdown-timeout",
        "--no-disable-log-stats",
    ):
        assert flag in text


def test_collect_env_and_bench_are_handed_over(capsys):
    assert main(["collect-env"]) == 0
    assert capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    assert "throughput" in capsys.readouterr().out
