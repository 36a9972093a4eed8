"""The page pool as a state machine, and attention through a page table."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rpa.dense import oracle
from rpa.page_pool import OutOfPages, PageCopy, PagePool
from rpa.paging import copy_pages, get_kv_cache_shape, paged_attention

pytestmark = pytest.mark.core


class PoolMachine(RuleBasedStateMachine):
    """Random calls against a model that stores the *tokens*, page by page, as a cache would."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(num_pages=7, page_size=3)
        self.cache = np.zeros((7, 3), int)  # the token stored in each slot
        self.tokens: dict[int, list[int]] = {}  # what each sequence must find there
        self.next_name = self.next_token = 1

    def store(self, name, num_tokens, copies):
        for source, target in copies:
            self.cache[target] = self.cache[source]
        for _ in range(num_tokens):
            position = len(self.tokens[name])
            self.cache[self.pool.pages(name)[position // 3], position % 3] = self.next_token
            self.tokens[name].append(self.next_token)
            self.next_token += 1

    def attempt(self, call, *args):
        """Run a call; if the pool is too small, check that nothing has changed."""
        names = list(self.tokens)
        before = [(self.pool.pages(n), self.pool.kv_len(n)) for n in names], self.pool.num_free
        try:
            return call(*args)
        except OutOfPages:
            after = [(self.pool.pages(n), self.pool.kv_len(n)) for n in names], self.pool.num_free
            assert before == after
            return None

    @rule(num_tokens=st.integers(0, 12))
    def allocate(self, num_tokens):
        copies = self.attempt(self.pool.allocate, self.next_name, num_tokens)
        if copies is not None:
            self.tokens[self.next_name] = []
            self.store(self.next_name, num_tokens, copies)
        self.next_name += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), num_tokens=st.integers(0, 7))
    def append(self, data, num_tokens):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        copies = self.attempt(self.pool.append, name, num_tokens)
        if copies is not None:
            self.store(name, num_tokens, copies)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        shared = data.draw(st.integers(0, len(self.tokens[parent])))
        self.pool.fork(parent, self.next_name, shared)
        self.tokens[self.next_name] = self.tokens[parent][:shared]
        self.next_name += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        self.pool.free(name)
        del self.tokens[name]

    @invariant()
    def the_book_is_right_and_every_token_is_where_it_was_put(self):
        self.pool.check()
        for name, tokens in self.tokens.items():
            found = self.cache[self.pool.pages(name)].reshape(-1)[: len(tokens)]
            assert found.tolist() == tokens


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, derandomize=True
)
TestPool = PoolMachine.TestCase


def test_copy_on_write_copies_only_the_last_page_and_only_when_it_is_shared():
    pool = PagePool(num_pages=8, page_size=4)
    pool.allocate("a", 6)
    pool.fork("a", "b")
    assert pool.num_free == 6, "a fork takes no page"
    assert pool.append("b", 3) == [PageCopy(source=1, target=2)]
    assert pool.pages("a") == [0, 1] and pool.pages("b") == [0, 2, 3]
    assert pool.append("a", 1) == [], "a has its last page for itself again"


def test_check_finds_a_corrupted_book():
    pool = PagePool(num_pages=4, page_size=4)
    pool.allocate("a", 6)
    pool._sequences["a"].pages[1] = 3
    with pytest.raises(AssertionError, match="1:"):
        pool.check()


def test_copy_pages_copies_bits():
    cache = jnp.arange(4 * 2.0).reshape(4, 2, 1, 1, 1).at[3].set(jnp.nan)
    copied = np.asarray(copy_pages(cache, [PageCopy(3, 0), PageCopy(1, 2)]))[..., 0, 0, 0]
    np.testing.assert_array_equal(copied, [[np.nan] * 2, [2, 3], [2, 3], [np.nan] * 2])


@pytest.mark.parametrize("window", [None, 3])
def test_paged_attention_reads_only_live_tokens(window):
    """Permuted pages, NaN in every other page, in the tail, and before the window."""
    rng = np.random.default_rng(0)
    page_size, pages, kv_len, q_len = 4, [5, 1, 3], 10, 2
    cache = np.full((7, page_size, 4, 1, 128), np.nan, np.float32)
    k, v = rng.standard_normal((2, kv_len, 2, 64)).astype(np.float32)
    first = 0 if window is None else kv_len - q_len - window + 1
    for position in range(first, kv_len):
        slot = cache[pages[position // page_size], position % page_size, :, 0]
        slot[0::2, :64], slot[1::2, :64] = k[position], v[position]
    q = rng.standard_normal((q_len, 4, 64)).astype(np.float32)
    table = np.array([*pages, 10**6], np.int32)
    out = paged_attention(
        q, cache, table, kv_len, kv_len - q_len, num_kv_heads=2, sliding_window=window
    )
    truth = oracle(q, k, v, sliding_window=window).output
    np.testing.assert_allclose(np.asarray(out), truth, atol=1e-6)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("size", [0, -1, 1.5, np.nan, "16", None, [16], np.arange(3)], ids=repr)
def test_a_shape_of_what_is_no_size_is_refused_and_named(place, size):
    names = ("total_num_pages", "page_size", "actual_num_kv_heads", "actual_head_dim")
    sizes = [4, 16, 2, 64]
    sizes[place] = size
    with pytest.raises(ValueError, match=f"{names[place]} is .* must be (positive|a whole number)"):
        get_kv_cache_shape(*sizes, jnp.bfloat16)


def test_a_dtype_without_bits_is_refused():
    with pytest.raises(ValueError, match="no bits"):
        get_kv_cache_shape(4, 16, 2, 64, {})


def test_lanes_are_shared_only_by_heads_that_fill_them_together():
    with pytest.raises(ValueError, match="share_lanes=True with head_dim 80: only with 64"):
        get_kv_cache_shape(1, 8, 2, 80, "float32", share_lanes=True)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda pool: PagePool(0, 4), "num_pages and page_size must be at least 1"),
        (lambda pool: pool.allocate("a", 1), "'a' exists already"),
        (lambda pool: pool.allocate("c", -1), "num_tokens must not be negative"),
        (lambda pool: pool.allocate("c", 100), "need 25 more pages, but only 2 of 4 are free"),
        (lambda pool: pool.append("c", 1), "'c' is not in the pool"),
        (lambda pool: pool.append("a", -1), "num_tokens must not be negative"),
        (lambda pool: pool.append("a", 100), "need 26 more pages, but only 2 of 4"),
        (lambda pool: pool.fork("c", "d"), "'c' is not in the pool"),
        (lambda pool: pool.fork("a", "b"), "'b' exists already"),
        (lambda pool: pool.fork("a", "c", 7), "between 0 and the 6 tokens of 'a'"),
        (lambda pool: pool.free("c"), "'c' is not in the pool"),
        (lambda pool: pool.page_table(["a"], 1), "widen it to at least 2"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_in_words_and_change_nothing(call, words):
    pool = PagePool(num_pages=4, page_size=4)
    pool.allocate("a", 6)
    pool.fork("a", "b")
    with pytest.raises(ValueError, match=words):
        call(pool)
    pool.check()
    assert pool.num_free == 2 and pool.pages("a") == [0, 1] == pool.pages("b")
    with pytest.raises(ValueError):
        pool.pages("c")
