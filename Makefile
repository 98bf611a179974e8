# make demo | demo-prompts | test | lint | fmt | bench | gpu | asan | wheel. Everything runs in .venv, which the first target makes.
SHELL := /bin/bash -o pipefail
VENV := .venv
PYTHON := $(VENV)/bin/python
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
INSTALLED := $(VENV)/.installed

# Threads that wait at a barrier give up their core: on a shared machine spinning ones cost ten times the work.
export OMP_WAIT_POLICY := passive

.PHONY: demo demo-prompts test lint fmt bench gpu asan wheel clean

demo: $(INSTALLED)
	$(VENV)/bin/fastprob demo --out demo-out

demo-prompts: $(INSTALLED)
	$(VENV)/bin/fastprob demo prompts --out demo-out/prompts

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not gpu"

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)
	$(PYTHON) -m mypy
	$(VENV)/bin/torch-abi-audit fastprob --check both

fmt: $(INSTALLED)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

bench: $(INSTALLED)
	mkdir -p bench/results
	$(PYTHON) -m pytest bench -q -m "not gpu" --benchmark-json=bench/results/cpu.json
	$(PYTHON) bench/prompts.py --out bench/results/prompts-cpu.json

# On a machine with a GPU and, perhaps, no network: GPU_PYTHON's own packages are used as they are. The CUDA library is
# built for this GPU alone, and only the test files that have GPU tests are imported.
GPU_PYTHON ?= python3
gpu:
	arch=$$($(GPU_PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") && \
		TORCH_CUDA_ARCH_LIST=$$arch $(GPU_PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) -m pytest -q -m gpu $$(grep -l pytest.mark.gpu tests/test_*.py)
	mkdir -p bench/results
	$(GPU_PYTHON) -m pytest bench -q -m gpu --benchmark-json=bench/results/gpu.json
	$(GPU_PYTHON) bench/prompts.py --device cuda --out bench/results/prompts-gpu.json

# The C++ CPU kernels under the address and undefined-behaviour sanitizers.
asan: $(INSTALLED)
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" LDFLAGS="-fsanitize=address,undefined" \
		CUDA_HOME=/nonexistent $(PYTHON) setup.py -q build --build-base build/asan
	cd tests && PYTHONPATH=$$(echo $(CURDIR)/build/asan/lib*) ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		../$(PYTHON) -m pytest -q -p no:cacheprovider test_ops.py -k "budget or extreme or nan_inf or layout or bits"

wheel: $(INSTALLED)
	$(PYTHON) -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist *.egg-info fastprob/*.so

$(INSTALLED): constraints.txt pyproject.toml setup.py $(SOURCES)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt torch torchvision "setuptools>=77" wheel ninja
	$(PYTHON) -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@
