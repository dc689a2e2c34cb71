"""Text of made-up words, as much as is asked for: `python -m tests.data.made_up_text 1e9 big.jsonl`."""

import sys
from pathlib import Path

import numpy as np

WORDS = 1_000_000  # of the language
DOCUMENT = 50, 1500  # words of one, from and below


def write(path: Path, size: float, seed: int = 0) -> None:
    """Write a .jsonl file of `size` bytes and up to a document more, whose words are as frequent as Zipf says."""
    random = np.random.default_rng(seed)
    odds = 1 / np.arange(2, 28)
    letters = random.choice(list("etaoinshrdlucmfwypvbgkjqxz"), p=odds / odds.sum(), size=(WORDS, 10))
    lengths = random.integers(1, 11, WORDS)
    words = np.array([row[:n].tobytes().decode("utf-32") for row, n in zip(letters, lengths, strict=True)])
    upto = np.cumsum(1 / np.arange(1, WORDS + 1))
    written = 0
    with open(path, "w") as file:
        while written < size:
            drawn = words[np.searchsorted(upto, random.random(random.integers(*DOCUMENT)) * upto[-1])]
            written += file.write('{"text": "' + " ".join(drawn) + '"}\n')


if __name__ == "__main__":
    write(Path(sys.argv[2]), float(sys.argv[1]))
