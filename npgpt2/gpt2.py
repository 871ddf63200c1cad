"""The library's face: a model that is ready to run, and what can be asked of it. A method is a few lines on the engine.

text → tokens → logits → token → text
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from npgpt2 import kernels, model
from npgpt2.checks import (
    as_ids,
    as_path,
    check_callable,
    check_flag,
    check_iterable,
    check_whole,
    is_sequence,
    wrong_type,
)
from npgpt2.engine import (
    Beam,
    EarlyStopping,
    Engine,
    Prompt,
    Request,
    Search,
    Settings,
    Stream,
    check_best_of,
    draws,
    likeliest,
    parse_settings,
    run,
    samples,
    search_beams,
    stream,
    window_start,
)
from npgpt2.forks import whole
from npgpt2.formulas import Array
from npgpt2.kernels import Tokenizer
from npgpt2.model import HParams
from npgpt2.models import BUNDLED, find_model
from npgpt2.samplers import Ids
from npgpt2.tokenizer import Tokenizer as PlainTokenizer
from npgpt2.vocabulary import Ranges, SpecialTokens
from npgpt2.weights import Weights, checked

if TYPE_CHECKING:
    from typing_extensions import TypeIs, Unpack

    from npgpt2.study.score import Score
    from npgpt2.study.trace import Trace


# Sequences that are continued at once where many were given; the others wait, since each takes memory.
SLOTS = 16


class GPT2:
    """A GPT-2 model that is ready to run; `npgpt2.load` makes one of a file.

    weights: the variables by name, as `Weights` reads them from a file, or any mapping of arrays · hparams, tokenizer:
    by default those of the file · threads: see `load` · draft: a smaller model with the same vocabulary, which guesses
    what comes next where one text is written at a time; see `drafts.py`. One with another raises ValueError.

    >>> model.hparams                                                # `model` is the tests' small model
    HParams(n_vocab=520, n_ctx=192, n_embd=48, n_head=4, n_layer=2)
    >>> one_layer = GPT2(model.weights, model.hparams._replace(n_layer=1))
    """

    def __init__(
        self,
        weights: Mapping[str, npt.NDArray[Any]],
        hparams: HParams | None = None,
        tokenizer: Tokenizer | None = None,
        threads: int | None = None,
        draft: GPT2 | None = None,
    ) -> None:
        if threads is not None:
            check_whole("threads", threads, 1)
            threads = int(threads)
        if hparams is None:
            if not isinstance(weights, Weights):
                raise TypeError("weights that are no model file's need hparams: GPT2(weights, hparams)")
            hparams = weights.hparams
        if not isinstance(weights, Mapping):
            raise wrong_type("weights", weights, "a mapping from names to arrays")
        if not isinstance(hparams, HParams):
            raise wrong_type("hparams", hparams, "HParams")
        if tokenizer is not None and not isinstance(tokenizer, PlainTokenizer):
            raise wrong_type("tokenizer", tokenizer, "a Tokenizer")
        hparams = checked(hparams)
        self.weights, self.hparams, self.threads = weights, hparams, threads
        self.matrices = kernels.prepare(weights, threads)  # which the kernels compute with
        self._tokenizer = tokenizer
        if isinstance(weights, Weights):
            self.special = weights.special or SpecialTokens()
        elif tokenizer is not None:
            self.special = replace(tokenizer.special, unused=tokenizer.unused(hparams.n_vocab))
        else:
            self.special = SpecialTokens()
        self.drawable = _drawable(self.special.unused, hparams.n_vocab)
        self._source = str(getattr(weights, "path", "the model"))  # what errors call it
        if draft is not None:
            self._check_draft(draft)
        self.draft = draft

    def __repr__(self) -> str:
        """Its file, types and sizes, for which no array is looked at."""
        what = "arrays"
        if isinstance(self.weights, Weights):
            what = f"{self._source!r}, {self.weights.dtype}"
            if "wte/scales" in self.weights and "int8" not in self.weights.dtype:
                what += " rounded to int8"
        sizes = ", ".join(f"{name}={size}" for name, size in self.hparams._asdict().items())
        return f"<GPT2 of {what}: {sizes}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weights, self.hparams, self._tokenizer, self.threads, self.draft)

    def _check_draft(self, draft: GPT2) -> None:
        """Raise an error where a model can't guess for this one, since its tokens are others."""
        if not isinstance(draft, GPT2):
            raise wrong_type("draft", draft, "a GPT2")
        wrong = f"{draft._source}: can't be the draft of {self._source}, since"
        if draft.hparams.n_vocab != self.hparams.n_vocab:
            sizes = f"{draft.hparams.n_vocab} and {self.hparams.n_vocab}"
            raise ValueError(f"{wrong} their vocabularies differ in size: n_vocab is {sizes}")
        files = [one.weights.vocabulary() if isinstance(one.weights, Weights) else None for one in (self, draft)]
        if None not in files and files[0] != files[1]:
            for token in range(self.hparams.n_vocab):
                texts = [
                    one.tokenizer.decode_bytes([token]) if token in one.tokenizer else b"" for one in (self, draft)
                ]
                if texts[0] != texts[1]:
                    raise ValueError(f"{wrong} token {token} is {texts[1]!r}, which there is {texts[0]!r}")

    @property
    def name(self) -> str:
        """What its file is called, without the ending."""
        return Path(self._source).stem

    def _check_file(self) -> None:
        """Raise ValueError where the file was written to after it was opened, and other numbers would be used."""
        if isinstance(self.weights, Weights):
            self.weights.check_unchanged()
        if self.draft is not None:
            self.draft._check_file()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's vocabulary; ValueError where its file has none, or one of another model."""
        # Not a cached_property, which before Python 3.12 has a lock that a forked process can inherit taken.
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer()
        return self._tokenizer

    def _read_tokenizer(self) -> Tokenizer:
        texts = self.weights.vocabulary() if isinstance(self.weights, Weights) else None
        if texts is None or not isinstance(self.weights, Weights):
            raise ValueError(
                f"{self._source}: has no vocabulary; convert it again with --vocab DIR to use text,"
                " or use token ids: generate_tokens, Engine(model, text=False)"
            )
        tokenizer = Tokenizer(*texts, source=self._source, special=self.weights.special)
        n_vocab = self.hparams.n_vocab
        try:
            fits = tokenizer.unused(n_vocab) == self.special.unused
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{self._source}: the vocabulary has {len(tokenizer)} entries, but n_vocab is {n_vocab}")
        return tokenizer

    # ---- Text

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, best_of: int = 1, **settings: Unpack[Settings]
    ) -> str: ...
    @overload
    def generate(self, prompt: Tokens[Prompt], best_of: int = 1, **settings: Unpack[Settings]) -> list[str]: ...
    def generate(
        self, prompt: Prompt | Tokens[Prompt], best_of: int = 1, **settings: Unpack[Settings]
    ) -> str | list[str]:
        """Continue a text, or each of several; returns the new text alone, or a list of them.

        prompt: a text or token ids; if an empty text, one of its own begins. Of a list of prompts, number i is
        continued by the seed's sample i, at most 16 at once. best_of: how many texts are drawn, 1 to 128, of which the
        likeliest is returned: that whose tokens' log-probabilities, as the model has them before all settings, are the
        highest in the mean. Of n, sample i has the n draws from the seed's sample i · n on. The prompt is read once.

        Settings, with their defaults; values out of range raise ValueError, those of another type TypeError:

        length=40: how many tokens to generate at most · temperature=0.0, top_k=0, top_p=1.0: see `Sampling`;
        temperature 0 always takes the likeliest token · min_p=0.0, typical_p=1.0, logit_bias=None,
        repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, no_repeat_ngram_size=0, min_tokens=0: see
        there too; as they are, these are off · seed=None: fixes what is drawn; sample=0: which of the seed's samples ·
        stop=(): a string, or several, before which the text ends · stop_tokens=(): ids of tokens that end it ·
        ignore_eot=False: whether to go on past `<|endoftext|>`, or whatever the model ends a text with ·
        allow_special=False: whether `<|endoftext|>` and other special tokens in a prompt's text are those tokens ·
        skip_special=None, guess=True: see `Limits`.
        What else is known of a text, such as log-probabilities, is had from `stream` or an `Engine`, by the request.

        >>> model.generate("A language model", length=20, stop=":")
        ' plays one small game'
        >>> model.generate(["A language", "A language model"], length=2)
        [' model plays', ' plays one']
        >>> model.generate("A language", best_of=4, length=2, temperature=2, seed=2)
        ' model plays'
        """
        if not _is_list_of_prompts(prompt):
            return self._continue([prompt], settings, best_of=best_of)[0].text
        return [request.text for request in self._continue(prompt, settings, best_of=best_of)]

    def stream(self, prompt: Prompt, **settings: Unpack[Settings]) -> Stream:
        """The same as `generate` of one prompt, in pieces as they come. Why the text ended, `request` knows.

        >>> pieces = model.stream("A language model", length=4)
        >>> for piece in pieces:
        ...     print(piece, end="|")
         plays| one| small| game|
        >>> pieces.request.finish_reason
        'length'
        """
        return stream(Engine(self, slots=1), prompt, **settings)

    def samples(
        self,
        prompt: Prompt,
        nsamples: int = 1,
        batch_size: int = 1,
        first: int = 0,
        progress: Callable[[int], object] = lambda tokens: None,
        best_of: int = 1,
        **settings: Unpack[Settings],
    ) -> Iterator[str]:
        """Continue one prompt several times; yields the texts in order, `nsamples` of them, or without end if 0. The
        prompt is read once.

        batch_size: how many to generate at once, which only changes speed and memory: sample i, counted from `first`,
        draws its random numbers from (seed, i) · progress: called with the number of tokens after each step · best_of:
        how many are drawn for each, of which the likeliest is given back. The settings are those of `generate`.

        >>> list(model.samples("A language", nsamples=2, length=4, seed=1, temperature=0))
        [' model plays one small', ' model plays one small']
        """
        check_whole("batch_size", batch_size, 1)
        check_whole("nsamples", nsamples, 0)
        check_whole("best_of", best_of, 1)
        slots = min(batch_size, int(nsamples) * int(best_of) or batch_size)
        return samples(Engine(self, slots=slots), prompt, nsamples, first, progress, best_of, **settings)

    def beam_search(
        self,
        prompt: Prompt,
        beams: int = 4,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        progress: Callable[[int], object] = lambda tokens: None,
        **settings: Unpack[Settings],
    ) -> Beam:
        """Search for a continuation that is likely as a whole, among as many texts at a time as there are beams; what
        `generate` takes token by token can be less likely. The prompt is read once.

        beams: how many, 1 to 128, and to half of the vocabulary; one alone finds what `generate` writes ·
        length_penalty: texts are compared by the sum of their tokens' log-probabilities, divided by their number to
        this power, -10 to 10: above 0 the longer ones gain, below the shorter ones · early_stopping: False ends the
        search once as many texts as there are beams have ended and none that goes on would be better as it is, True as
        soon as they have ended, "never" once none could become better · progress: called after each step, with 1

        Settings are those of `generate`: length=40, stop, ignore_eot, allow_special, skip_special, and what changes
        logits, such as no_repeat_ngram_size, which here changes log-probabilities; those of drawing, and others that
        have no part in it, raise ValueError. All of it is as in transformers, the score too. Past n_ctx, all beams go
        on with their last n_ctx // 2 tokens, as texts do elsewhere, and scores go by what the model saw.

        >>> found = model.beam_search("A language model", beams=3, length=4)
        >>> found.text, found.tokens, len(found.others)
        (' plays one small game', [417, 307, 436, 340], 2)
        """
        check_callable("progress", progress)
        search = Search(beams, length_penalty, early_stopping)
        return search_beams(self, prompt, search, progress, **settings)

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
        with whole("import"):
            from npgpt2.study.score import Score, surprises  # what generates needs neither this nor `trace`

        check_iterable("text", text, "a text, or pieces of one,")
        check_callable("each", each)
        self._check_file()
        score = Score()

        def tokens() -> Iterator[int]:
            if self.begin is not None:
                yield self.begin
            for new in self.tokenizer.encode_pieces(score.counted([text] if isinstance(text, str) else text)):
                yield from new

        for token, bits in surprises(self.matrices, self.hparams, tokens(), stride):
            score.bits += bits
            score.tokens += 1
            each(token, bits)
        return score

    # ---- Tokens

    def generate_tokens(self, tokens: npt.ArrayLike, **settings: Unpack[Settings]) -> Ids:
        """Continue token sequences by `length` tokens each, whatever they are (`<|endoftext|>` doesn't end them).

        tokens: ints (T,) or (B, T), of any T → int64 (length,) or (B, length), the new tokens alone. Row i draws its
        random numbers from (seed, i). The settings are those of `generate`, but for those of text.

        >>> tokens = model.tokenizer.encode("A language model")
        >>> model.tokenizer.decode(model.generate_tokens(tokens, length=4))
        ' plays one small game'
        """
        ids = self._check(tokens)
        ended = self._continue(np.atleast_2d(ids).tolist(), settings, text=False)
        new = np.array([request.tokens for request in ended], np.int64)
        return new.reshape(*ids.shape[:-1], -1)

    def _continue(
        self, prompts: Tokens[Prompt], settings: Settings, text: bool = True, best_of: int = 1
    ) -> Tokens[Request]:
        """Continue several prompts to their ends, some at once, each by a sample of its own, the likeliest of some."""
        sampling, _ = parse_settings(settings)
        check_best_of(best_of, sampling)
        if not text:
            settings = settings | {"ignore_eot": True}
        engine = Engine(self, slots=max(1, min(SLOTS, len(prompts) * int(best_of))), text=text)
        requests = [
            engine.submit(prompt, **drawn)
            for number, prompt in enumerate(prompts, sampling.sample)
            for drawn in draws(settings, number, best_of)
        ]
        return list(likeliest(run(engine, requests), best_of))

    def logits(self, tokens: npt.ArrayLike) -> Array:
        """The model's logits for the token after each position.

        tokens: ints (T,) or (B, T), T at most n_ctx → float32 (T, V) or (B, T, V). Ids that are not in the vocabulary,
        and more tokens than n_ctx, raise ValueError.

        >>> model.logits([10, 20, 30]).shape
        (3, 520)
        """
        ids = self._check(tokens, self.hparams.n_ctx)
        if ids.ndim == 1:
            return self._forward(ids)
        logits = np.empty((*ids.shape, self.hparams.n_vocab), np.float32)
        for row, out in zip(ids, logits, strict=True):
            out[:] = self.logits(row)
        return logits

    def next_logits(self, prompt: Prompt, allow_special: bool = False) -> Array:
        """The model's logits for the token after a prompt, of which it sees as much as while generating → float32 (V,).

        >>> int(model.next_logits("A language model").argmax()) == model.tokenizer.encode(" plays")[0]
        True
        """
        tokens = self.prompt_tokens(prompt, allow_special)
        ids = np.array(tokens[window_start(len(tokens), 0, self.hparams.n_ctx) :])
        logits: Array = self._forward(ids, wanted=slice(-1, None))[0]
        return logits

    def _forward(self, ids: Ids, wanted: slice = slice(None)) -> Array:
        """Read a text by itself, with the fast kernels. ids: (T,) → (M, V)"""
        with kernels.sharing_work(self.matrices, len(ids)):
            return model.forward(self.matrices, self.hparams, ids, wanted=wanted, kernels=kernels)

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
        check_flag("attention", attention)
        check_flag("residual", residual)
        ids = self._check(tokens, self.hparams.n_ctx)
        if ids.ndim != 1:
            raise ValueError(f"tokens have shape {ids.shape}, where (T,), a single sequence, is expected")
        with whole("import"):
            from npgpt2.study.trace import trace
        traced = trace(self.matrices, self.hparams, ids, attention, residual)
        return replace(traced, model=self, name=self.name)

    @property
    def begin(self) -> int | None:
        """The token after which a text of its own begins: `<|endoftext|>`, which came before each in training, unless
        the model's files say another; None where there is none.
        """
        if self.special.begin is not None:
            return self.special.begin
        end = self.tokenizer.end_of_text
        return end if end is not None and end < self.hparams.n_vocab else None

    def prompt_tokens(self, prompt: Prompt, allow_special: bool = False) -> list[int]:
        """A prompt's tokens; for an empty text, the one after which a text of its own begins.

        allow_special: whether special tokens that a text spells out are those tokens. An empty prompt raises ValueError
        where the vocabulary has no token to begin with, and so do ids that it hasn't.

        >>> model.prompt_tokens("A language model"), model.prompt_tokens("")
        ([32, 514, 352], [519])
        """
        if not isinstance(prompt, str):
            ids = self._check(prompt, name="prompt")
            if ids.ndim != 1:
                raise ValueError(f"a prompt of shape {ids.shape}, where a text, or the token ids of one, is expected")
            return list(ids.tolist())
        self._check_file()
        if prompt:
            tokens = self.tokenizer.encode(prompt, allow_special)
            if (most := max(tokens)) >= self.hparams.n_vocab:
                text = self.tokenizer.decode([most])
                raise ValueError(f"the prompt has {text!r}, token {most}, for which the model has no row: leave it out")
            return tokens
        if self.begin is None:
            raise ValueError(f"{self._source}: its vocabulary has no <|endoftext|>, so that a prompt is needed")
        return [self.begin]

    def _check(self, tokens: npt.ArrayLike, longest: int | None = None, name: str = "tokens") -> Ids:
        """Token ids as an array, once they are ones that the model knows, and no more than it can see at once."""
        self._check_file()
        ids = as_ids(name, tokens, "a text or token ids" if name == "prompt" else "token ids")
        if ids.min() < 0 or ids.max() >= self.hparams.n_vocab:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"token {wrong} is not in the vocabulary, which goes from 0 to {self.hparams.n_vocab - 1}")
        if longest is not None and ids.shape[-1] > longest:
            raise ValueError(f"{ids.shape[-1]} tokens are more than the model's n_ctx of {longest}")
        return ids.astype(np.int64, copy=False)


def _drawable(unused: Ranges, n_vocab: int) -> Ids | None:
    """The ids of tokens where some of a model's rows are of none, (K,) in order; None where all are."""
    if not unused:
        return None
    used = np.ones(n_vocab, np.bool_)
    for first, last in unused:
        used[first:last] = False
    return np.flatnonzero(used)


def _is_list_of_prompts(prompt: Prompt | Tokens[Prompt]) -> TypeIs[Tokens[Prompt]]:
    """Whether it is texts, or lists of ids, and not a text or the ids of one."""
    return is_sequence(prompt) and not any(isinstance(one, int | np.integer) for one in prompt)


def load(
    model: str | Path = BUNDLED,
    models_dir: str | Path | None = None,
    dtype: Literal["int8"] | None = None,
    threads: int | None = None,
    draft: str | Path | None = None,
) -> GPT2:
    """Open a model: a name such as "124M", which is looked up in the models folder, or the path of a model file.

    model: by default storyteller, the small one that comes with npgpt2 · models_dir: the models folder; by default
    $NPGPT2_MODELS, else ./models where that exists, else ~/.cache/npgpt2 · dtype: "int8" rounds the matrices to a
    quarter of their size; by default they are used as the file has them · threads: how many work; by default as many
    as NumPy's BLAS uses: as many as there are cores, or as $OPENBLAS_NUM_THREADS or $OMP_NUM_THREADS said when the
    program began. With another BLAS than OpenBLAS, that alone decides · draft: a smaller model, found and opened in the
    same way, which guesses what this one will say: a single text comes faster, and stays the same token for token. One
    with another vocabulary raises ValueError.

    Takes milliseconds, since the file is mapped into memory and read when it is used. A model that isn't there raises
    FileNotFoundError, a file that is damaged ValueError, now or when what is damaged is first used. The file must not
    be written to as long as the model is used, but another can be renamed to its name: see `Weights`.

    >>> load().hparams
    HParams(n_vocab=4096, n_ctx=512, n_embd=256, n_head=4, n_layer=6)
    >>> load("tests/fixtures/no-such-model.npz")
    Traceback (most recent call last):
    ...
    FileNotFoundError: tests/fixtures/no-such-model.npz: no such file; npgpt2 download fetches 124M, 355M, 774M, 1558M
    """
    as_path("model", model)
    if models_dir is not None:
        as_path("models_dir", models_dir)
    opened = None
    if draft is not None:
        opened = GPT2(Weights(find_model(as_path("draft", draft), models_dir), dtype), threads=threads)
    return GPT2(Weights(find_model(model, models_dir), dtype), threads=threads, draft=opened)
