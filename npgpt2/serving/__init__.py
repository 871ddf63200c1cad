"""Many requests: what a request's body may say, and how its answer looks. It knows models by what an engine needs of them,
and leaves out how tokens are computed and drawn (`engine`), and arguments (`cli`).
"""

from npgpt2.serving.protocol import BadRequest, Completion, Origin, answer, error_body, parse_completion

__all__ = ["BadRequest", "Completion", "Origin", "answer", "error_body", "parse_completion"]
