"""The kernels that multiply packed weights, and which of them runs where."""
