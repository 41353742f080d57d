"""Bytes: the one bit order, and the one layout of a KV page."""
