"""What the comparisons with other libraries share, beside the fixtures of all tests.

`make oracles` runs this folder in an environment of its own. Nothing here needs the network.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import zipfile

import pytest

from npgpt2.models import BUNDLED_FILE


@pytest.fixture(scope="session", params=["tiny", "storyteller", "gpt2-vocab"])
def vocabulary(request, tmp_path_factory):
    """A folder with `encoder.json` and `vocab.bpe`: a fixture's, the bundled model's, and GPT-2's where they are."""
    if request.param == "storyteller":
        folder = tmp_path_factory.mktemp("storyteller")
        with zipfile.ZipFile(BUNDLED_FILE) as model:
            model.extract("encoder.json", folder)
            model.extract("vocab.bpe", folder)
        return folder
    return request.getfixturevalue("fixtures" if request.param == "tiny" else "shared") / request.param
