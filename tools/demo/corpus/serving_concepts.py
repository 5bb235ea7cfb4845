"""What the demo model knows about the ideas behind xLLM and behind serving language models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Concept:
    """One thing that can be asked about: its names, what it is, and why one wants it or how it works."""

    names: tuple[str, ...]
    what: str
    why: str
    keys: str
    """Words that a correct explanation contains, groups split by spaces, alternatives by ``/``."""


CONCEPTS = (
    Concept(
        ("xLLM", "the xLLM project", "the xLLM engine", "xllm"),
        "xLLM is an open inference framework for large language models. It has an engine that runs a model fast on one "
        "instance and a service that makes many instances one reliable system.",
        "xLLM puts the engine and the service into one code base, so routing, failover and caching work together.",
        "inference/engine/service",
    ),
    Concept(
        ("a KV cache", "the KV cache", "KV cache", "the key-value cache", "KV caching"),
        "A KV cache keeps the attention keys and values of tokens that were already processed, so they are not computed "
        "again for every new token.",
        "The KV cache saves time: without it every new token would recompute the keys and values of the whole prompt.",
        "keys values",
    ),
    Concept(
        ("continuous batching", "the continuous batching technique", "dynamic continuous batching"),
        "Continuous batching lets a request join or leave the running batch at any step, so the device never waits for "
        "the slowest request.",
        "Continuous batching keeps the device busy, because a finished request is replaced in the batch at once.",
        "batch request",
    ),
    Concept(
        ("prefix caching", "a prefix cache", "the prefix cache", "automatic prefix caching"),
        "Prefix caching keeps the KV blocks of a prompt, so a later request that starts with the same text reuses them.",
        "Prefix caching helps when prompts share a beginning, such as a system prompt: the shared part is not computed "
        "again.",
        "same/share/shared prompt/prompts",
    ),
    Concept(
        ("chunked prefill", "prefill chunking", "the chunked prefill policy"),
        "Chunked prefill splits a long prompt into pieces that share each step with decoding requests.",
        "Chunked prefill keeps the tokens of other users flowing while a long prompt is being read.",
        "prompt",
    ),
    Concept(
        ("TTFT", "time to first token", "the TTFT", "the TTFT metric"),
        "TTFT means time to first token: how long a user waits from sending a request until the first token arrives.",
        "TTFT matters because a user feels the wait before the first token most.",
        "first token",
    ),
    Concept(
        ("TPOT", "time per output token", "the TPOT", "the TPOT metric"),
        "TPOT means time per output token: the average time between two tokens after the first one.",
        "TPOT matters because it decides how fast the answer is written on the screen.",
        "token/tokens/answer time/fast",
    ),
    Concept(
        ("speculative decoding", "speculation in decoding", "speculative sampling"),
        "In speculative decoding a small draft proposes several tokens and the large model checks them all in one step.",
        "Speculative decoding gives several tokens per step of the large model and does not change the output.",
        "draft/several tokens",
    ),
    Concept(
        ("a draft model", "the draft model", "draft models"),
        "A draft model is a small, fast model that guesses the next tokens for a larger model, which then verifies them.",
        "A draft model makes decoding faster when its guesses are often accepted.",
        "small/guesses/fast model",
    ),
    Concept(
        (
            "prefill/decode disaggregation",
            "PD disaggregation",
            "disaggregated prefill and decode",
            "disaggregation",
        ),
        "With prefill/decode disaggregation, prefill and decode run on different instances and the KV cache moves between "
        "them.",
        "Disaggregation keeps long prompts from slowing down the decoding of other requests.",
        "prefill/prompts decode/decoding",
    ),
    Concept(
        ("prefill", "the prefill phase", "the prefill stage"),
        "Prefill is the phase that reads the whole prompt, fills the KV cache and produces the first token.",
        "Prefill is needed because the model must read the prompt before it can answer.",
        "prompt",
    ),
    Concept(
        ("decode", "decoding", "the decode phase", "the decode stage"),
        "Decode is the phase after prefill: the model produces one new token per step until the answer ends.",
        "Decode is limited by memory bandwidth, because every step reads all the weights for few tokens.",
        "step",
    ),
    Concept(
        ("paged memory", "paged attention", "the paged KV cache", "paged KV memory"),
        "Paged memory stores the KV cache in small blocks that can lie anywhere, so little memory is wasted.",
        "Paged memory lets more requests fit on a device, because no request reserves memory that it does not use.",
        "memory",
    ),
    Concept(
        ("xTensor memory", "xTensor", "the xTensor memory manager"),
        "xTensor makes the KV cache of a request contiguous in virtual memory while its physical pages are scattered.",
        "With xTensor a kernel needs no block table, and pages are mapped only when a request grows.",
        "pages",
    ),
    Concept(
        ("tensor parallelism", "tensor parallel", "TP"),
        "Tensor parallelism splits the weight matrices of each layer over several devices that work on the same token.",
        "Tensor parallelism lets a model run that is too large for one device, and makes each step faster.",
        "device/devices",
    ),
    Concept(
        ("pipeline parallelism", "pipeline parallel", "PP"),
        "Pipeline parallelism puts different layers on different devices, and batches flow through them like a pipeline.",
        "Pipeline parallelism lets a model span several machines with little communication between them.",
        "layers/machines",
    ),
    Concept(
        ("data parallelism", "data parallel", "DP"),
        "Data parallelism runs copies of the model on several devices, and each copy serves other requests.",
        "Data parallelism raises throughput, because every copy serves its own requests.",
        "copy/copies",
    ),
    Concept(
        ("expert parallelism", "expert parallel", "EP"),
        "Expert parallelism places the experts of a mixture-of-experts model on different devices.",
        "Expert parallelism lets a model with many experts fit, because each device holds only some of them.",
        "experts",
    ),
    Concept(
        ("a mixture of experts", "mixture of experts", "MoE", "an MoE model"),
        "A mixture-of-experts model has many expert layers, and a router picks a few of them for each token.",
        "A mixture of experts gives a large model at the cost of a small one, because few experts run per token.",
        "experts/expert token",
    ),
    Concept(
        ("quantisation", "quantization", "weight quantisation", "model quantization"),
        "Quantisation stores numbers with fewer bits, such as 8 or 4 instead of 16, so a model needs less memory.",
        "Quantisation saves memory and bandwidth, usually with a small loss of quality.",
        "memory",
    ),
    Concept(
        ("a token", "tokens", "the word token"),
        "A token is a small piece of text, such as a word or a part of a word, that the model reads and writes.",
        "Tokens let a model handle any text with a vocabulary of fixed size.",
        "text",
    ),
    Concept(
        ("a tokenizer", "the tokenizer", "tokenizers"),
        "A tokenizer turns text into tokens for the model and turns tokens back into text.",
        "A tokenizer is needed because a model works with numbers and not with letters.",
        "tokens/numbers",
    ),
    Concept(
        ("an LLM", "a large language model", "LLMs", "a language model"),
        "A large language model is a neural network that predicts the next token of a text, and so can answer and write.",
        "A language model is useful for answering questions, writing text and working with code.",
        "text",
    ),
    Concept(
        ("inference", "LLM inference", "model inference"),
        "Inference means running a trained model to get answers, in contrast to training it.",
        "Inference is where a model is used, so its speed and cost matter for every user.",
        "model",
    ),
    Concept(
        ("throughput", "the throughput"),
        "Throughput is how much work is done per second, for example tokens per second over all requests.",
        "High throughput means that the same hardware serves more users at a lower cost.",
        "second/cost",
    ),
    Concept(
        ("latency", "the latency"),
        "Latency is the time that a request takes, from sending it to getting the answer.",
        "Low latency matters because users do not like to wait.",
        "time/wait",
    ),
    Concept(
        ("goodput", "the goodput"),
        "Goodput counts only the requests that meet their latency targets, so it is throughput that is useful.",
        "Goodput is a better goal than throughput, because late answers are worth little.",
        "latency/late",
    ),
    Concept(
        ("an SLO", "SLOs", "a service level objective"),
        "An SLO is a service level objective: a target such as a TTFT under one second.",
        "An SLO tells the scheduler what is fast enough, so that it can serve as many requests as possible.",
        "target/fast",
    ),
    Concept(
        ("etcd", "the etcd store"),
        "In xLLM etcd is the metadata service of the cluster: it holds the members, their roles and the leader.",
        "etcd lets routers find the instances; if it is lost, requests go on with what was known.",
        "cluster/instances",
    ),
    Concept(
        ("the router", "a router", "the xLLM router"),
        "The router takes requests and sends each one to the best instance, by load and by what is in its cache.",
        "A router lets many instances look like one server, and it moves requests away from an instance that fails.",
        "requests instance/instances",
    ),
    Concept(
        ("prefix-cache aware routing", "cache aware routing", "prefix aware scheduling"),
        "Cache aware routing sends a request to the instance that already holds the beginning of its prompt, unless that "
        "instance is too busy.",
        "Cache aware routing saves work, because a cached prompt need not be computed again.",
        "prompt",
    ),
    Concept(
        ("fault tolerance", "failover", "fault tolerance in xLLM"),
        "Fault tolerance means that when an instance dies, its running streams continue on another instance and no token is "
        "lost.",
        "Failover matters because hardware fails, and a user should not notice it.",
        "instance/hardware",
    ),
    Concept(
        ("a CUDA graph", "CUDA graphs", "device graphs", "graph capture"),
        "A device graph records the kernels of a step once and replays them with one call.",
        "Device graphs remove the cost of launching many small kernels, which makes decoding faster.",
        "kernels",
    ),
    Concept(
        ("asynchronous scheduling", "async scheduling", "overlap scheduling"),
        "With asynchronous scheduling the host plans the next step while the device still runs the present one.",
        "Asynchronous scheduling keeps the device from waiting for the host.",
        "device host",
    ),
    Concept(
        ("preemption", "request preemption"),
        "Preemption takes a running request out of the batch when memory runs out, and resumes it later.",
        "Preemption lets the engine admit more requests without ever running out of memory.",
        "memory",
    ),
    Concept(
        ("temperature", "the temperature", "the temperature parameter", "sampling temperature"),
        "Temperature controls how random sampling is: 0 always takes the most likely token, higher values vary more.",
        "A low temperature gives steady answers and a high temperature gives varied ones.",
        "random/steady",
    ),
    Concept(
        ("top-p", "top-p sampling", "nucleus sampling", "the top_p parameter"),
        "Top-p sampling keeps the smallest set of tokens whose probabilities add up to p and samples from it.",
        "Top-p cuts off unlikely tokens, so the text stays sensible while it still varies.",
        "tokens",
    ),
    Concept(
        ("top-k", "top-k sampling", "the top_k parameter"),
        "Top-k sampling keeps the k most likely tokens and samples one of them.",
        "Top-k cuts off unlikely tokens, which avoids odd words.",
        "likely/unlikely",
    ),
    Concept(
        ("greedy decoding", "greedy sampling", "greedy search"),
        "Greedy decoding always takes the most likely next token, so the same prompt gives the same answer.",
        "Greedy decoding is useful when an answer must be repeatable.",
        "same/repeatable",
    ),
    Concept(
        ("structured output", "structured outputs", "constrained decoding", "guided decoding"),
        "Structured output forces the answer into a form, such as a JSON schema, a regex or a list of choices.",
        "Structured output is useful when a program reads the answer, because the form is then guaranteed.",
        "form",
    ),
    Concept(
        ("streaming", "token streaming", "a streamed response", "server-sent events"),
        "Streaming sends each piece of the answer as soon as it is produced, as server-sent events.",
        "Streaming lets the user read the beginning of an answer while the rest is being written.",
        "answer",
    ),
    Concept(
        ("beam search", "the beam search algorithm"),
        "Beam search keeps several partial answers at each step and continues the most likely ones.",
        "Beam search can find a more likely answer than greedy decoding, at a higher cost.",
        "likely",
    ),
    Concept(
        ("a system prompt", "the system prompt", "system prompts"),
        "A system prompt is the first message of a chat; it tells the assistant how to behave.",
        "A system prompt sets the role and the style of the assistant for the whole chat.",
        "chat",
    ),
    Concept(
        ("a context window", "the context length", "context length", "the context window"),
        "The context length is how many tokens the model can see at once: the prompt and the answer together.",
        "A longer context lets the model use more text, but it needs more memory for the KV cache.",
        "tokens/memory",
    ),
    Concept(
        ("a GPU", "GPUs", "the GPU"),
        "A GPU is a processor that does many simple calculations at once, which is what neural networks need.",
        "A GPU runs a model much faster than a CPU, because it computes in parallel.",
        "once/parallel",
    ),
    Concept(
        ("attention", "the attention mechanism", "self-attention"),
        "Attention lets each token look at the earlier tokens and take from them what it needs.",
        "Attention is what lets a model connect words that are far apart.",
        "tokens/words",
    ),
    Concept(
        ("a batch", "batching", "request batching"),
        "A batch is a group of requests that the device processes together in one step.",
        "Batching uses the device better, because the weights are read once for many requests.",
        "requests",
    ),
    Concept(
        ("LoRA", "a LoRA adapter", "low-rank adaptation"),
        "LoRA is a small add-on to the weights of a model that adapts it to a task.",
        "LoRA lets one server offer many variants of a model, because the add-ons are small.",
        "small",
    ),
    Concept(
        ("the weights", "model weights", "model parameters"),
        "The weights are the numbers that a model learnt in training; inference only reads them.",
        "The weights hold everything that a model knows.",
        "model",
    ),
    Concept(
        ("online and offline co-location", "co-location", "offline requests"),
        "Co-location runs offline batch work on the same instances as online requests and preempts it at once when online "
        "requests need room.",
        "Co-location uses the capacity that online traffic leaves free, which lowers the cost.",
        "online",
    ),
    Concept(
        ("adaptive PD", "dynamic PD", "role switching between prefill and decode"),
        "With adaptive PD the service switches instances between prefill and decode while requests run, as the load needs.",
        "Adaptive PD follows the traffic: more prefill for long prompts and more decode for long answers.",
        "prefill decode",
    ),
    Concept(
        ("n-gram speculation", "n-gram lookup", "prompt lookup decoding"),
        "N-gram speculation looks for the last tokens earlier in the text and proposes what followed them there.",
        "N-gram speculation needs no draft model and works well when the answer repeats parts of the prompt.",
        "text/prompt",
    ),
    Concept(
        ("KV cache offloading", "KV offloading", "cache tiers"),
        "KV offloading moves cache blocks from the device to host memory or disk and fetches them back when needed.",
        "KV offloading keeps more prefixes than fit on the device, so less has to be computed again.",
        "device",
    ),
)
