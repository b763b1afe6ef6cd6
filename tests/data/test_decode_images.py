"""Every kind of picture that a folder may hold, sound or broken."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polypatch.data.decode import Undecodable, decode_image, image_size
from polypatch.errors import PolypatchError
from tests.data.pictures import encoded, picture


def decode(source, resolution=16):
    return decode_image(source, name="x.png", resolution=resolution)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "PPM"])
def test_formats(kind):
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    pixels = decode(encoded(image, kind))
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array([200, 100, 50])[:, None, None]).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes(mode):
    assert decode(encoded(picture(0, mode=mode))).shape == (3, 16, 16)


def test_lossless_and_unscaled_pixels_are_kept():
    image = picture(1, (16, 16))
    assert np.array_equal(decode(encoded(image)), np.asarray(image).transpose(2, 0, 1))


def test_transparent_is_white():
    clear = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    assert (decode(encoded(clear)) == 255).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    buffer = encoded(palette)
    assert (decode(buffer) == 255).all()


def test_cmyk():
    pixels = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert pixels[0].mean() > 200 > 60 > pixels[1].mean()


def test_sixteen_bits_map_to_eight():
    levels = np.array([0, 257, 32768, 65535], dtype=np.uint16).repeat(4)
    image = Image.fromarray(np.tile(levels, (16, 1)))
    for kind in ("PNG", "TIFF"):
        assert decode(encoded(image, kind))[1, 0, ::4].tolist() == [0, 1, 128, 255]


def test_floating_point():
    inside = Image.fromarray(np.full((16, 16), 0.5, dtype=np.float32))
    assert (decode(encoded(inside, "TIFF")) == 128).all()
    outside = Image.fromarray(np.full((16, 16), 7.0, dtype=np.float32))
    with pytest.raises(Undecodable, match=r"outside \[0, 1\]"):
        decode(encoded(outside, "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8, :8] = (255, 0, 0)
    upright[8:, :8] = (0, 255, 0)
    # What the camera stores: the inverse of the turn that the tag asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(decode(path), upright.transpose(2, 0, 1))


def test_shorter_side_then_centre():
    pixels = np.zeros((10, 40, 3), dtype=np.uint8)
    pixels[:, 15:25] = 255
    assert (decode(encoded(Image.fromarray(pixels)), 10) == 255).all()
    assert decode(encoded(Image.new("RGB", (1, 1))), 8).shape == (3, 8, 8)


def test_large_jpegs_are_decoded_small_but_alike(tmp_path):
    ramp = np.linspace(0, 255, 1000).astype(np.uint8)
    image = Image.fromarray(np.tile(ramp[:, None, None], (1, 1400, 3)))
    jpeg = encoded(image, "JPEG")
    fast, exact = decode(jpeg, 32), decode(encoded(image), 32)
    assert np.abs(fast.astype(int) - exact).max() <= 3
    assert image_size(jpeg, name="x") == (1400, 1000)


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = tmp_path / "x.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert decode(path)[:, 0, 0].tolist() == [255, 0, 0]


def test_broken_pictures_have_short_reasons(tmp_path):
    png, jpeg = encoded(picture(0, (64, 64))), encoded(picture(0, (64, 64)), "JPEG")
    text = tmp_path / "x.jpg"
    text.write_text("this is no picture")
    empty = tmp_path / "e.png"
    empty.touch()
    for source, reason in (
        (png[: len(png) // 2], "truncated"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (b"", "empty"),
        (empty, "empty"),
        (text, "not an image"),
        (tmp_path / "gone.png", "no such file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ):
        with pytest.raises(Undecodable, match=reason):
            decode(source)


@pytest.mark.filterwarnings("ignore")  # Pillow remarks on what it reads past
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
    place=st.floats(0, 1),
    junk=st.binary(max_size=40),
    keep=st.booleans(),
)
def test_damage_is_an_image_or_a_reason_never_a_crash(kind, place, junk, keep):
    whole = encoded(picture(3), kind)
    at = int(place * len(whole))
    damaged = whole[:at] + junk + (whole[at + len(junk) :] if keep else b"")
    # Damage may also claim a monstrous size, which is refused.
    with contextlib.suppress(Undecodable, PolypatchError):
        assert decode(damaged).shape == (3, 16, 16)


def test_a_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PolypatchError, match=r"x\.png has more pixels.*bomb"):
        decode(encoded(picture(0, (30, 30))))


def test_no_permission_is_refused(monkeypatch, tmp_path):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(PolypatchError, match=r"x\.png can't be read \(permission denied\)"):
        decode(tmp_path / "x.png")
