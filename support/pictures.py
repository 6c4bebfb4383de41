"""Picture files, which may be damaged or hostile, become upright RGB pictures, or are refused.

    image = decode(content)         content: bytes of a JPEG, PNG, WebP, GIF, BMP or PPM
"""
import io
import math
import os
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

# What Pillow's decoders raise on damaged or hostile files; open_picture makes the warning an error.
BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
             Image.DecompressionBombError, Image.DecompressionBombWarning)
MOST_BYTES = 2 ** 28    # our choice: of a picture file; a member of a zip may claim any size
LONGEST = 200           # our choice: longer side over shorter one; a panorama has 10
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")  # others start programs (EPS), or print
UPRIGHT = {  # what undoes each of EXIF's orientations; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def read_file(path):
    """The bytes of a file.  OSError: it is none (a pipe would be waited for), or is too large."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}")
    if os.path.getsize(path) > MOST_BYTES:
        raise OSError(f"{path} is no picture: it has {os.path.getsize(path):,} bytes")
    with open(path, "rb") as file:
        return file.read()


def read_member(archive, name):
    """The bytes of a file in an open zip.  KeyError: it is not there, OSError: it is too large."""
    if archive.getinfo(name).file_size > MOST_BYTES:
        raise OSError(f"{name} is no picture: it has {archive.getinfo(name).file_size:,} bytes")
    return archive.read(name)


def open_picture(content):
    """Bytes of a picture file -> PIL picture, its pixels not decoded yet.  Raises one of BAD_IMAGE.

    More pixels than Pillow's limit (89 million) are an error: such a picture takes all memory.  So
    does a very long one, once its shorter side is enlarged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"no picture ({', '.join(FORMATS)})") from error
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"a picture of {image.width} x {image.height}: one side has more than "
                         f"{LONGEST} times the other")
    return image


def _orientation(image):
    """EXIF's orientation, 1 if there is none."""
    try:
        return image.getexif().get(0x0112, 1)
    except BAD_IMAGE:
        return 1  # damaged EXIF does not spoil the pixels


def upright_size(image):
    """-> (width, height) of the picture once it is turned as EXIF says"""
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def decode(content, shrink=1.0):
    """Bytes, or open_picture's picture -> RGB picture: upright, on white, the first frame.

    shrink: how many times smaller the picture is needed: a JPEG is decoded at 1/2, 1/4 or 1/8 of
    its size, never smaller than needed.  Raises one of BAD_IMAGE.
    """
    image = open_picture(content) if isinstance(content, bytes) else content
    if shrink >= 2:
        image.draft(image.mode, [math.ceil(side / shrink) for side in image.size])  # JPEGs only
    turn = UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # grey of 16 bits, which convert would clip at 255
        values = np.asarray(image)
        clear = values == image.info.get("transparency")
        values = np.where(clear, 255, values.clip(0, 65535) // 257)
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")
