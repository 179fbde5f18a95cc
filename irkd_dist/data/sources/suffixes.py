"""Which files are taken for images, by their suffix."""

import functools

# Pillow's formats of raster images. Not: what starts another program (EPS), needs a handler that is not there (HDF5,
# WMF), or is a film.
_FORMATS = {
    "AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "JXL", "MPO", "PCX", "PNG", "PPM",
    "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP",
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Suffixes, with their dot and in lower case, of the images that the installed Pillow reads."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(s for s, name in known.items() if name in _FORMATS and name in Image.OPEN)
