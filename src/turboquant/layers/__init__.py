"""Torch objects without a framework: the cache of one attention layer."""
