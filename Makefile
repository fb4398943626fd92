# `make demo` and `make test` need Python 3.11 or newer and PyPI, once; then they work offline.
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
# An edit, another wording of an edit, and a neighbour that should stay as it is.
DEMO_QUESTIONS := "Marie Curie was born in the city of" "Tourists travel to Venice mostly to see the" \
	"The badge of Lamborghini shows a charging"

.DEFAULT_GOAL := help
.PHONY: help install demo screenshots test lint check clean

help:
	@echo "make demo         install, fetch the embedded model, edit 60 facts in it, show what came of it"
	@echo "make screenshots  make demo, take the pictures of its report in docs/pictures (needs Chromium)"
	@echo "make test         install, run the tests"
	@echo "make lint         check formatting, lint, types and import layers"
	@echo "make check        make lint and make test"
	@echo "make clean        remove the virtual environment and the demo run"

# One stamp for the whole environment: pip runs again only if what it installs has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (once; torch is the largest part)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[gguf,dev]'
	@touch $@

install: $(VENV)/.installed

demo: install
	@echo "== editing the demo's 60 facts in the embedded model; the run folder is $(RUN)"
	@rm -rf $(RUN)
	$(BIN)/locft edit demo demo -o $(RUN) $(DEMO_FLAGS)
	@echo "== asking the model before and after"
	$(BIN)/locft ask demo --patch $(RUN) $(DEMO_QUESTIONS)

screenshots: demo
	@echo "== taking pictures of the demo's report in Chromium"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[browser]'
	$(BIN)/python bench/screenshots.py $(RUN)

test: install
	@echo "== running the tests"
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(PYTEST_FLAGS)

lint: install
	@echo "== checking format, lint, types and import layers"
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

clean:
	rm -rf $(VENV) $(RUN)
