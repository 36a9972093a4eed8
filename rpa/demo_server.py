"""The server of the demos: the prompts as requests, their scheduler, and the answers as text."""

import json
from importlib import resources

import numpy as np

from rpa.models.scheduler import Request, Scheduler

PAGE_SIZE = 16
NUM_PAGES = 96
TOKEN_BUDGET = 288
CHUNK_SIZE = 96
MAX_NUM_SEQS = 10
PAGES_PER_SEQ = 24
ANSWER_TOKENS = 16
"""Tokens that the model writes at least for each prompt; the first prompts get a few more."""
PROMPT_END = 48
"""Characters of a prompt that are shown."""


def new_scheduler(requests, pool) -> Scheduler:
    """The server of the demo."""
    return Scheduler(
        requests,
        pool,
        token_budget=TOKEN_BUDGET,
        chunk_size=CHUNK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        pages_per_seq=PAGES_PER_SEQ,
    )


def read_requests(tokenizer) -> list[Request]:
    """The prompts of the demo as requests; one that shares a prefix forks the first that has it."""
    text = resources.files("rpa").joinpath("data/demo_prompts.json").read_text("utf-8")
    data = json.loads(text)
    requests, first_with = [], {}
    for entry in data["requests"]:
        messages = [{"role": "user", "content": entry["text"]}]
        prefix = entry.get("prefix")
        if prefix:
            messages.insert(0, {"role": "system", "content": data["prefixes"][prefix]})
        token_ids = tokenizer.encode(tokenizer.chat_prompt(messages))
        parent = first_with.setdefault(prefix, entry["name"]) if prefix else entry["name"]
        forks = None
        if parent != entry["name"]:
            other = next(r for r in requests if r.name == parent)
            same = [a == b for a, b in zip(token_ids, other.token_ids, strict=False)]
            forks = (parent, same.index(False))
        requests.append(Request(entry["name"], token_ids, len(token_ids), entry["arrives"], forks))
    return requests


def copy_pages_of_all_layers(kv_cache, copies, num_layers):
    """Carry out page copies in every layer; layer l's pages start at l * NUM_PAGES."""
    for source, target in copies:
        layers = np.arange(num_layers) * NUM_PAGES
        kv_cache = kv_cache.at[layers + target].set(kv_cache[layers + source])
    return kv_cache


def read_answer(tokenizer, request) -> tuple[str, str]:
    """The end of the user's message, and what was generated up to the end token, as two lines."""
    prompt = tokenizer.decode(request.token_ids[: request.prompt_len])
    message = prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
    written = request.token_ids[request.prompt_len :]
    if tokenizer.end_token_id in written:
        written = written[: written.index(tokenizer.end_token_id)]
    message, text = (" ".join(part.split()) for part in (message, tokenizer.decode(written)))
    return message[-PROMPT_END:], text


def format_answers(answers) -> str:
    """What the model wrote, prompt by prompt.

    >>> print(format_answers([("sums", "12 + 345 = ?", "It is 357.")]))
      sums       ... 12 + 345 = ?
                 -> It is 357.
    """
    lines = []
    for name, prompt_end, text in answers:
        lines += [f"  {name:<10} ... {prompt_end}", f"  {'':<10} -> {text}"]
    return "\n".join(lines)
