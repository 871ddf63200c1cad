"""The loop: sequences come and go, and each step reads what is next of all of them in one pass.

A step reads one token of each sequence that writes, some tokens of the prompts that are being read, so that no long
prompt holds up those that write, and where a sequence is alone, what it is guessed to say. Whatever else is running, a
request's tokens are those that it has alone: it has its own random numbers, and rows don't see each other (float32
rounds passes of other sizes a little differently).

Text can grow past the n_ctx positions that the model can see: whenever they are used up, the last n_ctx // 2 tokens are
read again from position 0, and it goes on behind them.
"""

from __future__ import annotations

import collections.abc
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from npgpt2.checks import check_flag, check_whole, wrong_type
from npgpt2.engine.cache import Slots, Span
from npgpt2.engine.drafts import Draft
from npgpt2.engine.request import Event, FinishReason, LogProb, Request, Settings, log_probs, parse_settings
from npgpt2.engine.sequence import Sequence
from npgpt2.forks import whole
from npgpt2.formulas import Array
from npgpt2.kernels import Matrices
from npgpt2.model import HParams
from npgpt2.samplers import Ids, check_bias
from npgpt2.tokenizer import Tokenizer
from npgpt2.vocabulary import SpecialTokens

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Tokens that are worth a step's wait if they needn't be read again. Prompts often have the first few in common.
WAIT_WORTH = 8

Prompt = str | collections.abc.Sequence[int]


class Model(Protocol):
    """What an engine needs of a model: `GPT2` is one."""

    @property
    def hparams(self) -> HParams: ...
    @property
    def matrices(self) -> Matrices: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def special(self) -> SpecialTokens: ...
    @property
    def drawable(self) -> Ids | None: ...
    @property
    def draft(self) -> Model | None: ...
    def prompt_tokens(self, prompt: Prompt, allow_special: bool, /) -> list[int]: ...


def end_tokens(model: Model) -> tuple[int, ...]:
    """The tokens with which a model ends a text: those that its files name, or else `<|endoftext|>`, if it has that.

    >>> end_tokens(model)
    (519,)
    """
    if model.special.end is not None:
        return model.special.end
    try:
        end = model.tokenizer.end_of_text
    except ValueError:  # it has no vocabulary
        return ()
    return () if end is None else (end,)


class Engine:
    """Continues texts, many at a time, each with settings of its own.

    model: a `GPT2` · slots: how many sequences are read and continued at once; others wait · chunk: how many tokens of
    prompts a step reads at most while others write; with 32, a step of eight that write takes about twice as long ·
    text: whether tokens are turned into text, for which the model needs a vocabulary. A slot takes a position's memory,
    74 kB in 124M, once there is one, and up to n_ctx of them; that memory is kept for as long as the engine.

    One thread calls `step`; others may call `submit` and `cancel` meanwhile. A request that begins as one did that a
    slot still remembers goes on from there.

    >>> engine = Engine(model, slots=4)
    >>> requests = [engine.submit("A language model", length=n) for n in (2, 4)]
    >>> while engine.busy:
    ...     for event in engine.step():
    ...         pass  # event.request, event.token, event.text, event.finish_reason
    >>> [(request.text, request.finish_reason) for request in requests]
    [(' plays one', 'length'), (' plays one small game', 'length')]
    """

    def __init__(self, model: Model, slots: int = 16, chunk: int = 32, text: bool = True) -> None:
        check_whole("slots", slots, 1)
        check_whole("chunk", chunk, 1)
        check_flag("text", text)
        if not hasattr(model, "prompt_tokens"):
            raise wrong_type("model", model, "a GPT2")
        self.model = model
        self.slots, self.chunk = slots, chunk = int(slots), int(chunk)
        draft = model.draft
        self._tokenizer = model.tokenizer if text else None
        self._ends = end_tokens(model) if text else model.special.end or ()
        self._cache = Slots(model.hparams, slots)
        self._draft = Draft(draft.matrices, draft.hparams, (model.matrices, model.hparams)) if draft else None
        self._idle = list(range(slots))  # from the one that was left longest ago
        self._kept: list[list[int]] = [[] for _ in range(slots)]  # what was read of whom a slot was left by
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        # What other threads append to.
        self._submitted: deque[Sequence] = deque()
        self._cancelled: deque[Request] = deque()
        self._events: list[Event] = []  # which nobody has been told of

    def __repr__(self) -> str:
        return f"<Engine of {self.slots} slots: {self.running} running, {self.waiting} waiting>"

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting) + len(self._submitted)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do for `step`."""
        return bool(self._running or self._waiting or self._submitted)

    def submit(self, prompt: Prompt, **settings: Unpack[Settings]) -> Request:
        """Ask for a text to be continued, which `step` will do.

        prompt: a text, or token ids; if an empty text, one of its own begins · settings: those of `Sampling` and
        `Limits`. What is wrong with them raises ValueError or TypeError.
        """
        sampling, limits = parse_settings(settings)
        request = Request(self.model.prompt_tokens(prompt, limits.allow_special), sampling, limits)
        n_vocab, n_ctx = self.model.hparams.n_vocab, self.model.hparams.n_ctx
        check_bias(sampling.logit_bias, n_vocab)
        if limits.prompt_logprobs is not None and len(request.prompt) > n_ctx:
            raise ValueError(f"prompt_logprobs of {len(request.prompt)} tokens, more than the model's n_ctx of {n_ctx}")
        limits.check_vocabulary(n_vocab)
        if (limits.stop or limits.stop_tokens) and self._tokenizer is None:
            raise ValueError("stop strings and tokens need an engine whose requests have text")
        bannable = (*end_tokens(self.model), *limits.stop_tokens) if sampling.min_tokens else ()
        self._submitted.append(Sequence(request, self._tokenizer, self._ends, n_ctx, n_vocab, bannable))
        return request

    def cancel(self, request: Request) -> None:
        """End a request; the next step takes note, and says so by an event. One that has ended stays as it is."""
        if not isinstance(request, Request):
            raise TypeError(f"request is {request!r}, which is no request; `submit` returns one")
        if request.finish_reason is None:
            self._cancelled.append(request)

    def step(self) -> list[Event]:
        """Read what is next of each sequence, choose the tokens that follow, and say what came of it.

        Nothing may have come, as while prompts are being read; `busy` says whether there is more to do. Where a step
        fails, as for want of memory, another can be tried, which goes on from there and says what hasn't been said.
        """
        with whole("step"):  # since a forked process couldn't go on from half of one
            self._take_note()
            self._admit()
            if passed := self._schedule():
                logits = self._read(passed)
                for sequence, rows in zip(passed, logits, strict=True):
                    self._write(sequence, rows)
            events, self._events = self._events, []
        return events

    # ---- Who is next

    def _take_note(self) -> None:
        """Of what was asked for since the last step; in this order, since nothing is cancelled that isn't submitted."""
        cancelled = {self._cancelled.popleft() for _ in range(len(self._cancelled))}
        while self._submitted:
            self._waiting.append(self._submitted[0])  # before it is taken away, so that it is always seen
            self._submitted.popleft()
        for sequence in [*self._running, *self._waiting] if cancelled else []:
            if sequence.request in cancelled:
                self._finish(sequence, None, "cancelled")

    def _admit(self) -> None:
        """Give slots to those that wait, as far as there are any; see `_place`.

        Only the first of those that wait are looked at, so that a step's time doesn't depend on their number.
        """
        for sequence in self._waiting[: 2 * self.slots]:
            if not self._idle:
                return
            if self._place(sequence):
                self._running.append(sequence)
                self._waiting.remove(sequence)

    def _place(self, sequence: Sequence) -> bool:
        """Choose a slot, and let it begin with what another has read of the same tokens.

        False where many more of them are being read just now: then waiting saves reading them twice.
        """
        reads = [(sequence.shared_with(other.window), other) for other in self._running]
        found = [(min(same, other.read), -other.slot, other.sound) for same, other in reads]
        found += [(sequence.shared_with(self._kept[slot]), -slot, len(self._kept[slot])) for slot in self._idle]
        shared, source, sound = max(found)
        source = -source  # of equals, the first
        if any(same >= shared + WAIT_WORTH for same, other in reads if other.unread > 1):
            return False
        # What is left in a slot serves on, unless most of it would be lost by that.
        slot = source if source in self._idle and 2 * shared >= sound else self._idle[0]
        if slot != source:
            self._cache.copy(source, slot, shared)
        self._idle.remove(slot)
        sequence.slot, sequence.read, sequence.sound = slot, shared, min(shared, sound)
        sequence.request.reused = shared
        return True

    def _schedule(self) -> list[Sequence]:
        """Whose tokens the next pass reads, in the order in which `Reading` wants them, with how many of each."""
        for sequence in self._running:
            sequence.make_room()
            sequence.reads, sequence.guessed = 0, []
        writers = [sequence for sequence in self._running if sequence.unread == 1]
        alone = writers[0] if len(self._running) == len(writers) == 1 else None
        if alone and alone.request.limits.guess and not alone.scores_prompt:
            alone.guess()
            if self._draft and not alone.guessed:
                drawn = alone.imagined(self.model.drawable)
                alone.guessed = self._draft.guess(alone.tokens, alone.start, alone.room, drawn)
        for sequence in writers:
            sequence.reads = 1
        scored = any(sequence.scores_prompt for sequence in self._running)
        # Where all of a prompt's logits are wanted, they take memory: 200 kB a row in 124M.
        left = self.chunk if writers or scored else self.model.hparams.n_ctx
        for sequence in self._running:
            if sequence.unread > 1:
                sequence.reads = min(sequence.unread, left)
                left -= sequence.reads
        passed = [sequence for sequence in self._running if sequence.reads]
        return sorted(passed, key=lambda sequence: (sequence.reads + len(sequence.guessed) > 1, sequence.slot))

    # ---- A pass

    def _read(self, passed: list[Sequence]) -> list[Array]:
        """The logits that each sequence needs: after its last token and each guess, or after all of its prompt's."""
        tokens: list[int] = []
        wanted: list[int] = []
        spans, ends = [], [0]
        for sequence in passed:
            first = len(tokens)
            tokens += sequence.next_tokens()
            spans.append(Span(sequence.slot, sequence.read, sequence.read + len(tokens) - first))
            if not sequence.scores_prompt:
                first = len(tokens) - len(sequence.guessed) - (sequence.reads == sequence.unread)
            wanted += range(first, len(tokens))
            ends.append(len(wanted))
        try:
            logits = self._cache.read(self.model.matrices, tokens, spans, wanted)
        except BaseException:
            for span in spans:  # of which some may have been read
                self._cache.clear(*span)
            raise
        return [logits[start:end] for start, end in pairwise(ends)]

    def _write(self, sequence: Sequence, logits: Array) -> None:
        """Take note of what was read, and, once that is all, choose what follows. logits: (M, V), see `_read`."""
        request, guessed, slot = sequence.request, sequence.guessed, sequence.slot
        end = sequence.read + sequence.reads + len(guessed)
        try:
            if sequence.scores_prompt:
                if not sequence.read:
                    request.prompt_logprobs.append(LogProb(request.prompt[0], None, []))
                targets = request.prompt[sequence.read + 1 : sequence.read + sequence.reads + 1]
                request.prompt_logprobs += log_probs(
                    logits, targets, request.limits.prompt_logprobs, self.model.drawable
                )
            sequence.read += sequence.reads
            if sequence.unread:
                return
            for row, guess in zip(logits[-1 - len(guessed) :], [*guessed, None], strict=True):
                token = request.sampling.choose(row, sequence.number, self.model.drawable, sequence.written)
                sequence.sound = sequence.read
                self._append(sequence, token, row)
                if token != guess or request.finish_reason:
                    break
                sequence.read += 1
        except Exception as error:  # of this one's logits or settings, which doesn't concern the others
            request.error = error
            if request.finish_reason is None:
                self._finish(sequence, None, "error")
        self._cache.clear(slot, sequence.sound, end)  # guesses that weren't right

    def _append(self, sequence: Sequence, token: int, logits: Array) -> None:
        """Add the token that was chosen from logits (V,)."""
        request = sequence.request
        if request.limits.logprobs is not None:
            request.logprobs += log_probs(logits[None], [token], request.limits.logprobs, self.model.drawable)
        piece, reason = sequence.append(token)
        if reason:
            self._finish(sequence, token, reason, piece)
        else:
            request.pieces.append(piece)
            self._events.append(Event(request, token, piece, None))

    def _finish(self, sequence: Sequence, token: int | None, reason: FinishReason, piece: str = "") -> None:
        """End a sequence, and leave its slot to others, with what of it may serve them."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._cache.clear(sequence.slot, sequence.sound, sequence.read)
            self._kept[sequence.slot] = sequence.window[: sequence.sound]
            self._idle.append(sequence.slot)
        piece += sequence.finish()
        sequence.request.pieces.append(piece)
        sequence.request.finish_reason = reason  # last, for those who wait for it in other threads
        self._events.append(Event(sequence.request, token, piece, reason))
