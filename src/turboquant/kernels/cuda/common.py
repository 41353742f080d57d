"""What both CUDA sources need to know about a page: the macros of config.cuh, and what they serve."""

import torch

from turboquant.maths.codec import ROW_STEPS, S_STEPS
from turboquant.maths.rotation import hadamard_block, signs
from turboquant.packed.page import PageLayout

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE = 64
MAX_HOT = 16
MAX_SLOTS = 1024  # of the ring


def refusal(layout: PageLayout) -> str | None:
    """None if pages of this layout are served, else why not."""
    kv, d = layout.kv, layout.head_dim
    if kv.codec != "live" or kv.page != PAGE or layout.hot > MAX_HOT or d not in HEAD_DIMS:
        return f"cuda: only live recipes with page={PAGE}, head_dim in {HEAD_DIMS}, up to {MAX_HOT} hot channels"
    if d == 80 and 3 in (kv.key_bits, kv.value_bits):
        return "cuda: not for 3 bits at head_dim 80"
    if kv.ring_slots > MAX_SLOTS:
        return f"cuda: only for rings of up to {MAX_SLOTS} slots"
    return None


def page_macros(layout: PageLayout, dtype: torch.dtype) -> dict[str, object]:
    """Macro names and values; SIGN_BITS is a declaration."""
    kv, d, f = layout.kv, layout.head_dim, layout.fields
    at = lambda name: f[name].offset if name in f else 0  # noqa: E731
    sign = [int(s > 0) for s in signs(d).tolist()]
    bits = [hex(sum(b << i for i, b in enumerate(sign[at : at + 32]))) + "u" for at in range(0, d, 32)]
    return {
        "D": d, "KEY_BITS": kv.key_bits, "VALUE_BITS": kv.value_bits, "HOT": layout.hot, "BLOCK": hadamard_block(d),
        "BF16": int(dtype == torch.bfloat16), "PAGE_BYTES": layout.page_bytes, "VALUE_PART": layout.key_bytes,
        "S_STEPS": S_STEPS, "ROW_STEPS": ROW_STEPS, "NORM": f"{hadamard_block(d) ** -0.5!r}f",
        "AT_MEAN": at("key_mean_code"), "AT_LOG_S": at("key_log_s"), "AT_KEY_SCALE": at("key_log_scale"),
        "AT_HOT_MEAN": at("key_hot_mean"), "AT_HOT_STEP": at("key_hot_step"), "AT_KEY_BASE": at("key_base"),
        "AT_MEAN_STEP": at("key_mean_step"), "AT_VALUE_BASE": at("value_base"), "AT_HOT_INDEX": at("key_hot_index"),
        "AT_HOT_CODES": at("key_hot_codes"), "AT_KEY_CODES": at("key_codes"), "AT_VALUE_SCALE": at("value_log_scale"),
        "AT_VALUE_CODES": at("value_codes"),
        "SIGN_BITS": f"__constant__ unsigned SIGN_BITS[{len(bits)}] = {{{', '.join(bits)}}};",
    }  # fmt: skip
