"""The one place that knows where this project is published."""

REPOSITORY = "https://github.com/ragged-paged-attention/rpa"
"""Address of the repository: notebooks install from it, badges link to it."""

BRANCH = "main"
"""The branch that the badges open."""
