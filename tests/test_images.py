"""Images that clips start from, of every kind of pixel."""

import numpy as np
import pytest
from PIL import Image, features

from t3.errors import T3Error
from t3.images import load_image


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize(("grey", "wanted"), [(0, 0), (257, 1), (32768, 127), (65535, 255)])
def test_grey_of_16_bits_keeps_its_shade(tmp_path, suffix, grey, wanted):
    path = tmp_path / f"grey{suffix}"
    Image.fromarray(np.full((9, 7), grey, np.uint16)).save(path)
    image = load_image(path, 16, 24)
    assert image.mode == "RGB" and image.size == (24, 16)
    assert image.getextrema() == ((wanted, wanted),) * 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_kinds_of_pixels_are_read(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    assert load_image(path, 8, 8).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("pixels", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), 200, np.int32)])
def test_pixels_without_a_known_range_are_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "wide.tif")
    with pytest.raises(T3Error, match="wide.tif has pixels of 32 bits.*Save it with 8 or 16"):
        load_image(tmp_path / "wide.tif", 8, 8)


@pytest.mark.parametrize("name", ["a.avif", "a.dds", "a.png", "a.jpg", "a.webp", "a.tif"])
def test_a_download_that_was_cut_off_is_refused(tmp_path, name):
    """The readers of the formats raise what they like."""
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this PIL reads no AVIF")
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    with pytest.raises(T3Error, match=f"{name} cannot be read as an image"):
        load_image(path, 8, 8)


@pytest.mark.parametrize("header", [b"P6\n8 x\n255\n", b"P5\n8 8\n2+5\n"])
def test_numbers_that_are_none_are_refused(tmp_path, header):
    (tmp_path / "a.ppm").write_bytes(header + bytes(300))
    with pytest.raises(T3Error, match="a.ppm cannot be read as an image"):
        load_image(tmp_path / "a.ppm", 8, 8)
