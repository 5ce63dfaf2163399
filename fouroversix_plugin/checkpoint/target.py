"""The folder a conversion makes: unfinished under another name, then at once and complete under its own.

Until everything is there it is ``DST.partial``, with a manifest that says which conversion it belongs to. So one that
was killed goes on where it stopped, nothing half done looks like a checkpoint, and a folder that somebody else made is
never touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from fouroversix_plugin.checkpoint.files import CONFIG, CheckpointError, read_json

_MANIFEST: Final = ".fouroversix-conversion.json"
_SAID: Final = {"files": "shard size", "headers": "source"}
"""Keys of a manifest in the words of who started the conversion."""


def partial_folder(target: Path) -> Path:
    """Where an unfinished ``target`` is."""
    return target.with_name(target.name + ".partial")


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse a target whose making would lose something, or that cannot be told from the source.

    Raises:
        CheckpointError: it is the source, lies in it or holds it; or exists, and is not to be or cannot safely be
            overwritten; or has no name of its own.
        OSError: its name is too long for the names that are made of it.
    """
    if target.name in ("", ".."):
        raise CheckpointError(f"{target}: has no name of its own, needed a folder to make, such as {target / 'NAME'}")
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{target}: got a name that is not UTF-8, which safetensors needs") from error
    with suppress(FileNotFoundError, NotADirectoryError):
        _replaced(target).lstat()  # of all these names the longest: better now than after the work
    real, start = (Path(os.path.realpath(path)) for path in (target, source))  # never fails, as links in a circle would
    if real == start:
        raise CheckpointError(f"{target}: is the source itself; name another folder")
    if start in real.parents:
        raise CheckpointError(f"{target}: lies inside the source; name a folder outside of {source}")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise CheckpointError(f"{target}: exists already; name another folder, or replace it with --overwrite")
    if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file()):
        raise CheckpointError(f"{target}: is no checkpoint (it has no {CONFIG}), so it is not overwritten")
    if real in start.parents:
        raise CheckpointError(f"{target}: holds the source, so it is not overwritten")
    if target.is_mount():
        raise CheckpointError(f"{target}: is a mount point, which cannot be replaced; name a folder in it")
    folders = () if target.is_symlink() else (folder for folder, _, _ in os.walk(target))
    locked = next((folder for folder in folders if not os.access(folder, os.W_OK | os.X_OK)), None)
    if locked is not None:
        raise CheckpointError(f"{locked}: is write-protected and could not be removed, so {target} is not overwritten")


@contextmanager
def unfinished(target: Path, manifest: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """``target.partial``, for one process alone; removed on failure, kept on interruption."""
    partial = partial_folder(target)
    created = [path for path in (partial, *partial.parents) if not path.exists()]
    if resume and created:
        raise CheckpointError(f"{partial}: does not exist, so there is nothing to resume; start without --resume")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial}: another process is writing {target}; wait for it to finish") from None
        begun = (partial / _MANIFEST).is_file()
        if not begun and {path.name for path in partial.iterdir()} - {_MANIFEST + ".tmp"}:
            raise CheckpointError(
                f"{partial}: is not what an interrupted conversion left (it has no {_MANIFEST}), so it is not touched; "
                "remove it, or name another target"
            )
        if resume and begun:
            _check_manifest(partial, manifest)
        else:
            _clear(partial)
            growing = partial / (_MANIFEST + ".tmp")
            write_json(growing, manifest)
            growing.rename(partial / _MANIFEST)
        try:
            yield partial
        except Exception:
            with suppress(OSError):
                _clear(partial)
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                for parent in created[1:]:
                    parent.rmdir()
            raise
    finally:
        os.close(descriptor)


def _clear(partial: Path) -> None:
    """Remove all but the manifest: what is left, should this be interrupted, is still known as ours."""
    for leftover in partial.iterdir():
        if leftover.name != _MANIFEST:
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_manifest(partial: Path, manifest: Mapping[str, Any]) -> None:
    found = read_json(partial / _MANIFEST)
    changed = [key for key in manifest if found.get(key) != manifest[key]]
    if changed:
        raise CheckpointError(
            f"{partial}: was started with another {' and '.join(_SAID.get(key, key) for key in changed)}; give the "
            "same arguments and source, or start again without --resume"
        )


def publish(partial: Path, target: Path) -> None:
    """Give the finished folder its name. Killed at any step, a resumed conversion finds the manifest and goes on."""
    for folder in (partial, *(path for path in partial.iterdir() if path.is_dir())):
        _sync(folder)
    replaced = _replaced(target)
    if target.exists():
        _remove(replaced)
        target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    _clean_up(target)


def published(target: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether ``target`` is complete but for its last clean-up, which is then done."""
    if not (target / _MANIFEST).is_file():
        return False
    _check_manifest(target, manifest)
    _clean_up(target)
    return True


def _clean_up(target: Path) -> None:
    _sync(target.parent)
    _remove(_replaced(target))
    (target / _MANIFEST).unlink(missing_ok=True)
    _sync(target)


def _replaced(target: Path) -> Path:
    """Where an overwritten target waits for its removal: a name that nobody else gives."""
    return target.with_name(f".{target.name}.fouroversix-replaced")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Text that is on the disk when this returns; what UTF-8 cannot say becomes a question mark."""
    with path.open("w", encoding="utf-8", errors="replace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def copy_file(source: Path, target: Path) -> None:
    """The same for a copy, which appears under its name whole."""
    growing = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, growing)
    _sync(growing)
    growing.rename(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
