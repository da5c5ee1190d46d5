"""Finding image files, reading them, and everything that can be wrong with them."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.data.test_preprocessing import noise
from vit_probe import InputError
from vit_probe.data.image_files import check_image, decode_image, find_images, open_file, printable, read_image


class TestReadImage:
    def test_exif_orientation_is_applied(self, tmp_path: Path) -> None:
        image = noise(20, 30)
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned by 90 degrees
        image.save(tmp_path / "turned.png", exif=exif)
        np.testing.assert_array_equal(
            np.asarray(read_image(tmp_path / "turned.png")), np.asarray(image.rotate(-90, expand=True))
        )

    def test_sixteen_bits_are_scaled_to_eight(self, tmp_path: Path) -> None:
        grey = np.arange(0, 256, dtype=np.uint16).reshape(16, 16)
        Image.fromarray(grey * 257).save(tmp_path / "grey.png")
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "grey.png"))[..., 1], grey)

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_values_of_unknown_range_raise(self, dtype: type, tmp_path: Path) -> None:
        Image.fromarray(np.ones((8, 8), dtype=dtype)).save(tmp_path / "odd.tif")
        with pytest.raises(InputError, match=r"odd.tif holds 32-bit values \(mode [IF]\) of unknown range; convert it"):
            read_image(tmp_path / "odd.tif")

    def test_too_many_pixels(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        with pytest.raises(InputError, match=r"b.png has more pixels than Pillow decodes by default; downsize it"):
            read_image(folder / "b.png")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no image file .*missing.png"):
            read_image(tmp_path / "missing.png")

    def test_not_an_image(self, folder: Path) -> None:
        with pytest.raises(InputError, match=r"notes.txt is not a readable image file"):
            read_image(folder / "notes.txt")

    def test_sixteen_bits_are_rounded(self, tmp_path: Path) -> None:
        grey = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
        Image.fromarray(grey).save(tmp_path / "grey.png")
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "grey.png"))[..., 0], np.round(grey / 257))

    @pytest.mark.parametrize("name", ["a.JPG", "b.png"])
    def test_truncated(self, folder: Path, name: str) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=f"{name} cannot be decoded .* truncated"):
            read_image(folder / name)


class TestFindImages:
    def test_a_folder_is_searched_in_order(self, folder: Path) -> None:
        names = [str(path.relative_to(folder)) for path in find_images([folder])]
        assert names == ["a.JPG", "b.png", "below/d.png", "c.jpeg"]

    def test_documents_and_hidden_files_are_ignored(self, folder: Path) -> None:
        (folder / ".hidden").mkdir()
        for name in ("paper.pdf", "._a.jpg", ".hidden/e.png"):
            (folder / name).write_bytes(b"")
        assert len(find_images([folder])) == 4

    def test_files_keep_their_order(self, folder: Path) -> None:
        assert [path.name for path in find_images([folder / "c.jpeg", folder / "a.JPG"])] == ["c.jpeg", "a.JPG"]

    def test_no_such_source(self, folder: Path) -> None:
        with pytest.raises(InputError, match=r"there is no image file or folder .*nowhere"):
            find_images([folder / "nowhere"])

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"the folder .* contains no image files"):
            find_images([tmp_path])

    def test_patterns_find_the_same_files_as_the_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / ".hidden").mkdir()
        noise(8, 8).save(folder / ".hidden" / "e.png")
        monkeypatch.chdir(folder)
        assert (
            find_images(["**/*"]) == find_images(["."]) == [Path("a.JPG"), Path("b.png"), Path("below/d.png"), Path("c.jpeg")]
        )
        assert find_images(["**.png"]) == [Path("b.png")]
        assert find_images(["be*/*.png"]) == find_images(["below/*"]) == [Path("below/d.png")]
        assert find_images([".hidden/*.png"]) == [Path(".hidden/e.png")]

    def test_links_are_followed_but_not_in_circles(self, folder: Path) -> None:
        for name in ("circle", "below/circle"):
            (folder / name).symlink_to(folder)
        (folder / "link.png").symlink_to(folder / "b.png")
        names = ["a.JPG", "b.png", "d.png", "c.jpeg", "link.png"]
        assert [path.name for path in find_images([folder])] == names
        assert [path.name for path in find_images([f"{folder}/**/*"])] == names
        assert read_image(folder / "link.png").tobytes() == read_image(folder / "b.png").tobytes()

    def test_broken_links_are_listed_and_cannot_be_read(self, folder: Path) -> None:
        (folder / "broken.png").symlink_to(folder / "nowhere.png")
        (folder / "loop.png").symlink_to(folder / "loop.png")
        for source in (folder, f"{folder}/*"):
            assert {"broken.png", "loop.png"} < {path.name for path in find_images([source])}
        for name in ("broken.png", "loop.png"):
            with pytest.raises(InputError, match=rf"{name} is a broken link$"):
                check_image(find_images([folder / name])[0])

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_pipes_sockets_and_folders_are_left_out(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)  # the path of a socket may be 100 characters long
        os.mkfifo("pipe.png")
        Path("folder.png").mkdir()
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket.png")
            for source in (folder, f"{folder}/*"):
                assert not {"pipe.png", "folder.png", "socket.png"} & {path.name for path in find_images([source])}
            for name in ("pipe.png", "socket.png"):
                for read in (read_image, check_image, open_file):
                    with pytest.raises(InputError, match=f"{name} is not a regular file"):
                        read(Path(name))

    @pytest.mark.parametrize("name", ["x" * 300 + ".jpg", "nul\0.jpg", "caf\udce9\n.jpg"])
    def test_names_that_no_file_can_have_or_that_cannot_be_printed(self, name: str) -> None:
        with pytest.raises(InputError, match="there is no image file or folder") as error:
            find_images([name])
        with pytest.raises(InputError, match=r"there is no image file|cannot be read .File name too long.") as other:
            read_image(name)
        for raised in (error, other):
            str(raised.value).encode()
            assert str(raised.value).isprintable()


class TestUnreadable:
    """Whatever Pillow's decoders run into is one InputError of that image."""

    def test_an_empty_file(self) -> None:
        with pytest.raises(InputError, match=r"^empty.jpg is not a readable image file$"):
            decode_image(b"", "empty.jpg")

    @pytest.mark.parametrize("error", [KeyError("tile"), ZeroDivisionError(), TypeError("no"), RuntimeError("bad"), EOFError()])
    def test_every_exception_of_pillow(self, error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "convert", fail)
        monkeypatch.setattr(ImageFile.ImageFile, "verify", fail)
        for read in (read_image, check_image):
            with pytest.raises(InputError, match=rf"a.JPG cannot be decoded \(({type(error).__name__}|'tile'|no|bad)\)"):
                read(folder / "a.JPG")

    def test_too_little_memory(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise MemoryError

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(InputError, match=r"b.png needs more memory than there is; downsize it"):
            read_image(folder / "b.png")

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"])
    def test_damaged_files(self, kind: str) -> None:
        """Bytes changed at random, headers above all, give an image or an InputError."""
        whole, random = io.BytesIO(), np.random.default_rng(0)
        noise(12, 9).save(whole, kind)
        failures = 0
        for _ in range(60):
            data = bytearray(whole.getvalue())
            for place in random.integers(0, min(len(data), 120), 3):
                data[place] = random.choice([0, 1, 127, 255])
            try:
                decode_image(bytes(data), "damaged")
            except InputError:
                failures += 1
        assert failures

    def test_postscript_is_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n")
        with pytest.raises(InputError, match=r"a.jpg is not a readable image file"):
            read_image(tmp_path / "a.jpg")


def test_printable_names_stay_as_they_are() -> None:
    for name in ("café.jpg", "写真 1.png", "narrow\u202fspace.png", "[bold]<b>$x$.png"):
        assert printable(name) == name
    assert printable("a\tb\x1b[31m\udcff") == r"a\tb\x1b[31m\udcff"
