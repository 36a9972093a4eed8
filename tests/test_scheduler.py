"""Scheduler and page pool together: all or nothing, whatever is asked for and whatever runs out."""

import copy

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rpa.models.scheduler import Request, Scheduler
from rpa.page_pool import OutOfPages, PagePool

pytestmark = pytest.mark.core

PAGE_SIZE = 4
SIZES = dict(token_budget=8, chunk_size=4, max_num_seqs=3, pages_per_seq=8)


def prompt(name, num_tokens):
    return [hash_of(name, i) for i in range(num_tokens)]


def hash_of(name, i):
    return (ord(name) * 100 + i) % 997


def request(name, num_tokens=5, **more):
    return Request(name, prompt(name, num_tokens), num_tokens, **more)


def fork(name, parent, shared, num_tokens):
    tokens = (parent.token_ids + prompt(name, num_tokens))[:shared] + prompt(name, num_tokens)
    return Request(name, tokens[:num_tokens], num_tokens, 0, (parent.name, shared))


def scheduler(requests, num_pages=20, **sizes):
    return Scheduler(requests, PagePool(num_pages, PAGE_SIZE), **(SIZES | sizes))


def state(s):
    """All that a call may change."""
    return copy.deepcopy((vars(s.pool), s.requests))


def answer(request, num_cached):
    return (7 * num_cached + ord(request.name[0])) % 997


def step_through(s, steps, start=0):
    for now in range(start, start + steps):
        step = s.plan(now)
        s.finish(step, [answer(r, len(r.token_ids)) for r in step.requests])


# --- Refused before anything moves ------------------------------------------------------------

NOT_WHOLE = (1.5, float("nan"), float("inf"), "x", None, [1])

NEVER = {
    "two of one name": (lambda: [request("a"), request("a")], {}, "two requests 'a'"),
    "an empty prompt": (lambda: [request("a", 0)], {}, "at least one"),
    "a prompt_len too long": (lambda: [Request("a", [1, 2], 3)], {}, "prompt_len 3 and 2 tokens"),
    "prompt_len 1.5": (lambda: [Request("a", [1, 2], 1.5)], {}, "1.5, but must be a whole"),
    "a fork of nothing": (lambda: [request("a", forks=("b", 2))], {}, "'b', which does not exist"),
    "a fork of itself": (lambda: [request("a", forks=("a", 2))], {}, "waits for it in turn"),
    "a fork in a circle": (
        lambda: [request("a", forks=("b", 2)), request("b", forks=("a", 2))],
        {},
        "waits for it in turn",
    ),
    "a fork of -1": (lambda: [request("a"), request("b", forks=("a", -1))], {}, "not be negative"),
    "a fork of 1.5": (lambda: [request("a"), request("b", forks=("a", 1.5))], {}, "a whole number"),
} | {
    f"{name} {value!r}": (lambda: [request("a")], {name: value}, f"{name} is .*must be")
    for name in SIZES
    for value in (0, -1, *NOT_WHOLE)
}


@pytest.mark.parametrize("kind", NEVER)
def test_what_could_never_be_served_is_refused_at_once(kind):
    requests, sizes, words = NEVER[kind]
    with pytest.raises(ValueError, match=words):
        scheduler(requests(), **sizes)


def test_a_name_that_the_pool_knows_is_another_sequence():
    pool = PagePool(4, 4)
    pool.allocate("a", 3)
    with pytest.raises(ValueError, match="two requests 'a'"):
        Scheduler([request("a")], pool, **SIZES)


def out_of_pages():
    s = scheduler([request("a", 8), request("b", 9)], num_pages=3, token_budget=20, chunk_size=9)
    return s, OutOfPages, lambda: s.plan(0)


def out_of_pages_at_a_fork():
    a = request("a", 8)
    requests = [a, fork("b", a, 6, 12), request("c", 9, arrives=1)]
    s = scheduler(requests, num_pages=4, token_budget=20, chunk_size=9)
    step_through(s, 1)
    return s, OutOfPages, lambda: s.plan(1)


def outgrows_the_table():
    s = scheduler([request("a", 9)], pages_per_seq=1)
    step_through(s, 1)
    return s, ValueError, lambda: s.plan(1)


def another_prefix():
    s = scheduler([request("a", 8), Request("b", [1] * 8, 8, 0, ("a", 4))], chunk_size=8)
    step_through(s, 1)
    return s, ValueError, lambda: s.plan(1)


def planned_twice():
    s = scheduler([request("a")])
    s.plan(0)
    return s, ValueError, lambda: s.plan(1)


def finished_twice():
    s = scheduler([request("a")])
    step = s.plan(0)
    s.finish(step, [1])
    return s, ValueError, lambda: s.finish(step, [1])


def finished_without_a_plan():
    s = scheduler([request("a")])
    return s, ValueError, lambda: s.finish(None, [1])


def too_few_tokens():
    s = scheduler([request("a"), request("b")])
    step = s.plan(0)
    return s, ValueError, lambda: s.finish(step, [1])


def tokens_that_are_none():
    s = scheduler([request("a"), request("b")])
    step = s.plan(0)
    return s, ValueError, lambda: s.finish(step, [1, 1.5])


def preempts_in_a_step():
    s = scheduler([request("a")])
    s.plan(0)
    return s, ValueError, lambda: s.preempt("a", 1)


def preempts_what_has_not_begun():
    s = scheduler([request("a")])
    return s, ValueError, lambda: s.preempt("a", 1)


IMPOSSIBLE = (
    *(out_of_pages, out_of_pages_at_a_fork, outgrows_the_table, another_prefix, planned_twice),
    *(finished_twice, finished_without_a_plan, too_few_tokens, tokens_that_are_none),
    *(preempts_in_a_step, preempts_what_has_not_begun),
)


@pytest.mark.parametrize("make", IMPOSSIBLE, ids=lambda make: make.__name__)
def test_what_cannot_be_done_changes_nothing(make):
    s, error, call = make()
    before = state(s)
    with pytest.raises(error):
        call()
    assert state(s) == before
    s.pool.check()


def test_a_second_plan_is_refused_for_what_it_is():
    """Without its own check it fails later, of shapes that do not fit."""
    s, _, call = planned_twice()
    with pytest.raises(ValueError, match="planned last is not finished: call finish"):
        call()


@pytest.mark.parametrize("value", NOT_WHOLE)
def test_wrong_types_change_nothing(value):
    s = scheduler([request("a")])
    step_through(s, 1)
    before = state(s)
    calls = [s.plan, lambda v: s.preempt("a", v), lambda v: s.pool.append("a", v)]
    calls += [lambda v: s.pool.allocate("b", v), lambda v: s.pool.page_table(["a"], v)]
    calls += [lambda v: PagePool(v, 4), lambda v: PagePool(4, v)]
    if value is not None:
        calls.append(lambda v: s.pool.fork("a", "b", v))
    for call in calls:
        with pytest.raises(ValueError, match="must be a whole number"):
            call(value)
    assert state(s) == before


# --- Right ------------------------------------------------------------------------------------


def test_a_prompt_that_is_wholly_shared_computes_its_last_token():
    a = request("a", 8)
    s = scheduler([a, fork("b", a, 8, 8)], chunk_size=8)
    step_through(s, 1)
    step = s.plan(1)
    b = [r.name for r in step.requests].index("b")
    assert step.stages[b] == "just arrived"
    rows = slice(step.batch.cu_q_lens[b], step.batch.cu_q_lens[b + 1])
    assert step.positions[rows].tolist() == [7] and step.batch.kv_lens[b] == 8
    assert len(step.copies) == 1, "position 7 is written into a page of its own"


def test_a_fork_waits_for_the_tokens_that_it_shares():
    a = request("a", 10, arrives=2)
    s = scheduler([fork("b", a, 6, 9), a], chunk_size=4)
    taking_part = []
    for now in range(6):
        step = s.plan(now)
        taking_part.append(sorted(r.name for r in step.requests))
        s.finish(step, [0] * len(step.requests))
    assert taking_part == [[], [], ["a"], ["a"], ["a", "b"], ["a", "b"]]


def test_a_waiting_fork_takes_no_place_from_the_one_that_it_waits_for():
    a = request("a", 4)
    s = scheduler([fork("b", a, 3, 6), a], max_num_seqs=1)
    assert [r.name for r in s.plan(0).requests] == ["a"]


def test_a_budget_smaller_than_the_decodes_leaves_some_idle():
    s = scheduler([request("a", 1), request("b", 1), request("c", 1)], token_budget=2)
    step = s.plan(0)
    assert step.batch.cu_q_lens.tolist()[-1] == 2
    s.finish(step, [5, 6, 7])
    assert sorted(len(r.token_ids) for r in s.requests) == [1, 2, 2]


class Serving(RuleBasedStateMachine):
    """A server with a pool that is too small, against a model that knows the tokens alone.

    The cache is simulated: what a step computes is stored where its batch says, and every request
    must find its own tokens there, whatever was preempted, shared or copied before.
    """

    @initialize(data=st.data(), num_pages=st.integers(4, 9), budget=st.integers(1, 12))
    def start(self, data, num_pages, budget):
        requests = []
        for name in "abcde"[: data.draw(st.integers(1, 5))]:
            length = data.draw(st.integers(1, 14))
            if requests and data.draw(st.booleans()):
                parent = data.draw(st.sampled_from(requests))
                shared = data.draw(st.integers(0, parent.prompt_len))
                new = fork(name, parent, shared, max(length, shared, 1))
            else:
                new = request(name, length)
            new.arrives = data.draw(st.integers(0, 4))
            requests.append(new)
        chunk = data.draw(st.integers(1, 6))
        self.scheduler = scheduler(
            requests, num_pages, token_budget=budget, chunk_size=chunk, pages_per_seq=num_pages
        )
        self.prompts = {r.name: list(r.token_ids) for r in requests}
        self.cache = np.full((num_pages, PAGE_SIZE), -1)
        self.now = 0

    def plan(self):
        """A step, after as many preemptions as it takes; None if a request is too long for all."""
        while True:
            before = state(self.scheduler)
            try:
                return self.scheduler.plan(self.now)
            except OutOfPages:
                assert state(self.scheduler) == before
                self.scheduler.pool.check()
            open_ones = self.scheduler.pool.names
            if not open_ones:
                return None
            self.scheduler.preempt(open_ones[-1], self.now + 2)

    @rule()
    def serve(self):
        step = self.plan()
        self.now += 1
        if step is None:
            return
        for source, target in step.copies:
            self.cache[target] = self.cache[source]
        batch = step.batch
        table = batch.page_indices.reshape(batch.max_num_seqs, -1)
        for s, r in enumerate(step.requests):
            for row in range(batch.cu_q_lens[s], batch.cu_q_lens[s + 1]):
                position = step.positions[row]
                self.cache[table[s, position // PAGE_SIZE], position % PAGE_SIZE] = step.token_ids[
                    row
                ]
            found = self.cache[table[s, : -(-batch.kv_lens[s] // PAGE_SIZE)]].reshape(-1)
            assert found[: batch.kv_lens[s]].tolist() == r.token_ids[: batch.kv_lens[s]]
        assert len(step.requests) == int(batch.num_seqs)
        batch.validate(
            num_tokens=len(step.token_ids),
            num_pages=self.scheduler.pool.num_pages,
            page_size=PAGE_SIZE,
            chunk_prefill_size=self.scheduler.chunk_size,
        )
        self.scheduler.finish(step, [answer(r, len(r.token_ids)) for r in step.requests])

    @rule(name=st.sampled_from("abcde"), later=st.integers(0, 3))
    def preempt(self, name, later):
        if name in self.scheduler.pool.names:
            self.scheduler.preempt(name, self.now + later)
        else:
            with pytest.raises(ValueError, match="has no pages"):
                self.scheduler.preempt(name, self.now)

    @invariant()
    def every_request_is_its_prompt_and_what_was_answered(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.pool.check()
        for r in self.scheduler.requests:
            tokens = list(self.prompts[r.name])
            while len(tokens) < len(r.token_ids):
                tokens.append(answer(r, len(tokens)))
            assert r.token_ids == tokens
            if r.name in self.scheduler.pool.names:
                assert self.scheduler.pool.kv_len(r.name) == r.num_cached
            else:
                assert r.num_cached == 0


Serving.TestCase.settings = settings(
    max_examples=80, stateful_step_count=20, deadline=None, derandomize=True
)
TestServing = Serving.TestCase
