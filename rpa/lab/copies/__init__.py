"""See the copies of a kernel: each DMA as an event, as a timeline, and as bytes moved.

| file | what it holds |
|---|---|
| `events.py` | what a timeline consists of: copies, waits, computation, buffers |
| `timeline.py` | `record_dmas`: the timeline of any kernel that runs in the TPU interpreter |
| `perfetto.py` | a timeline as a trace that Perfetto opens |
| `clock.py` | puts a timeline on the clock of a chip, predicted |
| `dryrun.py`, `dryrun_program.py` | run a kernel's scalar code alone, to list its copies |
| `traffic.py` | HBM bytes that a rung moves for a batch, against the least |
| `call_traffic.py` | HBM bytes that a function of any signature moves, by array |
"""
