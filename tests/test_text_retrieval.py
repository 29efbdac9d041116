"""Windows that teach retrieval: passkeys and repeated segments."""

import numpy as np
import pytest
from tiny import byte_tokenizer

from longspan.text.corpus import Corpus
from longspan.text.passkey import passkey_prompt
from longspan.text.repeats import repeated_segments

TOKENIZER = byte_tokenizer()
TEXT = Corpus.from_ids([TOKENIZER("some text to hide keys in, " * 200)["input_ids"]], separator=256)


def key(symbols: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    prompt = passkey_prompt(TOKENIZER, TEXT, length=300, depth=0.5, rng=rng, symbols=symbols)
    answer = TOKENIZER.decode(prompt.ids[-prompt.answer :]).strip()
    assert TOKENIZER.decode(prompt.ids[: -prompt.answer]).count(answer) == 2
    return answer


@pytest.mark.parametrize("symbols", [1, 2, 3])
def test_a_key_of_few_digits_has_no_more(symbols):
    keys = [key(symbols, seed) for seed in range(60)]
    assert max(len(set(digits)) for digits in keys) == symbols
    # Every digit is among those that can be drawn, the same few are not always taken.
    assert set("".join(keys)) == set("0123456789")


def test_segments_of_few_tokens_come_again_within_themselves():
    # No two tokens of this text are alike, so only a segment of few repeats one at once.
    numbers = Corpus(np.arange(100_000), np.zeros(1, dtype=np.int64))

    def runs(few: float) -> int:
        """Count tokens that follow themselves."""
        found = 0
        for seed in range(60):
            window = repeated_segments(numbers, length=255, rng=np.random.default_rng(seed), few=few)
            found += int((window[1:] == window[:-1]).sum())
        return found

    assert runs(0.0) == 0
    assert runs(1.0) > 100


def test_segments_fill_the_length():
    for length in (16, 63, 511):
        window = repeated_segments(TEXT, length=length, rng=np.random.default_rng(length), few=0.5)
        assert window.shape == (length,) and window.dtype == np.int64
