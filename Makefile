# make demo, make test: from a fresh clone, everything else is set up here.
PYTHON ?= python3
PIP = $(1)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: demo test clean

demo: .venv/demo
	.venv/demo/bin/enat-run --class all --num 8 --seed 1 --out demo-sheet.png --grid
	@echo "The sheet of pictures is $(CURDIR)/demo-sheet.png"

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $@
	$(call PIP,$@) ".[cpu]"
	@touch $@

# An installed package in a fresh environment, not the clone: lint, types, tests.
test: .venv/test
	rm -rf build *.egg-info
	$(call PIP,$<) --no-deps --force-reinstall .
	$</bin/ruff check .
	$</bin/ruff format --check .
	cd tests && ../$</bin/mypy --config-file ../pyproject.toml -p enat
	$</bin/python -m pytest -m "not slow and not gpu"

.venv/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $@
	$(call PIP,$@) torch
	$(call PIP,$@) ".[cpu,export,test]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
