import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.harness import Driver, Sequence, load
from tests.models.test_checkpoint import QWEN3
from xllm.core.errors import ConfigError
from xllm.models.checkpoint import read_model_config
from xllm.models.loader import load_model
from xllm.models.table import find_family
from xllm.ops.table import load_ops

PROMPT = list(range(10, 30))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small checkpoint in one file."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    config = read_model_config(tmp_path, None, "auto")
    torch.manual_seed(0)
    sources = [s for p in find_family(config.architecture).parameters(config) for s in p.sources]
    save_file({s.tensor: torch.randn(s.shape) * 0.1 for s in sources}, tmp_path / "model.safetensors")
    return tmp_path


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def logits(driver: Driver) -> torch.Tensor:
    return driver.step([(Sequence(PROMPT), len(PROMPT))])


def test_sharded_equals_one_file(directory: Path) -> None:
    expected = logits(load(directory))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}  # fused parameters lie in both
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    where = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(logits(load(directory)), expected)
    (directory / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"names files that are not in .*: b\.safetensors"):
        load(directory)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_dtype_is_converted(directory: Path, stored: torch.dtype) -> None:
    expected = logits(load(directory))
    change(directory, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    assert torch.allclose(logits(load(directory)), expected, atol=0.05)


def test_progress_ends_at_the_total(directory: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    for load_format in ("auto", "dummy"):
        config = read_model_config(directory, None, load_format)
        load_model(
            config,
            dtype=torch.float32,
            device="cpu",
            ops=load_ops("cpu", torch.float32),
            seed=0,
            progress=lambda *news: seen.append(news),
        )
        done = [news[1] for news in seen]
        assert done == sorted(done)
        assert seen[-1][1] == seen[-1][2] > 0
        seen.clear()


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors: model\.norm\.weight"),
        (lambda t: t.update(surprise=torch.zeros(1)), "has 1 tensors the model has no place for: surprise"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"model\.norm\.weight in model\.safetensors has shape \(3,\), the config asks for \(64,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            r"holds torch\.int8, not one of float16, bfloat16",
        ),
    ],
    ids=["missing", "unknown", "shape", "integers"],
)
def test_refuses_a_checkpoint_that_does_not_fit(
    directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any], sentence: str
) -> None:
    change(directory, edit)
    with pytest.raises(ConfigError, match=sentence):
        load(directory)


def test_many_missing_tensors_are_counted_not_listed(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks 33 tensors: .*, \.\.\."):
        load(directory, overrides={"num_hidden_layers": 5})


def test_buffers_and_tied_projections_in_the_file_are_fine(directory: Path) -> None:
    expected = logits(load(directory))
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
        "lm_head.weight": torch.zeros(100, 64),
    }
    change(directory, lambda tensors: tensors.update(extra))
    assert torch.equal(logits(load(directory)), expected)


def test_files_that_are_not_there_or_broken(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors files"):
        load(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a safetensors index"):
        load(directory)


def test_dummy_weights_follow_the_seed(directory: Path) -> None:
    config = read_model_config(directory, None, "dummy")

    def weights(seed: int) -> tuple[torch.Tensor, Any]:
        model = load_model(
            config, dtype=torch.float32, device="cpu", ops=load_ops("reference", torch.float32), seed=seed
        )
        return torch.cat([layer.mlp.gate_up.flatten() for layer in model.layers]), model  # type: ignore[attr-defined]

    first, model = weights(1)
    assert torch.equal(first, weights(1)[0])
    assert not torch.equal(first, weights(2)[0])
    assert abs(first.mean()) < 1e-3
    assert first.std() == pytest.approx(0.02, rel=0.05)
    assert (model.norm == 1).all()
    assert (model.layers[0].attention.q_norm == 1).all()


def test_model_calls_on_layer(directory: Path) -> None:
    driver = load(directory)
    calls: list[None] = []
    driver.model.on_layer = lambda: calls.append(None)
    logits(driver)
    assert len(calls) == QWEN3["num_hidden_layers"]
