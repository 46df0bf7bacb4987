"""The KV cache in formats of its own."""
