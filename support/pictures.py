"""Picture files, which may be damaged or hostile, become upright RGB pictures, or are refused.

    image = decode(content)         content: bytes of a JPEG, PNG, WebP, GIF, BMP or PPM
"""
import io
import math
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

# What Pillow's decoders raise on damaged or hostile files; open_picture makes the warning an error.
BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
             Image.DecompressionBombError, Image.DecompressionBombWarning)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")  # others start programs (EPS), or print
UPRIGHT = {  # what undoes each of EXIF's orientations; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def open_picture(content):
    """Bytes of a picture file -> PIL picture, its pixels not decoded yet.  Raises one of BAD_IMAGE.

    More pixels than Pillow's limit (89 million) are an error: such a picture takes all memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"no picture ({', '.join(FORMATS)})") from error


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
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")
