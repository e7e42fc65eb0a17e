"""Images as tensors: padding, cropping, sizes, the range that networks see, and grids to look at."""
import torch
import torch.nn.functional as F
import torchvision

from support import files


def pad(images, size):
    """(N,C,h,h) -> (N,C,size,size): a border of zeros, the background. ValueError if size < h or size - h is odd."""
    border, uneven = divmod(size - images.shape[-1], 2)
    if border < 0 or uneven:
        raise ValueError(f"cannot pad {images.shape[-1]} pixels to {size}: the difference must be even and positive")
    return F.pad(images, (border,) * 4)


def crop(images, size=28):
    """The inverse of pad: the central size x size pixels of (N,C,H,W), any dtype."""
    border, uneven = divmod(images.shape[-1] - size, 2)
    if border < 0 or uneven:
        raise ValueError(f"cannot crop {images.shape[-1]} pixels to {size}: the difference must be even and positive")
    return images[..., border : border + size, border : border + size]


def resize(images, size):
    """(N,C,h,h) uint8 -> (N,C,size,size) uint8, bilinear, antialiased when it shrinks."""
    if images.shape[-1] == size:
        return images
    parts = [F.interpolate(x.float(), size=(size, size), mode="bilinear", antialias=True) for x in images.split(500)]
    return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts])


def to_float(images):
    """uint8 0..255 -> float32 -1..1, the range in which every network of this project sees images."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float -1..1 -> uint8 0..255, rounded; values outside are clamped. Exact inverse of to_float."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=10):
    """Write images (N,C,H,W) uint8 as one PNG, row by row, small ones enlarged; all or nothing (files.replacing)."""
    enlarge = max(1, min(3, 900 // (columns * images.shape[-1])))
    images = images.cpu().repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    grid = torchvision.utils.make_grid(images.float() / 255, nrow=columns, padding=enlarge, pad_value=0.2)
    with files.replacing(path) as file:
        torchvision.utils.save_image(grid, file, format="png")
