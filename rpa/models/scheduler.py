"""Continuous batching in its smallest form: what a server puts into one step.

At every step the server takes one new token of each sequence that decodes, and fills what is left
of its token budget with chunks of prompts (Yu et al. 2022, Orca; chunked prefill: Agrawal et al.
2023, arXiv 2308.16369). This is where ragged batches come from.
"""

from dataclasses import dataclass

import numpy as np

from rpa.page_pool import PageCopy, whole_number
from rpa.ragged import RaggedBatch


@dataclass
class Request:
    """A sequence on its way: its tokens, and how many of them are in the cache.

    Attributes:
        name: what it is called in the page pool.
        token_ids: the prompt, and behind it what has been generated so far.
        prompt_len: tokens of the prompt.
        arrives: the step at which it comes in.
        forks: (name of another request, tokens of the prefix that both share), or None. Such a
            request waits until the other one has these tokens in the cache.
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
        return "just arrived" if self.num_cached <= self.num_shared else "in chunked prefill"

    @property
    def num_shared(self) -> int:
        """Tokens whose K and V are those of another request.

        The last token of all is computed in any case: from it the next one is predicted.
        """
        return 0 if self.forks is None else min(self.forks[1], len(self.token_ids) - 1)


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

    Raises:
        ValueError: for sizes below 1, and for requests that could never be served: two of one name,
            an empty prompt, a fork of itself or of what does not exist.

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
        self.requests, self.pool = list(requests), pool
        self.token_budget = _at_least_1("token_budget", token_budget)
        self.chunk_size = _at_least_1("chunk_size", chunk_size)
        self.max_num_seqs = _at_least_1("max_num_seqs", max_num_seqs)
        self.pages_per_seq = _at_least_1("pages_per_seq", pages_per_seq)
        self._planned = None
        _check_requests(self.requests, pool)

    def plan(self, now: int) -> Step:
        """Choose which requests take part in step `now`, and give them the pages that they need.

        Raises:
            OutOfPages: the pool has too few; requests and pool are as before. Wait, or `preempt`.
            ValueError: a request outgrows `pages_per_seq`, shares a prefix that differs, or the
                step before is not finished; here, too, nothing has changed.
        """
        now = whole_number("now", now)
        if self._planned is not None:
            raise ValueError(
                "the step that was planned last is not finished: call finish(step, "
                "next_token_ids) with it before you plan the next one."
            )
        num_cached = [r.num_cached for r in self.requests]
        try:
            with self.pool.all_or_nothing():
                self._planned = self._plan(now)
        except BaseException:
            for request, before in zip(self.requests, num_cached, strict=True):
                request.num_cached = before
            raise
        return self._planned

    def finish(self, step: Step, next_token_ids) -> None:
        """Take in a step's result: a request whose tokens are all cached gets its next one.

        Args:
            step: what `plan` returned last.
            next_token_ids: int[at least the number of requests in the step].

        Raises:
            ValueError: for another step, or too few tokens; nothing has changed.
        """
        if step is not self._planned or step is None:
            raise ValueError(
                "step is not the one that was planned last: finish each step once, in the order "
                "in which they are planned."
            )
        ids = [whole_number("a token id", token) for token in next_token_ids]
        if len(ids) < len(step.requests):
            raise ValueError(
                f"next_token_ids has {len(ids)} tokens, but the step has {len(step.requests)} "
                "requests: give one for each, also where it is not used."
            )
        for s, request in enumerate(step.requests):
            request.num_cached = int(step.batch.kv_lens[s])
            if request.num_cached == len(request.token_ids):
                request.token_ids.append(ids[s])
        self._planned = None

    def preempt(self, name: str, until: int) -> None:
        """Take a request's pages from it; from step `until` on it computes all its tokens anew.

        What it has generated stays, and is computed like a prompt (recomputation: vLLM,
        arXiv 2309.06180, section 4.5). Pages that a fork of it shares stay with the fork.

        Raises:
            ValueError: there is no such request in the pool, or a step is not finished.
        """
        until = whole_number("until", until)
        found = [r for r in self.requests if r.name == name and name in self.pool.names]
        if not found or self._planned is not None:
            why = "is in a step that is not finished" if found else "has no pages"
            raise ValueError(f"request {name!r} {why}: preempt, between steps, one that has pages.")
        self.pool.free(name)
        found[0].num_cached, found[0].arrives = 0, until

    def _plan(self, now):
        present = []
        for request in self.requests:
            if request.arrives <= now and len(present) < self.max_num_seqs and self._open(request):
                present.append(request)
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

    def _open(self, request) -> bool:
        """Open a sequence in the pool if it is new, as a fork where it shares a prefix.

        Returns:
            Whether it is open; a fork waits for the tokens that it shares.
        """
        if request.name in self.pool.names:
            return True
        if request.forks is None:
            self.pool.allocate(request.name, 0)
            return True
        parent = next(r for r in self.requests if r.name == request.forks[0])
        shared = request.num_shared
        if parent.num_cached < shared or parent.name not in self.pool.names:
            return False
        if request.token_ids[:shared] != parent.token_ids[:shared]:
            raise ValueError(
                f"request {request.name!r} forks {shared} tokens of {parent.name!r}, but its own "
                "first tokens are others: their keys and values cannot be shared."
            )
        self.pool.fork(parent.name, request.name, shared)
        request.num_cached = shared
        return True

    def _share_out(self, present):
        """New tokens of each request: decodes first, then chunks until the budget is used up."""
        wanted = [len(r.token_ids) - r.num_cached for r in present]
        q_lens, left = [0] * len(present), self.token_budget
        for s in sorted(range(len(present)), key=lambda s: wanted[s] > 1):
            q_lens[s] = min(wanted[s], self.chunk_size, left)
            left -= q_lens[s]
        return q_lens


def _at_least_1(name, value):
    if whole_number(name, value) < 1:
        raise ValueError(f"{name} is {value}, but must be at least 1.")
    return whole_number(name, value)


def _check_requests(requests, pool):
    """Refuse what could never be served, or would be mistaken for another one."""
    by_name = {}
    for request in requests:
        name = request.name
        if name in by_name or name in pool.names:
            raise ValueError(
                f"there are two requests {name!r}, but a name stands for one sequence."
            )
        by_name[name] = request
        if not 1 <= whole_number("prompt_len", request.prompt_len) <= len(request.token_ids):
            raise ValueError(
                f"request {name!r} has prompt_len {request.prompt_len} and "
                f"{len(request.token_ids)} tokens: a prompt has at least one, and token_ids holds "
                "all of it."
            )
    for request in requests:
        _check_fork(request, by_name)


def _check_fork(request, by_name):
    seen, forks = {request.name}, request.forks
    if forks and whole_number("the shared prefix", forks[1]) < 0:
        raise ValueError(
            f"request {request.name!r} forks {forks[1]} tokens, but that must not be negative."
        )
    while forks:
        parent = by_name.get(forks[0])
        if parent is None or parent.name in seen:
            what = "does not exist" if parent is None else "waits for it in turn"
            raise ValueError(
                f"request {request.name!r} waits for {forks[0]!r}, which {what}: fork a request "
                "that comes by itself."
            )
        seen.add(parent.name)
        forks = parent.forks
