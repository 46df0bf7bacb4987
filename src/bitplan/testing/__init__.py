"""Conformance tests for formats, roundings and export targets, those of other packages too. They need pytest.

A test file subclasses a suite under a name that pytest collects, and says with fixtures what is to be tested:

    import pytest
    from bitplan.testing import FormatTests
    from mine import MyFormat

    class TestMyFormat(FormatTests):
        @pytest.fixture
        def format(self):
            return MyFormat("my4", 4)

bitplan's own formats, roundings and targets pass the same suites. May import: formats, search, sensitivity, planner.
"""

import pytest

pytest.register_assert_rewrite(*(f"bitplan.testing.{name}" for name in ("formats", "roundings", "exports")))

from bitplan.testing.exports import ExportTests  # noqa: E402 - a module is rewritten only before its first import
from bitplan.testing.formats import FormatTests  # noqa: E402
from bitplan.testing.roundings import RoundingTests  # noqa: E402

__all__ = ["ExportTests", "FormatTests", "RoundingTests"]
