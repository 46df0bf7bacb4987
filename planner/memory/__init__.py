"""The arithmetic of memory: what a model needs on a device, and what is left for its weights."""
