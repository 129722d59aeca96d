# Two commands on a fresh machine (Linux or macOS, Python >= 3.10, pip):
#   make demo   set up, train a net on a sample of MNIST, evaluate it and the one that ships
#   make test   set up, check style and types, pass the quick tests
# And, for who works on it:
#   make page          the demo page, on http://127.0.0.1:7860
#   make benchmark     measure against the paper's algorithm and torchdeq, half an hour in which nothing else may run
#   make gpu           the tests that a device matters to, an epoch, and the benchmark on a GPU
#   make test-oldest   the quick tests with the oldest versions that pyproject.toml takes (Python 3.10 or 3.11)

PYTHON ?= python3
BIN := .venv/bin
DEMO := --model pcdeq1_l_tanh_mnist --data sample

.PHONY: setup demo page test test-page test-oldest benchmark gpu

setup: .venv/.installed

# The versions of PyTorch that the figures were measured with; pyproject.toml takes others.
.venv/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python >= 3.10 is needed, got ' + sys.version)"
	$(PYTHON) -m venv --clear .venv
	@echo "Installing PyTorch and the rest into .venv: some 6 GB on disk, the CUDA libraries among them; minutes of download."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: setup
	rm -rf runs/demo
	$(BIN)/python recipes/train.py $(DEMO) --epochs 6 --output runs/demo
	@echo "The same file, loaded by timm.create_model:"
	$(BIN)/python recipes/evaluate.py $(DEMO) --checkpoint runs/demo/model.safetensors
	@echo "The checkpoint that ships (60,000 images, 16 epochs) on the same 400 test images:"
	$(BIN)/python recipes/evaluate.py $(DEMO)

page: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	$(BIN)/python demo/app.py

test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile  # two thirds of the time of one with two threads

# In a headless Chromium: /usr/bin/chromium and /usr/bin/chromedriver, Debian's packages chromium and chromium-driver.
test-page: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]' 'selenium>=4.51'
	$(BIN)/python -m pytest -m '' tests/test_demo.py

test-oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c tests/oldest.txt -e '.[test]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile

gpu: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[benchmark]'
	$(BIN)/python -m benchmarks.gpu

benchmark: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[benchmark]'
	$(BIN)/python -m benchmarks.run
