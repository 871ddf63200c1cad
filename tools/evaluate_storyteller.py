"""Measure the bundled model: the figures of its card, npgpt2/models/README.md.

    python tools/evaluate_storyteller.py CORPUS [--model MODEL]

Run it where npgpt2 is installed. CORPUS is the folder that `train_storyteller.py` trained from. It prints

- bits per character of the held-out documents, by npgpt2's own forward pass, and with the weights rounded to int8;
- the same for a 5-gram model of the same tokens, counted on the training documents;
- how many of 200 samples repeat 15 words or more of the training documents in a row.
"""

import argparse
import lzma
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from npgpt2 import load

END = "<|endoftext|>"
ORDER = 5  # of the n-grams
SAMPLES, LENGTH, TEMPERATURE, TOP_K, SEED = 200, 200, 0.8, 40, 1
REPEATED = 15  # words


def read_documents(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        return [text for document in file.read().split(END) if (text := document.strip("\n"))]


class NGrams:
    """An n-gram model with interpolated, modified Kneser-Ney smoothing.

    Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling". An n-gram is kept as one
    int64, the earliest token in the highest bits; per order there are the n-grams sorted, and what was counted of each:
    in the highest order how often it occurs, in the lower ones how many different tokens come before it.
    """

    def __init__(self, n_vocab: int, documents: list[list[int]]) -> None:
        self.n_vocab = n_vocab
        self.bits = (n_vocab - 1).bit_length()
        if self.bits * ORDER > 63:
            raise ValueError(f"{ORDER} tokens of a vocabulary of {n_vocab} don't fit into 63 bits")
        grams, counts = np.unique(np.concatenate([self.pack(tokens) for tokens in documents]), return_counts=True)
        self.tables = []
        for n in range(ORDER, 0, -1):
            if n < ORDER:
                grams, counts = np.unique(self.last(grams, n), return_counts=True)
            self.tables.insert(0, (grams, counts, *self.discounted(grams, counts)))

    def pack(self, tokens: list[int]) -> np.ndarray:
        """The n-gram that ends at each token but the first, which is repeated before the document."""
        padded = np.array([tokens[0]] * (ORDER - 2) + tokens)
        places = np.arange(len(tokens) - 1)[:, None] + np.arange(ORDER)
        return (padded[places] << (self.bits * np.arange(ORDER)[::-1])).sum(1)

    def last(self, grams: np.ndarray, n: int) -> np.ndarray:
        return grams & ((1 << self.bits * n) - 1)

    def discounted(self, grams: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """What is left of each count, the contexts, the sum of each one's counts, and what was taken from those."""
        n1, n2, n3, n4 = (np.count_nonzero(counts == i) for i in range(1, 5))
        y = n1 / (n1 + 2 * n2)
        taken = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])[np.minimum(counts, 3)]
        contexts, first = np.unique(grams >> self.bits, return_index=True)
        return counts - taken, contexts, np.add.reduceat(counts, first), np.add.reduceat(taken, first)

    def probabilities(self, grams: np.ndarray) -> np.ndarray:
        """The probability of each n-gram's last token after the others."""
        p = np.full(len(grams), 1 / self.n_vocab)
        for n, (known, _, left, contexts, total, taken) in enumerate(self.tables, 1):
            gram = self.last(grams, n)
            at = np.searchsorted(known, gram).clip(max=len(known) - 1)
            context = np.searchsorted(contexts, gram >> self.bits).clip(max=len(contexts) - 1)
            seen = contexts[context] == gram >> self.bits
            own = np.where(known[at] == gram, left[at], 0)
            p = np.where(seen, (own + taken[context] * p) / total[context], p)
        return p

    def surprise(self, documents: list[list[int]]) -> float:
        """The bits that the model needs for all documents, each on its own after its first token."""
        return sum(-np.log2(self.probabilities(self.pack(tokens))).sum() for tokens in documents)


def runs_of_words(text: str) -> list[int]:
    """A hash of each run of REPEATED words; neither punctuation nor capitals count."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return [hash(tuple(words[i : i + REPEATED])) for i in range(len(words) - REPEATED + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the bundled model, storyteller.")
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("--model", default="storyteller", help="another model file that was trained on it")
    args = parser.parse_args()
    model = load(args.model)
    training, held_out = (read_documents(args.corpus / f"{name}.txt.xz") for name in ["train", "val"])

    def encode(texts: list[str]) -> list[list[int]]:
        assert model.tokenizer.end_of_text is not None
        return [[model.tokenizer.end_of_text, *model.tokenizer.encode(text)] for text in texts]

    tokenised, characters = encode(held_out), sum(map(len, held_out))
    n_tokens = sum(len(tokens) - 1 for tokens in tokenised)
    print(f"held out: {len(held_out)} documents, {characters:,} characters, {n_tokens:,} tokens")
    for name, scored in (("npgpt2", model), ("npgpt2 in int8", load(args.model, dtype="int8"))):
        bits = sum(scored.score(text).bits for text in tqdm(held_out, desc=name, leave=False, disable=None))
        print(f"{name}: {bits / characters:.4f} bits per character")
    n_grams = NGrams(model.hparams.n_vocab, encode(training))
    print(f"{ORDER}-gram: {n_grams.surprise(tokenised) / characters:.4f} bits per character")

    known = {run for text in training for run in runs_of_words(text)}
    repeating = 0
    with tqdm(total=SAMPLES * LENGTH, unit=" tokens", desc="samples", leave=False, disable=None) as bar:
        sampling = {"temperature": TEMPERATURE, "top_k": TOP_K, "seed": SEED, "ignore_eot": True}
        for sample in model.samples("", SAMPLES, 20, LENGTH, **sampling, progress=bar.update):
            repeating += not known.isdisjoint(runs_of_words(sample))
    print(f"{repeating} of {SAMPLES} samples repeat {REPEATED} words or more of the training text in a row")


if __name__ == "__main__":
    main()
