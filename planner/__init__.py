"""Allocation → plan file → the model on the device; memory arithmetic; reports; the command line."""
