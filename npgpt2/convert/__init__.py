"""What is done once for a model, so that it can be run later: others' models become model files.

TensorFlow's and PyTorch's checkpoints and Hugging Face's folders are read without the libraries that wrote them,
OpenAI's are fetched over HTTP, and texts become the training sets that others' code reads. Nothing here computes with a
model, and nothing that runs one imports this.
"""

from npgpt2.convert.conversion import Converted, convert
from npgpt2.convert.dataset import write_dataset
from npgpt2.convert.download import BASE_URL, fetch_checkpoint, remove_checkpoint

__all__ = ["BASE_URL", "Converted", "convert", "fetch_checkpoint", "remove_checkpoint", "write_dataset"]
