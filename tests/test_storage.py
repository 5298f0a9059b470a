"""The disk: whole or absent, full disks, torn journals."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openglm import storage
from openglm.errors import StorageError
from openglm.storage import Journal, atomic_folder, atomic_write, remove, sha256


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def children(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_is_whole_and_readable_by_others(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with atomic_write(target, "w") as file:
        file.write("中文\n")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "中文\n"
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask
    assert children(target.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic_write(target) as file:
        file.write(b"new")
        raise RuntimeError("in the middle")
    assert target.read_bytes() == b"old"
    assert children(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The real calls in order, of which one meets a full disk."""
    monkeypatch.setattr(storage.os, step, full)
    with pytest.raises(StorageError, match=r"file`: the disk is full") as caught, atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert caught.value.exit_code == 2 and "free some space" in (caught.value.hint or "")
    with pytest.raises(StorageError, match="the disk is full"), atomic_folder(tmp_path / "folder") as part:
        (part / "a").write_bytes(b"1")
    assert children(tmp_path) == []


def test_a_device_that_is_full(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(StorageError, match="the disk is full"), atomic_write(tmp_path / "x") as file:
        with open("/dev/full", "wb") as device:
            device.write(b"1")
        file.write(b"never")
    assert children(tmp_path) == []


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as part:
        (part / "a").write_bytes(b"1")
        raise KeyboardInterrupt
    assert children(tmp_path) == []
    with atomic_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_bytes(b"1")
        assert not target.exists()
    assert (target / "sub" / "a").read_bytes() == b"1"
    with pytest.raises(StorageError, match="exists and is not empty"), atomic_folder(target):
        pass
    with atomic_folder(target, replace=True) as part:
        (part / "b").write_bytes(b"2")
    assert children(target) == ["b"]
    assert children(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as part:
        (part / "old").write_bytes(b"1")
    rename = os.replace

    def refuse_the_new_one(source: Path, destination: Path) -> None:
        if str(source).endswith(".part"):
            full()
        rename(source, destination)

    monkeypatch.setattr(storage.os, "replace", refuse_the_new_one)
    with pytest.raises(StorageError, match="the disk is full"), atomic_folder(target, replace=True) as part:
        (part / "new").write_bytes(b"2")
    assert children(tmp_path) == ["model"] and children(target) == ["old"]


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"), atomic_write(tmp_path / "file" / "x"):
        pass
    with pytest.raises(StorageError, match="cannot read"):
        sha256(tmp_path / "absent")


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert (tmp_path / "folder" / "a").exists()
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert children(tmp_path) == []


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_journal_loses_no_line_and_repeats_none(tmp_path: Path) -> None:
    """Cut at every byte: what was finished stays, the torn line goes, and the job ends with each piece once."""
    path = tmp_path / "out.jsonl"
    pieces = [{"id": number, "text": '一行\n\u2028 "x" é' * number} for number in range(4)]
    with Journal(path) as journal:
        for piece in pieces:
            journal.append(piece)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        finished = whole[:cut].count(b"\n")
        with Journal(path) as journal:
            assert journal.entries == pieces[:finished]
            for piece in pieces[len(journal.entries) :]:
                journal.append(piece)
        assert path.read_bytes() == whole


def test_a_foreign_file_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"my notes\nsecond line\n")
    with pytest.raises(StorageError, match="line 1 is not a JSON object"):
        Journal(path)
    assert path.read_bytes() == b"my notes\nsecond line\n"
    path.write_bytes(b'{"id": 1}\n[2]\n')
    with pytest.raises(StorageError, match="line 2"):
        Journal(path)


_FILL_UP = """
import resource, signal, sys
from openglm.errors import StorageError
from openglm.storage import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Journal(sys.argv[1]) as journal:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    refused = 0
    for number in range(20):
        try:
            journal.append({"id": number, "text": "x" * 150})
        except StorageError:
            refused += 1
            journal_is_whole = open(sys.argv[1], "rb").read().endswith(b"\\n")
            assert journal_is_whole, "a torn line was left behind"
    assert refused, "the limit was never met"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append({"id": "last"})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ") or not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limit")
def test_a_disk_that_fills_up_leaves_no_torn_line(tmp_path: Path) -> None:
    """A limit of the size stands in for the disk's end: the system writes a part of the line, then refuses."""
    path = tmp_path / "out.jsonl"
    subprocess.run([sys.executable, "-c", _FILL_UP, str(path)], check=True, timeout=60)
    entries = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [entry["id"] for entry in entries] == [0, 1, 2, 3, 4, "last"]
