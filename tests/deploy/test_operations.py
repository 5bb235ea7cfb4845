"""docs/operations.md names things by the names they have: metrics, flags, routes, files, keys of the Secret."""

import re
from pathlib import Path

import pytest

from tests.deploy.rules import SECRETS
from xllm.cli import _parser
from xllm.cluster.client import ClusterClient
from xllm.server.metrics import DEFINITIONS
from xllm.server.router_metrics import RouterMetrics

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
OTHERS_FLAGS = {"--auto-compaction-mode", "--auto-compaction-retention", "--prefix"}  # etcd's, etcdctl's


def test_the_documented_secret_is_the_one_that_pods_read():
    assert set(re.findall(r"--from-literal=([\w-]+)=", TEXT)) == SECRETS


def test_metrics_have_the_names_that_are_documented():
    client = ClusterClient()
    try:
        known = {metric.name for metric in RouterMetrics(client, "demo").collect()}
    finally:
        client.close()
    known |= {f"xllm:{definition.name}" for definition in DEFINITIONS}
    named = {name.removesuffix("_total") for name in re.findall(r"`(xllm:\w+)", TEXT)}
    assert len(named) > 10
    assert named <= known, named - known


def test_flags_exist():
    known = set(OTHERS_FLAGS)
    for command in ("serve", "router", "up"):
        for action in _parser(command)._subparsers._group_actions[0].choices[command]._actions:  # type: ignore[union-attr,index]
            known |= set(action.option_strings)
    named = {
        flag for code in re.findall(r"`([^`\n]+)`", TEXT) for flag in re.findall(r"(?<!\S)--[a-z-]+", code)
    }
    assert "--shutdown-timeout" in named
    assert named <= known, named - known


@pytest.mark.parametrize("path", sorted(set(re.findall(r"deploy/[\w./-]*\w", TEXT))))
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_links_lead_somewhere():
    for page in (ROOT / "docs" / "operations.md", ROOT / "deploy" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_image_takes_only_files_that_are_there():
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    allowed = {
        line[1:]
        for line in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
        if line[0] == "!"
    }
    copied = {name for line in re.findall(r"^COPY (.+)$", dockerfile, re.M) for name in line.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    setup = (ROOT / "tools" / "setup.sh").read_text()
    (pinned,) = re.findall(r"^ARG TORCH_CPU=(\S+)$", dockerfile, re.M)
    assert f'TORCH_CPU="{pinned}"' in setup  # one version everywhere
