"""Stage 1, files: put in place whole or not at all, and read with errors that name them.

What is written goes to a new folder beside its target first, is flushed to the disk, and takes the
target's place by one rename. The process that writes such a staging folder holds a lock on it: what
a killed one left behind is removed by the next that writes there.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_STAGING = ".gatepack-tmp"
_ASIDE = ".old"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_MOUNTED = (
    "{} is a mount point or part of another file system, so that no folder can take its place: "
    "give the result a folder in it (--out)"
)


def refuse_out(out: str | os.PathLike, source: str | os.PathLike | None = None) -> None:
    """ValueError if a folder cannot be put in the place of `out` without loss, OSError of a file.

    That is where it is a mount point, where this process works in it, and where it is the folder of
    source, the model that is read: a folder, or a file in one.
    """
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is not a folder: name another for the result (--out)")
    if os.path.ismount(out):
        raise ValueError(_MOUNTED.format(out))
    if Path.cwd().is_relative_to(out):
        raise ValueError(
            f"{out} is the working directory or holds it, and saving replaces the whole folder: "
            "give the result a folder of its own (--out)"
        )
    if source is None or not out.exists():
        return
    folder = Path(source).expanduser()
    folder = folder.parent if folder.is_file() else folder
    if folder.exists() and folder.samefile(out):
        raise ValueError(
            f"{out} is the folder of the model itself, whose files would be replaced: give the "
            "result another folder (--out)"
        )


def refuse_folder(out: str | os.PathLike) -> None:
    """ValueError if there is a folder where a file is to be written."""
    if Path(out).is_dir():
        raise ValueError(f"{out} is a folder: name the file to write")


@contextlib.contextmanager
def replaced_folder(directory: str | os.PathLike, superseded: re.Pattern) -> Iterator[Path]:
    """A staging folder, put in the place of `directory` by one rename if all goes well.

    Files of `directory` stay, but for those that the new folder has too and those whose names
    `superseded` matches, and so do its permissions. Raises OSError, naming the folder, if writing
    fails; what was there is then unchanged. ValueErrors and FloatingPointErrors pass, as does that
    of refuse_out.
    """
    refuse_out(directory)
    directory = Path(directory).resolve()
    with contextlib.ExitStack() as stack:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(_staging(directory))
            if directory.exists():
                _take_mode(staging, directory, 0o700)
        except OSError as error:
            raise OSError(f"cannot write beside {directory}: {error}") from error
        try:
            yield staging
            for path in (*staging.rglob("*"), staging):
                _finish(path)
            if directory.exists():
                _carry_over(directory, staging, superseded)
                _take_mode(staging, directory)
            _put(staging, directory)
        except (ValueError, FloatingPointError):
            raise
        except Exception as error:
            raise OSError(
                f"saving to {directory} failed, what was there is unchanged: {error}"
            ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write near the target, renamed to it at the end; a failure leaves the target."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _staging(path) as folder:
        yield folder / path.name
        _finish(folder / path.name)
        os.replace(folder / path.name, path)


def files_in(folder: Path) -> list[Path]:
    """The files of a folder, at any depth, sorted; none where there is no folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_json(path: Path, value) -> None:
    """Writes the file whole or not at all."""
    with replacing(path) as staging:
        staging.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Writes the file whole or not at all."""
    with replacing(path) as staging:
        save_file({name: t.contiguous() for name, t in tensors.items()}, staging, metadata=metadata)


def plain(value):
    """value with paths as strings and tuples as lists, as JSON gives them back."""
    return json.loads(json.dumps(value, default=str))


def parse_json(text: str):
    """json.loads; a ValueError also for what is nested too deep, or holds a lone surrogate."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate, which UTF-8 does not have") from error
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError naming the file for anything else."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata); ValueError naming the file if it is damaged."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {
                name: handle.get_tensor(name) for name in handle.keys()
            }, handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove {path.parent} to start over"
        ) from error


def left_aside(directory: Path) -> Path | None:
    """What was in `directory` before a save that was killed between two renames, if one was."""
    found = [path for path in _beside(directory) if path.name.endswith(_ASIDE)]
    return found[0] if found and not directory.exists() else None


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A new folder beside path, removed at the end; those of dead processes are removed too."""
    _sweep(path)
    taken = False
    while not taken:
        name = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_STAGING, dir=path.parent)
        staging = Path(name)
        # Another process may sweep it away before the lock is held.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(staging, os.O_RDONLY)
            taken = _lock(lock) is not False and staging.exists()
            if not taken:
                os.close(lock)
    try:
        os.chmod(staging, 0o777 & ~_umask())
        yield staging
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Removes what processes left beside path that were killed while they wrote it.

    What one of them had moved aside and not replaced yet is moved back.
    """
    for leftover in sorted(_beside(path)):
        owner = Path(str(leftover).removesuffix(_ASIDE))
        with contextlib.suppress(OSError), _dead(owner) as dead:
            if dead and leftover != owner and not path.exists():
                os.rename(leftover, path)
            elif dead:
                shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _dead(staging: Path) -> Iterator[bool]:
    """Whether no process writes a staging folder; until the end, none can."""
    if not staging.exists():
        yield True
        return
    lock = os.open(staging, os.O_RDONLY)
    try:
        yield _lock(lock) is True
    finally:
        os.close(lock)


def _beside(path: Path) -> list[Path]:
    """Staging folders of path, and what was moved aside for them."""
    form = re.compile(
        rf"\.{re.escape(path.name)}\.\w{{8}}{re.escape(_STAGING)}({re.escape(_ASIDE)})?"
    )
    if not path.parent.is_dir():
        return []
    return [other for other in path.parent.iterdir() if form.fullmatch(other.name)]


def _lock(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def _finish(path: Path) -> None:
    """Gives a new file the mode that the umask asks for, and waits until it is on the disk."""
    if path.is_symlink():
        return
    if path.is_file():
        os.chmod(path, 0o666 & ~_umask())  # safetensors makes files that only their owner reads
    _flush(path)


def _take_mode(path: Path, like: Path, also: int = 0) -> None:
    """Gives a folder the permissions of another, and its owner and group as far as this process
    may; also: bits to set besides."""
    found = like.stat()
    for owner in (-1, found.st_uid):
        with contextlib.suppress(OSError, AttributeError):
            os.chown(path, owner, found.st_gid)
    os.chmod(path, stat.S_IMODE(found.st_mode) | also)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _carry_over(directory: Path, staging: Path, superseded: re.Pattern) -> None:
    """Gives staging what stays of directory, as hard links: there is no moment without it."""
    for path in directory.iterdir():
        target = staging / path.name
        if superseded.fullmatch(path.name) or target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=link)
        else:
            link(path, target)


def link(source: str | Path, target: str | Path) -> None:
    """A hard link where the file system has them, else a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def _put(staging: Path, directory: Path) -> None:
    """Moves staging to directory; what was there goes away, after it."""
    try:
        _replace(staging, directory)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise OSError(_MOUNTED.format(directory)) from error
        raise
    with contextlib.suppress(OSError):  # it is in place by now
        _flush(directory.parent)


def _replace(staging: Path, directory: Path) -> None:
    try:
        os.rename(staging, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(staging, directory):
            aside = Path(f"{staging}{_ASIDE}")
            os.rename(directory, aside)
            try:
                os.rename(staging, directory)
            except BaseException:
                os.rename(aside, directory)
                raise
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step; False where the kernel or the file system cannot."""
    renameat2 = None
    with contextlib.suppress(OSError, AttributeError):
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
