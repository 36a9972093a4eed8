"""Where this project is published: the one place that knows. `make publish` writes it."""

DISTRIBUTION = "ragged-paged-attention"
"""Name of the distribution; the import is `rpa`. The registry's own `rpa` is another project."""

REPOSITORY = None
"""Address of the repository, "https://github.com/OWNER/NAME", or None before it is published.

Notebooks install from it and badges link to it. While it is None they do neither: an address that
nobody owns would let its first owner run code in every reader's notebook.
"""

REVISION = None
"""The tag or commit that notebooks install and badges open, or None before it is published."""
