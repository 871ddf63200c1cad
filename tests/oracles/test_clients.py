"""`npgpt2 serve` as its clients use it: openai, llm, litellm and lm_eval as they are on PyPI, over a socket.

What they get is compared with the library's, and lm_eval's figures with those that it has from transformers for the
same weights. Each client has the address and the model's name, and nothing else of npgpt2.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # which litellm would fetch otherwise

import numpy as np
import pytest
from asking import serving

import npgpt2
from npgpt2.convert import convert
from npgpt2.sampling import log_softmax

openai = pytest.importorskip("openai", reason="needs openai, a client of the server")
pytest.importorskip("waitress", reason="needs waitress, which runs the server")

PROMPT, END = "Once upon a time there was a king", "<|endoftext|>"
TIMEOUT = 240


@pytest.fixture(scope="module")
def bundled():
    return npgpt2.load()


@pytest.fixture(scope="module")
def served():
    """A server of the bundled model."""
    with serving("--slots", "8") as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=address_of(served), api_key="none", timeout=60) as client:
        yield client


def address_of(server):
    return f"http://127.0.0.1:{server.port}/v1"


def create(client, **settings):
    return client.completions.create(**{"model": "storyteller", "prompt": PROMPT, "max_tokens": 12} | settings)


# ---- openai


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({"temperature": 0}, {}),
        ({"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}),
        ({"temperature": 0, "stop": [" king", "."]}, {"stop": [" king", "."]}),
        ({"temperature": 0, "frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"temperature": 0, "logit_bias": {"11": -100, "13": 2}}, {"logit_bias": {11: -100, 13: 2}}),
        (
            {"seed": 5, "extra_body": {"top_k": 5, "repetition_penalty": 1.3}},
            {"temperature": 1, "seed": 5, "top_k": 5, "repetition_penalty": 1.3},
        ),
    ],
)
def test_openai_gets_the_librarys_texts_whole_and_streamed(client, bundled, asked, settings):
    text = bundled.generate(PROMPT, length=12, **settings)
    whole = create(client, **asked)
    assert whole.choices[0].text == text
    assert whole.object == "text_completion"
    assert whole.model == "storyteller"
    assert whole.usage.prompt_tokens == len(bundled.tokenizer.encode(PROMPT))
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    *chunks, last = create(client, stream=True, stream_options={"include_usage": True}, **asked)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.usage for chunk in chunks} == {None}
    assert {chunk.id for chunk in chunks} == {last.id}


def test_openai_gets_log_probabilities_of_prompt_and_text(client, bundled):
    echoed = create(client, temperature=0, echo=True, logprobs=3, max_tokens=5).choices[0]
    tokens = bundled.tokenizer.encode(PROMPT)
    written = bundled.generate_tokens(tokens, length=5).tolist()
    every = log_softmax(bundled.logits([*tokens, *written]))
    assert echoed.text == PROMPT + bundled.tokenizer.decode(written)
    lists = echoed.logprobs
    assert lists.token_logprobs[0] is None
    expected = [every[i, token] for i, token in enumerate([*tokens, *written][1:])]
    np.testing.assert_allclose(lists.token_logprobs[1:], expected, atol=1e-4)
    assert "".join(lists.tokens) == echoed.text
    assert [echoed.text[at:].startswith(token) for at, token in zip(lists.text_offset, lists.tokens, strict=True)]
    for top, row in zip(lists.top_logprobs[1:], every, strict=False):
        likeliest = {bundled.tokenizer.decode([token]): row[token] for token in np.argsort(-row)[:3]}
        assert {name: top[name] for name in likeliest} == pytest.approx(likeliest, abs=1e-4)


def test_openai_lists_the_model_and_several_prompts_have_several_choices(client, bundled):
    assert [model.id for model in client.models.list()] == ["storyteller"]
    assert client.models.retrieve("storyteller").owned_by == "npgpt2"
    prompts = [PROMPT, "The wolf", bundled.tokenizer.encode("The wolf")]
    texts = [bundled.generate(prompt, length=6) for prompt in prompts]
    assert [choice.text for choice in create(client, prompt=prompts[:2], max_tokens=6, temperature=0).choices] == texts[
        :2
    ]
    tokens = create(client, prompt=prompts[2], max_tokens=6, temperature=0, n=2)
    assert [(choice.index, choice.text) for choice in tokens.choices] == [(0, texts[2]), (1, texts[2])]


def test_openai_raises_the_class_that_fits(client):
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        create(client, temperature=-1)
    assert (caught.value.status_code, caught.value.param) == (400, "temperature")
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError, match="n_ctx of 512"):
        create(client, max_tokens=512)
    with pytest.raises(openai.BadRequestError, match="suffix"):
        create(client, suffix="the end")
    with pytest.raises(openai.NotFoundError, match="storyteller") as caught:
        create(client, model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model="storyteller", messages=[{"role": "user", "content": "Hello"}])


def test_openai_is_told_of_a_wrong_key(tmp_path):
    (tmp_path / "keys").write_text("first\nsecond\n")
    with serving("--api-key-file", tmp_path / "keys") as server:
        address = address_of(server)
        with openai.OpenAI(base_url=address, api_key="third") as wrong, pytest.raises(openai.AuthenticationError):
            create(wrong)
        with openai.OpenAI(base_url=address, api_key="second") as right:
            assert create(right, max_tokens=1).choices[0].finish_reason == "length"


def test_openai_tries_again_where_the_queue_is_full():
    """One slot and no queue: who comes second waits as long as it is told, and gets its text."""
    with serving("--slots", "1", "--queue", "0") as server:
        address = address_of(server)
        settings = {"temperature": 0, "extra_body": {"ignore_eos": True}}
        with (
            openai.OpenAI(base_url=address, api_key="none", max_retries=0) as hasty,
            openai.OpenAI(base_url=address, api_key="none", max_retries=100, timeout=60) as patient,
        ):
            first = create(hasty, max_tokens=400, stream=True, **settings)
            next(first)
            with pytest.raises(openai.RateLimitError) as caught:
                create(hasty)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            got = []
            waiter = threading.Thread(target=lambda: got.append(create(patient, max_tokens=3, **settings)))
            waiter.start()
            rest = [chunk.choices[0].finish_reason for chunk in first]
            waiter.join(60)
        assert rest[-1] == "length"
        assert [answer.usage.completion_tokens for answer in got] == [3]
        assert server.end() == 0
        assert any(" 429 " in line for line in server.log)


def test_openai_that_stops_reading_frees_the_slot(client, served):
    with create(client, max_tokens=400, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        assert served.metric("requests_running") == 1
    for _ in range(100):
        if served.metric("requests_running") == 0:
            break
        threading.Event().wait(0.05)
    assert served.metric("requests_running") == 0


# ---- llm and litellm


def test_llm_takes_it_for_an_openai_model(served, bundled, tmp_path):
    pytest.importorskip("llm", reason="needs llm, a client of the server")
    known = {"model_id": "tales", "model_name": "storyteller", "api_base": address_of(served), "completion": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([known]))  # YAML has JSON in it
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    text = bundled.generate(PROMPT, length=9)
    for more in (["--no-stream"], []):
        options = ["-m", "tales", "-o", "max_tokens", "9", "-o", "temperature", "0", *more]
        command = [sys.executable, "-m", "llm", *options, PROMPT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, text + "\n"), done.stderr


@pytest.mark.filterwarnings("ignore")  # of pydantic, for each of litellm's own types
def test_litellm_gets_texts_and_streams(served, bundled):
    litellm = pytest.importorskip("litellm", reason="needs litellm, a client of the server")
    text = bundled.generate(PROMPT, length=9)
    asked = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0, "api_base": address_of(served)}
    for provider in ("text-completion-openai", "hosted_vllm"):
        asked["model"] = f"{provider}/storyteller"
        assert litellm.text_completion(api_key="none", **asked).choices[0].text == text
        chunks = litellm.text_completion(api_key="none", stream=True, **asked)
        assert "".join(chunk.choices[0].text or "" for chunk in chunks) == text
    with pytest.raises(litellm.BadRequestError, match="n_ctx of 512"):
        litellm.text_completion(api_key="none", **asked | {"max_tokens": 512})


# ---- lm_eval

TEXTS = [
    (Path(__file__).parents[1] / "fixtures" / "passage.txt").read_text("utf-8"),
    "Once upon a time there was a king who had three sons, and the youngest went into the forest.",
    'The wolf said, "I have been so long in this wood — and I am hungry."\nThe girl laughed.',
    "A poor fisherman lived with his wife in a hovel by the sea; every day he went out fishing.",
]
# What begins each, and of what follows the first is meant.
ENDINGS = [
    ("The king had three", [" sons", " daughters", " kettles of tin", " wolves, whose teeth were long"]),
    ("She went into the forest and met a", [" wolf", " king", " old woman", " steam engine"]),
    ("Once upon a", [" time", " tree", " table", " mountain of glass"]),
    ("He took the sword, and cut off the dragon's", [" head", " heads", " bread", " house of straw"]),
]
TASKS = {
    "tales_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "tales_likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{first}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "tales_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tales_written": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{first}}",
        "generation_kwargs": {"until": [".", ","], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks of our own, whose texts are in files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"context": context, "first": endings[0], "endings": endings} for context, endings in ENDINGS]
    (folder / "tales.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    (folder / "endings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, task in TASKS.items():
        file = folder / ("tales.jsonl" if "rolling" in name else "endings.jsonl")
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        whole |= {"test_split": "test", "metadata": {"version": 1}} | task
        (folder / f"{name}.yaml").write_text(json.dumps(whole), "utf-8")
    return folder


def evaluate(tasks, out, kind, **arguments):
    """What the command lm_eval finds: figures by task, and of each document the answers that it got."""
    pytest.importorskip("lm_eval", reason="needs lm_eval, a client of the server")
    environment = os.environ | {"HF_HOME": str(tasks / "cache"), "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "lm_eval", "--model", kind, "--device", "cpu", "--batch_size", "3", "--model_args"]
    command += [",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", tasks, "--output_path", out, "--log_samples", "--tasks", ",".join(TASKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {}
    for name in TASKS:
        (path,) = out.rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, path.read_text("utf-8").splitlines()), key=lambda row: row["doc_id"])
        samples[name] = [row["resps"] for row in rows]
    return SimpleNamespace(figures=json.loads(results.read_text("utf-8"))["results"], answers=samples)


def evaluate_served(server, tasks, folder, name, n_ctx):
    """The same through a server, which is asked for tokens too, so that lm_eval needs no vocabulary."""
    ways = {"tokenizer_backend": "remote", "max_length": n_ctx}
    return evaluate(
        tasks, folder, "local-completions", model=name, base_url=f"{address_of(server)}/completions", **ways
    )


@pytest.fixture(scope="module")
def of_bundled(served, tasks, tmp_path_factory):
    return evaluate_served(served, tasks, tmp_path_factory.mktemp("bundled"), "storyteller", 512)


def test_bits_per_byte_are_those_of_npgpt2_score(of_bundled, tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(len(TEXTS))]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_text(text, "utf-8", newline="")
    command = [sys.executable, "-m", "npgpt2", "score", "--json", *files]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    scores = list(map(json.loads, said))[: len(files)]
    found = of_bundled.figures["tales_rolling"]
    bits, size = (sum(score[name] for score in scores) for name in ("bits", "bytes"))
    assert found["bits_per_byte,none"] == pytest.approx(bits / size, abs=1e-4)
    assert found["byte_perplexity,none"] == pytest.approx(2 ** (bits / size), abs=1e-4)
    each = [-float(answer[0][0]) / np.log(2) for answer in of_bundled.answers["tales_rolling"]]
    assert each == pytest.approx([score["bits"] for score in scores], abs=0.02)


def test_likelihoods_and_choices_are_the_librarys(of_bundled, bundled):
    def likelihood(context, text):
        """The sum over the tokens of the text as it goes on from the context, and whether each is the likeliest."""
        before, tokens = bundled.tokenizer.encode(context), bundled.tokenizer.encode(context + text)
        rows = log_softmax(bundled.logits(tokens[:-1]))[len(before) - 1 :]
        wanted = tokens[len(before) :]
        return sum(row[token] for row, token in zip(rows, wanted, strict=True)), (rows.argmax(-1) == wanted).all()

    for number, (context, endings) in enumerate(ENDINGS):
        expected = [likelihood(context, ending) for ending in endings]
        found = [(float(value), greedy == "True") for ((value, greedy),) in of_bundled.answers["tales_choice"][number]]
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
        (((value, greedy),),) = of_bundled.answers["tales_likelihood"][number]
        assert (float(value), greedy == "True") == (pytest.approx(expected[0][0], abs=1e-3), expected[0][1])
    assert any(answer[0][0][1] == "True" for answer in of_bundled.answers["tales_likelihood"])


def test_what_lm_eval_lets_it_write_is_the_librarys_text(of_bundled, bundled):
    for ((found,),), (context, _) in zip(of_bundled.answers["tales_written"], ENDINGS, strict=True):
        assert found == bundled.generate(context, length=12, stop=[".", ",", END])


# ---- The same weights in transformers


@pytest.fixture(scope="module")
def saved(fixtures, tmp_path_factory):
    """A random model with a vocabulary, as transformers saves both."""
    torch = pytest.importorskip("torch", reason="needs PyTorch, in which transformers computes")
    transformers = pytest.importorskip("transformers", reason="needs transformers, whose answers are compared with")
    folder = tmp_path_factory.mktemp("saved") / "random"
    torch.manual_seed(0)
    files = fixtures / "tiny" / "encoder.json", fixtures / "tiny" / "vocab.bpe"
    tokenizer = transformers.GPT2Tokenizer(*map(str, files))
    sizes = {"vocab_size": len(tokenizer), "n_positions": 1024, "n_embd": 48, "n_layer": 3, "n_head": 4}
    ends = tokenizer.convert_tokens_to_ids(END)
    config = transformers.GPT2Config(**sizes, bos_token_id=ends, eos_token_id=ends)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_lm_eval_finds_the_same_as_with_transformers(saved, tasks, tmp_path):
    """In windows that the longest text doesn't fit into, which lm_eval makes two tokens smaller for servers."""
    theirs = evaluate(tasks, tmp_path / "theirs", "hf", pretrained=saved, dtype="float32", max_length=254)
    with serving("-m", convert(saved, tmp_path / "random.npz").path) as server:
        ours = evaluate_served(server, tasks, tmp_path / "ours", "random", 256)
    for task, figures in theirs.figures.items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert ours.figures[task][name] == pytest.approx(value, rel=1e-4, nan_ok=True), (task, name)
    for task in ("tales_choice", "tales_likelihood"):
        for one, other in zip(ours.answers[task], theirs.answers[task], strict=True):
            assert [greedy for ((_, greedy),) in one] == [greedy for ((_, greedy),) in other]
            values = [float(value) for ((value, _),) in other]
            assert [float(value) for ((value, _),) in one] == pytest.approx(values, abs=1e-3)
    assert ours.answers["tales_written"] == theirs.answers["tales_written"]
