"""The systemd units: known settings, a command line that xllm takes, time-outs that fit. What is broken is refused."""

import shutil
import subprocess

import pytest

from tests.deploy.units import PROGRAM, SYSTEMD, command, complaints, environment, read

UNITS = {"xllm-instance@.service": "instance", "xllm-router.service": "router"}


def _variables(unit: str) -> dict[str, str]:
    files = ("cluster.env.example", f"{UNITS[unit]}.env.example")
    return environment(*((SYSTEMD / name).read_text() for name in files))


def _complaints(unit: str, old: str = "", new: str = "") -> list[str]:
    text = (SYSTEMD / unit).read_text()
    assert old in text
    return list(complaints(read(text.replace(old, new)), _variables(unit)))


def test_every_unit_and_environment_file_is_looked_at():
    examples = {"cluster.env.example", *(f"{name}.env.example" for name in UNITS.values())}
    assert {path.name for path in SYSTEMD.iterdir()} == set(UNITS) | examples


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_right(unit):
    assert _complaints(unit) == []


def test_the_command_is_made_as_systemd_makes_it():
    unit = "xllm-instance@.service"
    words = command(read((SYSTEMD / unit).read_text()), _variables(unit))
    assert words[:3] == [PROGRAM, "serve", "demo"]
    at = words.index("--etcd")
    assert words[at + 1 : at + 5] == [*(f"http://10.0.0.{i}:2379" for i in (5, 6, 7)), "--cluster"]
    assert words[words.index("--instance-id") + 1] == "machine-1-0"
    assert words[words.index("--listen") + 1] == "tcp://0.0.0.0:5557"
    assert words[-2:] == ["--max-num-queued-reqs", "1024"]


def test_secrets_are_in_no_command_line():
    for unit in UNITS:
        line = read((SYSTEMD / unit).read_text())["Service"]["ExecStart"][0]
        assert "KEY" not in line
        assert "TOKEN" not in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[Install]", "[Instal]", "no section Install"),
        ("Restart=on", "Restrat=on", "no Restrat="),
        ("Restart=on-failure", "Restart=always", "Restart= is ['always']"),
        ("KillMode=mixed", "KillMode=process", "KillMode="),
        ("Type=exec", "Type=simple", "Type="),
        ("NoNewPrivileges=yes", "NoNewPrivileges=no", "NoNewPrivileges="),
        ("--shutdown-timeout 60", "--shutdown-timeout 85", "killed after 90 s"),
        ("TimeoutStopSec=90", "TimeoutStopSec=60", "killed after 60 s"),
        ("--instance-id", "--instance-name", "unrecognized arguments"),
        ("--listen tcp://", "--listen ", "--listen is tcp://"),
        ("%H-%i", "%H/%i", "--instance-id consists of"),
        ("${XLLM_PORT}", "${XLLM_HTTP_PORT}", "XLLM_HTTP_PORT is in no environment file"),
        ("$XLLM_ETCD", "$XLLM_ETCDS", "XLLM_ETCDS is in no environment file"),
        ("xllm serve", "xllm start", "a command of the service"),
        ("/opt/xllm/bin/xllm", "/usr/bin/xllm", "is not the program"),
        ("PrivateTmp=yes", "PrivateTmp=yes\nPrivateDevices=yes", "may not see its card"),
        ("ExecStart=", "ExecStart=/bin/true\nExecStart=", "one ExecStart="),
    ],
)
def test_a_broken_unit_is_refused(old, new, words):
    found = _complaints("xllm-instance@.service", old, new)
    assert any(words in complaint for complaint in found), found


@pytest.mark.parametrize(
    "text", ["Type=exec\n", "[Service]\nType exec\n", "[Service]\nExecStart=a \\\n  b\n"]
)
def test_what_is_no_unit_is_refused(text):
    with pytest.raises(ValueError):
        read(text)


def test_systemd_itself_has_no_complaint(tmp_path):
    """Where systemd is; the program is not installed here, so /bin/true stands in its place."""
    verify = shutil.which("systemd-analyze")
    if verify is None:
        return
    for unit in UNITS:
        path = tmp_path / unit.replace("@", "@0")
        path.write_text((SYSTEMD / unit).read_text().replace(PROGRAM, "/bin/true"))
        done = subprocess.run([verify, "verify", str(path)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert (
            unit.partition(".")[0].rstrip("@") not in done.stderr
        )  # an unknown setting is said, and no error
