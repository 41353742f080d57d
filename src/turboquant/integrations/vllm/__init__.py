"""vLLM: the same quantizers in its engine, as an out-of-tree plugin. Importing this imports no vLLM; `plugin.register`
is what vLLM calls."""
