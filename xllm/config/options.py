"""What a user may ask of an engine: every knob once, with its flag, its default and its help text.

`None` means "decide for me"; `resolve` then decides and says why. The command line, `LLM(...)` and a YAML file are
three ways to fill the same dataclass. This module imports nothing heavy: `xllm --help` reads it.
"""

from dataclasses import dataclass, field, fields
from typing import Any


def knob(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    short: str | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that also describes its command line flag (by default `--the-name`)."""
    return field(
        default=default,
        metadata={"help": help, "flag": flag, "short": short, "choices": choices, "metavar": metavar},
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    # the model
    model: str = "demo"
    tokenizer: str | None = knob(None, "tokenizer directory or hub id, when not the model's own")
    skip_tokenizer_init: bool = knob(
        False, "token ids in, token ids out: for LLM(...) and the offline benchmarks, not for serving"
    )
    revision: str | None = knob(None, "branch, tag or commit of a hub model")
    served_model_name: str | None = knob(None, "name the API serves the model under (default: MODEL)")
    dtype: str = knob("auto", "weights and arithmetic", choices=("auto", "bfloat16", "float32"))
    quantization: str | None = knob(
        None,
        "weights in fewer bits: fp8 (tokens too), int8 and int4 quantise a float checkpoint as it loads; "
        "awq and gptq confirm what the checkpoint is",
        choices=("fp8", "int8", "int4", "awq", "gptq"),
    )
    max_model_len: int | None = knob(
        None, "longest prompt + output in tokens (default: the model's own, as memory allows)"
    )
    load_format: str = knob(
        "auto",
        "auto, safetensors, or dummy: random weights from the config alone",
        choices=("auto", "safetensors", "dummy"),
    )
    hf_overrides: str | None = knob(None, "JSON object merged over the model's config.json", metavar="JSON")
    trust_remote_code: bool = knob(False, "refused: xLLM runs no code out of a checkpoint")
    generation_config: str = knob(
        "auto",
        "auto: sampling defaults from the model's generation_config.json; none: ours",
        choices=("auto", "none"),
    )
    seed: int = knob(0, "seed of requests that bring none, and of dummy weights")

    # where it runs
    device: str = knob(
        "auto",
        "hardware to run on; reference: plain PyTorch on the CPU, slow and exact",
        choices=("auto", "cpu", "cuda", "reference"),
    )
    enforce_eager: bool = knob(False, "never use device graphs: slower, and easier to debug")
    cudagraph_capture_sizes: tuple[int, ...] | None = knob(
        None, "sequences of a decode step that graphs are captured for (default: 1 to --max-num-seqs)"
    )
    threads: int | None = knob(None, "CPU threads for the model (default: physical cores)")

    # KV memory
    block_size: int | None = knob(None, "tokens per KV block (default: 16 on a CPU, 64 on a GPU)")
    kv_cache_memory_bytes: int | None = knob(
        None, "bytes for the KV cache (default: a share of what is free)"
    )
    gpu_memory_utilization: float = knob(
        0.9, "share of the device's memory to use at most; of free memory on a CPU it is halved"
    )
    kv_pool: str = knob(
        "paged",
        "paged: memory for the KV cache is taken at start; elastic: as blocks come into use, and given back when idle; "
        "contiguous: taken at start, and every sequence sees its blocks at neighbouring addresses",
        choices=("paged", "elastic", "contiguous"),
    )
    kv_cache_dtype: str = knob("auto", "numbers of the KV cache; auto: as --dtype", choices=("auto", "fp8"))
    enable_sleep_mode: bool = knob(
        False, "let POST /sleep give a card's memory back while nothing runs, and POST /wake_up take it again"
    )
    enable_prefix_caching: bool = knob(True, "share the KV of equal prefixes")
    kv_offloading_size: float = knob(
        0.0,
        "GiB of host memory that keep KV blocks beside the device's, for prefixes that come again",
        metavar="GIB",
    )
    kv_disk_path: str | None = knob(
        None,
        "directory that keeps KV blocks over restarts; with --kv-disk-size and --kv-offloading-size",
        metavar="DIR",
    )
    kv_disk_size: float = knob(0.0, "GiB of it", metavar="GIB")
    kv_remote: str | None = knob(
        None,
        "store that engines of one model share KV blocks through, as file:///DIR or mooncake://HOST:PORT; with "
        "--kv-offloading-size",
        metavar="URL",
    )
    kv_events_config: str | None = knob(
        None,
        'tell routers what is cached, over ZMQ: {"enable_kv_cache_events": true} with endpoint, replay_endpoint, topic, '
        "buffer_steps, hwm, max_queue_size as wanted",
        metavar="JSON",
    )

    # scheduling
    max_num_seqs: int | None = knob(None, "sequences that run at once")
    max_num_batched_tokens: int | None = knob(None, "token budget of a step")
    enable_chunked_prefill: bool = knob(True, "let a prompt be computed over several steps")
    long_prefill_token_threshold: int = knob(0, "largest chunk of one prompt in a step (0: the budget)")
    scheduling_policy: str = knob(
        "fcfs", "order of waiting requests", choices=("fcfs", "priority", "deadline", "shortest")
    )
    batching_policy: str = knob(
        "chunked", "how prefill and decode share a step", choices=("chunked", "prefill_first", "decode_first")
    )
    admission: str = knob(
        "optimistic",
        "optimistic: admit and preempt when memory runs out; no_eviction: admit only what surely finishes",
        choices=("optimistic", "no_eviction"),
    )
    async_scheduling: int = knob(
        2,
        "steps in flight: 1 plans and runs in turn, 2 or more plans the next while one runs",
        metavar="DEPTH",
    )
    max_num_queued_reqs: int = knob(
        1024, "requests that may wait; beyond it clients get 429 with Retry-After"
    )
    max_logprobs: int = knob(20, "most logprobs a request may ask for")


def option_fields() -> list[tuple[str, dict[str, Any]]]:
    """(name, flag description) of every knob, in the order above; `model` is positional and not among them."""
    return [
        (f.name, {**f.metadata, "default": f.default, "type": f.type})
        for f in fields(EngineOptions)
        if f.metadata
    ]
