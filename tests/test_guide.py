"""What the reading guide npgpt2/README.md says is true: its examples, its shapes, its links, and OpenAI's names."""

import ast
import doctest
import inspect
import re

import pytest

import npgpt2
from npgpt2 import HParams, formulas, model

# What OpenAI's code defines, file by file.
OPENAI = {
    "model.py": "default_hparams shape_list softmax gelu norm split_states merge_states conv1d attention_mask attn"
    " split_heads merge_heads mask_attn_weights multihead_attn mlp block past_shape expand_tile positions_for model",
    "sample.py": "top_k_logits top_p_logits sample_sequence",
    "encoder.py": "bytes_to_unicode get_pairs Encoder Encoder.bpe Encoder.encode Encoder.decode get_encoder",
}
LARGE = HParams(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)


@pytest.fixture(scope="module")
def path(fixtures):
    return fixtures.parent.parent / "npgpt2" / "README.md"


@pytest.fixture(scope="module")
def guide(path):
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def prose(guide):
    return re.sub(r"^```.*?^```$", "", guide, flags=re.DOTALL | re.MULTILINE)


def defined(source):
    """The names that a module defines at its top, and those of its classes' methods, as `Class.method`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_every_example_runs_and_prints_what_is_shown(path, guide):
    """In the order of the guide, and with nothing but what it has imported itself."""
    text = re.sub(r"^```.*$", "", guide, flags=re.MULTILINE)  # a fence below an output isn't part of it
    examples = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    assert len(examples.examples) > 100
    printed = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=printed.append)
    assert result.failed == 0, "".join(printed)


def test_every_block_of_python_is_an_example(guide):
    """What isn't marked as such is formulas, in which nothing looks like Python that should have run."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    assert sum(kind == "pycon" for kind, _ in blocks) >= 15
    for kind, block in blocks:
        assert kind in ("", "pycon")
        assert (kind == "pycon") == (">>>" in block), block


def test_every_link_leads_to_a_file_and_to_the_function_that_it_names(path, prose):
    headings = {
        re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    }
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", prose)
    assert len(links) > 40
    for text, target in links:
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://github.com/openai/gpt-2/"):
            file = path.parent / target
            assert file.is_file(), target
            if name := re.fullmatch(r"`([\w.]+)`", text):
                assert name[1] in defined(file.read_text("utf-8")), f"{name[1]} isn't in {target}"


@pytest.mark.parametrize("module", [model, formulas], ids=["model", "formulas"])
def test_every_function_and_class_of_the_forward_pass_is_linked(module, prose):
    nodes = ast.parse(inspect.getsource(module)).body
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) >= 5
    file = f"{module.__name__.removeprefix('npgpt2.')}.py"
    assert [name for name in names if f"[`{name}`]({file})" not in prose] == []


def test_no_machine_is_met_before_what_it_costs(guide):
    """The first eleven steps are about the model and the loop; which kernels there are, and threads, is the twelfth."""
    before, after = guide.split("\n## 12. ")
    learned = before.split("\n## 2. ")[1]
    for word in ("kernels/", "from npgpt2 import kernels", "BLAS", "threads", "int8"):
        assert word not in learned
        assert word.removesuffix("/") in after


def test_every_step_says_where_openai_does_the_same(prose):
    steps = re.findall(r"^## \d+\. (?:.(?!^## ))*", prose, re.DOTALL | re.MULTILINE)
    assert len(steps) == 12
    for step in steps:
        title = step.split("\n")[0]
        assert "](" in step, title
        if "All of it" not in title and "What it costs" not in title:
            _, said = step.split("**OpenAI:**")
            for sentence in re.findall(r"[^;]*? in `src/\w+\.py`", said.split("\n\n")[0], re.DOTALL):
                file = re.search(r"`src/(\w+\.py)`", sentence)[1]
                names = set(re.findall(r"`([\w.]+)`", sentence)) - {"past", "present"}
                assert names <= set(OPENAI[file].split()), title


def test_shapes_are_those_of_the_two_models(guide):
    rows = re.findall(r"^\| .+ \| (\(.+\)) \| (\(.+\)) \| (\(.+\)) \|$", guide, re.MULTILINE)
    assert len(rows) >= 20
    for shape, *shown in rows:
        for hparams, sizes in zip((LARGE, npgpt2.load().hparams), shown, strict=True):
            numbers = {
                "C": hparams.n_embd,
                "H": hparams.n_head,
                "D": hparams.n_embd // hparams.n_head,
                "V": hparams.n_vocab,
                "n_ctx": hparams.n_ctx,
            }
            expected = re.sub(
                r"(\d*)(n_ctx|[CHDV])", lambda size, of=numbers: str(int(size[1] or 1) * of[size[2]]), shape
            )
            assert sizes == expected, shape


def test_letters_have_the_sizes_of_the_two_models(guide):
    small = npgpt2.load().hparams
    for letter, large_size, small_size in (
        ("S", f"up to {LARGE.n_ctx:,}", f"up to {small.n_ctx:,}"),
        ("C", LARGE.n_embd, small.n_embd),
        ("H", LARGE.n_head, small.n_head),
        ("D", LARGE.n_embd // LARGE.n_head, small.n_embd // small.n_head),
        ("V", f"{LARGE.n_vocab:,}", f"{small.n_vocab:,}"),
    ):
        assert re.search(rf"^\| {letter} \| .* \| {large_size} \| {small_size} \|$", guide, re.MULTILINE)
