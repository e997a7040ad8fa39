# What README.md names; each target makes the virtual environment that it needs.
PYTHON ?= python3.11

.PHONY: check binary documents clean

.venv/bin/pytest:
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q -e '.[test]'

check: .venv/bin/pytest
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# A virtual environment of its own: what is in the file is what pyproject.toml asks for, no more.
binary:
	rm -rf build/binary && mkdir -p dist
	$(PYTHON) -m venv build/binary && build/binary/bin/pip install -q 'shiv>=1.0.8'
	build/binary/bin/shiv -q -c slackwater -p '/usr/bin/env $(PYTHON)' --compressed -o dist/slackwater.pyz .

# The tables of README.md and config.toml that follow from the code.
documents: .venv/bin/pytest
	.venv/bin/python -m tests.documents

clean:
	rm -rf build dist
