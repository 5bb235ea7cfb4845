import sys
import types
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from xllm.core.errors import ConfigError
from xllm.models import source
from xllm.models.source import locate


class Answer:
    """Stands in for a hub's HTTP response."""

    status_code = 404
    headers: dict[str, str] = {}
    request = None
    text = ""
    content = b""


def test_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(tmp_path), None) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model", None) == tmp_path / "model"


def test_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ConfigError, match="is a file; a model is a directory"):
        locate(str(tmp_path / "x.safetensors"), None)


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing", "a/b/c", "what is this"])
def test_neither_directory_nor_id(name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no directory .* not a hub id"):
        locate(name, None)


def test_shipped_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "__file__", str(tmp_path / "xllm" / "models" / "source.py"))
    with pytest.raises(ConfigError, match="the demo model is missing from this installation"):
        locate("demo", None)
    for name in ("demo", "demo-draft"):
        assets = tmp_path / "xllm" / "assets" / name
        assets.mkdir(parents=True)
        (assets / "config.json").touch()
        assert locate(name, None) == assets


def test_offline_hub_for_real(tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its environment when it is imported."""
    import os
    import subprocess

    code = (
        "from xllm.models.source import locate\nfrom xllm.core.errors import ConfigError\n"
        "try: locate('some-org/some-model', 'v1')\nexcept ConfigError as e: print(e.message)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert told.strip() == (
        "some-org/some-model (revision v1) is not in the local hub cache, and HF_HUB_OFFLINE forbids downloading it"
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.GatedRepoError, "is gated: accept its terms .* HF_TOKEN"),
        (errors.RevisionNotFoundError, "no revision 'v1' of org/name"),
        (errors.RepositoryNotFoundError, "the hub has no model of that name that you may read"),
        (errors.LocalEntryNotFoundError, "could not be downloaded: the hub did not answer .*HF_ENDPOINT"),
        (ConnectionError, "could not be downloaded: the hub did not answer .*ConnectionError"),
    ],
)
def test_hub_errors_become_sentences(
    error: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        if issubclass(error, errors.HfHubHTTPError):
            raise error("boom", response=Answer())  # type: ignore[arg-type]
        raise error("boom")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError, match=sentence):
        locate("org/name", "v1")


def test_hub_download_takes_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **kwargs: Any) -> str:
        asked.update(kwargs, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/name", "v1") == tmp_path
    assert (asked["model"], asked["revision"]) == ("org/name", "v1")
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]


@pytest.mark.parametrize(("model", "hub"), [("modelscope:org/name", None), ("org/name", "modelscope")])
def test_modelscope(model: str, hub: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hub:
        monkeypatch.setenv("XLLM_HUB", hub)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match="needs the package 'modelscope': pip install modelscope"):
        locate(model, None)

    fake = types.ModuleType("modelscope")
    fake.snapshot_download = lambda name, **kwargs: tmp_path / name  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert locate(model, None) == tmp_path / "org/name"

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("gone")

    fake.snapshot_download = fail  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="org/name could not be had from ModelScope: gone"):
        locate(model, None)
