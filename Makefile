# One place for commands: people and CI run these. The first `make run` or `make test` installs into .venv,
# later ones only when what that depends on has changed. docker/install.sh explains PYTHON and RIVULET_TORCH_INDEX.
VENV = .venv
ARGS =
BIN = $(VENV)/bin

.DEFAULT_GOAL = help
.PHONY: help run test bench soak format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/.for-run ## install, fetch the default model, serve it; ARGS go to `rivulet serve`
	@exec $(BIN)/rivulet serve $(ARGS)

test: $(VENV)/.for-test ## install, lint, check types, run the tests, two at a time but for those that measure time; ARGS go to pytest
	$(call stage,ruff check,$(BIN)/ruff check .)
	$(call stage,ruff format,$(BIN)/ruff format --check .)
	$(call stage,mypy,$(BIN)/mypy)
	$(call stage,pytest,$(BIN)/pytest -m "not alone" -n 2 --dist loadfile $(ARGS))
	$(call stage,pytest by itself,$(BIN)/pytest -m alone $(ARGS))

bench: $(VENV)/.for-test ## measure ours beside the peers that are installed; ARGS go to bench/compare.py
	@exec $(BIN)/python bench/compare.py $(ARGS)

soak: $(VENV)/.for-test ## ten minutes of random clients and injected faults; ARGS go to `python -m soak` (--help)
	@exec env PYTHONPATH=tests $(BIN)/python -m soak $(ARGS)

format: $(VENV)/.for-test ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and everything else that was made here; the model cache stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find model server tests -name __pycache__ -prune -exec rm -rf {} +

# $(call stage,name,command): say what runs; if it fails, say that it was this one, and stop.
stage = @echo "==> $(1)"; $(2) || { echo "make $@: FAILED at $(1)" >&2; exit 1; }

SOURCES_OF_THE_INSTALL = pyproject.toml setup.py docker/install.sh $(wildcard model/native/*.cpp model/native/*.h)

$(VENV)/.for-run: $(SOURCES_OF_THE_INSTALL)
	@sh docker/install.sh $(VENV) auto -e .
	@touch $@

$(VENV)/.for-test: $(SOURCES_OF_THE_INSTALL)
	@sh docker/install.sh $(VENV) auto -e '.[test]'
	@touch $(VENV)/.for-run $@
