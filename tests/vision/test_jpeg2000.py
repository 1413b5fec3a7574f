"""JPEG 2000 of other than 8 bits a sample."""

from __future__ import annotations

import base64
import io
import struct

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mllama_gguf.errors import ImageError
from mllama_gguf.vision.jpeg2000 import mend_jpeg2000
from mllama_gguf.vision.loading import load_image

# 8x8 pixels, red white to the right, green below, blue in stripes, and a grey pixel; written by OpenJPEG.
LOSSLESS_16 = (
    "/0//UQAvAAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEBAAQEAAH/XAAEQID/kAAKAAAA"
    "AAClAAH/k9/4kzALzxQiXKhTeOsh7kJInC6hXmjQv7oBTtbYlTZL2T3CQA4UeKmqSElXOipqkhEqVRU1SQdt3ipqkg48DFTVJBdYOKmq"
    "SCe3IqapIIVgipqkgUaSKmqSBN6IqapHQ0p0Fa1pKlagM1vf+JCYGhm7O/LLX6jHQxGKv3h2/3//f9/4kJAnNQopatMc8H33RnCWXbqV"
    "/3//2Q=="
)
LOSSY_12 = (
    "/0//UQAvAAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAADCwEBCwEBCwEB/1IADQECAAEBAAQEAACI/1wABUJgAP+QAAoA"
    "AAAAANMAAf+T36oQC88UIlyoSXa/FO3qx75erG9JNgKiyM2+M5xveBEldJtJNsoG2Nq82gKEUQOGENoxDMgZ0Z1hiEAm8FL8cndHiHvu"
    "z9UMGhm7O/LLX6jHOzkiQNDBLu3BgWbaXPvNnTMD41MCYlLrHBk91/EDTMxtwHK8mZjbgc32cGT3YLWvR5j57I9mZjbffc/I3Cc1Cilq"
    "0xzwfeNdn2LlCM4MncAHdcBV+Do/OxiAIngXv/CAAm8s8cMGUtlVsEei+cfNNpmY23P/2Q=="
)


def expected() -> npt.NDArray[np.int64]:
    y, x = np.mgrid[:8, :8]
    image = np.stack([(x > 3) * 255, (y > 3) * 255, ((x + y) % 8 > 3) * 255], -1)
    image[0, 0] = 127
    return image


@pytest.mark.parametrize("words", [LOSSLESS_16, LOSSY_12])
def test_white_stays_white(words: str) -> None:
    data = base64.b64decode(words)
    assert Image.open(io.BytesIO(data)).getpixel((7, 7))[:2] == (0, 0)  # type: ignore[index] # Pillow alone
    assert np.abs(np.asarray(load_image(data)).astype(int) - expected()).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("bits", [1, 4, 7])
def test_few_bits_reach_white(mode: str, bits: int) -> None:
    """A lossless file of 8 bits, declared to have fewer, has its values moved and cut off at both ends."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    samples = np.dstack([values] + [np.full((16, 16), 255, np.uint8)] * (bands - 1))
    file = io.BytesIO()
    Image.fromarray(samples.squeeze(), mode).save(file, "JPEG2000", no_jp2=True)
    data = bytearray(file.getvalue())
    for index in range(bands):
        data[42 + 3 * index] = bits - 1
    top = 2**bits - 1
    cut = np.clip(values.astype(int) - 128 + 2 ** (bits - 1), 0, top)
    shown = np.asarray(load_image(bytes(data)))[..., 0]
    np.testing.assert_array_equal(shown, np.round(cut * 255 / top))


def test_what_cannot_be_told_is_refused() -> None:
    data = base64.b64decode(LOSSY_12)
    no_guard = bytearray(data)
    no_guard[data.index(b"\xff\x5c") + 4] &= 31
    ycc = struct.pack(">I4sB2xI", 15, b"colr", 1, 18) + data
    for bad, words in ((bytes(no_guard), "of an unusual lossy kind"), (ycc, "in YCbCr")):
        with pytest.raises(ImageError, match=f"x: a JPEG 2000 image {words}"):
            mend_jpeg2000(Image.open(io.BytesIO(data)), bad, "x")
