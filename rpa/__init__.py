"""rpa: Ragged Paged Attention for TPUs, built rung by rung.

Read the package in the order of the ladder: `chips`, `dense`, `paging`, `ragged`, `tiled`,
`streamed`, `fused`, `kernel`. Each file answers the same question, attention over a batch of
sequences with a KV cache, and changes one thing in how it is answered.
"""

__version__ = "0.1.0"
