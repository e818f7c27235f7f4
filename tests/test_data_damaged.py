"""Damaged files of every kind are read or refused in one line; those that mean harm reach nothing."""

import damage
import pytest


@pytest.mark.parametrize("name", damage.names())
def test_damaged_files_are_read_or_refused(tmp_path, name):
    assert damage.short_of(name, tmp_path, 40) == []
