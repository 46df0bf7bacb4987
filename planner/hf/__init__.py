"""The transformers plug-in."""
