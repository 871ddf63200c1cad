"""The functions of `npgpt2.formulas` again, as fast as NumPy can be made to go: what a machine runs.

Same names, same results but for the rounding of float32. Comments here speak of caches, pages and threads; whoever
wants to know what is computed reads the formulas. `prepare` makes of a model's stored arrays the matrices that `linear`
takes, which may be in int8; `sharing_work` says who does a pass's work, and `time_of_pass` about how long it takes;
`Tokenizer` is the plain one, hurried. Nothing here knows what a layer or a sequence is.
"""

from npgpt2.kernels.attention import BYTES_WORTH, causal_attention, decode_attention
from npgpt2.kernels.int8 import Matrices, prepare
from npgpt2.kernels.passes import sharing_work, time_of_pass
from npgpt2.kernels.products import linear
from npgpt2.kernels.rows import gelu, layer_norm, softmax
from npgpt2.kernels.threads import THREAD_WORTH, count_threads, share
from npgpt2.kernels.tokenizer import Tokenizer

__all__ = [
    "BYTES_WORTH",
    "THREAD_WORTH",
    "Matrices",
    "Tokenizer",
    "causal_attention",
    "count_threads",
    "decode_attention",
    "gelu",
    "layer_norm",
    "linear",
    "prepare",
    "share",
    "sharing_work",
    "softmax",
    "time_of_pass",
]
