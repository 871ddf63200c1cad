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
# `npgpt2 batch --dask` leads to these where they are installed. They start other Pythons, as a program by itself can't;
# one that imports them has them all the same. What `npgpt2 serve` takes is small, and comes along.
excludedimports = ["dask", "distributed"]
