"""Counters in device memory that are 0 before and after every kernel that uses them.

Kernels of one stream run one after another and share theirs. So do the kernels that are captured on one stream in one
CUDA graph, but they have some of their own, for graphs may run at once. These come from memory that was zeroed before,
so that nothing is added to the graph, and that is kept for good, for a graph may run at any time.

Where several kernels hand counters on, no other thread may launch one that uses them in between: who launches holds
`TURN`.
"""

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

SUPPLY = 1 << 18  # counters set aside for graphs at a time
TURN = threading.Lock()


@dataclass
class _Device:
    """Of one device: counters by stream, and by stream those of its latest capture; what graphs can still get."""

    eager: dict[int, Tensor] = field(default_factory=dict)
    captured: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    supply: Tensor = field(default_factory=lambda: torch.empty(0))


_devices: dict[torch.device, _Device] = {}


def _capture(stream: int) -> int | None:
    """The id of the capture that goes on on a stream."""
    if not torch.cuda.is_current_stream_capturing():
        return None
    from cuda.bindings import driver

    return int(driver.cuStreamGetCaptureInfo(stream)[2])


def zeros(count: int, device: torch.device) -> Tensor:
    """`count` int32 counters for a kernel that is launched on the current stream now and leaves them at 0."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32)
    own, stream = _devices.setdefault(device, _Device()), int(torch.cuda.current_stream(device).cuda_stream)
    capture = _capture(stream)
    if capture is None:
        if len(own.supply) < SUPPLY // 2:
            own.supply = torch.zeros(SUPPLY, dtype=torch.int32, device=device)
            own.kept.append(own.supply)
            torch.cuda.current_stream(device).synchronize()
        if stream not in own.eager or len(own.eager[stream]) < count:
            own.eager[stream] = torch.zeros(count, dtype=torch.int32, device=device)
        return own.eager[stream]
    latest = own.captured.get(stream)
    if latest is None or latest[0] != capture or len(latest[1]) < count:
        if len(own.supply) < count:  # zeroed by the graph itself, at every replay
            return torch.zeros(count, dtype=torch.int32, device=device)
        latest = capture, own.supply[:count]
        own.supply, own.captured[stream] = own.supply[count:], latest
    return latest[1]
