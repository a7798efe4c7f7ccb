"""What made a picture, written into it: a PNG's text chunks.

    chunk: length of the data [4 bytes], kind [4], data, CRC-32 of kind and data [4]
    data of a tEXt chunk: keyword, a zero byte, text (Latin-1)

(PNG Specification, third edition, W3C 2025, sections 5.3 and 11.3.3.)
"""

import shlex
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from marref import files

ROOT = Path(__file__).parents[1]
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def stamp(path: Path, command: str, **more: str) -> None:
    """Write the commit and the command into a PNG; its pixels stay as they are.

    Parameters
    ----------
    path : pathlib.Path
    command : str
        What drew it, see `command_of`.
    **more
        Further keywords and texts, or another ``Commit`` than the one that is checked out.
    """
    texts = {"Commit": _commit(), "Command": command, **more}
    written = [
        _chunk(b"tEXt", f"{keyword}\0{text}".encode("latin-1")) for keyword, text in texts.items()
    ]
    header, *rest = [
        _chunk(kind, data)
        for kind, data in _chunks(path)
        if kind != b"tEXt" or _text(data)[0] not in texts
    ]
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"".join([_SIGNATURE, header, *written, *rest]))


def metadata(path: Path) -> dict[str, str]:
    """Read the texts of a PNG, by keyword."""
    return dict(_text(data) for kind, data in _chunks(path) if kind == b"tEXt")


def command_of(program: str) -> str:
    """Give the command that this process was started with; ``program`` is its beginning."""
    return shlex.join([*program.split(), *sys.argv[1:]])


def _commit() -> str:
    """Name the commit that is checked out, or "unknown" in a copy without a history."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _chunks(path: Path) -> Iterator[tuple[bytes, bytes]]:
    contents = path.read_bytes()
    if not contents.startswith(_SIGNATURE):
        raise ValueError(f"{path}: no PNG")
    start = len(_SIGNATURE)
    while start < len(contents):
        length, kind = struct.unpack_from(">I4s", contents, start)
        yield kind, contents[start + 8 : start + 8 + length]
        start += length + 12


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def _text(data: bytes) -> tuple[str, str]:
    keyword, _, text = data.decode("latin-1").partition("\0")
    return keyword, text
