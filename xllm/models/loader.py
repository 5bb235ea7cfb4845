"""Filling a model's parameters: from safetensors, sharded or not, or with random numbers.

Where the operators keep weights quantised, those of a float checkpoint are quantised as they come in, some rows at a
time; a quantised checkpoint's go in as they are.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xllm.config.decided import ModelConfig
from xllm.core.errors import ConfigError
from xllm.models.forward import Model
from xllm.models.packed import Part, parts_of, read_rows
from xllm.models.quantisation import Packing, is_quantised, read_packing
from xllm.models.spec import Parameter, Source
from xllm.models.table import find_family
from xllm.ops.table import Ops

Progress = Callable[[str, int, int], None]  # (what is being loaded, bytes done, bytes in all)

INDEX = "model.safetensors.index.json"
UNUSED = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)  # old checkpoints store them
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DUMMY_POOL = 8_388_593  # a prime: rows of no matrix repeat in step with it


def load_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    ops: Ops,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """The model with every parameter filled; weights in `dtype` or quantised, in the layout `ops` multiplies fastest.

    `load_format` "dummy" draws them from `seed`: weights and biases normal with deviation 0.02, norms 1. Otherwise
    they come from the directory's safetensors files. Raises ConfigError naming the tensors when the checkpoint
    lacks one, has one of another shape, or has one that the model does not know, and for a quantised checkpoint that
    `ops` were not loaded for.
    """
    family = find_family(config.architecture)
    parameters = family.parameters(config)
    packing = read_packing(config.hf)
    scheme = None if ops.quantised is None else ops.quantised.scheme
    if packing is not None and packing.scheme != scheme:
        raise ConfigError(
            f"the checkpoint is quantised ({packing.scheme}) and cannot be loaded as {scheme or 'floats'}"
        )
    with torch.inference_mode(), torch.device(device):
        storage = {p.name: _allocate(p, dtype, ops, packing) for p in parameters}
        if config.load_format == "dummy":
            _fill_dummy(parameters, storage, dtype, ops, seed, progress)
        else:
            _fill_from_files(Path(config.directory), parameters, storage, ops, packing, progress)
        return family.build(config, storage, ops)


def _allocate(parameter: Parameter, dtype: torch.dtype, ops: Ops, packing: Packing | None) -> Any:
    if parameter.kind != "weight":
        return torch.empty(parameter.shape, dtype=ops.activation_dtype)
    rows, columns = parameter.shape
    if ops.quantised is None or not is_quantised(parameter):
        return ops.new_weight(rows, columns, dtype)
    return ops.quantised.new_weight(rows, columns, (packing.group or columns) if packing else None)


def _store(parameter: Parameter, into: Any, first_row: int, rows: Any, ops: Ops) -> None:
    """rows: floats, or for a quantised parameter also ready rows (`ops.quantised.Rows`)."""
    if parameter.kind != "weight":
        into[first_row : first_row + rows.shape[0]] = rows
    elif ops.quantised is not None and is_quantised(parameter):
        ops.quantised.store_rows(into, first_row, rows)
    else:
        ops.store_rows(into, first_row, rows)


@dataclass(slots=True)
class _Target:
    """Where a source's rows go, and the checkpoint tensors they are made of: one, or several of a packed matrix."""

    parameter: Parameter
    first_row: int
    source: Source
    parts: Mapping[str, Part]  # by tensor name
    arrived: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: int = 0  # tensors of the checkpoint that have not arrived


def _targets(parameters: Sequence[Parameter], packing: Packing | None) -> dict[str, _Target]:
    """Tensor name -> the target it is part of."""
    targets: dict[str, _Target] = {}
    for parameter in parameters:
        for row, source in _rows(parameter):
            if packing is not None and is_quantised(parameter):
                parts = parts_of(source, packing)
            else:
                parts = {source.tensor: Part((source.shape,), FLOATS)}
            targets |= dict.fromkeys(parts, _Target(parameter, row, source, parts))
    return targets


def _fill_from_files(
    directory: Path,
    parameters: Sequence[Parameter],
    storage: dict[str, Any],
    ops: Ops,
    packing: Packing | None,
    progress: Progress | None,
) -> None:
    targets = _targets(parameters, packing)
    where = _tensor_files(directory)
    _check_complete(directory, targets, where.keys())
    wanted = sorted((file, tensor) for tensor, file in where.items() if tensor in targets)
    for _, tensor in wanted:
        targets[tensor].missing += 1
    total = sum((directory / file).stat().st_size for file in {file for file, _ in wanted})
    done = 0
    with ExitStack() as open_files:
        files = {
            file: open_files.enter_context(_open(directory / file)) for file in {file for file, _ in wanted}
        }
        for file, tensor in wanted:
            target = targets[tensor]
            # a view of the mapped file: pages come in as they are copied
            found = files[file].get_tensor(tensor)
            _check_tensor(tensor, file, found, target.parts[tensor])
            target.arrived[tensor] = found
            target.missing -= 1
            if target.missing == 0:
                _store_target(target, storage[target.parameter.name], ops, packing)
            done += found.numel() * found.element_size()
            if progress is not None:
                progress(file, done, max(total, done))
    if progress is not None:
        progress("weights", total, total)


def _check_tensor(tensor: str, file: str, found: torch.Tensor, part: Part) -> None:
    if tuple(found.shape) not in part.shapes:
        raise ConfigError(
            f"{tensor} in {file} has shape {tuple(found.shape)}, the config asks for "
            + " or ".join(map(str, part.shapes))
        )
    if found.dtype not in part.dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in part.dtypes)
        raise ConfigError(f"{tensor} in {file} holds {found.dtype}, not one of {expected}")


def _store_target(target: _Target, into: Any, ops: Ops, packing: Packing | None) -> None:
    """Called once all of its tensors are there; lets go of them."""
    source, tensors = target.source, target.arrived
    rows: Any
    if packing is not None and is_quantised(target.parameter):
        rows = read_rows(source, tensors, packing, into.numbers.device)
    else:
        rows = tensors[source.tensor]
    _store(target.parameter, into, target.first_row, rows, ops)
    target.arrived = {}


def _rows(parameter: Parameter) -> Iterator[tuple[int, Any]]:
    """(first row within the parameter, source) of each of its sources."""
    row = 0
    for source in parameter.sources:
        yield row, source
        row += source.shape[0]


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> name of the file it is in."""
    index = directory / INDEX
    if index.exists():
        try:
            where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, OSError) as error:
            raise ConfigError(f"{index} is not a safetensors index: {error!r}") from None
        if missing := sorted({file for file in where.values() if not (directory / file).exists()}):
            raise ConfigError(f"{INDEX} names files that are not in {directory}: {_some(missing)}")
        return where
    files = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{directory} holds no *.safetensors files; only safetensors checkpoints can be loaded"
        )
    where = {}
    for path in files:
        with _open(path) as opened:
            where |= dict.fromkeys(opened.keys(), path.name)
    return where


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}") from None


def _check_complete(directory: Path, targets: Mapping[str, _Target], found: Any) -> None:
    wanted = {tensor for tensor, target in targets.items() if not target.parts[tensor].optional}
    if missing := sorted(wanted - found):
        raise ConfigError(f"the checkpoint in {directory} lacks {len(missing)} tensors: {_some(missing)}")
    # with tied embeddings some checkpoints store the output projection all the same
    unknown = sorted(t for t in found - targets.keys() if not t.endswith(UNUSED) and t != "lm_head.weight")
    if unknown:
        raise ConfigError(
            f"the checkpoint in {directory} has {len(unknown)} tensors the model has no place for: {_some(unknown)}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _fill_dummy(
    parameters: Sequence[Parameter],
    storage: dict[str, Any],
    dtype: torch.dtype,
    ops: Ops,
    seed: int,
    progress: Progress | None,
) -> None:
    """Normal numbers are slow to draw, so a few million are drawn once and read from a random place each time."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    total, done = sum(p.numel for p in parameters) * dtype.itemsize, 0
    longest_row = max(p.shape[-1] for p in parameters)
    size = max(min(DUMMY_POOL, max(p.numel for p in parameters)), longest_row)
    pool = torch.empty(size, device="cpu").normal_(0.0, 0.02, generator=generator).to(dtype)
    pool = pool.to(torch.get_default_device())  # drawn on the host, so that a seed means the same everywhere
    for parameter in parameters:
        if parameter.name.endswith("norm"):
            storage[parameter.name].fill_(1.0)
        else:
            for first, rows in _draw(parameter.shape, pool, generator):
                _store(parameter, storage[parameter.name], first, rows, ops)
        done += parameter.numel * dtype.itemsize
        if progress is not None:
            progress("random weights", done, total)


def _draw(
    shape: tuple[int, ...], pool: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) until the shape is covered: runs of the pool that begin at random places."""
    width = shape[1] if len(shape) == 2 else 1
    first = 0
    while first < shape[0]:
        start = int(torch.randint(0, pool.numel() - width + 1, (), generator=generator, device="cpu"))
        rows = min((pool.numel() - start) // width, shape[0] - first)
        run = pool[start : start + rows * width]
        yield first, run.view(rows, width) if len(shape) == 2 else run
        first += rows
