"""Output files that are either complete under their final name or not there at all.

Check first (`check_output`, `check_output_folder`), before any work is done; then write through `atomic_path` or
`atomic_folder`, which hand out a hidden temporary name in the same folder and rename it once everything went well.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import T3Error


def check_output(path: str | os.PathLike[str], overwrite: bool = False, need_bytes: int | None = None) -> Path:
    """Make sure that a file can be written at `path`, and return the absolute path.

    Creates the folder if it is missing and really writes (and removes) a file in it: permission bits do not tell.

    Args:
        path: the final file.
        overwrite: whether an existing file may be replaced.
        need_bytes: the size the file is expected to have; the disk must have that much left.

    Raises:
        T3Error: the file exists, is a folder, cannot be created, or the disk is too full.
    """
    final = _final(path)
    try:
        exists, folder = _exists(final), final.is_dir()
    except (OSError, ValueError) as error:
        raise T3Error(f"{final} cannot be an output file ({reason(error)}). Choose another path.") from error
    if folder:
        raise T3Error(f"{final} is a folder, and a file is to be written. Name a file in it: {final / 'name.ext'}")
    if exists and not overwrite:
        raise _in_the_way(final)
    _check_writable(final, need_bytes)
    return final


def check_output_folder(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    need_bytes: int | None = None,
    ours: Sequence[str] = ("*",),
) -> Path:
    """Make sure that a folder of output files can be put at `path`, and return the absolute path.

    A folder that exists and is empty counts as free. With `overwrite`, a folder is replaced as a whole, so it may
    hold nothing but files whose names match one of the patterns in `ours`.

    Raises:
        T3Error: something is in the way, the place cannot be written, or the disk is too full.
    """
    final = _final(path)
    try:
        _check_replaceable(final, overwrite, ours)
    except (OSError, ValueError) as error:
        if isinstance(error, T3Error):
            raise
        raise T3Error(f"{final} cannot be an output folder ({reason(error)}). Choose another path.") from error
    _check_writable(final, need_bytes)
    return final


@contextlib.contextmanager
def atomic_path(final: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `final` to write to; it becomes `final` when the block ends without an error.

    The temporary name is hidden and keeps the suffix, so that writers which guess a format from it guess right. The
    file must be closed when the block ends. On any exception, KeyboardInterrupt included, it is removed.

    Raises:
        T3Error: `final` could not take the finished file (without `overwrite`: it appeared in the meantime). Nothing
            is overwritten then, and the finished file is kept under a free name beside it, which the message gives.
    """
    target = _final(final)
    temp = _temporary(target)
    try:
        yield temp
        _let_others_read(temp)
        _sync(temp)
        _publish(temp, target, os.replace if overwrite else _rename_new)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(
    final: str | os.PathLike[str], overwrite: bool = False, ours: Sequence[str] = ("*",)
) -> Iterator[Path]:
    """As `atomic_path`, for a folder: yield a new, empty temporary folder that becomes `final` at the end.

    `overwrite` and `ours` are those of `check_output_folder`, and are checked again before the old folder goes.
    """
    target = _final(final)
    temp = _temporary(target)
    temp.mkdir(parents=True)

    def replace(source: Path, place: Path) -> None:
        _check_replaceable(place, overwrite, ours)
        _replace_folder(source, place)

    try:
        yield temp
        for file in temp.iterdir():
            _let_others_read(file)
            _sync(file)
        _publish(temp, target, replace)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def put_between(file: Path, begin: str, end: str, text: str, what: str) -> None:
    """Replace what stands between two marks of a document, which keeps both, by a blank line and `text`.

    Raises T3Error as `around_marks`; `what`: the name of the text in messages.
    """
    before, after = around_marks(file, begin, end, what)
    with atomic_path(file, overwrite=True) as temp:
        temp.write_text(f"{before}{begin}\n\n{text}{end}{after}", encoding="utf-8")


def around_marks(file: Path, begin: str, end: str, what: str) -> tuple[str, str]:
    """What stands before the first mark of a document and after the second; to be called before any work, too.

    Raises T3Error where the document cannot be read or has not both marks; `what`: the name of the text in messages.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise T3Error(f"{file} cannot be read: {reason(error)}.") from None
    before, first, rest = content.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise T3Error(f"{file} has no place for {what}: put the lines {begin} and {end} where they belong.")
    return before, after


def remove_partial(path: str | os.PathLike[str], pid: int) -> None:
    """Remove what process `pid` of this machine, which is gone, had begun and not finished of an output."""
    final = _final(path)
    for leftover in final.parent.glob(glob.escape(f".{final.stem[:40]}.partial-{pid}-") + "*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _final(path: str | os.PathLike[str]) -> Path:
    final = Path(path).absolute()
    if final.name in ("", ".."):
        raise T3Error(f"{str(path)!r} names no output. Give a path that ends in a name.")
    return final


def _exists(final: Path) -> bool:
    """As `os.path.lexists`, with an error instead of False for a name that cannot be."""
    try:
        os.lstat(final)
    except FileNotFoundError:
        return False
    return True


def _in_the_way(final: Path) -> T3Error:
    return T3Error(f"{final} exists already. Name another output (such as {_free(final)}), or allow overwriting.")


def _free(final: Path) -> Path:
    return next(sibling for sibling in _siblings(final) if not os.path.lexists(sibling))


def _siblings(final: Path) -> Iterator[Path]:
    return (final.with_name(f"{final.stem}-{number}{final.suffix}") for number in itertools.count(2))


def _temporary(final: Path) -> Path:
    # Forty characters are at most 160 bytes: the whole stays below the 255 bytes a name may have.
    return final.with_name(f".{final.stem[:40]}.partial-{os.getpid()}-{secrets.token_hex(4)}{final.suffix}")


def reason(error: BaseException) -> str:
    """Why something with a file failed, in the system's words where there are any."""
    return getattr(error, "strerror", None) or str(error)


def _check_writable(final: Path, need_bytes: int | None) -> None:
    folder = final.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(final)
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        raise T3Error(
            f"{final} cannot be written: {reason(error)} in the folder {folder}. "
            "Choose a folder you may write to, or change its permissions."
        ) from error
    if need_bytes is not None and free < need_bytes:
        raise T3Error(
            f"{final} needs about {_size(need_bytes)}, and {_size(free)} are free on that disk. "
            f"Free {_size(need_bytes - free)} there, or write to another disk."
        )


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _check_replaceable(final: Path, overwrite: bool, ours: Sequence[str]) -> None:
    if not _exists(final):
        return
    if final.is_symlink() or not final.is_dir():
        raise T3Error(f"{final} exists and is no folder of its own. Name another folder, or remove it first.")
    names = sorted(entry.name for entry in final.iterdir())
    if names and not overwrite:
        raise _in_the_way(final)
    for name in names:
        if (final / name).is_dir() or not any(fnmatch.fnmatchcase(name, pattern) for pattern in ours):
            raise T3Error(
                f"{final} also holds {name!r}, which this program did not write, so the folder is not replaced. "
                f"Name another folder (such as {_free(final)}), or move that file away."
            )


def _let_others_read(file: Path) -> None:
    """Give a file that its writer made for its owner alone, as safetensors does, the permissions of new files here."""
    with contextlib.suppress(OSError):
        if file.stat().st_mode & 0o777 == 0o600:
            probe = _temporary(file)
            try:
                probe.touch(exist_ok=False)
                file.chmod(probe.stat().st_mode & 0o777)
            finally:
                probe.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    try:
        # Opened for writing because Windows refuses to flush a read-only handle.
        with open(file, "r+b") as handle:
            os.fsync(handle.fileno())
    except OSError as error:
        raise T3Error(
            f"{file.parent} did not take the whole output ({reason(error)}). "
            "Check the free space of that disk, or write to another one."
        ) from error


def _publish(temp: Path, final: Path, rename) -> None:
    """Give the finished `temp` its final name. It may hold an hour of work: if the name is taken, keep it beside."""
    try:
        rename(temp, final)
    except (OSError, T3Error) as error:
        kept = _keep(temp, final)
        why = str(error) if isinstance(error, T3Error) else f"{final} could not be put in place ({reason(error)})."
        raise T3Error(f"{why} The finished output is kept as {kept}") from error
    _sync_folder(final.parent)


def _keep(temp: Path, final: Path) -> Path:
    for sibling in _siblings(final):
        # A sibling may be taken between any look and the rename, so rename first and believe the error.
        with contextlib.suppress(FileExistsError):
            if temp.is_dir():
                if os.path.lexists(sibling):
                    continue
                os.rename(temp, sibling)
            else:
                _rename_new(temp, sibling)
            break
    return sibling


def _rename_new(temp: Path, final: Path) -> None:
    """Rename a file, never onto an existing one: FileExistsError instead."""
    if os.name == "nt":
        os.rename(temp, final)
        return
    # rename() replaces in silence here; link() does not.
    try:
        os.link(temp, final)
    except FileExistsError:
        raise
    except OSError:
        # No hard links (FAT, some network shares): the look before the rename leaves a gap of microseconds.
        if os.path.lexists(final):
            raise FileExistsError(f"{final} exists") from None
        os.rename(temp, final)
    else:
        os.unlink(temp)


def _replace_folder(temp: Path, final: Path) -> None:
    if not final.is_dir():
        os.rename(temp, final)
        return
    old = _temporary(final)
    os.rename(final, old)
    try:
        os.rename(temp, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    # Makes the rename survive a power cut; Windows cannot open folders and some file systems refuse.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def utf8_text(text: str) -> str:
    """What UTF-8 can hold of a text: halves of characters, and bytes of a path that are no UTF-8, as `\\ud83d`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold, with characters as they are: halves of characters, as `\\ud83d`, are escaped."""
    # They stand inside of strings, where this is how JSON escapes them too.
    return utf8_text(json.dumps(value, ensure_ascii=False, indent=indent))
