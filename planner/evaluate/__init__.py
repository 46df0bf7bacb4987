"""Plans and formats measured against the full-precision model."""
