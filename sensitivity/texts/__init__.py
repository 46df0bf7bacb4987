"""Where calibration, search and held-out text come from."""
