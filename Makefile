# From a fresh clone: make demo, make test, make test-slow. Everything else is set up here, in .venv/.
PYTHON ?= python3
TRITON_PYTHON ?= $(PYTHON)
PIP = bin/python -m pip --disable-pip-version-check install -q
INSTALL = $(PIP) -c constraints.txt -c tests/constraints.txt
PACKAGE = --no-deps --force-reinstall .
export ENAT_TRITON_ENVIRONMENT = $(CURDIR)/.venv/triton

.PHONY: demo test test-slow test-oldest test-quality test-gpu clean

# Draws a sheet with the bundled engine, without PyTorch.
demo: .venv/demo/ready
	.venv/demo/$(INSTALL) $(PACKAGE)
	.venv/demo/bin/enat-run --class all --num 8 --seed 1 --out demo-sheet.png --grid --columns 32
	@echo "The sheet of pictures: $(CURDIR)/demo-sheet.png"

# Tests an installed package, not the clone; and that the commands work where there is no PyTorch.
test: .venv/test/ready .venv/demo/ready .venv/triton/ready
	.venv/test/$(INSTALL) $(PACKAGE)
	.venv/demo/$(INSTALL) $(PACKAGE)
	.venv/test/bin/ruff check .
	.venv/test/bin/ruff format --check .
	cd tests && ../.venv/test/bin/mypy --config-file ../pyproject.toml -p enat
	.venv/test/bin/python -m pytest
	PYTHONPATH=.venv/tensorrt-11 .venv/test/bin/python -m pytest -q tests/test_tensorrt_builds.py tests/test_tensorrt_building.py tests/test_tensorrt_running.py
	.venv/demo/bin/python tests/without_torch.py

# What takes minutes more: servers at full load, the C++ library with sanitizers, torch.compile.
test-slow: .venv/test/ready .venv/triton/ready
	.venv/test/$(INSTALL) $(PACKAGE)
	.venv/test/bin/python -m pytest -m slow

# The same tests with the oldest versions that pyproject.toml allows.
test-oldest: .venv/oldest/ready .venv/triton/ready
	.venv/oldest/$(PIP) $(PACKAGE)
	.venv/oldest/bin/python -m pytest

# Half an hour: do 20,160 pictures drawn in 8 bits look like those in float32? With the figures of docs/PRECISION.md.
test-quality: .venv/test/ready
	.venv/test/$(INSTALL) $(PACKAGE)
	.venv/test/bin/python -m pytest -m quality -rP

# On a machine with an NVIDIA GPU: what the other tests cannot tell without one.
test-gpu: .venv/gpu/ready
	.venv/gpu/$(INSTALL) $(PACKAGE)
	ENAT_TEST_GPU=1 .venv/gpu/bin/python -m pytest tests/test_gpu.py -rsP

.venv/gpu/ready: pyproject.toml constraints.txt tests/constraints.txt
	$(PYTHON) -m venv --clear .venv/gpu
	.venv/gpu/$(INSTALL) ".[gpu,calibration]" pytest hypothesis || \
		{ echo "TensorRT cannot be installed here; its tests are left out"; .venv/gpu/$(INSTALL) ".[cuda,calibration]" pytest hypothesis; }
	touch $@

# Triton's server. Its Python backend needs NumPy 1, which is not to be had for newer Pythons, so that it has an environment of its own.
.venv/triton/ready: requirements-triton.txt
	if $(TRITON_PYTHON) -c "import sys; sys.exit(sys.version_info >= (3, 13))"; then \
		$(TRITON_PYTHON) -m venv --clear .venv/triton && \
		.venv/triton/$(PIP) -r requirements-triton.txt && \
		touch $@; \
	else \
		rm -rf .venv/triton; \
		echo "Triton's server needs Python 3.11 or 3.12 (TRITON_PYTHON=python3.12); its tests are left out"; \
	fi

.venv/demo/ready: pyproject.toml constraints.txt tests/constraints.txt
	$(PYTHON) -m venv --clear .venv/demo
	.venv/demo/$(INSTALL) ".[cpu]"
	touch $@

.venv/test/ready: pyproject.toml constraints.txt tests/constraints.txt
	$(PYTHON) -m venv --clear .venv/test
	.venv/test/$(INSTALL) torch
	.venv/test/$(INSTALL) ".[cpu,export,calibration,plot,test]"
	.venv/test/$(PIP) --no-deps --upgrade --target .venv/tensorrt-11 \
		tensorrt-cu13-bindings==11.4.0.106
	touch $@

.venv/oldest/ready: pyproject.toml tests/oldest_versions.py
	$(PYTHON) -m venv --clear .venv/oldest
	.venv/oldest/bin/python tests/oldest_versions.py > .venv/oldest/constraints.txt
	.venv/oldest/$(PIP) -c .venv/oldest/constraints.txt torch
	.venv/oldest/$(PIP) -c .venv/oldest/constraints.txt ".[cpu,openvino,export,calibration,plot,test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info demo-sheet.png
