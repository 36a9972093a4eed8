"""Our own claims, each from one command: tables, peers, block sweeps, published timings.

| file | what it holds |
|---|---|
| `tables/` | every table of docs/bench.md |
| `gain.py` | what a user gains over well-configured peers: the README's small table |
| `around.py` | what XLA does around a kernel, by its own estimate |
| `comparison.py` | one step of a server with every rung and its peers |
| `tune.py` | sweeps of block sizes, and how far the defaults are from the best |
| `published.py` | timings on real TPUs that were published, next to predictions |
| `timed_runs.py` | 58 of them with recorded runs: what the model of time is fitted to |
| `measured.py` | what `rpa bench` measured on a TPU, next to predictions; a fit with it |
| `compile_time.py` | compile time of the kernel next to a peer's |
| `on_device.py`, `stopwatch.py` | `python -m rpa bench`: time every rung on an attached TPU |
"""
