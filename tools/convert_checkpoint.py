"""Convert a checkpoint or a Hugging Face folder: the command `npgpt2 convert`, without installing npgpt2."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from npgpt2.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
