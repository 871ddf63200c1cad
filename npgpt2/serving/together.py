"""Several requests as one, whose texts are streamed together.

A browser keeps six lines to a server open at most, over all of its tabs: a page that has eight texts written at once
needs one line for all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from reprlib import repr as shortened

from npgpt2.engine import Settings
from npgpt2.engine.engine import Model
from npgpt2.serving.protocol import TOKENS_LIMIT, BadRequest, Completion, parse_completion

REQUESTS_LIMIT = 16


@dataclass(frozen=True, repr=False)
class Together(Completion):
    """Requests of one text each, as one whose texts are theirs, in their order. each: the settings of each"""

    each: tuple[Settings, ...]

    def submissions(self) -> Iterator[tuple[Sequence[int], Settings]]:
        for prompt, settings in zip(self.prompts, self.each, strict=True):
            yield prompt, settings | {"sample": 0}


def parse_together(body: object, model: Model, names: Collection[str] | None = None) -> Completion:
    """Several requests' bodies, checked; `BadRequest` says what is wrong with one of them.

    body: {"requests": bodies of `parse_completion`}, of one prompt and one text each, with "stream": true · names: what
    the model may be called. All have the same `logprobs`; ids and usage are given back as the first one says.

    >>> bodies = [{"prompt": "A language", "temperature": t, "stream": True} for t in (0, 1)]
    >>> together = parse_together({"requests": bodies}, model)
    >>> [settings["temperature"] for _, settings in together.submissions()]
    [0, 1]
    """
    bodies = body.get("requests") if isinstance(body, dict) else None
    if not isinstance(bodies, list) or not 0 < len(bodies) <= REQUESTS_LIMIT:
        expected = f"1 to {REQUESTS_LIMIT} bodies are expected"
        raise BadRequest(f"requests is {shortened(bodies)}, where {expected}", "requests")
    asked = [parse_completion(each, model, names=names) for each in bodies]
    first = asked[0]
    if not all(each.sequences == 1 and each.stream and not each.echo and each.max_tokens for each in asked):
        expected = "a prompt, stream, and no more than one text of it are expected, without echo"
        raise BadRequest(f"in each of the requests, {expected}", "requests")
    if any(each.logprobs != first.logprobs for each in asked):
        raise BadRequest("logprobs is not the same in all of the requests", "requests")
    if (tokens := sum(each.most_tokens for each in asked) * (2 + (first.logprobs or 0))) > TOKENS_LIMIT:
        raise BadRequest(f"requests come to {tokens:,} tokens, more than {TOKENS_LIMIT:,}", "requests")
    given = {field.name: getattr(first, field.name) for field in fields(first)}
    given["prompts"] = [prompt for each in asked for prompt in each.prompts]
    return Together(**given, each=tuple(each.settings for each in asked))
