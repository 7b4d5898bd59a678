"""A user's own folder."""

import shutil

import pytest
from wrong import Place


@pytest.fixture
def place(tmp_path, small, text):
    shutil.copytree(text, tmp_path / "text")
    return Place(tmp_path, small)
