"""The command line: a module per command, `python -m rpa lab EXPERIMENT` and `rpa bench`."""
