"""Folders of images: links, suffixes, and files that are not read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from taoq.errors import TaoqError
from taoq.tasks.image_files import image_files, image_suffixes


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    cat = picture(tmp_path / "elsewhere" / "cats" / "deep" / "1.png")
    dog = picture(tmp_path / "elsewhere" / "dog.png")
    folder = tmp_path / "data"
    (folder / "dog").mkdir(parents=True)
    (folder / "cat").symlink_to(cat.parent.parent)
    (folder / "dog" / "2.png").symlink_to(dog)
    assert image_files(folder, "x") == [folder / "cat" / "deep" / "1.png", folder / "dog" / "2.png"]


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_above_ends(target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = picture(tmp_path / "data" / "a" / "b" / "1.png")
    link = image.parent / "again"
    link.symlink_to(target)
    assert image_files(tmp_path / "data", "x") == [image]
    assert image_files(tmp_path / "data", "x") == [image]
    assert caplog.messages[0].startswith(f"x: {link}")
    assert "is left out: a link leads back to the folder " in caplog.messages[0]


def test_folders_that_lead_to_each_other_end(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "one" / "1.png"), picture(tmp_path / "two" / "2.png")
    (one.parent / "to_two").symlink_to(two.parent)
    (two.parent / "to_one").symlink_to(one.parent)
    assert image_files(one.parent, "x") == [one, one.parent / "to_two" / "2.png"]


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = picture(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("nothing.png")
    assert image_files(tmp_path, "x") == [image]
    (tmp_path / "n.01").symlink_to("no_folder")
    assert image_files(tmp_path, "x") == [image]
    assert caplog.messages[1:] == [
        f"x: {tmp_path / name} is left out: it is a link that leads nowhere" for name in ("2.png", "n.01")
    ]


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = picture(tmp_path / "cat" / "1.png")
    for name in ("classes.txt", "cat/a.txt", "cat/b.TXT", "cat/c.heic", "cat/raw", ".hidden.txt", "cat/Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    assert image_files(tmp_path, "x") == [image]
    assert caplog.messages == [
        "x: 4 file(s) are not read: 1 .heic, 2 .txt, 1 without a suffix; the package pillow-heif reads .heic and .heif"
    ]


@pytest.mark.parametrize("suffix", [".PPM", ".pgm", ".jfif", ".jpe", ".jp2", ".tga", ".avif", ".JPEG", ".qoi"])
def test_pictures_that_pillow_reads_are_images(suffix: str, tmp_path: Path) -> None:
    assert image_files(picture(tmp_path / f"1{suffix}").parent, "x") == [tmp_path / f"1{suffix}"]


def test_documents_films_and_programs_are_no_images() -> None:
    assert not {".pdf", ".eps", ".ps", ".mpg", ".h5", ".fits", ".ico", ".psd", ".wmf"} & set(image_suffixes())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "secret").mkdir(mode=0)
    with pytest.raises(TaoqError) as error:
        image_files(tmp_path, "x")
    assert str(error.value) == (f"x: {tmp_path / 'secret'} cannot be listed: Permission denied\nhint: allow to read it")


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    names = [b"caf\xe9.png", b"two\nlines.png"]
    for name in names:
        picture(tmp_path / os.fsdecode(name))
    assert image_files(tmp_path, "x") == [tmp_path / os.fsdecode(name) for name in names]
