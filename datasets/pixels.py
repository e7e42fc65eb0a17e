"""Images as tensors: padding, cropping, sizes, the range that networks see, and grids to look at."""
import numpy as np
import torch
import torch.nn.functional as F

from support import files

from .registry import DataError


def to_bytes(values, path):
    """Pixels in an array of any dtype -> uint8, by a constant of the dtype, never by what the images hold.

    uint8 and other integers count 0..255, floats 0..1, bool is black and white. Others are refused, with the
    way to convert them: a file that holds them would be black, or white, in silence.
    """
    if values.dtype == np.uint8:
        return values
    top = 1 if values.dtype.kind in "fb" else 255
    if values.dtype.kind not in "biuf" or not (values.min() >= 0 and values.max() <= top):  # no if NaN
        raise DataError(f"{path}: found pixels of {values.dtype} beyond 0..{top}, expected uint8, whole "
                        "numbers in 0..255 or floats in 0..1; convert like this: images.clip(0, "
                        "255).astype('uint8') if 255 is white, images / 65535 of 16 bits, (images + 1) / 2 "
                        "of floats from -1")
    return np.rint(values * np.float32(255 / top)).astype(np.uint8)


def one_colour(images):
    """Which images (N,C,H,W) have one colour all over: their numbers."""
    return (images.amin((2, 3)) == images.amax((2, 3))).all(1).nonzero().flatten().tolist()


def pad(images, size):
    """(N,C,h,h) -> (N,C,size,size): a border of zeros. ValueError if size < h or size - h is odd."""
    h = images.shape[-1]
    border, uneven = divmod(size - h, 2)
    if border < 0:
        larger = next((f"say --size {side}, or " for side in (64, 128, 256) if side >= h), "")
        raise ValueError(f"images of {h} pixels cannot be padded to {size}: {larger}shrink them")
    if uneven:
        raise ValueError(f"images of {h} pixels cannot be padded to {size} by the same border on all sides: "
                         f"resize them to {h + 1} pixels")
    return F.pad(images, (border,) * 4)


def crop(images, size=28):
    """The inverse of pad: the central size x size pixels of (N,C,H,W), any dtype. ValueError as for `pad`."""
    border, uneven = divmod(images.shape[-1] - size, 2)
    if border < 0 or uneven:
        raise ValueError(f"cannot crop {images.shape[-1]} pixels to {size}: the difference must be even and "
                         "not negative")
    return images[..., border : border + size, border : border + size]


def resize(images, size):
    """(N,C,h,h) uint8 -> (N,C,size,size) uint8, bilinear, antialiased when it shrinks."""
    if images.shape[-1] == size:
        return images
    parts = [F.interpolate(x.float(), size=(size, size), mode="bilinear", antialias=True)
             for x in images.split(500)]
    return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts])


def to_float(images):
    """uint8 0..255 -> float32 -1..1, the range in which every network of this project sees images."""
    return images.float() / 127.5 - 1


def some(images):
    """4,000 of images (N,C,H,W), fewer if they have more than 8 million pixels: to fit memory.

    Not the first ones: a folder is sorted by class, and in a mix B comes last.
    """
    most = min(4000, 8_000_000 // images.shape[-1] ** 2)
    return images[torch.linspace(0, len(images) - 1, min(most, len(images))).long()]


def to_uint8(x):
    """float -1..1 -> uint8 0..255, rounded; values outside are clamped. Exact inverse of to_float."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=10, private=False):
    """Write images (N,C,H,W) uint8 as one PNG, row by row, small ones enlarged; all or nothing.

    private: only its owner may read the file.
    """
    import torchvision  # here and elsewhere: loading it takes as long as loading torch
    enlarge = max(1, min(3, 900 // (columns * images.shape[-1])))
    images = images.cpu().repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    grid = torchvision.utils.make_grid(images.float() / 255, nrow=columns, padding=enlarge, pad_value=0.2)
    with files.replacing(path, private) as file:
        torchvision.utils.save_image(grid, file, format="png")
