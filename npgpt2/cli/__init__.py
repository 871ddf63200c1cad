"""The command line: arguments in, text out. There is no arithmetic here; what the commands do is in the other folders.

`main` runs a command. The commands are in families, one to a module, each with its options beside what it does.
"""

from npgpt2.cli.commands import main

__all__ = ["main"]
