"""The page pool: which page of the KV cache belongs to which sequence.

A book kept on the host: it needs no jax and never touches the cache. A server asks it for pages
before it stores tokens; `rpa.paging` is where the tokens then go.
"""

import contextlib
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


def cdiv(a, b):
    """How many `b` it takes to hold `a`: division rounded up; ints or arrays.

    >>> cdiv(17, 16)
    2
    """
    return (a + b - 1) // b


NO_PAGE = -1
"""What pads every page table that is made here: no page, so a row that is too short is refused."""


class PageCopy(NamedTuple):
    """One page whose content must be copied on the device before new tokens are stored."""

    source: int
    target: int


def whole_number(name: str, value) -> int:
    """A number of tokens, pages or steps as an int; ValueError for what counts nothing.

    >>> whole_number("num_tokens", np.int64(3))
    3
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, but must be a whole number.") from None


class OutOfPages(ValueError):
    """The pool has fewer free pages than a request needs; nothing was changed."""


@dataclass
class _Sequence:
    pages: list[int]
    kv_len: int


class PagePool:
    """The book of who owns which page; it lives on the host and never touches the cache itself.

    Invariants, which `check()` asserts and every method keeps, also when it raises:

    1. A page's reference count is the number of sequences that list it; free pages have none.
    2. A sequence of `kv_len` tokens lists exactly `ceil(kv_len / page_size)` pages, each once.
    3. Only a page with one owner is written: `append` first replaces a shared last page by a copy
       (copy-on-write), and full shared pages are never written again.
    4. A request that does not fit raises before anything is changed.

    Args:
        num_pages: pages of the cache array.
        page_size: tokens of a page.

    >>> pool = PagePool(num_pages=8, page_size=4)
    >>> pool.allocate("a", 6), pool.pages("a")
    ([], [0, 1])
    >>> pool.fork("a", "b")  # the same prefix, no new page
    >>> pool.append("b", 1)  # b writes: it gets its own copy of the last page
    [PageCopy(source=1, target=2)]
    >>> pool.pages("b"), pool.num_free
    ([0, 2], 5)
    """

    def __init__(self, num_pages: int, page_size: int):
        num_pages = whole_number("num_pages", num_pages)
        page_size = whole_number("page_size", page_size)
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"num_pages and page_size must be at least 1, but are {num_pages} and {page_size}."
            )
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages))[::-1]  # a stack: the page freed last is used first
        self._references: Counter[int] = Counter()
        self._sequences: dict[object, _Sequence] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def names(self) -> list:
        """The sequences that are open, in the order in which they were opened."""
        return list(self._sequences)

    def pages(self, name) -> list[int]:
        """The pages of a sequence, in the order of its tokens; ValueError if it is unknown."""
        return list(self._known(name).pages)

    def kv_len(self, name) -> int:
        """How many tokens the sequence has in the cache; ValueError if it is unknown."""
        return self._known(name).kv_len

    def allocate(self, name, num_tokens: int) -> list[PageCopy]:
        """Open a sequence with room for `num_tokens`; raises OutOfPages or ValueError."""
        if name in self._sequences:
            raise ValueError(f"Sequence {name!r} exists already: free it, or append to it.")
        self._sequences[name] = _Sequence([], 0)
        try:
            return self.append(name, num_tokens)
        except ValueError:
            del self._sequences[name]
            raise

    def append(self, name, num_tokens: int) -> list[PageCopy]:
        """Make room for new tokens; returns the page copies to carry out before they are stored.

        Raises:
            ValueError: for a negative number, or a sequence that does not exist.
            OutOfPages: if the free pages do not suffice; nothing was changed.
        """
        sequence = self._known(name)
        num_tokens = whole_number("num_tokens", num_tokens)
        if num_tokens < 0:
            raise ValueError(
                f"num_tokens must not be negative, but is {num_tokens}: a sequence only grows. To "
                "shorten it, fork its first tokens under a new name and free it."
            )
        kv_len = sequence.kv_len + num_tokens
        fresh = cdiv(kv_len, self.page_size) - len(sequence.pages)
        # The new tokens begin in the middle of the last page, which another sequence reads too.
        splits = (
            num_tokens > 0
            and sequence.kv_len % self.page_size > 0
            and self._references[sequence.pages[-1]] > 1
        )
        self._require(fresh + splits, name, num_tokens)
        copies = []
        if splits:
            shared = sequence.pages.pop()
            self._references[shared] -= 1
            sequence.pages.append(self._take())
            copies.append(PageCopy(shared, sequence.pages[-1]))
        sequence.pages += [self._take() for _ in range(fresh)]
        sequence.kv_len = kv_len
        return copies

    def fork(self, parent, child, num_tokens: int | None = None) -> None:
        """Open `child` with the first `num_tokens` of `parent` (default all), sharing its pages.

        Raises:
            ValueError: if there is no parent, the child exists, or the parent has fewer tokens.
        """
        source = self._known(parent)
        if num_tokens is None:
            num_tokens = source.kv_len
        num_tokens = whole_number("num_tokens", num_tokens)
        if child in self._sequences:
            raise ValueError(f"Sequence {child!r} exists already: fork into a new name.")
        if not 0 <= num_tokens <= source.kv_len:
            raise ValueError(
                f"num_tokens must be between 0 and the {source.kv_len} tokens of {parent!r}, but "
                f"is {num_tokens}: only what is in the cache can be shared."
            )
        shared = source.pages[: cdiv(num_tokens, self.page_size)]
        self._references.update(shared)
        self._sequences[child] = _Sequence(list(shared), num_tokens)

    def free(self, name) -> None:
        """Close a sequence; pages that no other sequence lists become free.

        Raises:
            ValueError: if there is no such sequence.
        """
        for page in self._known(name).pages:
            self._references[page] -= 1
            if not self._references[page]:
                del self._references[page]
                self._free.append(page)
        del self._sequences[name]

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Rule 4 for several requests: if the body raises, everything in the pool is as before.

        >>> pool = PagePool(num_pages=2, page_size=4)
        >>> with contextlib.suppress(OutOfPages), pool.all_or_nothing():
        ...     pool.allocate("a", 4)
        ...     pool.allocate("b", 8)
        []
        >>> pool.names, pool.num_free
        ([], 2)
        """
        free, references = list(self._free), Counter(self._references)
        sequences = {n: _Sequence(list(s.pages), s.kv_len) for n, s in self._sequences.items()}
        try:
            yield
        except BaseException:
            self._free, self._references, self._sequences = free, references, sequences
            raise

    def page_table(self, names, pages_per_seq: int) -> np.ndarray:
        """The page table of some sequences, i32[len(names), pages_per_seq]; padding is NO_PAGE.

        Raises:
            ValueError: if a sequence has more pages than the table is wide.
        """
        pages_per_seq = whole_number("pages_per_seq", pages_per_seq)
        table = np.full((len(names), pages_per_seq), NO_PAGE, np.int32)
        for row, name in zip(table, names, strict=True):
            pages = self._known(name).pages
            if len(pages) > pages_per_seq:
                raise ValueError(
                    f"Sequence {name!r} has {len(pages)} pages, but the table has room for "
                    f"pages_per_seq={pages_per_seq}: widen it to at least {len(pages)}."
                )
            row[: len(pages)] = pages
        return table

    def check(self) -> None:
        """Assert the invariants of the class docstring; for tests, and for the curious."""
        listed = Counter(page for seq in self._sequences.values() for page in seq.pages)
        assert listed == +self._references, "1: reference counts do not match the page lists"
        assert not listed.keys() & set(self._free), "1: a page is free and owned"
        assert len(listed) + len(self._free) == self.num_pages, "1: a page got lost"
        for name, seq in self._sequences.items():
            assert len(seq.pages) == cdiv(seq.kv_len, self.page_size), f"2: page count of {name!r}"
            assert len(set(seq.pages)) == len(seq.pages), f"2: {name!r} lists a page twice"

    def _known(self, name) -> _Sequence:
        if name not in self._sequences:
            raise ValueError(
                f"Sequence {name!r} is not in the pool, which holds {self.names}: "
                "allocate it first."
            )
        return self._sequences[name]

    def _require(self, needed: int, name, num_tokens: int) -> None:
        if needed > self.num_free:
            raise OutOfPages(
                f"{num_tokens} new tokens of sequence {name!r} need {needed} more pages, but only "
                f"{self.num_free} of {self.num_pages} are free: free a sequence, or wait."
            )

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] += 1
        return page
