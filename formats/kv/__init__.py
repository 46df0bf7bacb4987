"""Quantized KV caches."""
