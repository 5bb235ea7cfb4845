"""systemd units: what we rely on in them, and the command line that systemd makes of ExecStart= and environment files."""

import configparser
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.deploy.commands import parse
from xllm.core.errors import ConfigError

SYSTEMD = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
PROGRAM = "/opt/xllm/bin/xllm"
FLUSH_AND_END_S = 10
BY_SYSTEMD = {"%H": "machine-1", "%i": "0"}
# `systemd-analyze verify` is not everywhere, and an unknown key is only a line in a journal: so they are listed here
KNOWN = {
    "Unit": {"Description", "Wants", "After", "StartLimitIntervalSec", "StartLimitBurst"},
    "Service": {
        *("Type", "EnvironmentFile", "Environment", "ExecStart", "Restart", "RestartSec", "RestartPreventExitStatus", "SuccessExitStatus"),
        *("KillMode", "TimeoutStopSec", "User", "Group", "CacheDirectory", "UMask", "LimitNOFILE", "NoNewPrivileges"),
        *("CapabilityBoundingSet", "AmbientCapabilities", "ProtectSystem", "ProtectHome", "PrivateDevices", "PrivateTmp"),
        *("ProtectClock", "ProtectControlGroups", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules"),
        *("ProtectKernelTunables", "LockPersonality", "RestrictAddressFamilies", "RestrictNamespaces"),
        *("RestrictRealtime", "RestrictSUIDSGID", "SystemCallArchitectures", "SystemCallFilter", "SystemCallErrorNumber"),
    },
    "Install": {"WantedBy"},
}  # fmt: skip
WANTED = {  # what the way a unit ends, fails and is fenced in rests on
    "Type": "exec", "Restart": "on-failure", "RestartPreventExitStatus": "2", "SuccessExitStatus": "130", "KillMode": "mixed",
    "NoNewPrivileges": "yes", "ProtectSystem": "strict", "PrivateTmp": "yes", "CapabilityBoundingSet": "",
    "User": "xllm", "CacheDirectory": "xllm",
}  # fmt: skip
HIDE_CARDS = {"PrivateDevices", "ProtectClock", "DeviceAllow", "DevicePolicy"}

Unit = Mapping[str, Mapping[str, list[str]]]


def read(text: str) -> Unit:
    """Sections, keys, and every value a key was given. Raises ValueError for what is no unit."""
    unit: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] | None = None
    for line in text.splitlines():
        if not line.strip() or line[0] in "#;":
            continue
        if line.endswith("\\"):
            raise ValueError("a line that goes on in the next one is not read here")
        if line.startswith("["):
            section = unit.setdefault(line.strip("[]"), {})
            continue
        key, equals, value = line.partition("=")
        if section is None or not equals:
            raise ValueError(f"not a setting of a section: {line}")
        section.setdefault(key.strip(), []).append(value.strip())
    return unit


def environment(*texts: str) -> dict[str, str]:
    """What EnvironmentFile= reads, later ones winning. Values of ours need no quotes."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#", ";"))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    for text in texts:
        parser.read_string("[all]\n" + text)
    return dict(parser["all"])


def command(unit: Unit, variables: Mapping[str, str]) -> list[str]:
    """ExecStart= as systemd expands it: `${X}` inside a word, `$X` alone as the words it holds."""
    (line,) = unit["Service"]["ExecStart"]
    for short, value in BY_SYSTEMD.items():
        line = line.replace(short, value)
    words: list[str] = []
    for word in shlex.split(line):
        if named := re.fullmatch(r"\$(\w+)", word):
            words += variables.get(named[1], "").split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda m: variables.get(m[1], ""), word))
    return words


def complaints(unit: Unit, variables: Mapping[str, str]) -> Iterator[str]:
    for section in sorted(set(KNOWN) - set(unit)):
        yield f"no section {section}"
    for section, settings in unit.items():
        for key in sorted(set(settings) - KNOWN.get(section, set())):
            yield f"[{section}] has no {key}="
    service = unit.get("Service", {})
    for key, value in WANTED.items():
        if service.get(key) != [value]:
            yield f"{key}= is {service.get(key)}, not {value!r}"
    if len(service.get("ExecStart", ())) != 1:
        yield "one ExecStart= is wanted"
        return
    line = service["ExecStart"][0]
    for name in sorted(set(re.findall(r"\$\{?(\w+)", line)) - set(variables)):
        yield f"{name} is in no environment file"
    program, *argv = command(unit, variables)
    if program != PROGRAM:
        yield f"{program} is not the program"
    try:
        asked = parse(argv)
    except ConfigError as e:
        yield e.message
        return
    stop_s = float(service.get("TimeoutStopSec", ["90"])[-1])
    if stop_s < asked.shutdown_timeout + FLUSH_AND_END_S:
        yield f"killed after {stop_s:g} s, and may need {asked.shutdown_timeout + FLUSH_AND_END_S:g}"
    if argv[0] == "serve":
        yield from (f"with {key}= it may not see its card" for key in sorted(HIDE_CARDS & set(service)))
