"""Find the files in a tar by their headers, so that each is read by its offset and no content is held in memory."""

import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from d2f_fast.errors import DatasetError, printable

BLOCK = tarfile.BLOCKSIZE
# A name is far shorter; a hostile header must not fill the memory.
_MAX_NAME_BYTES = 1 << 16
# Programs fill a tar with zeros up to a whole record, which has 10 KiB as a rule and a few MiB where it was asked for.
_MAX_FILLING, _PIECE = 1 << 26, 1 << 20
_GNU_LABEL = b"V"  # the name of a whole tar
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarMember(NamedTuple):
    """A file in a tar.

    Attributes:
        name: Its path in the tar, with forward slashes.
        start: Offset of its content in the tar, in bytes.
        size: Size of its content, in bytes.
        head: First bytes of its content, at most 512, with what follows where it is shorter.
    """

    name: str
    start: int
    size: int
    head: bytes


def padded(size: int) -> int:
    """Return a size rounded up to the whole blocks that a tar stores."""
    return -(-size // BLOCK) * BLOCK


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for reading by offset inside a `with` block, and yield its descriptor.

    Args:
        path: The file.

    Raises:
        DatasetError: It cannot be opened, or is no ordinary file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # A named pipe would wait for a writer.
    except OSError as error:
        raise DatasetError(f"{printable(path)} cannot be read ({error.strerror}): check the file") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DatasetError(f"{printable(path)} is not an ordinary file: give a file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, size: int, offset: int, path: Path) -> bytes:
    """Return bytes of an open file.

    Args:
        descriptor: Descriptor of the file.
        size: Number of bytes.
        offset: Offset of the first one.
        path: The file, for messages.

    Raises:
        DatasetError: The file ends before them, or cannot be read.
    """
    try:
        content = os.pread(descriptor, size, offset)
    except OSError as error:
        raise DatasetError(f"{printable(path)} cannot be read ({error.strerror}): check the file") from error
    if len(content) != size:
        raise _cut_short(path)
    return content


def tar_members(path: Path) -> Iterator[TarMember]:
    """Yield the files in a tar, in their order; folders are passed over.

    Python's own reader takes a damaged header, or the end of a file that was cut short, for the end of the tar.

    Args:
        path: Tar without compression, in the formats ustar, GNU or pax.

    Raises:
        DatasetError: The file cannot be read, is compressed, cut short, damaged or no tar, or goes on behind its end;
            or a member is not a file, or has an absolute path or one with "..".
    """
    with opened(path) as descriptor:
        total, offset, long_name = os.fstat(descriptor).st_size, 0, ""
        while True:
            blocks = read_at(descriptor, min(2 * BLOCK, max(total - offset, BLOCK)), offset, path)
            if not any(blocks[:BLOCK]):
                _check_end(path, descriptor, offset, total)
                return
            header = _header(path, blocks[:BLOCK], offset)
            start = offset + BLOCK
            if start + header.size > total:
                raise _cut_short(path)
            offset = start + padded(header.size)
            if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                if header.size > _MAX_NAME_BYTES:
                    raise DatasetError(f"{printable(path)}: a header has {header.size} bytes: make the tar again")
                long_name = _long_name(path, header.type, read_at(descriptor, header.size, start, path))
            elif header.type not in (tarfile.XGLTYPE, tarfile.DIRTYPE, _GNU_LABEL):
                name, long_name = long_name or header.name, ""
                _check_member(path, name, header.type)
                yield TarMember(name.removeprefix("./"), start, header.size, blocks[BLOCK:])


def _check_end(path: Path, descriptor: int, end: int, total: int) -> None:
    """Refuse a tar in which more than the usual filling follows the first empty block, which ends it."""
    pieces = ((at, min(_PIECE, total - at)) for at in range(end, total, _PIECE))
    if total - end <= _MAX_FILLING and not any(any(read_at(descriptor, size, at, path)) for at, size in pieces):
        return
    raise DatasetError(
        f"{printable(path)} goes on behind the end of the tar at byte {end}, as joined tars and unfinished downloads"
        " do: download or make it again, and keep joined tars apart"
    )


class _Header(NamedTuple):
    """What is read of a header: the name, the size of the content in bytes, and the type of the member."""

    name: str
    size: int
    type: bytes


def _header(path: Path, block: bytes, offset: int) -> _Header:
    """Return the header in a block, or refuse a block that is none; Python's own parser takes six times as long."""
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
        size = int.from_bytes(block[125:136]) if block[124] == 0x80 else int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        checksum, size = -1, -1
    if size < 0 or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        for magic, program in _COMPRESSIONS.items():
            if offset == 0 and block.startswith(magic):
                raise DatasetError(f"{printable(path)} is compressed with {program}: decompress it first")
        raise DatasetError(
            f"{printable(path)} is not a tar file, or is damaged at byte {offset}: download or make it again"
        )
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == tarfile.POSIX_MAGIC[:6] and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    # Tars from before ustar mark a folder by its name alone.
    kind = tarfile.DIRTYPE if block[156:157] == tarfile.AREGTYPE and name.endswith(b"/") else block[156:157]
    return _Header(name.decode("utf-8", "surrogateescape"), size, kind)


def _check_member(path: Path, name: str, kind: bytes) -> None:
    """Refuse a member that is not an ordinary file, or whose path leaves the place where a tar is unpacked."""
    if kind not in tarfile.REGULAR_TYPES or kind == tarfile.GNUTYPE_SPARSE:
        raise DatasetError(
            f"{printable(path)}: {printable(name)} is not an ordinary file: pack the files themselves (tar -h"
            " --hard-dereference)"
        )
    if name.startswith("/") or ".." in name.split("/"):
        raise DatasetError(
            f"{printable(path)}: the name {printable(name)} leaves the folder of the tar: take it from another source"
        )


def _long_name(path: Path, kind: bytes, content: bytes) -> str:
    """Return the name that a header gives to the member after it; "" where it gives none."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    name = ""
    while content:  # Each record of pax is "<its length> <key>=<value>\n".
        length, _, _ = content.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 8 else 0
        key, equal, value = content[len(length) + 1 : size].partition(b"=")
        if not equal:
            raise DatasetError(f"{printable(path)}: a pax header is damaged: download or make it again")
        if key == b"path":
            name = value.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        if key == b"size" or key.startswith(b"GNU.sparse"):
            raise DatasetError(f"{printable(path)}: sparse and very large members are not read: make the tar again")
        content = content[size:]
    return name


def _cut_short(path: Path) -> DatasetError:
    """Return the error for a tar that ends too early."""
    return DatasetError(f"{printable(path)} is cut short: download or make it again")
