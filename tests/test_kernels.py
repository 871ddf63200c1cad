"""The kernels against the formulas of the same names, at every shape; and what their speed rests on."""

from types import SimpleNamespace

import numpy as np
import pytest
from watching import attention_weights

from npgpt2 import formulas, kernels
from npgpt2.kernels import attention, matmul, products, rows, threads, ways
from npgpt2.kernels.ways import Way


def random(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def close(actual, formula, *arguments, tolerance=1e-5):
    """What a kernel gave is what the formula gives in float64."""
    expected = formula(*(np.asarray(argument, np.float64) for argument in arguments))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["linear", "layer_norm", "gelu", "softmax", "causal_attention"])
def test_every_formula_has_a_kernel_of_its_name(name):
    assert getattr(formulas, name).__name__ == getattr(kernels, name).__name__ == name


def test_formulas_compute_in_the_type_that_they_are_given():
    for dtype in (np.float32, np.float64):
        x, w = random(3, 4).astype(dtype), random(4, 4, seed=1).astype(dtype)
        q = random(2, 3, 4).astype(dtype)
        for y in (
            formulas.linear(x, w, w[0]),
            formulas.layer_norm(x, w[0], w[1]),
            formulas.gelu(x),
            formulas.softmax(x),
            formulas.causal_attention(q, q, q),
        ):
            assert y.dtype == dtype


# ---- Products


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("n_out", [1, 15, 16, 64, 200])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 24, 25])
@pytest.mark.parametrize("way", ["rows", "tiles", "small tiles", None])
def test_matmul_in_every_way_in_tiles_of_any_size(n, n_out, way, order, monkeypatch):
    x, w = random(n, 5), np.asarray(random(5, n_out, seed=1), order=order)
    for tile, small_product in ((1, 10**6), (15, 16 * n * 5), (64, 48 * n * 5 + 1), (256, 1)):
        monkeypatch.setattr(matmul, "way_for", lambda rows, tile=tile: way and Way(rows, way, 4 * 5 * tile))
        monkeypatch.setattr(matmul, "SMALL_PRODUCT", small_product)
        y = np.full((n, n_out), np.nan, np.float32)
        matmul.matmul(x, w, y)
        close(y, formulas.linear, x, w)


SMALL, FEW, SOME = Way(4, "small tiles", 0), Way(2, "rows", 100), Way(8, "tiles", 200)


@pytest.mark.parametrize(
    ("processor", "alone", "together"),
    [
        ("Haswell", [FEW, None, SOME, None], [None, None, None, None]),
        ("Zen", [FEW, None, SOME, None], [None, None, None, None]),
        ("SkylakeX", [SMALL, SMALL, None, None], [SMALL, SMALL, None, None]),
        ("SapphireRapids", [SMALL, SMALL, None, None], [SMALL, SMALL, None, None]),
        ("NEOVERSEN1", [Way(24, "tiles", 786432)] * 3 + [None], [None, None, None, None]),
        (None, [Way(24, "tiles", 786432)] * 3 + [None], [None, None, None, None]),
    ],
)
def test_the_way_of_multiplying_follows_from_the_processor_and_the_rows(processor, alone, together, monkeypatch):
    monkeypatch.setattr(ways, "ALONE", {"Haswell": [FEW, Way(4, "whole", 0), SOME], "SkylakeX": [SMALL]})
    monkeypatch.setattr(ways, "TOGETHER", {"SkylakeX": [SMALL]})
    monkeypatch.setattr(ways, "openblas", lambda: processor and SimpleNamespace(kernels=processor))
    for sharing, expected in ((True, alone), (False, together)):
        monkeypatch.setattr(ways, "is_sharing", lambda sharing=sharing: sharing)
        assert [ways.way_for(rows) for rows in (2, 4, 5, 200)] == expected


def test_the_table_of_ways_goes_from_few_rows_to_more():
    for table in (ways.ALONE, ways.TOGETHER):
        for kind, chosen in table.items():
            assert kind not in ways.SAME
            assert [way.rows for way in chosen] == sorted({way.rows for way in chosen})
            assert all((way.way in ("small tiles", "whole")) == (way.tile_bytes == 0) for way in chosen)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 40, 200])
def test_linear_in_any_number_of_parts(n, count, order, monkeypatch):
    monkeypatch.setattr(products, "THREAD_WORTH", 1)
    x, w, b = random(n, 5), np.asarray(random(5, 333, seed=1), order=order), random(333, seed=2)
    close(kernels.linear(x, w, b), formulas.linear, x, w, b)
    with threads.sharing(count):
        close(kernels.linear(x, w, b), formulas.linear, x, w, b)
        close(kernels.linear(x, w), formulas.linear, x, w)


@pytest.mark.parametrize("n", range(2, 30))
def test_linear_makes_no_copy_of_a_matrix(n, allocated_peak):
    """What a few rows of a large matrix rest on: NumPy hands it to BLAS where it lies, and only the result is new."""
    x, w = random(n, 300), np.asfortranarray(random(300, 4000))
    with threads.sharing(2):
        assert allocated_peak(lambda: kernels.linear(x, w)) < 2.2 * 4 * n * (4000 + 300) + 20_000 < w.nbytes / 2


def test_no_rows_make_no_product():
    """As where a piece of a prompt is read, after which no logits are wanted."""
    w = np.asfortranarray(random(300, 4000))
    for count in (1, 2):
        with threads.sharing(count):
            assert kernels.linear(random(0, 300), w, random(4000)).shape == (0, 4000)
    assert kernels.linear(random(0, 300), w).shape == (0, 4000)


# ---- Rows


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 4, rows.ROWS + 1])
def test_layer_norm(n, scale):
    x, gain, bias = random(n, 33, scale=scale), random(33, seed=1), random(33, seed=2)
    close(kernels.layer_norm(x, gain, bias), formulas.layer_norm, x, gain, bias)


def test_layer_norm_of_a_constant_row_is_the_bias():
    x, gain, bias = np.full((1, 8), 3, np.float32), random(8, seed=1), random(8)
    for layer_norm in (kernels.layer_norm, formulas.layer_norm):
        np.testing.assert_allclose(layer_norm(x, gain, bias), bias[None], atol=1e-6)


@pytest.mark.parametrize("n", [1, rows.ROWS, rows.ROWS + 1, 3 * rows.ROWS])
def test_gelu(n):
    x = random(n, 9, scale=4)
    close(kernels.gelu(x.copy()), formulas.gelu, x)


def test_gelu_overwrites_its_argument():
    x = random(3, 4)
    assert kernels.gelu(x) is x


def test_softmax():
    x = random(2, 3, 50, scale=5)
    close(kernels.softmax(x.copy()), formulas.softmax, x)


def test_softmax_of_scores_whose_exponentials_overflow():
    for softmax in (kernels.softmax, formulas.softmax):
        np.testing.assert_array_equal(softmax(np.array([1000, 1000, -1000], np.float32)), [0.5, 0.5, 0])


# ---- Attention

BLOCK = attention.QUERY_BLOCK
SHAPES = [(1, 1), (1, 9), (2, 9), (9, 9), (BLOCK, BLOCK), (BLOCK + 1, BLOCK + 4), (300, 300)]


@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_causal_attention(T, S, count, monkeypatch):
    monkeypatch.setattr(attention, "THREAD_WORTH", 1)
    q, k, v = random(4, T, 5), random(4, S, 5, seed=1), random(4, S, 5, seed=2)
    with threads.sharing(count):
        close(kernels.causal_attention(q, k, v), formulas.causal_attention, q, k, v)


@pytest.mark.parametrize(("T", "S"), SHAPES)
def test_whoever_watches_attention_sees_the_weights_of_all_queries(T, S):
    q, k, v = (random(2, n, 5, seed=seed) for seed, n in enumerate((T, S, S)))
    seen = np.zeros((2, T, S), np.float32)
    done = 0

    def watch(weights):
        nonlocal done
        _, block, positions = weights.shape
        assert positions == S - T + done + block, "the last of the block's queries sees up to itself"
        seen[:, done : done + block, :positions] = weights
        done += block

    kernels.causal_attention(q, k, v, watch)
    assert done == T
    close(seen, attention_weights, q, k)


@pytest.mark.parametrize("lengths", [[1], [9], [4, 4, 4], [1, 9, 5, 2], [9, 1]])
def test_decode_attention_is_that_of_each_sequence_alone(lengths):
    B, S = len(lengths), max(lengths)
    q, k, v = random(B, 3, 5), random(B, 3, S, 5, seed=1), random(B, 3, S, 5, seed=2)
    for row, length in enumerate(lengths):
        k[row, :, length:], v[row, :, length:] = np.nan, 1e30  # what a slot holds of those before
    hidden = np.arange(S) >= np.array(lengths)[:, None]
    together = np.full((B, 15), np.nan, np.float32)
    kernels.decode_attention(q, k, v, together, hidden if hidden.any() else None)
    for row, length in enumerate(lengths):
        own = k[row, :, :length], v[row, :, :length]
        close(together[row : row + 1], formulas.causal_attention, q[row][:, None], *own)


def test_attention_ignores_what_comes_later():
    q, k, v = (random(2, 200, 4, seed=seed) for seed in range(3))
    before = kernels.causal_attention(q, k, v)
    k[:, 150:], v[:, 150:] = 100, np.nan
    np.testing.assert_array_equal(kernels.causal_attention(q, k, v)[:128], before[:128])


def test_attention_makes_no_array_of_all_queries_by_all_keys(allocated_peak):
    H, T, D = 4, 1024, 8
    q, k, v = (random(H, T, D, seed=seed) for seed in range(3))
    peak = allocated_peak(lambda: kernels.causal_attention(q, k, v))
    assert peak < H * T * T * 4 / 2
