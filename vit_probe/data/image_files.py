"""Finding image files and reading them, whatever they hold."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from glob import has_magic
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_probe.errors import InputError

__all__ = [
    "READ_ERRORS",
    "check_image",
    "decode_image",
    "decoding",
    "expand_source",
    "find_images",
    "open_file",
    "printable",
    "read_image",
    "upright_rgb",
]

READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
"""What the dataset classes of torch and Hugging Face raise for images that cannot be read: Pillow's exceptions."""
# Pillow registers endings of documents and volumes too (PDF, EPS, HDF5, ...), which a folder of photographs may also hold.
_PHOTOGRAPH_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def read_image(path: str | Path) -> Image.Image:
    """Read and decode an image file as RGB, turned upright according to its EXIF orientation.

    Raises:
        InputError: If the file does not exist, is not a regular file or not an image, or cannot be decoded.
    """
    name = printable(path)
    with decoding(name), open_file(path) as file, _open_image(file) as image:
        return upright_rgb(image, name)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file as `read_image` does; errors call the image `name`."""
    with decoding(name), _open_image(BytesIO(data)) as image:
        return upright_rgb(image, name)


def check_image(path: str | Path) -> None:
    """Check that an image file is readable, without decoding it where possible.

    Reads the header and, of a PNG file, the checksums. JPEG files have no checksums: a truncated one passes.

    Raises:
        InputError: As `read_image`.
    """
    try:
        with open_file(path) as file, _open_image(file) as image:
            valid = image.mode not in ("I", "F")
            image.verify()
    except Exception:  # see `decoding`
        valid = False
    if not valid:  # Pillow decodes some files that fail `verify`, so only decoding can tell.
        read_image(path)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn every exception for an unreadable image into an InputError that calls the image `name`.

    Pillow's decoders raise what a damaged file makes their code run into: KeyError, TypeError, ZeroDivisionError and others.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no image file {name}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a readable image file") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{name} has more pixels than Pillow decodes by default; downsize it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except MemoryError:
        raise InputError(f"{name} needs more memory than there is; downsize it") from None
    except OSError as error:
        if error.errno is not None:  # of the operating system, else of Pillow; without the path, which is `name` once more
            raise InputError(f"{name} cannot be read ({error.strerror})") from None
        raise InputError(f"{name} cannot be decoded ({error}); the file may be truncated") from None
    except Exception as error:
        reason = printable(str(error) or type(error).__name__)
        raise InputError(f"{name} cannot be decoded ({reason}); the file may be truncated") from error


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file for reading. Opening a named pipe would wait for a writer, and reading a device may never end.

    Raises:
        InputError: If the path names something else, or a broken link.
        OSError: If there is no such file, or it cannot be opened.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(f"{printable(path)} is a broken link")
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # the path contains a NUL character
        raise FileNotFoundError(path) from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{printable(path)} is not a regular file")
    return open(path, "rb")


def printable(name: str | Path) -> str:
    r"""A file's name for results and messages: control characters and bytes that are not UTF-8 become escapes of Python.

    Other names stay as they are. Tables, JSON, figures and terminals cannot hold the surrogates by which Python represents
    bytes that are not UTF-8.

    Examples:
        >>> print(printable("caf\udce9\n.jpg"), printable("café.jpg"))
        caf\udce9\n.jpg café.jpg
    """
    return _UNPRINTABLE.sub(lambda character: character[0].encode("unicode_escape").decode(), str(name))


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """The image as 8-bit RGB, turned upright; 16-bit values are scaled, transparency is ignored."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255
    if image.mode in ("I", "F"):
        raise InputError(f"{name} holds 32-bit values (mode {image.mode}) of unknown range; convert it to 8 or 16 bits")
    return image.convert("RGB")


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """List the image files of files, folders and patterns, in the order of `sources`; see `expand_source`.

    Raises:
        InputError: If a source does not exist, a folder contains no image files, or a pattern matches none.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("b.png", "a.jpg", "notes.txt"):
        ...         (Path(folder) / name).touch()
        ...     [path.name for path in find_images([folder])], [path.name for path in find_images([f"{folder}/*.png"])]
        (['a.jpg', 'b.png'], ['b.png'])
    """
    paths: list[Path] = []
    for source in sources:
        files = expand_source(source)
        if files == [Path(source)] and not os.path.lexists(source):
            raise InputError(f"there is no image file or folder {printable(source)}")
        paths += files
    return paths


def expand_source(source: str | Path) -> list[Path]:
    """List the image files in a folder and its subfolders, or those that match a pattern such as `photos/**/*.jpg`.

    Image files are recognised by their extensions, sorted by path, and listed without hidden ones. Links to files are
    followed, broken ones listed too, and links to folders followed only where a pattern names their level with `*`. Pipes,
    sockets and devices are left out. Any other source is returned as a single file, whether it exists or not.

    Raises:
        InputError: If a folder contains no image files, or a pattern matches none.
    """
    path = Path(source)
    if os.path.isdir(path):
        files = _image_files(path, path.rglob("*"))
        if not files:
            raise InputError(f"the folder {printable(source)} contains no image files")
        return files
    if has_magic(str(source)) and not os.path.lexists(path):  # a file may be called [1].jpg
        first = next(index for index, part in enumerate(path.parts) if has_magic(part))
        # As in a shell, two asterisks beside other characters mean one. Path.glob, other than glob.glob, does not follow links
        # to folders for `**`, which could lead in circles.
        pattern = Path(*(part if part == "**" else re.sub(r"\*+", "*", part) for part in path.parts[first:]))
        folder = Path(*path.parts[:first])
        files = _image_files(folder, folder.glob(str(pattern)))
        if not files:
            raise InputError(f"the pattern {printable(source)} matches no image files")
        return files
    return [path]


def _image_files(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """The visible image files among `paths` in `folder`, sorted; broken links are kept, so that they are reported."""
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in _PHOTOGRAPH_FORMATS}
    return sorted(
        path
        for path in set(paths)
        if path.suffix.lower() in extensions
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (os.path.isfile(path) or not os.path.exists(path))
    )


def _open_image(file: BinaryIO) -> Image.Image:
    return Image.open(file, formats=_readable_formats())


@cache
def _readable_formats() -> tuple[str, ...]:
    """All of Pillow's formats but EPS, for which it would run the file, whatever its name, as a program in Ghostscript."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")
