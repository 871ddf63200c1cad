"""What other programs find where npgpt2 is installed beside them, to which the entry points in setup.cfg lead them.

Nothing of npgpt2's imports this.
"""

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """The folders with hooks, which the entry point `pyinstaller40` leads to: PyInstaller's."""
    return [str(Path(__file__).parent)]
