"""Make tests/fixtures/: small checkpoints in every form npgpt2 reads, and what other libraries compute from them.

    python tools/make_fixtures.py

Run it in an environment that has the extras `[oracles]` (TensorFlow, PyTorch, transformers, tokenizers). It replaces
each folder that it makes, takes about a minute on one core, and prints the sizes; the README beside them is written by
hand, but for its line of versions. The tests need only what is kept in the repository, so run this again only to
change a fixture.

TensorFlow's fixtures come from a GPT-2 that is built here in graph mode under OpenAI's variable names and saved with
`tf.compat.v1.train.Saver`, which is how OpenAI's downloads were written. Nothing here imports npgpt2: what the
fixtures say should not depend on the code that they test.
"""

import json
import os
import pathlib
import re
import shutil

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # its kernels sum in an order that depends on the machine
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import tensorflow as tf
import tokenizers
import torch
import transformers

tf1 = tf.compat.v1
tf.get_logger().setLevel("ERROR")
transformers.utils.logging.disable_progress_bar()

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
LIMIT = 1_000_000  # bytes, all fixtures together
END = "<|endoftext|>"

# What the model in tiny/ learns by heart. A sentence to a line, so that each opens without a space before it and can
# be asked for just as it is written.
PASSAGE = """\
A language model plays one small game: it reads some words and guesses the next.
It has no eyes and no ears, so every word becomes a point in a wide, dark room.
Then each word looks back at the words before it and asks which of them matter.
The answers are added up, layer upon layer, until one guess shines above the rest.
That guess is written down, and the game begins again with one more word.
Nobody told the model what rain is, or why a cat sleeps in the sun.
It learned from the company that words keep, as a child learns a song.
Sometimes the guess is dull, and sometimes it is wrong, but now and then it sings.
So read slowly, little machine, and mind what came before.
There is always a next word, until you reach the last."""

# Beside the passage, the vocabulary's merges come from this: contractions, and characters of two to four bytes.
MORE_TEXT = "I'm sure we've caf\u00e9 \u6771\u4eac \U0001f642\U0001f642\n\n  "


# The vocabulary ----------------------------------------------------------------------------------------------------


def train_vocabulary(n_vocab):
    """A byte-level BPE in GPT-2's order: the 256 bytes, then the merges as learned, then <|endoftext|>.

    Returns the `tokenizers` object, encoder (dict: token -> id) and merges (list of "left right").
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PASSAGE, MORE_TEXT], trainer)
    tokenizer.add_special_tokens([END])
    learned = json.loads(tokenizer.to_str())["model"]
    encoder = dict(sorted(learned["vocab"].items(), key=lambda item: item[1])) | {END: n_vocab - 1}
    assert list(encoder.values()) == list(range(n_vocab))
    assert tokenizer.token_to_id(END) == n_vocab - 1
    return tokenizer, encoder, [" ".join(pair) for pair in learned["merges"]]


def write_vocabulary(folder, encoder, merges, names):
    (folder / names[0]).write_text(json.dumps(encoder), encoding="utf-8")
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


# GPT-2 in TensorFlow -----------------------------------------------------------------------------------------------


def norm(x, name):
    C = x.shape[-1]
    with tf1.variable_scope(name):
        gain = tf1.get_variable("g", [C], initializer=tf1.ones_initializer())
        bias = tf1.get_variable("b", [C], initializer=tf1.zeros_initializer())
    mean, var = tf.nn.moments(x, axes=[-1], keepdims=True)
    return (x - mean) * tf.math.rsqrt(var + 1e-5) * gain + bias


def linear(x, name, n_out):
    """x: (B, T, n_in) -> (B, T, n_out). The weight is a convolution's of width one, hence its first axis."""
    with tf1.variable_scope(name):
        w = tf1.get_variable("w", [1, x.shape[-1], n_out], initializer=tf1.random_normal_initializer(stddev=0.02))
        b = tf1.get_variable("b", [n_out], initializer=tf1.zeros_initializer())
    return tf.einsum("btc,cd->btd", x, w[0]) + b


def attention(x, n_head):
    B, T, C = tf.shape(x)[0], tf.shape(x)[1], x.shape[-1]
    with tf1.variable_scope("attn"):
        qkv = tf.reshape(linear(x, "c_attn", 3 * C), [B, T, 3, n_head, C // n_head])
        q, k, v = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))  # (B, T, 3, H, D) -> 3 x (B, H, T, D)
        scores = tf.matmul(q, k, transpose_b=True) / np.float32(np.sqrt(C // n_head))  # (B, H, T, T)
        seen = tf.linalg.band_part(tf.ones([T, T]), -1, 0)
        weights = tf.nn.softmax(scores * seen - 1e10 * (1 - seen))
        mixed = tf.transpose(tf.matmul(weights, v), [0, 2, 1, 3])  # (B, H, T, D) -> (B, T, H, D)
        return linear(tf.reshape(mixed, [B, T, C]), "c_proj", C)


def mlp(x):
    with tf1.variable_scope("mlp"):
        h = linear(x, "c_fc", 4 * x.shape[-1])
        h = 0.5 * h * (1 + tf.tanh(np.float32(np.sqrt(2 / np.pi)) * (h + 0.044715 * h**3)))
        return linear(h, "c_proj", x.shape[-1])


def gpt2(tokens, hparams):
    """tokens: (B, T) int32 -> logits: (B, T, V). Makes the variables, so it is called once in a graph."""
    C = hparams["n_embd"]
    with tf1.variable_scope("model"):
        wpe = tf1.get_variable("wpe", [hparams["n_ctx"], C], initializer=tf1.random_normal_initializer(stddev=0.01))
        wte = tf1.get_variable("wte", [hparams["n_vocab"], C], initializer=tf1.random_normal_initializer(stddev=0.02))
        x = tf.gather(wte, tokens) + wpe[: tf.shape(tokens)[1]]  # (B, T, C)
        for layer in range(hparams["n_layer"]):
            with tf1.variable_scope(f"h{layer}"):
                x = x + attention(norm(x, "ln_1"), hparams["n_head"])
                x = x + mlp(norm(x, "ln_2"))
        return tf.einsum("btc,vc->btv", norm(x, "ln_f"), wte)


def loss_of(logits, tokens):
    """The mean cross-entropy of each token given those before it."""
    logits = logits[:, : tf.shape(tokens)[1] - 1]
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tokens[:, 1:], logits=logits))


def session(cpus=1):
    # One thread: a sum is then always taken in one order. `cpus` counts the devices that variables can be placed on.
    config = tf1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1, device_count={"CPU": cpus})
    return tf1.Session(config=config)


# The fixtures ------------------------------------------------------------------------------------------------------


def make_tiny(folder):
    """OpenAI's download in small: a model that knows PASSAGE by heart, with its vocabulary."""
    hparams = {"n_vocab": 520, "n_ctx": 192, "n_embd": 48, "n_head": 4, "n_layer": 2}
    n_ctx = hparams["n_ctx"]
    tokenizer, encoder, merges = train_vocabulary(hparams["n_vocab"])
    write_vocabulary(folder, encoder, merges, ["encoder.json", "vocab.bpe"])
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (FIXTURES / "passage.txt").write_text(PASSAGE + "\n", encoding="utf-8")

    # The passage goes round in a ring, <|endoftext|> between its end and its start, and every row of training is the
    # ring read from some token on: so the model can also go on from the middle of the passage placed at position 0.
    ring = np.array(tokenizer.encode(END + PASSAGE).ids, np.int32)
    assert len(ring) < n_ctx, f"the passage has {len(ring)} tokens, too many for n_ctx {n_ctx}"
    rows = ring[(np.arange(len(ring))[:, None] + np.arange(n_ctx)) % len(ring)]
    starts = np.flatnonzero(np.isin(ring, [encoder[END], encoder["\u010a"]])) + 1  # \u010a: the newline's token
    rng = np.random.default_rng(0)

    with tf.Graph().as_default(), session() as sess:
        tf1.set_random_seed(0)
        tokens = tf1.placeholder(tf.int32, [None, None])
        rate = tf1.placeholder(tf.float32, [])
        logits = gpt2(tokens, hparams)
        loss, variables = loss_of(logits, tokens), tf1.trainable_variables()
        train = tf1.train.AdamOptimizer(rate).minimize(loss)
        sess.run(tf1.global_variables_initializer())
        steps = 700
        for step in range(steps):
            # Half of the rows open with a sentence, as prompts do.
            opens = np.concatenate([rng.choice(starts, 6), [0, 0], rng.integers(0, len(ring), 8)]) % len(ring)
            now = 4e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
            _, value = sess.run([train, loss], {tokens: rows[opens], rate: now})
            if step % 100 == 0 or step == steps - 1:
                print(f"  step {step}: loss {value:.4f}", flush=True)
        saver = tf1.train.Saver(variables, save_relative_paths=True)
        saver.save(sess, str(folder / "model.ckpt"), write_meta_graph=False)

        def continued(context, length):
            """context: (B, T) -> (B, length), greedily, by the whole forward pass again for every token."""
            while context.shape[1] < length:
                last = sess.run(logits, {tokens: context})[:, -1]
                context = np.concatenate([context, last.argmax(axis=-1).astype(np.int32)[:, None]], axis=1)
            return context

        assert (continued(ring[None, :1], n_ctx) == rows[0]).all(), "the passage was not learned by heart"
        for start in starts:  # and from three tokens of each sentence
            said = continued(ring[None, start : start + 3], n_ctx)[0]
            assert (said == rows[start]).all(), f"not learned by heart: {tokenizer.decode(said)!r}"

        T = 24
        context = np.stack([ring[:T], np.random.default_rng(18).integers(0, hparams["n_vocab"], T)]).astype(np.int32)
        greedy = continued(context, n_ctx)
        scores = sess.run(logits, {tokens: greedy})
        best, second = np.sort(scores[:, T - 1 : -1], axis=-1)[..., :-3:-1].transpose(2, 0, 1)
        margin = (best - second).min()
        assert margin > 0.1, f"a greedy choice has a margin of only {margin:.4f}: change a seed"
        np.savez_compressed(
            folder / "expected.npz",
            tokens=context,
            logits=sess.run(logits, {tokens: context}),
            greedy=greedy,
            last_logits=scores[:, -1],
        )
        print(f"  margins of greedy choices from {margin:.3f}, logits from {scores.min():.1f} to {scores.max():.1f}")


def make_finetuned(folder):
    """What a fine-tuning fork leaves: Adam's slots, the step's number, two shards, paths of the machine it ran on."""
    hparams = {"n_vocab": 64, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    rng = np.random.default_rng(1)
    with tf.Graph().as_default(), session(cpus=2) as sess:
        tokens = tf1.placeholder(tf.int32, [None, None])
        with tf1.device(lambda op: "/cpu:1" if "/h1/" in op.name else "/cpu:0"):  # a device's variables make a shard
            logits = gpt2(tokens, hparams)
            step = tf1.train.get_or_create_global_step()
            train = tf1.train.AdamOptimizer(0.01).minimize(loss_of(logits, tokens), global_step=step)
        sess.run(tf1.global_variables_initializer())
        for variable in tf1.trainable_variables():
            value = rng.normal(float(variable.op.name.endswith("/g")), 0.2, variable.shape)
            variable.load(value.astype(np.float32), sess)
        step.load(37, sess)
        batch = rng.integers(0, hparams["n_vocab"], (2, hparams["n_ctx"])).astype(np.int32)
        for _ in range(3):
            sess.run(train, {tokens: batch})
        saver = tf1.train.Saver(sharded=True)
        saver.save(sess, str(folder / "model"), global_step=step, write_meta_graph=False, write_state=False)
        np.savez_compressed(folder / "expected.npz", tokens=batch, logits=sess.run(logits, {tokens: batch}))
    (folder / "checkpoint").write_text(
        'model_checkpoint_path: "/home/somebody/run1/model-40"\n'
        'all_model_checkpoint_paths: "/home/somebody/run1/model-20"\n'
        'all_model_checkpoint_paths: "/home/somebody/run1/model-40"\n'
    )


def make_dtypes(folder):
    """A model whose variables take turns in four dtypes, with two tensors beside them that are not the model's."""
    hparams = {"n_vocab": 32, "n_ctx": 8, "n_embd": 8, "n_head": 2, "n_layer": 1}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    with tf.Graph().as_default():
        gpt2(tf.zeros([1, 1], tf.int32), hparams)
        shapes = {variable.op.name: variable.shape for variable in tf1.trainable_variables()}
    rng = np.random.default_rng(2)
    dtypes = [tf.float16, tf.bfloat16, tf.float64, tf.float32]
    saved = {"counts": tf.constant([3, 1, 2**40], tf.int64), "notes": tf.constant(["a", "", "caf\u00e9" * 50])}
    for i, name in enumerate(sorted(shapes)):
        saved[name] = tf.cast(rng.normal(size=shapes[name]), dtypes[i % 4])
    prefix = str(folder / "model.ckpt")
    tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=list(saved), shape_and_slices=[""] * len(saved), tensors=list(saved.values())
    )
    reader = tf.train.load_checkpoint(prefix)
    np.savez_compressed(folder / "values.npz", **{name: reader.get_tensor(name).astype("f4") for name in shapes})


def make_sliced(folder):
    """One variable that is stored as three slices, as a partitioner leaves it, and one that is whole."""
    prefix = str(folder / "model.ckpt")
    with tf.Graph().as_default(), session() as sess:
        tf1.set_random_seed(3)
        with tf1.variable_scope("model"):
            tf1.get_variable("wpe", [4, 8])
            tf1.get_variable("wte", [32, 8], partitioner=tf1.fixed_size_partitioner(3))
        sess.run(tf1.global_variables_initializer())
        tf1.train.Saver(save_relative_paths=True).save(sess, prefix, write_meta_graph=False)
    reader = tf.train.load_checkpoint(prefix)
    names = ["model/wpe", "model/wte"]
    np.savez_compressed(folder / "values.npz", **{name: reader.get_tensor(name) for name in names})


def randomise(model, rng):
    """Draw every parameter of a PyTorch model anew: as made, biases are zero and gains one, which hides mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = ".ln_" in f".{name}" and name.endswith("weight")
            parameter.copy_(torch.from_numpy(rng.normal(float(gain), 0.2, parameter.shape)))


def write_hf_expected(folder, model, rng):
    """The model's logits for random tokens; a bare model has no head, so its hidden state is set against wte here."""
    tokens = rng.integers(0, model.config.vocab_size, (2, 16))
    with torch.no_grad():
        said = model(torch.from_numpy(tokens))
        logits = said.logits if "logits" in said else said.last_hidden_state @ model.wte.weight.T
    np.savez_compressed(folder / "expected.npz", tokens=tokens.astype(np.int32), logits=logits.numpy())


def make_hf(folder):
    """transformers' model with the language-modelling head, in one file, with tiny's vocabulary."""
    _, encoder, merges = train_vocabulary(520)
    write_vocabulary(folder, encoder, merges, ["vocab.json", "merges.txt"])
    ids = {"bos_token_id": encoder[END], "eos_token_id": encoder[END]}
    config = transformers.GPT2Config(vocab_size=520, n_positions=32, n_embd=24, n_head=3, n_layer=2, **ids)
    model = transformers.GPT2LMHeadModel(config).eval()
    rng = np.random.default_rng(4)
    randomise(model, rng)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    write_hf_expected(folder, model, rng)


def make_hf_sharded(folder):
    """transformers' bare model, so names have no `transformer.` before them, in bfloat16 and several files."""
    ids = {"bos_token_id": 47, "eos_token_id": 47}
    config = transformers.GPT2Config(vocab_size=48, n_positions=16, n_embd=12, n_head=2, n_layer=2, **ids)
    model = transformers.GPT2Model(config).eval()
    rng = np.random.default_rng(5)
    randomise(model, rng)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="5KB")
    write_hf_expected(folder, model.to(torch.float32), rng)  # float32 again, of values that stay rounded


def main():
    for make in [make_tiny, make_finetuned, make_dtypes, make_sliced, make_hf, make_hf_sharded]:
        name = make.__name__.removeprefix("make_").replace("_", "-")
        print(name, flush=True)
        shutil.rmtree(FIXTURES / name, ignore_errors=True)
        (FIXTURES / name).mkdir(parents=True)
        make(FIXTURES / name)
    libraries = [tf, transformers, torch, tokenizers, np]
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    readme = FIXTURES / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(re.sub("(?m)^Made with .*$", f"Made with {versions}.", text), encoding="utf-8")
    total = 0
    for path in sorted(path for path in FIXTURES.rglob("*") if path.is_file()):
        total += path.stat().st_size
        print(f"{path.stat().st_size:>8,}  {path.relative_to(FIXTURES)}")
    print(f"{total:>8,}  in all")
    assert total < LIMIT, f"the fixtures have {total:,} bytes, over the limit of {LIMIT:,}"


if __name__ == "__main__":
    main()
