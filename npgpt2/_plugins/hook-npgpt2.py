"""What PyInstaller puts into a program beside the modules that it finds by itself."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

# The bundled model and all else that isn't code: where it is, and in which folder the program has it.
datas = [
    (str(path), path.parent.relative_to(_PACKAGE.parent).as_posix())
    for path in sorted(_PACKAGE.rglob("*"))
    if path.is_file() and path.suffix not in (".py", ".pyc")
]
# What `import npgpt2` leads to once one of its names is used.
hiddenimports = ["npgpt2.gpt2"]
# Their sources too, which `npgpt2 inspect` shows.
module_collection_mode = {"npgpt2.formulas": "pyz+py", "npgpt2.model": "pyz+py"}
