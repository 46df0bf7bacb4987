"""Kernels that multiply packed weights, and the choice among them."""
