"""A whole model on the CPU: what encoding adds to a prompt, decoding with a long context, and llama.cpp beside it.

    python benchmarks/cpu_model.py MODEL --alone --context 8192 --threads 2          # tokens/s and memory, end to end
    python benchmarks/cpu_model.py MODEL --context 8192 32768 --threads 1 --json out.json
    python benchmarks/cpu_model.py MODEL.gguf --llama --context 8192     # needs llama-cpp-python and numpy only

Decoding is timed with caches that are filled with random keys and values: what a step costs does not depend on them.
Contestants and contexts take turns, token by token; medians. `growth_ms` is what a token costs with the context less
what it costs without one, which is attention and cache alone and can be compared with llama.cpp, whose other arithmetic
differs. llama.cpp (flash attention, q4_0 keys and values) gets its context as a state: the cells of 256 tokens that it
processed, repeated at later positions. --really processes the whole prompt instead, which takes minutes.

--alone gives every cache a process of its own, so that `rss_mb`, the process's resident memory after the last token,
says what it costs; freed memory is handed back to the system first. --really there reads a prompt in pieces of 512.
"""

import argparse
import ctypes
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COLUMNS = ["op", "cache", "context", "ms", "growth_ms", "tokens_per_s", "cache_bytes", "rss_mb"]
PIECE = 512  # tokens of a prompt at a time


def resident_mb() -> float:
    """Resident MB of this process, without what it has freed."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def fill(model: Any, cache: Any, tokens: int) -> None:
    """Give every layer of the cache `tokens` random tokens."""
    import torch

    from turboquant.integrations.transformers.cache import TurboQuantLayer
    from turboquant.kernels import ops

    config = model.config
    h, hq = config.num_key_value_heads, config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // hq
    for i in range(config.num_hidden_layers):
        q, k, v = (torch.randn(1, n, tokens, d, dtype=model.dtype) for n in (hq, h, h))
        if not cache.layers or not isinstance(cache.layers[i], TurboQuantLayer):
            cache.update(k, v, i)
            continue
        layer = cache.layers[i].cache
        layer._start(k)
        layer._reserve([tokens])
        ops.cache_append(layer.buf, layer.layout, q, k, v, None)
        layer.lengths, layer._reach, layer.columns = [tokens], [tokens], tokens


def new_cache(model: Any, name: str) -> Any:
    """An empty cache: "bf16" is transformers' own, any other name a recipe."""
    from transformers import DynamicCache

    from turboquant import TurboQuantCache

    model.set_attn_implementation("sdpa" if name == "bf16" else "turboquant")
    return DynamicCache(config=model.config) if name == "bf16" else TurboQuantCache(model, name)


def held(cache: Any) -> int:
    """Bytes of a cache's tensors."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes()["total"])
    return sum(x.keys.nbytes + x.values.nbytes for x in cache.layers if getattr(x, "keys", None) is not None)


def decode_rows(model: Any, contexts: list[int], tokens: int, recipe: str) -> list[dict[str, Any]]:
    """Rows of both caches without and with each context."""
    import torch

    caches = {}
    for context in [0, *contexts]:
        for name in (recipe, "bf16"):
            caches[name, context] = new_cache(model, name)
            if context:
                fill(model, caches[name, context], context)
    ms: dict[tuple[str, int], list[float]] = {key: [] for key in caches}
    token = torch.tensor([[11]])
    for i in range(tokens + 1):
        for key, cache in caches.items():
            model.set_attn_implementation("turboquant" if key[0] == recipe else "sdpa")
            start = time.perf_counter()
            model(token, past_key_values=cache)
            if i:
                ms[key].append(1e3 * (time.perf_counter() - start))
    rows = []
    for (name, context), cache in caches.items():
        t, empty = statistics.median(ms[name, context]), statistics.median(ms[name, 0])
        rows.append(row("decode", name, context, t, t - empty, held(cache)))
    return rows


def row(
    op: str, cache: str, context: int, ms: float, growth: float | None, size: int, rss: float | None = None
) -> dict[str, Any]:
    read = context if op in ("prompt", "prefill", "encode") else 1
    return dict(zip(COLUMNS, (op, cache, context, ms, growth, 1e3 * read / ms, size, rss), strict=True))


def alone_rows(model: Any, name: str, context: int, tokens: int, really: bool) -> list[dict[str, Any]]:
    """One cache in this process: decoding after `context` tokens, and resident memory."""
    import torch

    cache, rows = new_cache(model, name), []
    ids = torch.randint(0, 1000, (1, context), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for i in range(0, context, PIECE):
        if really:
            model(ids[:, i : i + PIECE], past_key_values=cache, logits_to_keep=1)
            print(f"\r{name}: {min(i + PIECE, context)} of {context} tokens read", end="", file=sys.stderr, flush=True)
    if really:
        print(file=sys.stderr)
        rows.append(row("prompt", name, context, 1e3 * (time.perf_counter() - start), None, held(cache)))
    else:
        fill(model, cache, context)
    ms, token = [], torch.tensor([[11]])
    for i in range(tokens + 1):
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        if i:
            ms.append(1e3 * (time.perf_counter() - start))
    return [*rows, row("alone", name, context, statistics.median(ms), None, held(cache), resident_mb())]


def end_to_end(context: int, recipe: str) -> list[dict[str, Any]]:
    """Rows of both caches, each from a process of its own that runs this script once more."""
    rows: list[dict[str, Any]] = []
    for name in (recipe, "bf16"):
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            command = [sys.executable, *sys.argv, "--only", name, "--json", out.name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            rows += json.loads(Path(out.name).read_text(encoding="utf-8"))
    ours, theirs = (r for r in rows if r["op"] == "alone")
    share = (theirs["cache_bytes"] - ours["cache_bytes"]) / 1e6
    faster = ours["tokens_per_s"] / theirs["tokens_per_s"]
    print(f"{recipe} at {context} tokens: {faster:.2f} x the tokens/s of transformers' bf16 cache")
    print(f"resident memory {theirs['rss_mb'] - ours['rss_mb']:.0f} MB lower; the caches differ by {share:.0f} MB")
    return rows


def prefill_rows(model: Any, tokens: int, rounds: int, recipe: str) -> list[dict[str, Any]]:
    """The prompt's time, and how much of it cache_append takes."""
    import torch

    from turboquant import TurboQuantCache
    from turboquant.kernels.cpu import cache as cpu

    seconds: list[float] = []
    native = cpu._native

    def append(*args: Any) -> bool:
        start = time.perf_counter()
        done = native.append(*args)
        seconds.append(time.perf_counter() - start)
        return bool(done)

    all_ = {name: getattr(native, name) for name in dir(native) if not name.startswith("_")}
    cpu._native = SimpleNamespace(**all_ | {"append": append})
    whole, encode, size = [], [], 0
    for _ in range(rounds):
        seconds.clear()
        cache = TurboQuantCache(model, recipe)
        start = time.perf_counter()
        model(torch.randint(0, 1000, (1, tokens)), past_key_values=cache, logits_to_keep=1)
        whole.append(1e3 * (time.perf_counter() - start)), encode.append(1e3 * sum(seconds))
        size = cache.nbytes()["total"]
    cpu._native = native
    t, e = statistics.median(whole), statistics.median(encode)
    print(f"encoding takes {100 * e / t:.2f} % of a prompt of {tokens} tokens")
    return [row("prefill", recipe, tokens, t, None, size), row("encode", recipe, tokens, e, None, size)]


def repeated(state: bytes, cells: int) -> bytes:
    """A sequence state of llama.cpp of n tokens, its cells repeated until there are `cells`, at positions of their own.

    The layout (llama-cpp-python 0.3.36): eight bytes of a mark, streams, cells, (position, sequences, sequence) of
    each cell; then of keys and of values a type, a row's bytes and the rows of every layer (flash attention).

    Raises:
        ValueError: another layout.
    """
    at = 8

    def number(code: str) -> int:
        nonlocal at
        value = struct.unpack_from("<" + code, state, at)[0]
        at += struct.calcsize(code)
        return int(value)

    streams, n = number("I"), number("I")
    places = [(number("i"), number("I"), number("i")) for _ in range(n)]
    transposed, layers = number("I"), number("I")
    if streams != 1 or transposed or places != [(i, 1, 0) for i in range(n)]:
        raise ValueError("this version of llama.cpp writes its state in another way")
    head = state[:8] + struct.pack("<II", 1, cells) + b"".join(struct.pack("<iIi", i, 1, 0) for i in range(cells))
    parts = [head, struct.pack("<II", 0, layers)]
    for _ in range(2 * layers):
        parts.append(state[at : at + 12])
        _type, row_bytes = number("i"), number("Q")
        rows = state[at : at + n * row_bytes]
        at += n * row_bytes
        parts.append((rows * -(-cells // n))[: cells * row_bytes])
    if at != len(state):
        raise ValueError("this version of llama.cpp writes its state in another way")
    return b"".join(parts)


def llama_rows(path: str, contexts: list[int], tokens: int, threads: int, really: bool) -> list[dict[str, Any]]:
    """llama.cpp with flash attention and q4_0 keys and values: time per token without and with each context."""
    import ctypes

    import llama_cpp as lib

    models = {}
    for context in [0, *contexts]:
        options = dict(n_ctx=context + tokens + 64, n_threads=threads, n_threads_batch=2, n_batch=2048, n_ubatch=512)
        types = dict(type_k=lib.GGML_TYPE_Q4_0, type_v=lib.GGML_TYPE_Q4_0)
        llm = lib.Llama(path, flash_attn=True, verbose=False, **options, **types)
        some = context if really else min(context, 256)
        llm.eval([100 + i % 1000 for i in range(max(some, 4))])
        if some < context:
            size = lib.llama_state_seq_get_size(llm.ctx, 0)
            held = (ctypes.c_uint8 * size)()
            if lib.llama_state_seq_get_data(llm.ctx, held, size, 0) != size:
                raise SystemExit("llama.cpp gave no state")
            full = repeated(bytes(held), context)
            given = (ctypes.c_uint8 * len(full)).from_buffer_copy(full)
            if lib.llama_state_seq_set_data(llm.ctx, given, len(full), 0) != len(full):
                raise SystemExit("llama.cpp refused the state")
            llm.n_tokens = context
        if context and lib.llama_memory_seq_pos_max(lib.llama_get_memory(llm.ctx), 0) != context - 1:
            raise SystemExit("llama.cpp holds another number of tokens")
        models[context] = llm
    ms: dict[int, list[float]] = {context: [] for context in models}
    for i in range(tokens + 1):
        for context, llm in models.items():
            start = time.perf_counter()
            llm.eval([11])
            if i:
                ms[context].append(1e3 * (time.perf_counter() - start))
    times = {context: statistics.median(x) for context, x in ms.items()}
    return [row("decode", "llama.cpp q4_0", context, t, t - times[0], 0) for context, t in times.items()]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--recipe", default="kv4")
    p.add_argument("--context", type=int, nargs="+", default=[8192])
    p.add_argument("--tokens", type=int, default=24, help="decoded tokens of each cache")
    p.add_argument("--prompt", type=int, default=0, help="also time a prompt of so many tokens and its encoding")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--llama", action="store_true", help="time llama.cpp on MODEL (a GGUF file) instead")
    p.add_argument("--really", action="store_true", help="with --llama or --alone: process the context")
    p.add_argument("--alone", action="store_true", help="every cache in a process of its own; the first context only")
    p.add_argument("--only", metavar="CACHE", help=argparse.SUPPRESS)
    p.add_argument("--json", type=Path, metavar="OUT")
    a = p.parse_args()
    if a.llama:
        rows = llama_rows(a.model, a.context, a.tokens, a.threads, a.really)
    elif a.alone and not a.only:
        rows = end_to_end(a.context[0], a.recipe)
    else:
        import torch

        from turboquant.evaluate.models import load

        torch.set_num_threads(a.threads)
        with torch.no_grad():
            model, _ = load(a.model, dtype="bfloat16", device="cpu")
            if a.only:
                rows = alone_rows(model, a.only, a.context[0], a.tokens, a.really)
            else:
                rows = decode_rows(model, a.context, a.tokens, a.recipe)
            if a.prompt and not a.only:
                rows += prefill_rows(model, a.prompt, 3, a.recipe)
    print("  ".join(COLUMNS))
    for r in rows:
        print("  ".join("-" if x is None else f"{x:.2f}" if isinstance(x, float) else str(x) for x in r.values()))
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
