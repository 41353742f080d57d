"""Entry point of `vllm.general_plugins`: called once or more in every process of vLLM."""


def register() -> None:
    """Make `--quantization turboquant` known; idempotent, nothing else changes for models without it."""
    from turboquant.integrations.vllm import config

    config.register()
