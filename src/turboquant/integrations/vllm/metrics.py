"""What quantization does, in vLLM's /metrics: bits, bytes, kernels, non-finite tokens, drift.

The numbers arise in the workers, other processes than the API server. A worker writes its own to a file in a folder
that the process which made the configuration has named in the environment; that process' registry reads the files
when it is asked. With several API servers vLLM uses prometheus_client's multiprocess mode, and so do the workers then.
Ray's workers get the environment's names as vLLM hands them over. Workers on other hosts are not seen.
"""

import atexit
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = "TURBOQUANT_METRICS_DIR"
SHARED = "PROMETHEUS_MULTIPROC_DIR"
RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
EVERY = 2.0  # seconds between two reports of a worker
Row = tuple[str, dict[str, str], float]  # name in HELP, labels, value
HELP = {  # name -> (kind, help)
    "weight_bits": ("gauge", "Bits stored for each packed weight, scales and zeros included."),
    "weight_bytes": ("gauge", "Bytes of all packed weights of this rank."),
    "cache_bits": ("gauge", "Bits stored for each number of the cache, everything in a page included."),
    "cache_bytes_per_token": ("gauge", "Bytes of the cache for each token, over all layers of this rank."),
    "nonfinite_tokens": ("counter", "Tokens whose keys or values were not finite when they came."),
    "drift_alarms": ("counter", "Of the cache: pages of KV heads that drifted. Of inputs: new hot channels."),
    "kernel_info": ("gauge", "Which kernel runs an op: 1 for each layer's."),
}
_sources: list[Callable[[], list[Row]]] = []
_labels: dict[str, str] = {}
_next = 0.0
_series: dict[str, Any] = {}
_before: dict[Any, float] = {}


def prepare() -> None:
    """In the process that makes the configuration: name the folder, and let its /metrics read it. Idempotent."""
    copied = os.environ.get(RAY, "").split(",")
    os.environ[RAY] = ",".join(dict.fromkeys([*filter(None, copied), FOLDER, SHARED]))
    if FOLDER in os.environ or SHARED in os.environ:
        return
    from prometheus_client import REGISTRY

    folder = os.environ[FOLDER] = tempfile.mkdtemp(prefix="turboquant-metrics-")
    owner = os.getpid()
    REGISTRY.register(Files(Path(folder)))
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)


def source(rows: Callable[[], list[Row]]) -> None:
    """In a worker: where numbers come from; asked at every report. Idempotent."""
    if rows not in _sources:
        _sources.append(rows)


def identify(parallel: Any) -> None:
    """In a worker: whose numbers these are.

    Args:
        parallel: vLLM's ParallelConfig.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    _labels.update(engine=str(parallel.data_parallel_rank), rank=str(rank))


def publish(x: torch.Tensor | None = None, now: bool = False) -> None:
    """In a worker, at each step: report if EVERY seconds have passed (or `now`), never while a CUDA graph is captured.

    Args:
        x: a tensor on the device of the model.
    """
    global _next
    if time.monotonic() < _next and not now:
        return
    if x is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    _next = time.monotonic() + EVERY
    try:
        _report()
    except Exception as e:  # numbers are not worth a request
        _next = float("inf")
        warnings.warn(f"turboquant's metrics of process {os.getpid()} end here: {e!r}", stacklevel=2)


def _report() -> None:
    rows = [(name, _labels | labels, float(value)) for make in _sources for name, labels, value in make()]
    if SHARED in os.environ:
        _share(rows)
    elif FOLDER in os.environ:
        path = Path(os.environ[FOLDER]) / f"{os.getpid()}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rows))
        os.replace(part, path)


def _share(rows: list[Row]) -> None:
    from prometheus_client import Counter, Gauge

    for name, labels, value in rows:
        kind, text = HELP[name]
        if name not in _series:
            make = Counter if kind == "counter" else Gauge
            extra = {} if kind == "counter" else {"multiprocess_mode": "mostrecent"}
            _series[name] = make(f"turboquant:{name}", text, sorted(labels), **extra)
        series = _series[name].labels(**labels)
        if kind == "gauge":
            series.set(value)
        else:
            key = (name, *sorted(labels.items()))
            series.inc(max(0.0, value - _before.get(key, 0.0)))
            _before[key] = value


class Files:
    """A collector of prometheus_client: what the workers have written.

    Args:
        folder: with a file a worker.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Any]:
        """Families of metrics."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found: dict[str, Any] = {}
        for file in sorted(self.folder.glob("*.json")):
            for name, labels, value in json.loads(file.read_text()):
                kind, text = HELP[name]
                if name not in found:
                    family: Any = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
                    found[name] = family(f"turboquant:{name}", text, labels=sorted(labels))
                found[name].add_metric([labels[key] for key in sorted(labels)], value)
        yield from found.values()

    def describe(self) -> list[Any]:
        """Nothing before it is asked."""
        return []
