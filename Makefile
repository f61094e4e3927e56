PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format docs figures wheel install clean

demo: install
	$(BIN)/mimdet demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs

figures: install
	$(BIN)/python docs/figures/architecture.py

wheel: install
	$(BIN)/python -m build --no-isolation

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[docs,fast-eval,test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
