# Each target sets up what it needs in a virtual environment of its own, once.
PYTHON ?= python3
NUMPY ?= numpy
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint pythons oracles bench clean

# A story by the bundled model.
demo: $(VENV)/ready
	@$(BIN)/python tools/demo.py

test: $(VENV)/test-ready
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report

lint: $(VENV)/lint-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy npgpt2
	$(BIN)/lint-imports --no-logo

# The same on the other Pythons that this machine has, and with the oldest NumPy on the oldest of them.
pythons: python-3.10 python-3.11 python-3.12 python-3.13

python-%: .venv-ci/ci-ready
	.venv-ci/bin/nox --noxfile tools/noxfile.py --python $*

# Compare with TensorFlow, PyTorch and the other tokenizers, which take 3 GB of disk; and look at `npgpt2 inspect`'s pages
# in a browser, where chromium and chromedriver are installed.
oracles: .venv-oracles/oracles-ready
	.venv-oracles/bin/python -m pytest --override-ini addopts=-ra --override-ini filterwarnings= tests/oracles

# Speed and memory with a model of 124M's size, beside other engines and what the machine can do at best, in a quarter of
# an hour. Wants an idle machine. llama.cpp is compiled for this processor, which takes longer than that, once; and once
# more without AVX-512 for `make bench ISA=avx2`, which shows how all engines do on processors that have AVX2 alone.
ISA ?= native
bench: .venv-bench/bench-ready .venv-bench/llama-$(ISA)-tried
	.venv-bench/bin/python tools/benchmark.py --isa $(ISA)

# pip keeps what it has compiled, whatever it was compiled for: hence without its cache.
LLAMA = -m pip install --quiet --disable-pip-version-check --no-cache-dir llama-cpp-python
LLAMA_FAILED = echo "llama.cpp can't be compiled here, and is left out"

.venv-bench/llama-native-tried: .venv-bench/bench-ready
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON" $(@D)/bin/python $(LLAMA) || $(LLAMA_FAILED)
	touch $@

.venv-bench/llama-avx2-tried: .venv-bench/llama-native-tried
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_AVX512=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" \
		$(@D)/bin/python $(LLAMA) --no-deps --target $(@D)/llama-avx2 || $(LLAMA_FAILED)
	touch $@

%/ready: setup.cfg
	@echo "Setting npgpt2 up in $* …"
	@$(PYTHON) -m venv $*
	@$*/bin/python -m pip install --quiet --disable-pip-version-check --editable . '$(NUMPY)'
	@touch $@

%-ready: setup.cfg
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(notdir $*)]' '$(NUMPY)'
	touch $@

clean:
	rm -rf .venv* .nox .coverage .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist npgpt2.egg-info
