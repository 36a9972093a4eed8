"""SmolLM2's tokenizer: byte-level BPE, built from what a GGUF file says about itself.

Text becomes bytes, bytes become letters of a visible alphabet, and the most frequent neighbours
are merged, in the order in which training found them (Sennrich et al. 2016, arXiv 1508.07909;
Radford et al. 2019, section 2.2).
"""

SYSTEM_TURN = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the model's chat template says first when a conversation has no system message."""

_CONTROL = 3
"""GGUF's token type of special tokens, such as `<|im_start|>`."""


class Tokenizer:
    """Text to token ids and back, like transformers' tokenizer of SmolLM2 does it.

    A special token that is written out in a text, such as `<|im_start|>`, becomes that token:
    this is how the chat template works, and why text of a stranger should be searched for it
    first. Nothing is added to the text, no begin token either.

    21 of the 256 bytes never occurred in training and have no token; 13 of them never occur in
    UTF-8, the others are control characters and the first byte of planes 4 to 11 of Unicode,
    which hold no characters today. As in the original, they are left out without a word; every
    other text comes back from `decode(encode(text))` as it was.

    Args:
        tokens: every token in the byte-level alphabet, in the order of ids.
        merges: "left right", best first.
        token_types: GGUF token types, 3 for a special token.
        end_token_id: the id that ends an answer.
    """

    def __init__(self, tokens, merges, token_types, end_token_id):
        # Imported here: `rpa` works without the extra, only the real model needs it.
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as FastTokenizer

        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        self._fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        # Digits first, each on its own, then GPT-2's words. Without the first step the last of
        # two spaces before a number sticks to the number, and " 7" is not the tokens the model
        # was trained on. (transformers loses this step when it reads a GGUF file.)
        self._fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self._fast.decoder = decoders.ByteLevel()
        self.special_tokens = {
            token: token_id
            for token_id, (token, kind) in enumerate(zip(tokens, token_types, strict=True))
            if kind == _CONTROL
        }
        self._fast.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in self.special_tokens]
        )
        self.vocab_size = len(tokens)
        self.end_token_id = end_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens that are written out in it are recognised.

        Raises:
            ValueError: if text is no string, or holds half a surrogate pair.
        """
        if not isinstance(text, str):
            raise ValueError(
                f"text must be a str, but is a {type(text).__name__}: encode one text at a time."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds half a surrogate pair at index {error.start}, which is no character: "
                'clean it with text.encode("utf-8", "replace").decode().'
            ) from error
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids, *, skip_special_tokens=False) -> str:
        """The text of token ids; bytes that are no UTF-8 (a character cut in two) show as U+FFFD.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
        token_ids = [int(token_id) for token_id in token_ids]
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"token_ids holds {token_id}, but the vocabulary has ids 0 to "
                    f"{self.vocab_size - 1}: is it an id of another tokenizer?"
                )
        return self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def chat_prompt(self, messages) -> str:
        """The text that asks the model for its next answer in a conversation: its chat template.

        A conversation that does not begin with a system message gets the model's own one.

        Args:
            messages: a list of {"role": "system" | "user" | "assistant", "content": str}.

        Returns:
            A text for `encode`, which ends where the answer of the assistant begins.

        Raises:
            ValueError: if there is no message, or one lacks a role or content.
        """
        if isinstance(messages, str) or not messages:
            raise ValueError(
                f"messages must be a list with at least one message, but is {messages!r}: pass "
                '[{"role": "user", "content": "..."}].'
            )
        turns = []
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(
                    f'messages[{index}] must be a dict with "role" and "content", but is '
                    f"{message!r}."
                )
            turns.append((message["role"], message["content"]))
        if turns[0][0] != "system":
            turns.insert(0, ("system", SYSTEM_TURN))
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return text + "<|im_start|>assistant\n"
