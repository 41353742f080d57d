"""Attention functions of the instruments: how a scheme of their own is put under a model, and taken away again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_known: set[str] = set()


def register(name: str, function: Callable[..., Any]) -> None:
    """Make an attention function known to transformers under `name`, with the mask that SDPA gets."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if name not in _known:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
        _known.add(name)


@contextmanager
def implementation(model: Any, name: str | None = None) -> Iterator[None]:
    """Within the context the model runs this attention implementation (None: its own); afterwards its own again."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    if name is not None and name != before:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if model.config.get_text_config(decoder=True)._attn_implementation != before:
            model.set_attn_implementation(before)
