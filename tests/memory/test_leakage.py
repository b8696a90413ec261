"""The leakage report on a bank whose leaks are planted."""

from __future__ import annotations

import pytest
import torch

from tinyalign.memory import MemoryBank, leakage_report


@pytest.fixture
def planted():
    """Entries 0-9: ten directions; 10-12: twins of 0-2 in their groups; 13: a copy of 5 under another group."""
    keys = torch.eye(16)[:10]
    noise = 0.001 * torch.randn(4, 16)
    bank = MemoryBank(16, (1,))
    every = torch.cat([keys, keys[:3] + noise[:3], keys[5:6] + noise[3:]])
    bank.add(every, torch.ones(14, 1), ids=range(14), groups=[*range(10), 0, 1, 2, 77])
    return bank, keys


def test_counts_what_was_planted(planted):
    bank, keys = planted
    report = leakage_report(bank, keys, range(10), range(10), k=3)
    assert report.without_exclusion[:3] == (10, 3, 1)
    assert report.without_exclusion[3:] == pytest.approx((1.0, 0.3, 0.1))
    assert report.with_exclusion[:3] == (0, 0, 1)
    assert report.with_exclusion.near_duplicate_rate == pytest.approx(0.1)
    assert "themselves 100.0%" in str(report)
    assert "themselves 0.0%, another of their group 0.0%" in str(report)


def test_without_groups_twins_count_as_near_duplicates(planted):
    bank, keys = planted
    report = leakage_report(bank, keys, torch.arange(10), k=2)
    assert report.without_exclusion[:3] == (10, 0, 4)
    assert report.with_exclusion[:3] == (0, 0, 4)


def test_samples_outside_the_bank_do_not_leak(planted):
    bank, _ = planted
    report = leakage_report(bank, torch.randn(6, 16), range(100, 106), k=3)
    assert report.without_exclusion[:2] == (0, 0)
    assert report.with_exclusion[:2] == (0, 0)


def test_bad_input(planted):
    bank, keys = planted
    with pytest.raises(ValueError, match="queries must hold at least one row, got 0"):
        leakage_report(bank, keys[:0], [])
    with pytest.raises(ValueError, match=r"ids must have shape \(10,\), got \(3,\)"):
        leakage_report(bank, keys, [1, 2, 3])
    with pytest.raises(ValueError, match=r"groups must have shape \(10,\), got \(1,\)"):
        leakage_report(bank, keys, range(10), [1])
