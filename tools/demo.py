"""Print a story by the bundled model as it is generated, how fast that went, and what to try next: `make demo`."""

import os
import sys
import time

import npgpt2

PROMPT = '"Good morning," said Dorothy.'


def main() -> None:
    model = npgpt2.load()
    began = time.perf_counter()
    print(PROMPT, end="", flush=True)
    story = ""
    for piece in model.stream(PROMPT, length=200, temperature=0.8, top_k=40, seed=2):
        print(piece, end="", flush=True)
        story += piece
    seconds = time.perf_counter() - began
    tokens = len(model.tokenizer.encode(story))
    print(f"\n\n({tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s, on this machine's CPU alone)\n")
    print("To go on:")
    for command, what in {
        f"source {os.path.relpath(sys.prefix)}/bin/activate": "brings the command npgpt2 into this terminal",
        "npgpt2 interactive": "continues what you write",
        "npgpt2 download 124M": "fetches OpenAI's smallest GPT-2, once: 498 MB",
        "npgpt2 interactive -m 124M": "asks that instead",
        "npgpt2 serve --open": "opens a page to write on; takes waitress: pip install waitress",
    }.items():
        print(f"    {command:<29} {what}")


if __name__ == "__main__":
    main()
