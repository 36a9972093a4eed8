"""The one look of every figure, and how a figure or a source listing gets into a notebook.

Every figure is opaque white with dark ink, so that it reads the same on a dark page; colours are
the Okabe-Ito palette, which colour-blind readers can tell apart; nothing is smaller than 9 points
at the size of a laptop screen. Figures are built without pyplot: no global state, and a notebook
never shows one twice.
"""

import base64
import html
import inspect
import io
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
    "grey": "#6E6E6E",
    "light": "#E8E8E8",
}
"""The Okabe-Ito palette by name, plus two greys.

Source: Okabe and Ito, "Color Universal Design", https://jfly.uni-koeln.de/color/.
"""

CYCLE = [COLORS[name] for name in ("blue", "orange", "green", "red", "purple", "sky", "black")]
"""The order in which a plot with many lines takes its colours; yellow is too pale for a line."""

MIN_FONT_POINTS = 9
"""No text of a figure is smaller than this; a test measures every figure."""

STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "savefig.transparent": False,
    "axes.facecolor": "white",
    "axes.edgecolor": "#333333",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}


def style():
    """Return the context manager under which a figure is drawn.

    Matplotlib reads its settings when a piece of text is created, so all drawing happens inside.

    >>> with style():
    ...     fig = new_figure(4, 3)
    ...     axes = fig.subplots()
    >>> [float(side) for side in fig.get_size_inches()]
    [4.0, 3.0]
    """
    return matplotlib.rc_context(STYLE)


def new_figure(width_inches=8.0, height_inches=4.5):
    """Return an empty matplotlib figure with its own canvas; call it inside `style()`."""
    fig = Figure(figsize=(width_inches, height_inches))
    FigureCanvasAgg(fig)
    return fig


def png_bytes(fig, dpi=110):
    """Return the figure as the bytes of a PNG file on an opaque white ground.

    >>> png_bytes(new_figure(1, 1))[:4]
    b'\\x89PNG'
    """
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, facecolor="white", transparent=False)
    return buffer.getvalue()


class Picture:
    """A figure with the words that say what it shows, for readers who cannot see it.

    A notebook shows two outputs: the picture, and a folded description below it. The picture is
    plain `image/png`, the one form that JupyterLab, Colab, Kaggle and GitHub all draw; its
    alternative text travels as `alt` in the output's metadata, where nbconvert puts it into
    `<img alt=...>`. JupyterLab ignores that key and GitHub strips images inside HTML, hence the
    folded text, which every screen reader reaches.
    """

    def __init__(self, fig, text):
        self.fig = fig
        self.text = text

    def __repr__(self):
        return f"Figure: {self.text}"

    def save(self, path, dpi=150):
        """Write the PNG to `path` (folders are made) and return the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(self.fig, dpi))
        return path

    def _repr_mimebundle_(self, include=None, exclude=None):
        png = base64.b64encode(png_bytes(self.fig)).decode("ascii")
        return (
            {"image/png": png, "text/plain": repr(self)},
            {"image/png": {"alt": self.text}},
        )

    def _ipython_display_(self):
        from IPython.display import display

        data, metadata = self._repr_mimebundle_()
        display(data, metadata=metadata, raw=True)
        summary = "<summary>What this figure shows, in words</summary>"
        folded = f"<details>{summary}{html.escape(self.text)}</details>"
        display({"text/html": folded, "text/plain": self.text}, raw=True)


def alt(fig, text):
    """Give a figure its alternative text, and return what a notebook cell ends with.

    Args:
        fig: a matplotlib `Figure`.
        text: what the figure shows, in one to three sentences: what is drawn, and what follows.

    Raises:
        ValueError: when `text` is empty.

    >>> alt(new_figure(1, 1), "A white square.")
    Figure: A white square.
    """
    if not text.strip():
        raise ValueError(
            "alt: text is empty. Say in one to three sentences what the figure shows, for readers "
            "who cannot see it."
        )
    return Picture(fig, " ".join(text.split()))


def show_source(obj):
    """Show the source of a function, class or module of rpa where the reader stands.

    In a notebook the listing is Markdown, which JupyterLab, Colab, Kaggle and GitHub all
    highlight; the HTML of `IPython.display.Code` carries a style sheet that GitHub strips.
    Elsewhere the source is printed.

    >>> show_source(style)          # doctest: +ELLIPSIS
    # rpa/figures/style.py, line ...
    def style():
    ...
    """
    lines, first = inspect.getsourcelines(obj)
    path = Path(inspect.getsourcefile(obj))
    # The path from the package down: an absolute one would differ between machines. The last
    # "rpa" counts, because a checkout is often a folder of that name too.
    start = len(path.parts) - 1 - path.parts[::-1].index("rpa") if "rpa" in path.parts else -1
    where = "/".join(path.parts[start:])
    source = f"# {where}, line {max(first, 1)}\n{''.join(lines).rstrip()}"
    if not _in_notebook():
        print(source)
        return
    from IPython.display import display

    display({"text/markdown": f"```python\n{source}\n```", "text/plain": source}, raw=True)


def _in_notebook():
    """Whether an IPython kernel (a notebook) is running this code."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")
