"""Generating text: the loop that ties tokenizer, model and sampler together, and the library's interface to it.

    text → tokens → logits → token → text

Text can grow past the n_ctx positions that the model can see: whenever they are used up, the last n_ctx // 2 tokens
are read again from position 0, and generation goes on behind them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from npgpt2.engine.continuation import Continuation, Prefix
from npgpt2.engine.text import TextStream
from npgpt2.kernels.int8 import prepare
from npgpt2.kernels.kernels import Array
from npgpt2.kernels.tokenizer import Tokenizer
from npgpt2.model import Cache, HParams, forward
from npgpt2.models import BUNDLED, find_model
from npgpt2.sampling import Ids, Sampler, random_generator
from npgpt2.study.score import Score, surprises
from npgpt2.study.trace import Trace, trace
from npgpt2.weights import Weights


class GPT2:
    """A GPT-2 model that is ready to run; `npgpt2.load` makes one.

    >>> model.hparams                                                # `model` is the tests' small model
    HParams(n_vocab=520, n_ctx=192, n_embd=48, n_head=4, n_layer=2)
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.matrices = prepare(weights)  # what is computed with
        self.hparams: HParams = weights.hparams
        self._tokenizer: Tokenizer | None = None

    def __reduce__(self) -> tuple[type[GPT2], tuple[Weights]]:
        return type(self), (self.weights,)  # all else is made of them

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's vocabulary; ValueError where its file has none, or one of another model."""
        # Not a cached_property, which before Python 3.12 has a lock that a forked process can inherit taken.
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer()
        return self._tokenizer

    def _read_tokenizer(self) -> Tokenizer:
        texts = self.weights.vocabulary()
        if texts is None:
            raise ValueError(f"{self.weights.path}: has no vocabulary; convert it again with --vocab DIR to use text")
        tokenizer = Tokenizer(*texts, source=str(self.weights.path))
        n_vocab = self.hparams.n_vocab
        if len(tokenizer) != n_vocab:
            raise ValueError(
                f"{self.weights.path}: the vocabulary has {len(tokenizer)} entries, but n_vocab is {n_vocab}"
            )
        return tokenizer

    def logits(self, tokens: npt.ArrayLike) -> Array:
        """The model's logits for the token after each position.

        tokens: ints (T,) or (B, T), T at most n_ctx → float32 (T, V) or (B, T, V). Ids that are not in the vocabulary,
        and more tokens than n_ctx, raise ValueError.

        >>> model.logits([10, 20, 30]).shape
        (3, 520)
        """
        ids = self._check(tokens, self.hparams.n_ctx)
        if ids.ndim == 1:
            return forward(self.matrices, self.hparams, [ids], [Cache(self.hparams)], all_positions=True)
        logits = np.empty((*ids.shape, self.hparams.n_vocab), np.float32)
        for row, out in zip(ids, logits, strict=True):
            out[:] = forward(self.matrices, self.hparams, [row], [Cache(self.hparams)], all_positions=True)
        return logits

    def trace(self, tokens: npt.ArrayLike, attention: bool = False, residual: bool = False) -> Trace:
        """The same logits, and what happened on the way to them; see `Trace`.

        tokens: ints (T,), T at most n_ctx · attention, residual: whether to keep every layer's attention weights, and
        what the residual stream was after it. Besides the logits' 4·T·V bytes, a trace takes 4·L·H·T² bytes for the
        first and 4·L·T·C for the second, where L is n_layer: 124M and 256 tokens make 51 MB, 38 MB and 9 MB. Tokens of
        another shape, ids that are not in the vocabulary, and more than n_ctx raise ValueError.

        >>> trace = model.trace([10, 20, 30], attention=True)
        >>> trace.logits.shape, trace.attention.shape, trace.residual
        ((3, 520), (2, 4, 3, 3), None)
        """
        ids = self._check(tokens, self.hparams.n_ctx)
        if ids.ndim != 1:
            raise ValueError(f"tokens have shape {ids.shape}, where (T,), a single sequence, is expected")
        return trace(self.matrices, self.hparams, ids, attention, residual)

    def generate_tokens(
        self,
        tokens: npt.ArrayLike,
        length: int = 40,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Ids:
        """Continue token sequences by `length` tokens each, whatever they are (`<|endoftext|>` doesn't end them).

        tokens: ints (T,) or (B, T), of any T → int64 (length,) or (B, length), the new tokens alone. Row i draws its
        random numbers from (seed, i). The other parameters are those of `generate`.

        >>> tokens = model.tokenizer.encode("A language model")
        >>> model.tokenizer.decode(model.generate_tokens(tokens, length=4))
        ' plays one small game'
        """
        ids = self._check(tokens)
        sampler, generators = self._settings(length, temperature, top_k, top_p, seed)
        rows = [Continuation(self.hparams, row.tolist(), generators(i)) for i, row in enumerate(np.atleast_2d(ids))]
        new = np.empty((len(rows), length), np.int64)
        for step in range(length):
            new[:, step] = self._advance(rows, sampler)
        return new.reshape(*ids.shape[:-1], length)

    def generate(
        self,
        prompt: str,
        length: int = 40,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eot: bool = False,
        prefix: Prefix | None = None,
    ) -> str:
        """Continue a text; returns the new text alone.

        prompt: what to continue; if empty, a text of its own begins · length: how many tokens to generate at most ·
        temperature, top_k, top_p: see `Sampler`; temperature 0 always takes the likeliest token · seed: fixes what is
        drawn · stop: strings before which the text ends · ignore_eot: go on past `<|endoftext|>`, with which the model
        ends a text · prefix: what `prefix` returned for a text with which the prompt begins, to save time. Values out
        of range raise ValueError.

        >>> model.generate("A language model", length=20, stop=":")
        ' plays one small game'
        """
        return "".join(self.stream(prompt, length, temperature, top_k, top_p, seed, stop, ignore_eot, prefix))

    def stream(
        self,
        prompt: str,
        length: int = 40,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eot: bool = False,
        prefix: Prefix | None = None,
        sample: int = 0,
    ) -> Iterator[str]:
        """The same as `generate`, in pieces as they come. sample: which of the seed's samples to draw (see `samples`).

        >>> for piece in model.stream("A language model", length=4):
        ...     print(piece, end="|")
         plays| one| small| game|
        """
        run = self._run(prompt, length, temperature, top_k, top_p, seed, stop, ignore_eot)
        return (piece for step in run(range(sample, sample + 1), prefix) for _, piece in step if piece)

    def samples(
        self,
        prompt: str,
        nsamples: int = 1,
        batch_size: int = 1,
        length: int = 40,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eot: bool = False,
        prefix: Prefix | None = None,
        first: int = 0,
        progress: Callable[[int], object] = lambda tokens: None,
    ) -> Iterator[str]:
        """Continue one prompt several times; yields the texts in order, `nsamples` of them, or without end if 0. The
        prompt is read once.

        batch_size: how many to generate at once, which only changes speed and memory: sample i, counted from `first`,
        draws its random numbers from (seed, i) · progress: called with the number of tokens after each step. The
        other parameters are those of `generate`.

        >>> list(model.samples("A language", nsamples=2, length=4, seed=1, temperature=0))
        [' model plays one small', ' model plays one small']
        """
        for name, value, least in (("nsamples", nsamples, 0), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}, where a whole number of at least {least} is expected")
        run = self._run(prompt, length, temperature, top_k, top_p, seed, stop, ignore_eot)

        def texts() -> Iterator[str]:
            shared = prefix if nsamples == 1 else self.prefix(prompt, prefix)
            for done in range(0, nsamples, batch_size) if nsamples else count(0, batch_size):
                size = min(batch_size, nsamples - done) if nsamples else batch_size
                batch = range(first + done, first + done + size)
                parts = dict.fromkeys(batch, "")
                for step in run(batch, shared):
                    progress(len(step))
                    for number, piece in step:
                        parts[number] += piece
                yield from parts.values()

        return texts()

    def score(
        self,
        text: str | Iterable[str],
        stride: int | None = None,
        each: Callable[[int, float], object] = lambda token, bits: None,
    ) -> Score:
        """How well the model predicts a text: its bits and lengths, and what papers make of them; see `Score`.

        text: a string, or pieces of one, as from an open file, of any length · stride: how far apart the windows are in
        which it is read, 1 to n_ctx, by default n_ctx // 2; see `npgpt2.study.score` · each: called with every token
        that was predicted, and the bits it took.

        >>> model.score("A language model plays one small game").perplexity_per_token < 1.1
        True
        """
        score = Score()

        def tokens() -> Iterator[int]:
            if self.tokenizer.end_of_text is not None:
                yield self.tokenizer.end_of_text
            for new in self.tokenizer.encode_pieces(score.counted([text] if isinstance(text, str) else text)):
                yield from new

        for token, bits in surprises(self.matrices, self.hparams, tokens(), stride):
            score.bits += bits
            score.tokens += 1
            each(token, bits)
        return score

    def prefix(self, text: str, prefix: Prefix | None = None) -> Prefix:
        """Read a text with which several prompts begin, once; `generate` and its like then take it as `prefix`.

        text: if empty, what comes before a text of its own · prefix: what was read of its own beginning. A prompt's
        tokens are compared with the text's, and those that both begin with aren't read again, so that any prefix goes
        with any prompt and changes nothing but the time. One of more than n_ctx tokens serves no prompt but itself. It
        takes a cache's memory: 74 kB for each token in 124M.

        >>> prefix = model.prefix("A language model plays")
        >>> model.generate("A language model plays one", length=2, prefix=prefix)
        ' small game'
        """
        tokens = self.prompt_tokens(text)
        if prefix is not None and prefix.tokens == tokens:
            return prefix
        beginning = Continuation(self.hparams, tokens, random_generator(0, 0), prefix)
        beginning.make_room()
        self._read([beginning])
        return Prefix(tokens, beginning.cache, beginning.logits[0])

    def _run(
        self,
        prompt: str,
        length: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
        stop: str | Sequence[str],
        ignore_eot: bool,
    ) -> Callable[[range, Prefix | None], Iterator[list[tuple[int, str]]]]:
        """Check the settings, and return what generates the samples of some numbers together, from a prefix.

        It yields, for each token, the numbers of the samples that are not at their end yet, with what they gained.
        """
        sampler, generators = self._settings(length, temperature, top_k, top_p, seed)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise ValueError("a stop string is empty, which would end every text at once")
        tokens = self.prompt_tokens(prompt)
        end = None if ignore_eot else self.tokenizer.end_of_text

        def steps(numbers: range, prefix: Prefix | None) -> Iterator[list[tuple[int, str]]]:
            sequences = {number: Continuation(self.hparams, tokens, generators(number), prefix) for number in numbers}
            texts = {number: TextStream(self.tokenizer, stops) for number in numbers}
            for step in range(1, length + 1):
                pieces = []
                for number, token in zip(list(sequences), self._advance([*sequences.values()], sampler), strict=True):
                    text = texts[number]
                    piece = "" if token == end else text.push(token)
                    if token == end or text.done or step == length:
                        piece += text.finish()
                        del sequences[number]
                    pieces.append((number, piece))
                yield pieces
                if not sequences:
                    return

        return steps

    def _advance(self, sequences: Sequence[Continuation], sampler: Sampler) -> list[int]:
        """Let the model read what it hasn't of each sequence, and draw the next token of each."""
        for sequence in sequences:
            sequence.make_room()
        if len(sequences) == 1:
            sequences[0].guess()
        self._read(sequences)
        return [sequence.append(sampler.choose(sequence.logits[0], sequence.rng)) for sequence in sequences]

    def _read(self, sequences: Sequence[Continuation]) -> None:
        # Reading one token takes as long as fetching the weights from memory, so that sequences share it; reading many
        # is bound by arithmetic, so that long prompts gain nothing from it and are read one by one, in less memory.
        alone = [[sequence] for sequence in sequences if len(sequence.unread) > 1]
        together = [sequence for sequence in sequences if len(sequence.unread) == 1]
        for group in [*alone, together] if together else alone:
            tokens = [np.array(sequence.unread + sequence.guessed) for sequence in group]
            caches = [sequence.cache for sequence in group]
            logits = forward(self.matrices, self.hparams, tokens, caches, bool(group[0].guessed))
            for sequence, rows in zip(group, np.split(logits, len(group)), strict=True):
                sequence.read(rows)

    def _check(self, tokens: npt.ArrayLike, longest: int | None = None) -> Ids:
        """Token ids as an array, once they are ones that the model knows, and no more than it can see at once."""
        ids = np.asarray(tokens)
        if ids.ndim not in (1, 2) or ids.size == 0:
            raise ValueError(f"tokens have shape {ids.shape}, where (T,) or (B, T) with at least one token is expected")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens have type {ids.dtype}, where integers are expected")
        if ids.min() < 0 or ids.max() >= self.hparams.n_vocab:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"token {wrong} is not in the vocabulary, which goes from 0 to {self.hparams.n_vocab - 1}")
        if longest is not None and ids.shape[-1] > longest:
            raise ValueError(f"{ids.shape[-1]} tokens are more than the model's n_ctx of {longest}")
        return ids.astype(np.int64, copy=False)

    def prompt_tokens(self, prompt: str) -> list[int]:
        """A prompt's tokens; a text of its own begins after `<|endoftext|>`, which came before each in training.

        An empty prompt raises ValueError where the vocabulary has no such token.

        >>> model.prompt_tokens("A language model"), model.prompt_tokens("")
        ([32, 514, 352], [519])
        """
        if prompt:
            return self.tokenizer.encode(prompt)
        if self.tokenizer.end_of_text is None:
            raise ValueError(f"{self.weights.path}: its vocabulary has no <|endoftext|>, so that a prompt is needed")
        return [self.tokenizer.end_of_text]

    def _settings(
        self, length: int, temperature: float, top_k: int, top_p: float, seed: int | None
    ) -> tuple[Sampler, Callable[[int], np.random.Generator]]:
        if length < 1:
            raise ValueError(f"length is {length}, where a whole number of at least 1 is expected")
        if seed is not None and seed < 0:
            raise ValueError(f"seed is {seed}, where a whole number of at least 0 is expected")
        chosen = secrets.randbits(64) if seed is None else seed
        return Sampler(temperature, top_k, top_p), lambda sample: random_generator(chosen, sample)


def load(
    model: str | Path = BUNDLED, models_dir: str | Path | None = None, dtype: Literal["int8"] | None = None
) -> GPT2:
    """Open a model: a name such as "124M", which is looked up in the models folder, or the path of a model file.

    model: by default storyteller, the small one that comes with npgpt2 · models_dir: the models folder; by default
    $NPGPT2_MODELS, else ./models where that exists, else ~/.cache/npgpt2 · dtype: "int8" rounds the matrices to a
    quarter of their size; by default they are used as the file has them. Takes milliseconds, since the file is mapped
    into memory and read when it is used. A model that isn't there raises FileNotFoundError, a file that is damaged
    ValueError, now or when what is damaged is first used.

    >>> load().hparams
    HParams(n_vocab=4096, n_ctx=512, n_embd=256, n_head=4, n_layer=6)
    >>> load("tests/fixtures/no-such-model.npz")
    Traceback (most recent call last):
    ...
    FileNotFoundError: tests/fixtures/no-such-model.npz: no such file; npgpt2 download fetches 124M, 355M, 774M, 1558M
    """
    return GPT2(Weights(find_model(model, models_dir), dtype))
