"""What `polypatch patches` draws: which models can be cut with."""

from __future__ import annotations

import pytest

from polypatch.errors import PolypatchError
from polypatch.report.layouts import cutters_of


def test_networks_without_tokens_are_refused():
    with pytest.raises(PolypatchError, match="has no tokens with places"):
        cutters_of("grid", host="convmixer-nano", patch=16, resolution=32)
