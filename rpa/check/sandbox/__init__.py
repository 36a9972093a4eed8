"""Run a learner's kernel where it can do no harm: in a process that can be killed.

| file | what it holds |
|---|---|
| `process.py` | the door, `in_sandbox` and `try_kernel`; starts, asks and ends the process |
| `worker.py` | that process |
| `pipe.py` | numbered messages between the two |
| `pickling.py` | sends a learner's function there, by its source |
| `faults.py` | what a kernel's copies did wrong, in words and with lines |
| `dma.py` | what exercises about kernels with DMAs share |
| `fast_compile.py` | compiles interpreted kernels with optimisation off |
"""

from rpa.check.sandbox.process import in_sandbox, start, try_kernel

__all__ = ["in_sandbox", "start", "try_kernel"]
