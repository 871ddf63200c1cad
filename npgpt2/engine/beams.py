"""Beam search: several texts are continued side by side, to find one that is likely as a whole.

Greedily taking the likeliest token can lead to where nothing likely follows. So the `beams` likeliest texts are kept:
each step looks at every token behind each of them, and keeps the likeliest texts of those. What ends among them is set
aside, with its score: the sum of its tokens' log-probabilities, divided by a power of how many they are. Scores, and
when to stop, are those of Hugging Face's transformers.

All beams have the same length, and each a slot. A pass reads the last token of all; where two go on from one, the
second gets a copy, of no more than the slot that it is given lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from npgpt2.checks import check_callable, check_number, check_whole, wrong_type
from npgpt2.engine.cache import Slots, Span
from npgpt2.engine.engine import Model, Prompt, end_tokens
from npgpt2.engine.request import Limits, Request, Settings, parse_settings
from npgpt2.engine.sequence import Sequence as Continued
from npgpt2.engine.sequence import count_shared, window_start
from npgpt2.formulas import Array
from npgpt2.samplers import FILTERS, PROCESSORS, Candidates, Written, check_bias
from npgpt2.sampling import Sampling, check_finite, largest, log_softmax, nothing_left
from npgpt2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

EarlyStopping = bool | Literal["never"]
# Each takes a slot, and a row of logits in each step.
MOST_BEAMS = 128
# Settings that have no part in it, besides those that narrow what is drawn from.
FOREIGN = ("seed", "sample", "logprobs", "prompt_logprobs")


class Beam(NamedTuple):
    """A text that a search found.

    text: up to the end token or a stop string · tokens: those that were generated, the end token included · score: the
    sum of their log-probabilities, as the processors leave them, divided by len(tokens) ** length_penalty · others: the
    next best texts that ended, from the best on; fewer than there were beams
    """

    text: str
    tokens: list[int]
    score: float
    others: tuple[Beam, ...] = ()


@dataclass(frozen=True)
class Search:
    """How to search; what each setting does is in `GPT2.beam_search`. Values out of range raise ValueError."""

    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        check_whole("beams", self.beams, 1)
        if self.beams > MOST_BEAMS:
            raise ValueError(f"beams is {self.beams}, where a whole number from 1 to {MOST_BEAMS} is expected")
        check_number("length_penalty", self.length_penalty)
        if not -10 <= self.length_penalty <= 10:
            expected = "a number from -10 to 10 is expected (0 compares sums)"
            raise ValueError(f"length_penalty is {self.length_penalty}, where {expected}")
        if not isinstance(self.early_stopping, bool | np.bool_ | str):
            raise wrong_type("early_stopping", self.early_stopping, 'False, True or "never"')
        if isinstance(self.early_stopping, str) and self.early_stopping != "never":
            raise ValueError(f'early_stopping is {self.early_stopping!r}, where False, True or "never" is expected')
        object.__setattr__(self, "beams", int(self.beams))
        object.__setattr__(self, "length_penalty", float(self.length_penalty))


def search_beams(
    model: Model,
    prompt: Prompt,
    search: Search,
    progress: Callable[[int], object] = lambda tokens: None,
    **settings: Unpack[Settings],
) -> Beam:
    """The best continuation of a prompt that a search finds; see `GPT2.beam_search`.

    >>> search_beams(model, "A language model", Search(beams=2), length=2).text
    ' plays one'
    """
    check_callable("progress", progress)
    sampling, limits = parse_settings(settings)
    check_foreign(sampling, limits)
    n_vocab = model.hparams.n_vocab
    check_bias(sampling.logit_bias, n_vocab)
    if search.beams > max(1, n_vocab // 2):
        raise ValueError(f"beams is {search.beams}, more than half of the model's {n_vocab} tokens")
    searching = _Searching(model, model.prompt_tokens(prompt, limits.allow_special), search, sampling, limits)
    while not searching.done:
        searching.step()
        progress(1)
    return searching.found()


def check_foreign(sampling: Sampling, limits: Limits) -> None:
    """Raise ValueError where a setting has no part in a search, and isn't at its default."""
    for name in (*FILTERS, *FOREIGN):
        owner = sampling if hasattr(sampling, name) else limits
        if (value := getattr(owner, name)) != getattr(type(owner), name):
            why = "reports none" if name in ("logprobs", "prompt_logprobs") else "draws nothing"
            raise ValueError(f"{name} is {value}, but beam search {why}; leave it out")


@dataclass
class _Running:
    """A text that hasn't ended: the tokens that were generated, the sum of their scores, the slot where all but the
    last are read, and what the processors look at.
    """

    tokens: list[int]
    score: float
    slot: int
    written: Written | None


class _Searching:
    """A search while it goes on: `step` until `done`, then look at what was `found`."""

    def __init__(self, model: Model, prompt: list[int], search: Search, sampling: Sampling, limits: Limits) -> None:
        self._model, self._prompt, self._search = model, prompt, search
        self._sampling, self._limits = sampling, limits
        n_vocab = model.hparams.n_vocab
        limits.check_vocabulary(n_vocab)
        ends = [token for token in (*end_tokens(model), *limits.stop_tokens) if token < n_vocab]
        self._ends = {*(() if limits.ignore_eot else ends), *limits.stop_tokens}
        self._tokenizer = _tokenizer_of(model, limits)
        self._slots = Slots(model.hparams, search.beams)
        self._kept: list[list[int]] = [[] for _ in range(search.beams)]  # what is read in each slot
        self._start = 0  # of the window
        self._running = [_Running([], 0.0, 0, Written(prompt, n_vocab, ends) if sampling.steps(PROCESSORS) else None)]
        self._ended: list[tuple[float, list[int]]] = []  # by score
        self._generated = 0

    @property
    def done(self) -> bool:
        """Whether no text is left that could become better than all of those that have ended."""
        search = self._search
        if not self._running or len(self._ended) < search.beams:
            return not self._running
        never = search.early_stopping == "never"
        if (search.early_stopping and not never) or search.beams == 1:  # one goes no further than `generate` does
            return True
        longest = never and search.length_penalty > 0
        length = self._limits.length if longest else self._generated
        best: float = self._running[0].score / length**search.length_penalty
        return best <= self._ended[-1][0]

    def found(self) -> Beam:
        """The best of the texts that have ended; ValueError where none could."""
        if not self._ended:
            raise nothing_left()
        beams = [Beam(self._say(tokens)[0], tokens, score) for score, tokens in self._ended]
        return beams[0]._replace(others=tuple(beams[1:]))

    def step(self) -> None:
        """Read what is new, and go on with the likeliest texts that are longer by a token."""
        candidates = self._candidates(self._read())
        self._generated += 1
        beams = self._search.beams
        going_on: list[tuple[_Running, int, float]] = []
        for rank, (score, number, token) in enumerate(candidates):
            parent = self._running[number]
            tokens = [*parent.tokens, token]
            if self._ends_with(tokens):
                if rank < beams:
                    self._ended.append((score / self._generated**self._search.length_penalty, tokens))
            elif len(going_on) < beams:
                going_on.append((parent, token, score))
            elif rank >= beams:
                break
        self._ended = sorted(self._ended, key=lambda ended: -ended[0])[:beams]
        self._running = self._fork(going_on)

    # ---- What is read

    def _read(self) -> Sequence[Array]:
        """The logits of what follows each running text, (V,)."""
        length = len(self._prompt) + self._generated
        start = window_start(length, self._start, self._model.hparams.n_ctx)
        if self._generated and start == self._start:
            in_order = sorted(self._running, key=lambda beam: beam.slot)
            logits = self._pass([(beam.slot, beam.tokens[-1:]) for beam in in_order])
            rows = {beam.slot: row for beam, row in zip(in_order, logits, strict=True)}
            return [rows[beam.slot] for beam in self._running]
        self._start = start
        found: list[Array] = []
        for beam in self._running:  # one by one, so that what they begin with alike is read once
            window = self._prompt[start:] + beam.tokens[max(0, start - len(self._prompt)) :]
            self._share(self._running[0].slot, beam.slot, window[:-1])
            found += [*self._pass([(beam.slot, window[len(self._kept[beam.slot]) :])])]
        return found

    def _pass(self, unread: list[tuple[int, list[int]]]) -> Array:
        """Read tokens behind what is kept in some slots → (M, V), the logits after the last of each."""
        tokens: list[int] = []
        spans, wanted = [], []
        for slot, new in unread:
            kept = self._kept[slot]
            spans.append(Span(slot, len(kept), len(kept) + len(new)))
            kept += new
            tokens += new
            wanted.append(len(tokens) - 1)
        logits = self._slots.read(self._model.matrices, tokens, spans, wanted)
        check_finite(logits)
        return logits

    def _share(self, source: int, target: int, tokens: list[int]) -> None:
        """Let a slot hold as many of these tokens as it or another does; only what it lacks is copied."""
        known, has = (count_shared(self._kept[slot], tokens) for slot in (source, target))
        if known > has:
            self._slots.copy(source, target, known, has)
        self._kept[target] = tokens[: max(known, has)]

    # ---- What is written

    def _candidates(self, logits: Sequence[Array]) -> list[tuple[float, int, int]]:
        """The likeliest texts that are longer by a token, from the first on: score, which running one, and the token.

        As many as are needed for `beams` of them not to end.
        """
        most = self._search.beams * (1 + max(1, len(self._ends)))
        scores, tokens, numbers = [], [], []
        for number, (beam, row) in enumerate(zip(self._running, logits, strict=True)):
            kept = self._scored(row, beam.written)
            likely = largest(kept.logits, most)
            scores.append(beam.score + kept.logits[likely])
            tokens.append(kept.tokens[likely])
            numbers.append(np.full(likely.size, number))
        together = np.concatenate(scores)
        best = largest(together, most)
        columns = (together, np.concatenate(numbers), np.concatenate(tokens))
        return list(zip(*(column[best].tolist() for column in columns), strict=True))

    def _scored(self, logits: Array, written: Written | None) -> Candidates:
        """What may follow, with the logarithms of probabilities, which the processors have changed, as logits.

        A single beam is what `generate` writes, whose processors are given logits: this differs for the repetition
        penalty, which depends on where 0 is.
        """
        among = self._model.drawable
        if self._search.beams > 1:
            return self._sampling.processed(log_softmax(logits), among, written)
        kept = self._sampling.processed(logits, among, written)
        return kept._replace(logits=log_softmax(kept.logits)) if kept.tokens.size else kept

    def _ends_with(self, tokens: list[int]) -> bool:
        """Whether the last of these ends the text."""
        if self._generated == self._limits.length or tokens[-1] in self._ends:
            return True
        return bool(self._limits.stop) and self._say(tokens)[1]

    def _say(self, tokens: list[int]) -> tuple[str, bool]:
        """The text of tokens, and whether they end it."""
        request, hparams = Request(self._prompt, self._sampling, self._limits), self._model.hparams
        said = Continued(request, self._tokenizer, self._ends, hparams.n_ctx, hparams.n_vocab, ())
        pieces, reason = [], None
        for token in tokens:
            piece, reason = said.append(token)
            pieces.append(piece)
        return "".join(pieces) + said.finish(), reason is not None

    def _fork(self, going_on: list[tuple[_Running, int, float]]) -> list[_Running]:
        """The texts that go on. The first that goes on from one stays in its slot, the others are given free ones."""
        free = set(range(self._search.beams)) - {parent.slot for parent, _, _ in going_on}
        stayed: set[int] = set()
        running = []
        for parent, token, score in going_on:
            beam = _Running([*parent.tokens, token], score, parent.slot, parent.written)
            if parent.slot in stayed:
                beam.slot, beam.written = free.pop(), deepcopy(parent.written)
                self._share(parent.slot, beam.slot, self._kept[parent.slot])
            stayed.add(parent.slot)
            running.append(beam)
        for beam in running:  # now that all are copied
            if beam.written is not None:
                beam.written.append(beam.tokens[-1])
        return running


def _tokenizer_of(model: Model, limits: Limits) -> Tokenizer | None:
    """What makes text of tokens; None for a model without a vocabulary, where nothing asks for text."""
    try:
        return model.tokenizer
    except ValueError:
        if limits.stop:
            raise
        return None
