"""Compile for a chip that is not there: `compile_for` reports time, VMEM, HBM and HLO, or why not.

| file | what it holds |
|---|---|
| `compiler.py` | the door, `compile_for`; keeps results on disk |
| `worker.py` | the subprocess that loads libtpu |
| `words.py` | the compiler's errors in words, facts read from the HLO |
| `vmem_slices.py` | some rows of a buffer, from a row known at run time: chapter 6, too |
| `dma_layouts.py` | one token stored by one DMA in two layouts of a page: chapter 6 compiles both |
"""

from rpa.lab.compile.compiler import CompileResult, Kernel, compile_for, compile_versions

__all__ = ["CompileResult", "Kernel", "compile_for", "compile_versions"]
