"""The engines that `benchmark.py` compares, each behind the same function, and the limit of the machine as one more.

An engine is opened with a folder of models, "float32" or "int8", and a number of threads, and gives back a function
`generate(prompts, length, step)`. It continues each of `prompts`, lists of token ids, greedily by `length` tokens and
calls `step(tokens)` whenever the next token of each is there, so that the first call comes when the prompts are read.
Each engine uses its own loop, as its users do, except llama.cpp, whose loop is the caller's. What is no float32: the
cache of llama.cpp, which is float16 unless one asks for something else.

    python tools/engines.py ACTION ENGINE DTYPE FOLDER THREADS [LENGTH]
    python tools/engines.py tokenize TOKENIZER FOLDER TEXT

write: writes the engine's files from the folder's model.npz · once: opens the engine and generates LENGTH tokens ·
serve: opens it and measures what it is asked for on standard input, a JSON object a line · tokenize: opens a tokenizer
with the vocabulary in a folder, and encodes a file, twice. Nothing is imported before it is needed, since "once" is
timed.
"""

import ctypes
import json
import os
import re
import sys
import time
import zlib
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from random import Random

PROMPT = [464, 3290, 318]  # "The dog is" in GPT-2's vocabulary


# ---- npgpt2


def open_npgpt2(folder, dtype, threads):
    from npgpt2 import Engine, load

    model = load(folder / ("model-int8.npz" if dtype == "int8" else "model.npz"))

    def generate(prompts, length, step):
        # What `generate_tokens` does, which doesn't tell about its steps. An engine begins with prompts in more than
        # one step if they are many, and some write meanwhile: all prompts that are left are read in the next one, so
        # that those are hardly ahead. Guesses would make it faster by what its own text repeats, which is measured by
        # itself.
        engine = Engine(model, slots=len(prompts), chunk=sum(map(len, prompts)), text=False)
        settings = {"length": length + len(prompts), "guess": False}  # so that those ahead don't end before the others
        requests = [engine.submit(prompt, **settings) for prompt in prompts]
        while not all(request.tokens for request in requests):
            engine.step()
        for number in range(length):
            if number:
                engine.step()
            step([request.tokens[number] for request in requests])

    return generate


# ---- The machine's limit: what NumPy can do at best, as if it were an engine


def open_limit(folder, dtype, threads):
    """Reading one token takes at least as long as `np.dot` of a matrix of the weights' size, and of the cache's where
    that counts, with a vector. Reading a prompt takes at least as long as the products of its linear layers."""
    import numpy as np

    from npgpt2 import load

    model = load(folder / "model.npz")
    width, bytes_each = model.hparams.n_embd, 1 if dtype == "int8" else 4
    layers = [shape for name, shape in model.weights.shapes.items() if name.endswith("/w")]
    weights = bytes_each * (sum(n_in * n_out for n_in, n_out in layers) + model.hparams.n_vocab * width)
    rng, vector = np.random.default_rng(0), np.ones(width, np.float32)

    def generate(prompts, length, step):
        context = len(prompts[0])
        if length == 1:
            pairs = {shape: [rng.random(size, np.float32) for size in ((context, shape[0]), shape)] for shape in layers}
            step(None)  # the clock runs from step to step
            for shape in layers:
                np.dot(*pairs[shape])
            return step(None)
        cache = 2 * 4 * width * model.hparams.n_layer * len(prompts) * context if context >= 256 else 0
        matrix = np.ones(((weights + cache) // 4 // width, width), np.float32)
        for _ in range(length):
            np.dot(matrix, vector)
            step(None)

    return generate


# ---- transformers


def write_transformers(folder, _):
    """A folder as `save_pretrained` makes it. CTranslate2's converter reads it too, and wants a vocabulary there."""
    import numpy as np
    from safetensors.numpy import save_file

    with np.load(folder / "model.npz") as file:
        hparams = json.loads(file["hparams.json"])
        tensors = {_hugging_face_name(name): np.ascontiguousarray(file[name]) for name in _variables(file)}
        target = folder / "transformers"
        target.mkdir(exist_ok=True)
        for member, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            (target / name).write_bytes(file[member])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    sizes = {"vocab_size": hparams.pop("n_vocab"), "n_positions": hparams["n_ctx"]}
    no_end = {"bos_token_id": None, "eos_token_id": None}  # so that nothing ends before it is as long as the others
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config | sizes | hparams | no_end))
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def _variables(file):
    return [name for name in file.files if re.match(r"wte|wpe|h\d+/|ln_f", name)]


def _hugging_face_name(name):
    """`h0/attn/c_attn/w` is `transformer.h.0.attn.c_attn.weight` there."""
    name = re.sub(r"^h(\d+)", r"h/\1", name)
    name = f"{name}/w" if name in ("wte", "wpe") else name
    return "transformer." + re.sub(r"/[gw]$", "/weight", re.sub(r"/b$", "/bias", name)).replace("/", ".")


def open_transformers(folder, dtype, threads):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder / "transformers", dtype=torch.float32)

    class Steps(BaseStreamer):
        def __init__(self, step):
            self.step, self.started = step, False

        def put(self, tokens):
            if self.started:  # the first are the prompt's
                self.step(tokens.tolist())
            self.started = True

        def end(self):
            pass

    def generate(prompts, length, step):
        tokens = torch.tensor(prompts)
        settings = {"do_sample": False, "max_new_tokens": length, "pad_token_id": 0}
        model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=Steps(step), **settings)

    return generate


# ---- CTranslate2


def write_ctranslate2(folder, dtype):
    from ctranslate2.converters import TransformersConverter

    converter = TransformersConverter(str(folder / "transformers"))
    converter.convert(str(folder / f"ctranslate2-{dtype}"), quantization=dtype, force=True)


def open_ctranslate2(folder, dtype, threads):
    import ctranslate2

    path = folder / f"ctranslate2-{dtype}"
    model = ctranslate2.Generator(str(path), compute_type=dtype, inter_threads=1, intra_threads=threads)
    texts = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompts, length, step):
        row = []

        def take(result):  # one call for each sequence and step
            row.append(result.token_id)
            if len(row) == len(prompts):
                step(row.copy())
                row.clear()

        lengths = {"max_length": length, "min_length": length}
        named = [[texts[token] for token in prompt] for prompt in prompts]
        model.generate_batch(named, **lengths, sampling_topk=1, include_prompt_in_result=False, callback=take)

    return generate


# ---- llama.cpp


def write_llama(folder, _):
    """The model under the names that llama.cpp has for GPT-2, with matrices that have a row for each output."""
    import gguf
    import numpy as np

    parts = {"ln_1": "attn_norm", "attn/c_attn": "attn_qkv", "attn/c_proj": "attn_output"}
    parts |= {"ln_2": "ffn_norm", "mlp/c_fc": "ffn_up", "mlp/c_proj": "ffn_down"}
    whole = {"wte": "token_embd.weight", "wpe": "position_embd.weight"}
    whole |= {"ln_f/g": "output_norm.weight", "ln_f/b": "output_norm.bias"}
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "gpt2")
    with np.load(folder / "model.npz") as file:
        hparams = json.loads(file["hparams.json"])
        for name in _variables(file):
            if name not in whole:
                _, layer, part, kind = re.fullmatch(r"(h(\d+))/(.*)/([gbw])", name).groups()
                whole[name] = f"blk.{layer}.{parts[part]}.{'bias' if kind == 'b' else 'weight'}"
            writer.add_tensor(whole[name], np.ascontiguousarray(file[name].T if name.endswith("/w") else file[name]))
    writer.add_vocab_size(hparams["n_vocab"])
    writer.add_context_length(hparams["n_ctx"])
    writer.add_embedding_length(hparams["n_embd"])
    writer.add_feed_forward_length(4 * hparams["n_embd"])
    writer.add_block_count(hparams["n_layer"])
    writer.add_head_count(hparams["n_head"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_llama(folder, dtype, threads):
    import llama_cpp as llama
    import numpy as np

    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(folder / "model.gguf").encode(), llama.llama_model_default_params())
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    contexts = {}

    def context_for(sequences, positions):
        """A cache of this size, which a measurement uses again and again; the last one's makes room for it."""
        if (sequences, positions) not in contexts:
            for old in contexts.values():
                llama.llama_free(old)
            contexts.clear()
            settings = llama.llama_context_default_params()
            settings.n_seq_max, settings.n_ctx = sequences, sequences * positions
            settings.n_threads = settings.n_threads_batch = threads
            contexts[sequences, positions] = llama.llama_init_from_model(model, settings)
        return contexts[sequences, positions]

    def read(context, rows):
        """Read (token, position, sequence, whether logits are wanted) rows; the likeliest token for each wanted."""
        batch = llama.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama.llama_decode(context, batch):
            sys.exit("benchmark: llama.cpp failed to read a batch")
        llama.llama_batch_free(batch)
        wanted = [llama.llama_get_logits_ith(context, i) for i, row in enumerate(rows) if row[3]]
        return [int(np.ctypeslib.as_array(logits, (n_vocab,)).argmax()) for logits in wanted]

    def generate(prompts, length, step):
        context = context_for(len(prompts), len(prompts[0]) + length)
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        tokens = []
        for sequence, prompt in enumerate(prompts):
            tokens += read(context, [(t, i, sequence, i == len(prompt) - 1) for i, t in enumerate(prompt)])
        step(tokens)
        for position in range(len(prompts[0]), len(prompts[0]) + length - 1):
            tokens = read(context, [(token, position, sequence, True) for sequence, token in enumerate(tokens)])
            step(tokens)

    generate.log = quiet  # which has to stay as long as llama.cpp may call it
    return generate


# ---- Tokenizers: functions that read a vocabulary's folder and return one that encodes text


def tokenize_npgpt2(folder):
    from npgpt2 import Tokenizer

    return Tokenizer.load(folder).encode


def tokenize_tiktoken(folder):
    """Its merges are numbered by the tokens that they make, as those of GPT-2 are."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from npgpt2 import Tokenizer

    ours = Tokenizer.load(folder)
    ranks = {ours.decode_bytes([token]): token for token in range(len(ours)) if token != ours.end_of_text}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


def tokenize_tokenizers(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda text: tokenizer.encode(text).ids


TOKENIZERS = {"npgpt2": tokenize_npgpt2, "tiktoken": tokenize_tiktoken, "tokenizers": tokenize_tokenizers}


def tokenize(tokenizer, folder, text):
    encode, text = TOKENIZERS[tokenizer](Path(folder)), Path(text).read_text(encoding="utf-8")
    clock = [time.perf_counter()]
    for _ in range(2):
        tokens = encode(text)
        clock.append(time.perf_counter())
    seconds = [end - start for start, end in pairwise(clock)]
    print(json.dumps({"seconds": seconds, "tokens": len(tokens), "checksum": zlib.crc32(str(tokens).encode())}))


# ---- All engines

# For each: the function that opens it, the one that writes its files, and the packages that it takes.
ENGINES = {
    "limit": (open_limit, None, []),
    "npgpt2": (open_npgpt2, None, []),
    "CTranslate2": (open_ctranslate2, write_ctranslate2, ["ctranslate2", "transformers", "torch", "safetensors"]),
    "llama.cpp": (open_llama, write_llama, ["llama_cpp", "gguf"]),
    "transformers": (open_transformers, write_transformers, ["transformers", "torch", "safetensors"]),
}


def missing_packages(engine):
    return [package for package in ENGINES[engine][2] if find_spec(package) is None]


def measure(generate, n_vocab, sequences, context, length, times):
    """Seconds of each step after the prompts, or, where `length` is 1, of reading them; and the tokens.

    times: how often prompts are read after a first time that doesn't count."""
    prompts = [Random(number).choices(range(n_vocab), k=context) for number in range(sequences)]
    runs = [take_time(generate, prompts, length) for _ in range(1 + times if length == 1 else 1)]
    seconds = [steps[-1] for steps, _ in runs[1:]] if length == 1 else runs[0][0][1:]
    return {"seconds": seconds, "tokens": runs[0][1]}


def take_time(generate, prompts, length):
    clock, tokens = [time.perf_counter()], []

    def step(new):
        clock.append(time.perf_counter())
        tokens.append(new)

    generate(prompts, length, step)
    return [end - start for start, end in pairwise(clock)], tokens


def main(action, engine, dtype, folder, threads, length=1):
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    opens, writes, _ = ENGINES[engine]
    folder, threads = Path(folder), int(threads)
    if action == "write":
        return writes(folder, dtype)
    generate = opens(folder, dtype, threads)
    if action == "once":
        return generate([PROMPT], int(length), lambda tokens: None)
    n_vocab = json.loads((folder / "hparams.json").read_text())["n_vocab"]
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(generate, n_vocab, **json.loads(line))), flush=True)


if __name__ == "__main__":
    tokenize(*sys.argv[2:]) if sys.argv[1] == "tokenize" else main(*sys.argv[1:])
