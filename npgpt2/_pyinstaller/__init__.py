"""What PyInstaller asks for when a program uses npgpt2: where its hook is. Nothing else imports this."""

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """The folders with hooks, which the entry point `pyinstaller40` leads to."""
    return [str(Path(__file__).parent)]
