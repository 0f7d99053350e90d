"""Hostile files are refused for what they are, by every door that reads strangers' files."""

import pytest
import torch

from benchmarks.strangers import ARCHIVES, DOORS, good_files, prepare, refused

# Every file through one door, and one through every door: benchmarks/strangers.py tries them all.
READERS = {id(files): door for door, (_, _, files, _) in reversed(DOORS.items())}
CASES = [
    (door, file)
    for door, (_, _, files, _) in DOORS.items()
    for file in (files if READERS[id(files)] == door else list(files)[:1])
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return good_files(tmp_path_factory.mktemp("strangers") / "good")


@pytest.mark.parametrize("door, file", CASES)
def test_a_hostile_file_is_refused_for_what_it_is_and_runs_nothing(good, tmp_path, door, file):
    at = tmp_path / "at"
    canary = prepare(door, file, good, at)
    made = set(at.rglob("*"))
    said = refused(door, at)
    assert DOORS[door][2][file][1] in said
    assert not canary.exists()
    assert {path for path in set(at.rglob("*")) - made if path.is_file()} == set()


@pytest.mark.parametrize("file", [name for name in ARCHIVES if name.startswith("code")])
def test_the_code_in_them_would_run(tmp_path, file):
    path, canary = tmp_path / "x.pth", tmp_path / "canary"
    ARCHIVES[file][0](path, canary)
    torch.load(path, weights_only=False)
    assert canary.exists()
