"""Continuous batching in its smallest form: what a server puts into one step.

At every step the server takes one new token of each sequence that decodes, and fills what is left
of its token budget with chunks of prompts (Yu et al. 2022, Orca; chunked prefill: Agrawal et al.
2023, arXiv 2308.16369). This is where ragged batches come from.
"""

from dataclasses import dataclass

import numpy as np

from rpa.page_pool import PageCopy
from rpa.ragged import RaggedBatch


@dataclass
class Request:
    """A sequence on its way: its tokens, and how many of them are in the cache.

    Attributes:
        name: what it is called in the page pool.
        token_ids: the prompt, and behind it what has been generated so far.
        prompt_len: tokens of the prompt.
        arrives: the step at which it comes in.
        forks: (name of another request, tokens of the prefix that both share), or None.
        num_cached: tokens whose K and V are in the cache.
    """

    name: str
    token_ids: list[int]
    prompt_len: int
    arrives: int = 0
    forks: tuple[str, int] | None = None
    num_cached: int = 0

    @property
    def stage(self) -> str:
        """In words, where the request stands before its next step."""
        if self.num_cached >= self.prompt_len:
            return "decoding"
        if self.num_cached == 0 or self.forks and self.num_cached == self.forks[1]:
            return "just arrived"
        return "in chunked prefill"


@dataclass(frozen=True)
class Step:
    """One step of the server, planned: the arguments of `rpa.models.forward`, as NumPy arrays.

    Attributes:
        requests: those that take part, in the order of the batch.
        stages: where each stood before the step, see `Request.stage`.
        batch: who owns which row and which page.
        token_ids, positions: i32[token_budget], padded with zeros.
        logit_rows: i32[max_num_seqs], the row of each sequence's last token, padded with zeros.
        copies: pages to copy before the step (copy-on-write of a shared last page).
    """

    requests: list[Request]
    stages: list[str]
    batch: RaggedBatch
    token_ids: np.ndarray
    positions: np.ndarray
    logit_rows: np.ndarray
    copies: list[PageCopy]


class Scheduler:
    """Plans steps for some requests over one page pool, and takes in what the model answers.

    Args:
        requests: all that will ever come.
        pool: the page pool; sequences are opened, forked and grown in it.
        token_budget: rows of one step; fixed, so that the model is compiled once.
        chunk_size: the most prompt tokens that one request gets in one step.
        max_num_seqs, pages_per_seq: room of the batch.

    >>> from rpa.page_pool import PagePool
    >>> pool = PagePool(num_pages=8, page_size=4)
    >>> requests = [Request("a", [5, 6, 7], 3), Request("b", [8] * 9, 9)]
    >>> scheduler = Scheduler(requests, pool, token_budget=8, chunk_size=4, max_num_seqs=2,
    ...                       pages_per_seq=4)
    >>> step = scheduler.plan(0)
    >>> step.batch.cu_q_lens.tolist(), step.stages
    ([0, 4, 7], ['just arrived', 'just arrived'])
    >>> scheduler.finish(step, next_token_ids=[1, 2])  # "a", now second, decodes from now on
    >>> step = scheduler.plan(1)
    >>> step.batch.cu_q_lens.tolist(), step.batch.distribution.tolist(), step.stages
    ([0, 1, 5], [1, 2, 2], ['decoding', 'in chunked prefill'])
    """

    def __init__(self, requests, pool, *, token_budget, chunk_size, max_num_seqs, pages_per_seq):
        self.requests, self.pool = requests, pool
        self.token_budget, self.chunk_size = token_budget, chunk_size
        self.max_num_seqs, self.pages_per_seq = max_num_seqs, pages_per_seq

    def plan(self, now: int) -> Step:
        """Choose who takes part in step `now`, and give them the pages that they need."""
        present = [r for r in self.requests if r.arrives <= now][: self.max_num_seqs]
        for request in present:
            self._open(request)
        stages = {r.name: r.stage for r in present}
        q_lens = self._share_out(present)
        copies = []
        for request, q_len in zip(present, q_lens, strict=True):
            copies += self.pool.append(request.name, q_len)

        batch, order = RaggedBatch.from_lengths(
            q_lens,
            [self.pool.kv_len(r.name) for r in present],
            [self.pool.pages(r.name) for r in present],
            max_num_seqs=self.max_num_seqs,
            pages_per_seq=self.pages_per_seq,
            chunk_prefill_size=self.chunk_size,
        )
        ordered = [present[s] for s in order]
        token_ids = np.zeros(self.token_budget, np.int32)
        positions = np.zeros(self.token_budget, np.int32)
        for s, request in enumerate(ordered):
            rows = slice(batch.cu_q_lens[s], batch.cu_q_lens[s + 1])
            new = slice(request.num_cached, batch.kv_lens[s])
            token_ids[rows] = request.token_ids[new]
            positions[rows] = np.arange(new.start, new.stop)
        last_rows = np.maximum(batch.cu_q_lens[1:] - 1, 0)
        named_stages = [stages[r.name] for r in ordered]
        return Step(ordered, named_stages, batch, token_ids, positions, last_rows, copies)

    def finish(self, step: Step, next_token_ids) -> None:
        """Take in a step's result: a request whose tokens are all cached gets its next one."""
        for s, request in enumerate(step.requests):
            request.num_cached = int(step.batch.kv_lens[s])
            if request.num_cached == len(request.token_ids):
                request.token_ids.append(int(next_token_ids[s]))

    def _open(self, request):
        """Open a sequence in the pool if it is new, as a fork where it shares a prefix."""
        if request.name in self.pool.names:
            return
        if request.forks is None:
            self.pool.allocate(request.name, 0)
        else:
            parent, num_tokens = request.forks
            self.pool.fork(parent, request.name, num_tokens)
            request.num_cached = num_tokens

    def _share_out(self, present):
        """New tokens of each request: decodes first, then chunks until the budget is used up."""
        wanted = [len(r.token_ids) - r.num_cached for r in present]
        q_lens, left = [0] * len(present), self.token_budget
        for s in sorted(range(len(present)), key=lambda s: wanted[s] > 1):
            q_lens[s] = min(wanted[s], self.chunk_size, left)
            left -= q_lens[s]
        return q_lens
