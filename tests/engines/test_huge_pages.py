"""Asking for huge pages moves memory without changing it, and only memory that is filled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgellm.engines.huge_pages import MIN_BYTES, use_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no transparent huge pages here")
def test_content_stays() -> None:
    weights = torch.arange(MIN_BYTES, dtype=torch.int32)
    empty = torch.empty(4 * MIN_BYTES, dtype=torch.uint8)
    empty[0] = 1
    use_huge_pages()
    assert torch.equal(weights, torch.arange(MIN_BYTES, dtype=torch.int32))
    assert use_huge_pages() < weights.nbytes, "what is in huge pages is not moved again"
