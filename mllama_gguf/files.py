"""Files that appear whole or not at all, and the one place that decides whether a file may be written.

`check_output` answers before the work begins: an output never replaces an input, and never a file of another
kind than the command writes. `replacing` then writes: to a temporary file in the same folder, which gets the
name when it is complete. A symbolic link is followed: its target is judged and replaced, the link stays.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import MllamaError, RequestError
from .reading import kind_of_file
from .temporary import create_locked, is_at, remove_leftovers, sync_folder, temporary_name
from .words import os_reason, show_name, show_size

AnyPath = str | os.PathLike[str]


# ---- what may be written -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file, told by its content.

    name:   for people, without an article: "GGUF file"
    is_one: looks at a file, open for reading at its beginning; it may raise OSError and ValueError
    """

    name: str
    is_one: Callable[[BinaryIO], bool]

    @classmethod
    def begins_with(cls, name: str, magic: bytes) -> Kind:
        """The kind of all files that begin with these bytes."""
        return cls(name, lambda file: file.read(len(magic)) == magic)

    @classmethod
    def png_by(cls, name: str, program: str) -> Kind:
        """PNG files with tEXt chunk "Software" of this program, near their beginning."""
        return cls(
            name,
            lambda file: (
                (head := file.read(512)).startswith(b"\x89PNG\r\n\x1a\n")
                and b"tEXtSoftware\0" + program.encode() in head
            ),
        )

    def fits(self, path: AnyPath) -> bool:
        """Whether a regular file is of this kind. Raises OSError."""
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            try:
                return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and self.is_one(file)
            except (ValueError, RecursionError):
                return False


def check_output(
    path: AnyPath, kind: Kind, *, inputs: Iterable[AnyPath] = (), overwrite: bool = False
) -> Path:
    """The file to write, links followed.

    inputs:    files that are read; no output replaces one, whatever name either has
    overwrite: an existing file of this kind may be replaced; without it only an empty file may

    Raises RequestError, which names the file, the reason and the way out.
    """
    name, shown = os.fspath(path), show_name(path)

    def refuse(reason: str) -> RequestError:
        return RequestError(f"cannot write {shown}: {reason}")

    if not name:
        raise RequestError(f"the output has an empty name; name the {kind.name} to write")
    if os.path.basename(name) in ("", ".", ".."):
        raise refuse("this names a folder; give the name of a file")
    try:
        target = Path(os.path.realpath(name))
    except FileNotFoundError:
        raise refuse("the current folder is gone; go to another one") from None
    except OSError as e:
        raise refuse(os_reason(e)) from e
    except ValueError as e:  # a NUL
        raise refuse("the name cannot be used") from e
    try:
        info = _stat(name)  # of the name and not of the target: /dev/stdout leads to no other path
        folder = target.parent.stat()
    except FileNotFoundError:
        raise refuse(f"there is no folder {show_name(target.parent)}; make it first") from None
    except OSError as e:
        raise refuse(os_reason(e)) from e
    except ValueError as e:  # a NUL
        raise refuse("the name cannot be used") from e
    if not stat.S_ISDIR(folder.st_mode):
        raise refuse(f"{show_name(target.parent)} is not a folder")
    if info is not None:
        if not stat.S_ISREG(info.st_mode):
            raise refuse(f"it is {kind_of_file(info.st_mode)}, no regular file; give the name of a file")
        source = next((path for path in inputs if _is(info, path)), None)
        if source is not None:
            same_name = os.path.abspath(source) == os.path.abspath(name)
            other = "" if same_name else f" {show_name(source)} by another name"
            raise refuse(f"it is the input{other}; write to another file")
        if info.st_size:
            try:
                same_kind = kind.fits(name)
            except OSError as e:
                raise refuse(f"it exists and cannot be read ({os_reason(e)}); give another name") from e
            if not same_kind:
                raise refuse(f"it exists and is not a {kind.name}; give another name, or move it away")
            if not overwrite:
                raise refuse("it exists; --overwrite replaces it")
    if words := why_protected(name):
        raise refuse(f"{words}; give another name")
    return target


def check_folder(path: AnyPath) -> Path:
    """The folder for outputs, which exists or can be made; what killed writers left in it is removed. Raises
    RequestError."""
    name, shown = os.fspath(path), show_name(path)
    if not name:
        raise RequestError("the folder for the output has an empty name; '.' is the current one")
    try:
        there = next(p for p in (Path(name), *Path(os.path.abspath(name)).parents) if _stat(p) is not None)
        mode = there.stat().st_mode
    except OSError as e:
        raise RequestError(f"cannot write to {shown}: {os_reason(e)}") from e
    except ValueError as e:  # a NUL
        raise RequestError(f"cannot write to {shown}: the name cannot be used") from e
    if not stat.S_ISDIR(mode):
        raise RequestError(
            f"cannot write to {shown}: {show_name(there)} is {kind_of_file(mode)}, not a folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(f"cannot write to {shown}: the folder {show_name(there)} cannot be written")
    remove_leftovers(Path(name))
    return Path(name)


def why_protected(path: AnyPath) -> str:
    """Why a file can be neither made nor replaced, links followed: it or its folder is write-protected. ""
    if it can, or if there is another reason, which writing it finds."""
    try:
        target = os.path.realpath(path)
        info, folder = _stat(target), os.path.dirname(target)
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            return f"the folder {show_name(folder)} cannot be written"
        if info is not None and (not info.st_mode & 0o222 or not os.access(target, os.W_OK)):
            return "it is write-protected"
    except (OSError, ValueError):
        return ""
    return ""


def check_distinct(first: AnyPath, second: AnyPath) -> None:
    """Check that two outputs are two files. Names that differ only in case or in the form of accents count as
    the same, because on some disks they are. Raises RequestError."""
    try:
        paths = [os.path.realpath(path) for path in (first, second)]
    except ValueError:  # a NUL, for which `check_output` has words
        return
    infos = [quiet_stat(path) for path in paths]
    folders = [quiet_stat(os.path.dirname(path)) for path in paths]
    names = [unicodedata.normalize("NFC", os.path.basename(path)).casefold() for path in paths]
    if (
        paths[0] == paths[1]
        or (infos[0] and infos[1] and os.path.samestat(infos[0], infos[1]))
        or (names[0] == names[1] and folders[0] and folders[1] and os.path.samestat(folders[0], folders[1]))
    ):
        raise RequestError(
            f"cannot write {show_name(second)}: it is the same file as {show_name(first)}; "
            "name two different files"
        )


def check_room(outputs: Iterable[tuple[Path, int]]) -> None:
    """Fail early if the disks cannot hold files of these sizes (bytes). Raises MllamaError."""
    need: dict[int, int] = {}
    for path, n_bytes in outputs:
        try:
            device = path.parent.stat().st_dev
            free = shutil.disk_usage(path.parent).free
        except OSError as e:
            raise cannot_write(path, e) from e
        need[device] = need.get(device, 0) + n_bytes
        if need[device] > free:
            raise MllamaError(
                f"cannot write {show_name(path)}: the disk is too full: {show_size(need[device])} needed, "
                f"{show_size(free)} free; make room, or write to another disk"
            )


def cannot_write(path: AnyPath, e: OSError) -> MllamaError:
    """The error to show for a failure to write."""
    reason = "the disk is full; make room, or write to another disk" if is_full(e) else os_reason(e)
    return MllamaError(f"cannot write {show_name(path)}: {reason}")


def is_full(e: OSError) -> bool:
    """Whether the disk, or the user's part of it, has no room left."""
    return e.errno in (errno.ENOSPC, errno.EDQUOT)


def _is(info: os.stat_result, path: AnyPath) -> bool:
    """Whether a file has this name too, through links or by a hard link."""
    other = quiet_stat(path)
    return other is not None and os.path.samestat(info, other)


def _stat(path: AnyPath) -> os.stat_result | None:
    """None: there is no such file, or a link to none. Raises OSError, ValueError."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def quiet_stat(path: AnyPath) -> os.stat_result | None:
    """What the system knows of a file; None for one that it cannot say anything about."""
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


# ---- writing -----------------------------------------------------------------------------------------------


@contextmanager
def replacing(
    path: AnyPath,
    *,
    durable: bool = False,
    overwrite: bool = True,
    kind: Kind | None = None,
    wait: float = 30.0,
    mode: int = 0o666,
) -> Iterator[BinaryIO]:
    """A binary file to write to. It becomes `path` if the block ends well, and is removed if not.

    durable:   it survives a crash of the machine once the block has ended. In any case an old content goes
               only when the new one is on the disk
    overwrite: replace a file that exists by then; if not, only an empty one
    kind:      of the file that may be replaced: what `check_output` found may be another file by then. None:
               any
    wait:      seconds to wait for another process that writes the same file; two processes that read the old
               content in the block and write the new one do so one after the other
    mode:      permissions of a new file, less the umask

    Permissions and owner of a file that is replaced are kept. Raises OSError, with `path` as its file name.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target)
    try:
        with create_locked(temporary, wait, mode) as file:
            try:
                old = keep_attributes(target, file.fileno())
                yield file
                file.flush()
                if durable or old:
                    os.fsync(file.fileno())
                if not is_at(file.fileno(), temporary):
                    raise FileNotFoundError(errno.ENOENT, "it was removed while it was written")
                if overwrite:
                    _check_kind(target, kind)
                    os.replace(temporary, target)
                else:
                    _publish(temporary, target)
            except BaseException:
                if is_at(file.fileno(), temporary):
                    with suppress(OSError):
                        temporary.unlink()
                file.raw.close()  # what is not written yet is not wanted any more
                raise
        if durable:
            sync_folder(target.parent)
    except OSError as e:
        if e.filename not in (None, os.fspath(temporary), os.fspath(target)):
            raise
        raise OSError(e.errno, os_reason(e), os.fspath(path)) from e


def write_whole(
    path: AnyPath, content: str | bytes, *, durable: bool = False, kind: Kind | None = None
) -> None:
    """Write a file that is always the old or the new one; its folder is made if missing. Text becomes UTF-8.
    kind: as in `replacing`. Raises OSError."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=durable, kind=kind) as file:
        file.write(data)


def keep_attributes(target: Path, fd: int) -> bool:
    """Give a new file the permissions and owner of the one that it will replace. Whether there is one, with
    content."""
    info = quiet_stat(target)
    if info is None or not stat.S_ISREG(info.st_mode):
        return False
    with suppress(OSError):
        if (info.st_uid, info.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(fd, info.st_uid, info.st_gid)
        os.fchmod(fd, stat.S_IMODE(info.st_mode) & 0o777)
    return info.st_size > 0


def _check_kind(target: Path, kind: Kind | None) -> None:
    """Raise OSError if a file with content is not of this kind by now."""
    info = quiet_stat(target)
    if kind is None or info is None or (stat.S_ISREG(info.st_mode) and not info.st_size):
        return
    if not stat.S_ISREG(info.st_mode) or not kind.fits(target):
        words = f"it has become another file, which is not a {kind.name}; it stays"
        raise FileExistsError(errno.EEXIST, words)


def _publish(temporary: Path, target: Path) -> None:
    """Give a complete file its name unless a file with content has it by now. Raises OSError."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if quiet_stat(target) is None:
            os.replace(temporary, target)
            return
    else:
        os.unlink(temporary)
        return
    info = quiet_stat(target)
    if info is not None and (info.st_size or not stat.S_ISREG(info.st_mode)):
        raise FileExistsError(errno.EEXIST, "another program made it meanwhile; --overwrite replaces it")
    os.replace(temporary, target)
