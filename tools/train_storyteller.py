"""Train the bundled model: a small GPT-2 that has read 42 books of stories.

    python tools/train_storyteller.py CORPUS [OUTPUT] [--steps N]

Run it where npgpt2 is installed with the extras `[train]` (PyTorch, tokenizers, safetensors), on a Unix with two cores
or more and a C++ compiler. CORPUS is a folder with `train.txt.xz` and `val.txt.xz`, documents separated by
<|endoftext|>. It learns a byte-level BPE vocabulary, trains the model, scores it on the held-out documents and leaves
in OUTPUT:

    encoder.json, vocab.bpe    the vocabulary, as OpenAI stores GPT-2's
    checkpoint.pt              where training stands; the same command goes on from it after an interruption
    log.csv                    the loss curve
    storyteller/               the model as Hugging Face's transformers saves it
    storyteller.npz            the same for npgpt2, in float16: what npgpt2/models/ holds

The seed is fixed, so that the same number of steps gives the same model, up to the rounding of the machine.
"""

import argparse
import csv
import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from evaluate_storyteller import END, read_documents
from safetensors.torch import save_file
from torch import nn

from npgpt2 import load
from npgpt2.convert import convert

SEED = 1
N_VOCAB, N_CTX, N_EMBD, N_HEAD, N_LAYER = 4096, 512, 256, 4, 6
BATCH = 16  # windows of N_CTX tokens
RATE, WARM_UP = 3e-3, 100  # the highest learning rate, and the steps it takes to get there; then linearly to zero
DECAY, DROPOUT = 0.1, 0.1
CHECKPOINT_EVERY, SCORE_EVERY, LOG_EVERY = 180, 240, 25  # seconds, seconds, steps


# The text -------------------------------------------------------------------------------------------------------------


def train_vocabulary(documents):
    """A byte-level BPE in GPT-2's order: the 256 bytes, then the merges as learned, then <|endoftext|>."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=N_VOCAB - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    encoder = dict(sorted(learned["vocab"].items(), key=lambda item: item[1])) | {END: N_VOCAB - 1}
    assert list(encoder.values()) == list(range(N_VOCAB))
    return tokenizer, encoder, [" ".join(pair) for pair in learned["merges"]]


def write_vocabulary(folder, encoder, merges, names):
    (folder / names[0]).write_text(json.dumps(encoder), encoding="utf-8")
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def encode(tokenizer, documents):
    """One array of tokens per document, each opened by <|endoftext|>."""
    return [np.array([N_VOCAB - 1, *encoding.ids]) for encoding in tokenizer.encode_batch(documents)]


def find_tales(documents):
    """Documents that open as folk tales do: they are simple, and what "Once upon a time" asks for."""
    tale = re.compile(r".{0,60}\b(once|there (was|were|lived))\b", re.DOTALL | re.IGNORECASE)
    return [text for text in documents if tale.match(text)]


def epoch_of_windows(documents, epoch):
    """Every token once as a target: documents in random order, cut from a random place on. -> (N, N_CTX + 1)"""
    rng = np.random.default_rng([SEED, epoch])
    stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
    stream = np.roll(stream, rng.integers(len(stream)))
    starts = rng.permutation((len(stream) - 1) // N_CTX) * N_CTX
    return stream[starts[:, None] + np.arange(N_CTX + 1)]


# The model, under the names that transformers gives its parts ---------------------------------------------------------


class Dropout(nn.Module):
    """Drop the same channels at every position of a window: Gal and Ghahramani 2016, "A Theoretically Grounded
    Application of Dropout in Recurrent Neural Networks". Drawing each position's own took a quarter of a step's time.
    """

    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        if not self.training or not self.probability:
            return x
        kept = torch.rand(len(x), 1, N_EMBD) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(N_EMBD, 3 * N_EMBD)
        self.c_proj = nn.Linear(N_EMBD, N_EMBD)

    def forward(self, x):
        B, T, C = x.shape
        D = C // N_HEAD
        q, k, v = self.c_attn(x).view(B, T, 3, N_HEAD, D).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        # A quarter of the queries at a time, each against only the keys that some of it sees: compiled, this took 19 ms
        # forward and backward on two cores where scaled_dot_product_attention took 41.
        mixed, step = [], T // 4
        for start in range(0, T, step):
            stop = start + step
            scores = (q[:, :, start:stop] @ k[:, :, :stop].mT).float() / math.sqrt(D)  # (B, H, T/4, S)
            hidden = torch.ones(step, stop, dtype=torch.bool).triu(start + 1)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
            mixed.append(weights @ v[:, :, :stop])
        return self.c_proj(torch.cat(mixed, 2).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(N_EMBD, 4 * N_EMBD)
        self.c_proj = nn.Linear(4 * N_EMBD, N_EMBD)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(N_EMBD), Attention()
        self.ln_2, self.mlp = nn.LayerNorm(N_EMBD), MLP()
        self.dropout = Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(N_VOCAB, N_EMBD), nn.Embedding(N_CTX, N_EMBD)
        self.h = nn.ModuleList(Block(dropout) for _ in range(N_LAYER))
        self.ln_f = nn.LayerNorm(N_EMBD)
        self.dropout = Dropout(dropout)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * N_LAYER) if "c_proj" in name else 0.01 if "wpe" in name else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens, targets):
        """The surprise at each target, in nats: (B, T)."""
        x = self.dropout(self.wte(tokens) + self.wpe.weight)
        for block in self.h:
            x = block(x)
        logits = self.ln_f(x) @ self.wte.weight.T  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


def losses(model, batch):
    """batch: (B, N_CTX + 1) -> (B, N_CTX), in bfloat16 where that does little harm."""
    batch = torch.as_tensor(batch)
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())


def bits_per_character(model, tokenised, n_characters):
    """What `npgpt2.GPT2.score` measures, each document on its own, in batches and a little less exactly.

    Every token is predicted from the N_CTX / 2 before it at least, or all of its document so far.
    """
    windows, wanted = [], []
    for tokens in tokenised:
        for start in range(0, max(1, len(tokens) - 1 - N_CTX // 2), N_CTX // 2):
            window = tokens[start : start + N_CTX + 1]
            new = np.arange(N_CTX) >= (N_CTX // 2 if start else 0)
            windows.append(np.pad(window, (0, N_CTX + 1 - len(window))))
            wanted.append(new & (np.arange(N_CTX) < len(window) - 1))
    nats = 0.0
    model.eval()
    with torch.no_grad():
        for i in range(0, len(windows), BATCH):
            said = losses(model, np.stack(windows[i : i + BATCH])).numpy()
            nats += said[np.stack(wanted[i : i + BATCH])].sum(dtype=np.float64)
    model.train()
    return float(nats / math.log(2) / n_characters)


# Training -------------------------------------------------------------------------------------------------------------


def orthogonalise(x):
    """x: (N, rows, columns), rows <= columns -> each with its singular values brought to about 1 (Newton-Schulz)."""
    x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised, for the matrices of the layers. K. Jordan et al. 2024, "Muon".

    The updates are scaled to the size of AdamW's, so that the two share a learning rate and a weight decay: Liu et al.
    2025, "Muon is Scalable for LLM Training". c_attn counts as three matrices.
    """

    def __init__(self, parameters, momentum=0.95):
        super().__init__(parameters, {"lr": RATE, "momentum": momentum, "weight_decay": DECAY})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            squares, wides = [], []  # views of the weights, and their updates to be
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                if weight.shape[0] == 4 * N_EMBD:
                    wides.append((weight.mT, update.mT))
                elif weight.shape[1] == 4 * N_EMBD:
                    wides.append((weight, update))
                else:
                    squares += zip(weight.split(N_EMBD), update.split(N_EMBD), strict=True)
            for pairs in (squares, wides):
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                scale = 0.2 * math.sqrt(updates.shape[2])
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.sub_(update, alpha=group["lr"] * scale)


def make_optimizers(model):
    matrices = [parameter for parameter in model.h.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    others = [
        {"params": [model.wte.weight], "weight_decay": DECAY},
        {"params": [model.wpe.weight, *vectors], "weight_decay": 0.0},
    ]
    return [Muon(matrices), torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), fused=True)]


def write_checkpoint(path, model, optimizers, state):
    state = state | {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


def write_log(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "seconds", "rate", "training loss", "bits per character on a part of val"])
        writer.writerows(rows)


def train(model, documents, score, folder, steps):
    """Train for so many steps, from the checkpoint where there is one. Returns the state at the end."""
    path = folder / "checkpoint.pt"
    optimizers = make_optimizers(model)
    state = {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0, "log": []}
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        print(f"going on from step {state['step']}", flush=True)
    torch.manual_seed(SEED + state["step"])
    compiled = torch.compile(model)
    epoch = epoch_of_windows(documents, state["epoch"])
    began = time.monotonic() - state["seconds"]
    checkpointed = scored = state["seconds"]
    recent = []
    while state["step"] < steps:
        batch = epoch[state["batch"] * BATCH :][:BATCH]
        if len(batch) < BATCH:  # what is left of an epoch is dropped
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
            epoch = epoch_of_windows(documents, state["epoch"])
            continue
        rate = RATE * min((state["step"] + 1) / WARM_UP, 1 - state["step"] / steps)
        loss = losses(compiled, batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        state["step"] += 1
        state["batch"] += 1
        state["seconds"] = seconds = time.monotonic() - began
        if state["step"] % LOG_EVERY == 0:
            bits = ""
            if seconds - scored > SCORE_EVERY:
                bits, scored = round(score(), 4), seconds
            tokens = state["step"] * BATCH * N_CTX
            row = [state["step"], tokens, round(seconds), round(rate, 6), round(float(np.mean(recent)), 4), bits]
            state["log"].append(row)
            print(*row, f"{tokens / seconds:.0f} tokens/s", flush=True)
            write_log(folder / "log.csv", state["log"])
            recent = []
            if seconds - checkpointed > CHECKPOINT_EVERY:
                write_checkpoint(path, model, optimizers, state)
                checkpointed = seconds
    write_checkpoint(path, model, optimizers, state)
    return state


def export(folder, model, encoder, merges):
    """Write the model as transformers saves it. Its linear layers hold their weights as (in, out)."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, value in model.state_dict().items():
        linear = ".c_" in name and name.endswith("weight")
        tensors[f"transformer.{name}"] = (value.T if linear else value).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shape = {"n_positions": N_CTX, "n_ctx": N_CTX, "n_embd": N_EMBD, "n_head": N_HEAD, "n_layer": N_LAYER}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": N_VOCAB, **shape}
    config |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    config |= {"bos_token_id": N_VOCAB - 1, "eos_token_id": N_VOCAB - 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_vocabulary(folder, encoder, merges, ["vocab.json", "merges.txt"])


def main():
    parser = argparse.ArgumentParser(description="Train the bundled model, storyteller.")
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("output", nargs="?", type=Path, default=Path("storyteller"), metavar="OUTPUT")
    parser.add_argument("--steps", type=int, default=5000, help="how many steps to train (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch's threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.output.mkdir(parents=True, exist_ok=True)

    training, held_out = (read_documents(args.corpus / f"{name}.txt.xz") for name in ["train", "val"])
    tokenizer, encoder, merges = train_vocabulary(training)
    write_vocabulary(args.output, encoder, merges, ["encoder.json", "vocab.bpe"])
    # Tales come twice in each epoch.
    documents, tokenised = encode(tokenizer, training + find_tales(training)), encode(tokenizer, held_out)
    model = GPT2(DROPOUT)
    n_tokens, n_parameters = sum(map(len, documents)), sum(map(torch.numel, model.parameters()))
    print(f"{n_tokens:,} tokens in an epoch, {n_parameters:,} parameters", flush=True)

    characters = [len(text) for text in held_out]

    def score_a_part():
        return bits_per_character(model, tokenised[::4], sum(characters[::4]))

    state = train(model, documents, score_a_part, args.output, args.steps)
    tokens, minutes = state["step"] * BATCH * N_CTX, state["seconds"] / 60
    print(f"{state['step']:,} steps, {tokens:,} tokens, {tokens / n_tokens:.1f} epochs, {minutes:.1f} minutes")
    export(args.output / "storyteller", model, encoder, merges)
    model_file = convert(args.output / "storyteller", args.output / "storyteller.npz", dtype="float16").path
    print(model_file)
    trained = load(model_file)
    bits = sum(trained.score(text).bits for text in held_out)
    print(f"validation: {bits / sum(characters):.4f} bits per character")


if __name__ == "__main__":
    main()
