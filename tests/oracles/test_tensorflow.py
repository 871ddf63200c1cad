"""npgpt2 against TensorFlow: its checkpoints as its own reader reads them, and OpenAI's sampling in its operations.

Checkpoints are the fixtures, and others that TensorFlow writes here, of kinds that are too large or too odd to keep.
What a model computes is compared elsewhere: the fixtures hold the logits and tokens that TensorFlow got from them.
"""

from __future__ import annotations

import string

import numpy as np
import pytest
import tensorflow as tf
from distributions import probabilities

from npgpt2.convert.checkpoint import Checkpoint, find_prefix
from npgpt2.convert.conversion import widen
from npgpt2.convert.crc32c import crc32c
from npgpt2.sampling import Sampling

tf1 = tf.compat.v1
tf.get_logger().setLevel("ERROR")

FLOATS = [tf.float32, tf.float16, tf.bfloat16, tf.float64]


def write(prefix, tensors):
    """Write a checkpoint of one data file with the operation behind every way of saving. tensors: by name"""
    names, values = list(tensors), list(tensors.values())
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values)


def random_tensor(rng, dtype, shape):
    """Normally distributed, and now and then at the ends of what the type can hold, or beyond."""
    extremes = rng.choice([0, -0.0, float(dtype.max), float(dtype.min), 6e-8, 1e-40, np.inf, -np.inf], shape)
    values = np.where(rng.random(shape) < 0.1, extremes, rng.normal(size=shape))
    return tf.constant(values.astype(dtype.as_numpy_dtype))


def assert_same(prefix):
    """Everything that TensorFlow's reader finds in a checkpoint, npgpt2 finds too, and nothing else."""
    theirs, ours = tf.train.load_checkpoint(str(prefix)), Checkpoint(prefix)
    shapes, dtypes = theirs.get_variable_to_shape_map(), theirs.get_variable_to_dtype_map()
    # A variable that is stored in slices has further entries for these, whose names begin with a zero.
    assert {name for name in ours.entries if not name.startswith("\0")} == set(shapes)
    for name, entry in ours.entries.items():
        if name.startswith("\0"):
            continue
        assert entry.shape == tuple(shapes[name])
        assert entry.dtype == dtypes[name].as_datatype_enum
        if entry.sliced or dtypes[name] not in FLOATS:
            continue
        data, dtype = ours.read(name)
        expected = theirs.get_tensor(name)
        assert dtype == dtypes[name].name
        assert data.tobytes() == expected.tobytes()
        with np.errstate(over="ignore"):
            assert widen(data, dtype).tobytes() == expected.astype(np.float32).tobytes()


# ---- Checkpoints


@pytest.mark.parametrize("folder", ["tiny", "finetuned", "dtypes", "sliced"])
def test_fixtures_hold_what_tensorflow_reads_in_them(fixtures, folder):
    assert_same(find_prefix(fixtures / folder))


def test_a_recorded_checkpoint_holds_what_tensorflow_reads_in_it(shared):
    assert_same(find_prefix(shared / "checkpoints" / "recorded-tiny"))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_tensors_of_every_shape_and_float_type_have_tensorflows_bytes(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shapes = [(), (1,), (0,), (3, 0, 2), (1, 1, 1), (7,), (1, 12, 36), (2, 3, 4, 5, 6), (1000, 77), (3_000_001,)]
    write(tmp_path / "model", {f"model/{shape}": random_tensor(rng, dtype, shape) for shape in shapes})
    assert_same(tmp_path / "model")


def test_tensors_of_other_types_are_listed_beside_the_floats(tmp_path):
    others = {
        "bool": tf.constant([True, False]),
        "complex": tf.constant([1 + 2j]),
        "int8": tf.constant([1, 2, 3], tf.int8),
        "step": tf.constant(2**40, tf.int64),
        "string": tf.constant([["a", "b"], ["", "é" * 1000]]),
        "uint16": tf.zeros([2, 0], tf.uint16),
    }
    write(tmp_path / "model", others | {"float": tf.constant([1.5])})
    assert_same(tmp_path / "model")
    with pytest.raises(ValueError, match="not a float"):
        Checkpoint(tmp_path / "model").read("step")


def test_thousands_of_names_that_share_prefixes_are_found(tmp_path):
    """So many that TensorFlow's index has several blocks, and in no order."""
    rng = np.random.default_rng(1)
    letters = np.array(list(string.ascii_letters + string.digits + "/_.- é東🙂"))
    names = ["model/"]
    for _ in range(6000):
        # Another name up to some character, then anything; npgpt2 takes names of up to 1 kB.
        start = names[rng.integers(max(0, len(names) - 20), len(names))]
        kept = start[: rng.integers(0, min(len(start), 500) + 1)]
        names.append(kept + "".join(rng.choice(letters, rng.integers(1, 150))))
    names = rng.permutation(sorted(set(names))).tolist()
    tensors = {name: random_tensor(rng, FLOATS[i % 4], [i % 5, i % 3]) for i, name in enumerate(names)}
    write(tmp_path / "model", tensors)
    assert (tmp_path / "model.index").stat().st_size > 2 * 2**18  # a block ends at 256 KB
    assert len(Checkpoint(tmp_path / "model").entries) > 5000
    assert_same(tmp_path / "model")


def test_checkpoints_of_several_shards_are_read_as_tensorflow_reads_them(tmp_path):
    rng = np.random.default_rng(2)
    for shard in range(5):
        names = [f"model/h{layer}/{shard}" for layer in range(shard, 40, 3)]
        write(tmp_path / f"part{shard}", {name: random_tensor(rng, FLOATS[shard % 4], [shard, 31]) for name in names})
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(tmp_path / f"part{shard}") for shard in range(5)],
        destination_prefix=str(tmp_path / "merged"),
        delete_old_dirs=False,
    )
    assert Checkpoint(tmp_path / "merged").shards == 5
    assert_same(tmp_path / "merged")


def test_what_a_sharding_saver_leaves_is_read_as_tensorflow_reads_it(tmp_path):
    """Variables of four types in two shards, some cut into slices, with an optimizer's, in a numbered checkpoint."""
    config = tf1.ConfigProto(device_count={"CPU": 2})
    with tf.Graph().as_default(), tf1.Session(config=config) as session:
        with tf1.device("/cpu:0"):
            step = tf1.train.get_or_create_global_step()
        for i in range(12):
            with tf1.device(f"/cpu:{i % 2}"), tf1.variable_scope(f"model/h{i}"):
                initial = tf1.random_normal_initializer(seed=i, dtype=FLOATS[i % 4])
                cut = tf1.fixed_size_partitioner(3) if i % 4 == 0 else None
                tf1.get_variable("w", [6, 5 + i], FLOATS[i % 4], initializer=initial, partitioner=cut)
        loss = tf.add_n([tf.reduce_sum(tf.cast(variable, tf.float32)) for variable in tf1.trainable_variables()])
        train = tf1.train.MomentumOptimizer(0.1, 0.9).minimize(loss, global_step=step)
        session.run(tf1.global_variables_initializer())
        saver = tf1.train.Saver(sharded=True)
        for _ in range(2):
            session.run(train)
            saver.save(session, str(tmp_path / "model"), global_step=step)
    prefix = find_prefix(tmp_path)
    assert str(prefix) == tf.train.latest_checkpoint(str(tmp_path))
    assert prefix.name == "model-2"
    assert Checkpoint(prefix).shards == 2
    assert_same(prefix)


@pytest.mark.parametrize("name", ["run 1", 'quo"ted', "it's", "é東🙂", "tab\tnewline\nreturn\r"], ids=ascii)
def test_the_latest_checkpoint_is_tensorflows_whatever_its_name(tmp_path, name):
    prefixes = [str(tmp_path / name / f"{name}-{step}") for step in (1, 2)]
    for prefix in prefixes:
        write(prefix, {"model/wte": tf.constant([1.0])})
    tf1.train.update_checkpoint_state(str(tmp_path / name), prefixes[1], prefixes)
    assert tf.train.latest_checkpoint(str(tmp_path / name)) == prefixes[1]
    assert str(find_prefix(tmp_path / name)) == prefixes[1]


def test_checksums_of_every_length_are_tensorflows(tmp_path):
    """Below, at and above the lengths at which the computation takes another path."""
    edges = [5685 - 1362, 5685, 64 * (5685 - 1362), 64 * 5685, 4 * 2**20, 4 * 2**20 + 64 * 5685, 8 * 2**20]
    lengths = [*range(1, 70), *(edge + more for edge in edges for more in (-1, 0, 1, 2, 63)), 10_000_019]
    rng = np.random.default_rng(3)
    write(tmp_path / "model", {str(n): tf.constant(rng.integers(0, 256, n, np.uint8)) for n in lengths})
    data = (tmp_path / "model.data-00000-of-00001").read_bytes()
    for name, entry in Checkpoint(tmp_path / "model").entries.items():
        assert entry.size == int(name)
        assert crc32c(data[entry.offset : entry.offset + entry.size]) == entry.crc, name


# ---- Sampling


def openais_probabilities(logits, temperature, top_k):
    """What OpenAI's sampling draws from: logits below the k-th become -1e10, so that those equal to it are kept."""
    scores = tf.constant(logits)[None] / temperature  # (1, V)
    if top_k:
        kth = tf.math.top_k(scores, k=top_k).values[:, -1:]
        scores = tf.where(scores < kth, tf.fill(scores.shape, tf.constant(-1e10, scores.dtype)), scores)
    return tf.nn.softmax(scores)[0].numpy()


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 40, 499, 500])
@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_probabilities_are_those_of_openais_sampling(temperature, top_k, ties):
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 3, 500)
        if ties:
            logits = np.round(logits)
        ours, theirs = (
            probabilities(Sampling(temperature, top_k), logits),
            openais_probabilities(logits, temperature, top_k),
        )
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-11)


def test_probabilities_are_those_of_openais_sampling_in_float32():
    logits = np.random.default_rng(0).normal(0, 3, 50257).astype(np.float32)
    theirs = openais_probabilities(logits, np.float32(0.7), 40)
    np.testing.assert_allclose(probabilities(Sampling(0.7, 40), logits), theirs, rtol=1e-5, atol=1e-12)


def test_at_temperature_0_openais_sampling_draws_a_token_that_is_not_there():
    """README says so: all logits become infinite or NaN, for which TensorFlow answers with n_vocab. Ours is greedy."""
    for logits in ([-35.0, -33.0, -40.0], [3.0, -1.0, 2.0], [-1.0, 0.0, 1.0]):
        theirs = tf1.multinomial([tf.constant(logits) / 0.0], num_samples=20, seed=1)
        assert set(theirs.numpy().ravel()) == {3}
        assert Sampling(temperature=0).choose(np.float32(logits), np.random.default_rng(1)) == np.argmax(logits)
