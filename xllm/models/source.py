"""Where a model lies: a local directory, one that ships with xLLM, a Hugging Face hub id or a ModelScope id.

Torch-free. Hub downloads honour HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN, as huggingface_hub does.
"""

import os
import re
from pathlib import Path

from xllm.core.errors import ConfigError

SHIPPED = {"demo": "demo", "demo-draft": "demo-draft"}  # name -> directory under xllm/assets
FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
NOT_FILES = ["original/*", "consolidated*.safetensors", "onnx/*", "*.bin"]  # the same weights once more
MODELSCOPE = "modelscope:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(model: str, revision: str | None) -> Path:
    """The directory of `model`, downloading it if need be (to the cache of the hub it comes from).

    `modelscope:org/name` asks ModelScope; with XLLM_HUB=modelscope in the environment every id does. Raises
    ConfigError with what to do when the model is not found, not reachable, or not open to this user.
    """
    if model in SHIPPED:
        return _shipped(SHIPPED[model])
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.startswith(MODELSCOPE):
        return _from_modelscope(model.removeprefix(MODELSCOPE), revision)
    if path.exists():
        raise ConfigError(f"{model} is a file; a model is a directory with config.json and *.safetensors")
    if not HUB_ID.fullmatch(model) or model.startswith("."):
        raise ConfigError(f"there is no directory {model}, and it is not a hub id (org/name) either")
    if os.environ.get("XLLM_HUB", "huggingface").lower() == "modelscope":
        return _from_modelscope(model, revision)
    return _from_hugging_face(model, revision)


def _shipped(name: str) -> Path:
    path = Path(__file__).resolve().parent.parent / "assets" / name
    if not (path / "config.json").exists():
        raise ConfigError(f"the {name} model is missing from this installation (looked in {path})")
    return path


def _from_hugging_face(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    which = model if revision is None else f"{model} (revision {revision})"
    try:
        found = snapshot_download(model, revision=revision, allow_patterns=FILES, ignore_patterns=NOT_FILES)
        return Path(found)
    except errors.GatedRepoError:
        raise ConfigError(
            f"{which} is gated: accept its terms on its hub page, then set HF_TOKEN to a token of that account"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"the hub has no revision {revision!r} of {model}") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"there is no directory {model}, and the hub has no model of that name that you may read "
            "(for a private one set HF_TOKEN)"
        ) from None
    except errors.HFValidationError as error:
        raise ConfigError(f"there is no directory {model}, and it is not a hub id either: {error}") from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        OSError,
    ) as error:
        raise ConfigError(f"{which} {_unreachable(error)}") from None


def _unreachable(error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "is not in the local hub cache, and HF_HUB_OFFLINE forbids downloading it"
    reason = str(error).strip().splitlines()
    return (
        "is not in the local hub cache and could not be downloaded: the hub did not answer as it should "
        f"({type(error).__name__}{': ' + reason[0] if reason else ''}). Give a local directory, or set HF_ENDPOINT to a mirror"
    )


def _from_modelscope(model: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ConfigError(
            f"downloading {model} from ModelScope needs the package 'modelscope': pip install modelscope"
        ) from None
    try:
        found = snapshot_download(model, revision=revision, allow_patterns=FILES, ignore_patterns=NOT_FILES)
    except Exception as error:  # its errors share no base class
        raise ConfigError(f"{model} could not be had from ModelScope: {error}") from None
    return Path(found)
