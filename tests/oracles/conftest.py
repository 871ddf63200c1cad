"""What the comparisons with other libraries share, beside the fixtures of all tests.

`make oracles` runs this folder in an environment of its own. Nothing here needs the network.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import pytest


@pytest.fixture(scope="session", params=["tiny", "gpt2-vocab"])
def vocabulary(request):
    """A folder with `encoder.json` and `vocab.bpe`: the fixture's 520 entries, and GPT-2's 50,257 where they are."""
    return request.getfixturevalue("fixtures" if request.param == "tiny" else "shared") / request.param
