"""The kernels against their slow and obvious versions in naive.py."""

import naive
import numpy as np
import pytest

from npgpt2.kernels import kernels, threads


def random(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def close(actual, expected, tolerance=1e-5):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[False, True], ids=["copies", "small"])
def small_products(request, monkeypatch):
    """Whether BLAS multiplies small matrices where they lie; what is computed doesn't depend on it."""
    monkeypatch.setattr(kernels, "multiplies_small_matrices", lambda: request.param)


@pytest.mark.usefixtures("small_products")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("n_out", [1, 15, 16, 64, 200])
@pytest.mark.parametrize("rows", range(1, kernels.FEW_ROWS + 2))
def test_matmul_in_tiles_of_any_size(rows, n_out, order, monkeypatch):
    x, w = random(rows, 5), np.asarray(random(5, n_out, seed=1), order=order)
    expected = naive.linear(x, w, np.zeros(n_out))
    for tile_bytes, small_product in ((1, 10**6), (100, 16 * rows * 5), (2**20, 48 * rows * 5 + 1), (2**20, 1)):
        monkeypatch.setattr(kernels, "TILE_BYTES", tile_bytes)
        monkeypatch.setattr(kernels, "SMALL_PRODUCT", small_product)
        y = np.full((rows, n_out), np.nan, np.float32)
        kernels.matmul(x, w, y)
        close(y, expected)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 7, 40, 200])
def test_linear_in_any_number_of_parts(rows, count, order, monkeypatch):
    monkeypatch.setattr(threads, "count_threads", lambda: count)
    monkeypatch.setattr(kernels, "THREAD_WORTH", 1)
    x, w, b = random(rows, 5), np.asarray(random(5, 333, seed=1), order=order), random(333, seed=2)
    for expected, bias in ((naive.linear(x, w, b), b), (naive.linear(x, w, 0 * b), None)):
        close(kernels.linear(x, w, bias), expected)
        with threads.sharing():
            close(kernels.linear(x, w, bias), expected)


@pytest.mark.parametrize("rows", range(2, 20))
def test_linear_makes_no_copy_of_a_matrix(rows, allocated_peak, monkeypatch):
    """What a few rows of a large matrix rest on: NumPy hands it to BLAS where it lies, and only the result is new."""
    monkeypatch.setattr(threads, "count_threads", lambda: 2)
    x, w = random(rows, 300), np.asfortranarray(random(300, 4000))
    with threads.sharing():
        assert allocated_peak(lambda: kernels.linear(x, w)) < 2.2 * 4 * rows * (4000 + 300) + 20_000 < w.nbytes / 2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_layer_norm(scale):
    x, gain, bias = random(4, 33, scale=scale), random(33, seed=1), random(33, seed=2)
    close(kernels.layer_norm(x, gain, bias), naive.layer_norm(x.astype(np.float64), gain, bias))


def test_layer_norm_of_a_constant_row_is_the_bias():
    bias = random(8)
    close(kernels.layer_norm(np.full((1, 8), 3, np.float32), random(8, seed=1), bias), bias[None])


def test_a_row_is_multiplied_without_pythons_lock(monkeypatch):
    """np.matmul keeps it where there are few outputs, and with it all other threads."""
    x, w = np.ones((1, 3), np.float32), np.ones((3, 2), np.float32)
    monkeypatch.setattr(np, "matmul", None)
    y = np.empty((1, 2), np.float32)
    kernels.matmul(x, w, y)
    np.testing.assert_array_equal(y, [[3, 3]])


@pytest.mark.parametrize("rows", [1, kernels.ROWS, kernels.ROWS + 1, 3 * kernels.ROWS])
def test_gelu(rows):
    x = random(rows, 9, scale=4)
    close(kernels.gelu(x.copy()), naive.gelu(x.astype(np.float64)))


def test_gelu_overwrites_its_argument():
    x = random(3, 4)
    assert kernels.gelu(x) is x


def test_softmax():
    x = random(2, 3, 50, scale=5)
    close(kernels.softmax(x.copy()), naive.softmax(x.astype(np.float64)))


def test_softmax_of_scores_whose_exponentials_overflow():
    close(kernels.softmax(np.array([1000, 1000, -1000], np.float32)), [0.5, 0.5, 0])


BLOCK = kernels.QUERY_BLOCK


@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (1, 9), (2, 9), (9, 9), (BLOCK, BLOCK), (BLOCK + 1, BLOCK + 4), (300, 300)]
)
def test_causal_attention(T, S):
    q, k, v = random(2, T, 5), random(2, S, 5, seed=1), random(2, S, 5, seed=2)
    close(kernels.causal_attention(q, k, v), naive.causal_attention(q, k, v))


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
