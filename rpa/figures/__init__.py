"""The pictures of the course, one module per chapter, all in one style.

Every function here takes plain numbers or rpa objects and returns a `Picture`: a figure that knows
the words which describe it. It computes nothing that a reader should see computed.
"""

from rpa.figures.chips import compare, tpu
from rpa.figures.serving import decode_share
from rpa.figures.style import COLORS, Picture, alt, new_figure, png_bytes, show_source, style

__all__ = [
    "COLORS",
    "Picture",
    "alt",
    "compare",
    "decode_share",
    "new_figure",
    "png_bytes",
    "show_source",
    "style",
    "tpu",
]
