"""Compile attention for many chips that are not there, and say what crosses the wire.

| file | what it holds |
|---|---|
| `cases.py` | the forms of `rpa.parallel`, each with a model, a batch and a mesh of eight devices |
| `worker.py` | the subprocess that loads libtpu: lowers and compiles one case |
| `wire.py` | collectives in the HLO: how often, how many bytes |
| `estimate.py` | the door, `estimate_for`: what a layer takes on the chips and on the wire |
"""

from rpa.lab.parallel.cases import CASES, TOPOLOGIES
from rpa.lab.parallel.estimate import Estimate, estimate_for

__all__ = ["CASES", "TOPOLOGIES", "Estimate", "estimate_for"]
