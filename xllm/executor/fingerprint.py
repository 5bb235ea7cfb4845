"""What KV on disk belongs to: a model, its weights, and how a block is laid out."""

from pathlib import Path

import msgspec
import xxhash

from xllm.config.decided import EngineConfig

_SAMPLE = 1 << 16  # bytes at either end of a file of weights; the first hold its header, with every shape


def fingerprint(config: EngineConfig) -> bytes:
    """16 bytes. KV of one fingerprint serves every engine of the same, wherever its files lie; what would compute other
    KV has another one. Of the weights it looks at sizes and at the ends of the files, not at every byte."""
    model, cache, executor = config.model, config.cache, config.executor
    digest = xxhash.xxh3_128(b"xllm.kv.disk.1\0")
    facts = {
        "architecture": model.architecture, "hf": model.hf, "block_size": cache.block_size, "kv_dtype": cache.kv_dtype,
        "dtype": executor.dtype, "quantization": executor.quantization, "device": executor.device,
        "seed": executor.seed if model.load_format == "dummy" else None,
    }  # fmt: skip
    digest.update(msgspec.json.encode(facts, order="sorted"))
    if model.load_format != "dummy":
        for path in sorted(Path(model.directory).glob("*.safetensors")):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, path.stat().st_size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    result: bytes = digest.digest()
    return result
