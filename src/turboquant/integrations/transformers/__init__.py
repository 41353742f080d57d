"""Hugging Face transformers: a cache, an attention function that reads it, and a quantization_config.

Importing this registers the names "turboquant" (attention, mask, quantization method) with transformers.
"""

from turboquant.integrations.transformers.attention import register as _register
from turboquant.integrations.transformers.cache import TurboQuantCache
from turboquant.integrations.transformers.config import TurboQuantConfig, attach
from turboquant.integrations.transformers.quantizer import TurboQuantizer, quantize

_register()

__all__ = ["TurboQuantCache", "TurboQuantConfig", "TurboQuantizer", "attach", "quantize"]
