"""Files that are whole or absent: atomic writes, checksums, and the journals of long jobs.

This is the only room of the house that renames or deletes. It knows nothing of what is stored.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from openglm.errors import StorageError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder, then run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EROFS: ("the file system is read-only", "choose a folder that can be written"),
    errno.EACCES: ("permission denied", "choose a folder that you may write, or change its rights"),
    errno.EPERM: ("permission denied", "choose a folder that you may write, or change its rights"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EIO: ("the disk reported an input/output error", "check the disk, then run the same command again"),
}


def storage_error(path: str | Path, error: OSError, action: str = "write") -> StorageError:
    """One sentence for an ``OSError``: which file, why, and the way out."""
    reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), None))
    return StorageError(f"cannot {action} `{path}`: {reason}", hint=hint, path=path)


def is_refusal(error: OSError) -> bool:
    """Whether the disk refused for a reason that a user can mend; anything else that comes unexpected is a bug."""
    return error.errno in _REASONS


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder that holds the name is synced, too.
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """Open a file that gets its final name only when the block ends well.

    Writes to a temporary name beside ``path``, syncs, renames, syncs the folder. If the block raises, the
    temporary file is removed and an older ``path`` stays as it was. Raises ``StorageError`` for a full or
    read-only disk.
    """
    path = Path(path)
    if "b" not in mode and encoding is None:
        encoding = "utf-8"
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        with open(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def exclusive(folder: Path, hint: str) -> Iterator[None]:
    """Hold a folder, which is made where it is not there, against other processes until the block ends, or this one does.

    Raises ``StorageError`` with the hint if another process holds it. Without effect on systems that have no ``flock``.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (closed below, whatever happens)
    except OSError as error:
        raise storage_error(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"`{folder}` is in use by another process", hint=hint, path=folder) from error
        except OSError:
            pass  # a file system without locks
        yield


def total_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or those of its control group."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            size = min(size, int(Path(name).read_text()))
    return size


def refuse_existing(path: Path) -> None:
    """Raise ``StorageError`` for a folder that holds something, or a file: what is there is never overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StorageError(f"`{path}` exists and is not empty", hint="choose another folder or remove it", path=path)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder under a temporary name; it gets its final name only when the block ends well.

    Yields the temporary folder. With ``replace`` an existing ``path`` is swapped out and removed only after the
    new one has the name. Raises ``StorageError`` when ``path`` exists and is not empty (without ``replace``), and
    for a full or read-only disk.
    """
    path = Path(path)
    if not replace:
        refuse_existing(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        _sync_folder(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(old, path)
                raise
            _sync_folder(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise storage_error(path, error) from error
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove(path: str | Path) -> None:
    """Delete a file or a whole folder; nothing happens if it is not there."""
    path = Path(path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(path, error, "remove") from error


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises ``StorageError`` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(path, error, "read") from error


class Journal:
    """An append-only JSON-lines file that survives an interruption: the record of a long job.

    A line counts once it ends with a newline; a torn last line is cut off when the journal is opened, so a job
    that goes on repeats at most one piece and never loses a finished one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries: list[dict[str, Any]] = []
        if self.path.exists() and not self.path.is_file():
            raise StorageError(f"`{self.path}` is not a regular file", hint="choose another output file", path=self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer would keep what a full disk refused, and write it later.
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed by close or the context manager)
        except OSError as error:
            raise storage_error(self.path, error) from error
        try:
            self._file.seek(0)
            whole = self._read_entries(self._file.readall())
            self._file.truncate(whole)
            self._file.seek(whole)
        except OSError as error:
            self._file.close()
            raise storage_error(self.path, error) from error
        except BaseException:
            self._file.close()
            raise

    def _read_entries(self, data: bytes) -> int:
        """Take the finished lines; returns how many bytes they are."""
        whole = 0
        for number, line in enumerate(io.BytesIO(data), 1):
            if not line.endswith(b"\n"):
                if not line.startswith(b"{"):  # torn or not, a line of ours begins so; this is somebody's file
                    self._refuse(number)
                break
            whole += len(line)
            if line.strip():
                try:
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise ValueError("not an object")
                except ValueError:
                    self._refuse(number)
                else:
                    self.entries.append(entry)
        return whole

    def _refuse(self, line: int) -> NoReturn:
        raise StorageError(
            f"`{self.path}` line {line} is not a JSON object, so it is not a file that this job wrote",
            hint="choose another output file",
            path=self.path,
        )

    def append(self, entry: dict[str, Any]) -> None:
        """Write one finished piece; it is on disk when this returns. A failed write leaves no torn line behind."""
        start = self._file.tell()
        try:
            rest = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
            while rest:  # a full disk takes a part and refuses the next
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
                self._file.seek(start)
            raise storage_error(self.path, error) from error
        self.entries.append(entry)

    def close(self) -> None:
        """Close the file; what was appended is already safe."""
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
