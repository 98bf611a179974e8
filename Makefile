# make demo | demo-prompts | demo-explain | demo-pretrain | real | real-study | real-few-shot | test | test-newest | lint |
# fmt | docs | bench | emulate | emulate-some | instructions | asan | wheel | gpu-wheels | gpu (gpu-test | gpu-bench |
# gpu-prompts). All but gpu run in .venv, which the first target makes.
SHELL := /bin/bash -o pipefail
VENV := .venv
PYTHON := $(VENV)/bin/python
SOURCES := $(shell find csrc tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
INSTALLED := $(VENV)/.installed

# Threads that wait at a barrier give up their core: on a shared machine spinning ones cost ten times the work.
export OMP_WAIT_POLICY := passive

.PHONY: demo demo-prompts demo-explain demo-pretrain real real-study real-few-shot test test-newest lint fmt docs bench \
	emulate emulate-some emulated instructions asan wheel clean gpu gpu-test gpu-bench gpu-prompts gpu-site gpu-wheels

demo: $(INSTALLED)
	$(VENV)/bin/fastprob demo --out demo-out

demo-prompts: $(INSTALLED)
	$(VENV)/bin/fastprob demo prompts --out demo-out/prompts

demo-explain: $(INSTALLED)
	$(VENV)/bin/fastprob demo explain --out demo-out/explain

demo-pretrain: $(INSTALLED)
	$(VENV)/bin/fastprob demo pretrain --out demo-out/pretrain

# Real pictures: towers over openclipart once (cached), an adapter by the ordinary commands, then adapters by cross weight
# and loss and their report. real is a seed of every setting, real-study all seeds, what decides the sign, all rivals of
# ProbVLM's uncertainty, and whether it chooses captions, pictures and models. The first time it needs a network.
REAL_OUT ?= real-out
REAL := $(PYTHON) -m bench.real

real: $(VENV)/.installed-real
	$(REAL).fetch
	parts=$$($(REAL).parts | tail -1) && for part in train val test outside; do $(VENV)/bin/fastprob embed \
		--from-arrays $$parts/$$part/image.npy $$parts/$$part/text.npy --pairs $$parts/$$part/pairs.npy \
		--captions $$parts/$$part/captions.txt --encoder-name openclipart-heads --out $(REAL_OUT)/$$part || exit; done
	$(VENV)/bin/fastprob fit --store $(REAL_OUT)/train --val-store $(REAL_OUT)/val --out $(REAL_OUT)/adapter \
		$$(if [ -e $(REAL_OUT)/adapter/last.pt ]; then echo --resume; fi)
	$(VENV)/bin/fastprob calibrate --store $(REAL_OUT)/val --checkpoint $(REAL_OUT)/adapter --overwrite
	$(VENV)/bin/fastprob eval --store $(REAL_OUT)/test --checkpoint $(REAL_OUT)/adapter --out $(REAL_OUT)/eval \
		--outside $(REAL_OUT)/outside --truth $$($(REAL).parts | tail -1)/test/truth.npy
	$(REAL).study --first 12
	$(REAL).report --out $(REAL_OUT)

real-study: $(VENV)/.installed-real
	$(REAL).study
	$(REAL).report --out bench/results/real
	$(REAL).uncertainty --out bench/results/real
	$(REAL).selection --out bench/results/real
	$(REAL).outside

# A small CLIP of these pictures and of emoji, once (cached), then prompts on emoji, CIFAR-10 and QuickDraw by every method.
real-few-shot: $(VENV)/.installed-real
	$(REAL).fetch --few-shot
	$(REAL).clip
	$(REAL).few_shot

$(VENV)/.installed-real: $(INSTALLED)
	$(PYTHON) -m pip install -q -c constraints.txt transformers
	touch $@

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

# The site, in build/site. Nothing is fetched.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench: $(INSTALLED)
	$(PYTHON) -m pytest bench -q -m "not gpu" --out bench/results/cpu.json
	$(PYTHON) bench/prompts.py --out bench/results/prompts-cpu.json

# On a machine with a GPU and, perhaps, no network: GPU_PYTHON's packages, torch above all, stay as they are. fastprob,
# built for this GPU alone, and the wheels that gpu-wheels gathered elsewhere are laid over them. Each target goes on
# where a part of it fails, writes what it has, and is to end within eight minutes.
GPU_PYTHON ?= python3
GPU_OUT ?= bench/results
GPU_SITE := $(abspath build/gpu-site)
GPU_WHEELS := build/gpu-wheels
GPU_RUN := PYTHONPATH=$(GPU_SITE) $(GPU_PYTHON) -P
GPU_PACKAGES := open_clip_torch ftfy wcwidth regex safetensors tqdm pillow scikit-learn scipy joblib threadpoolctl \
	narwhals pytest pytest-timeout pytest-xdist execnet iniconfig packaging pluggy pygments hypothesis sortedcontainers \
	"setuptools>=77,<82"

gpu:
	$(MAKE) --keep-going gpu-test gpu-bench gpu-prompts

gpu-test: gpu-site
	status=0; for file in $$(grep -l pytest.mark.gpu tests/test_*.py); do \
		$(GPU_RUN) -m pytest -q -m gpu -n 8 --dist worksteal $$file || status=1; done; exit $$status

gpu-bench: gpu-site
	$(GPU_RUN) -m pytest bench -q -m gpu --continue-on-collection-errors --minutes 5 --out $(GPU_OUT)/gpu.json
	$(GPU_RUN) bench/alone.py --out $(GPU_OUT)/gpu-alone.json

gpu-prompts: gpu-site
	$(GPU_RUN) bench/prompts.py --device cuda --out $(GPU_OUT)/prompts-gpu.json

gpu-site:
	$(GPU_PYTHON) -c "import torch; torch.cuda.is_available() or exit('no GPU that torch can use')"
	mkdir -p $(GPU_SITE)
	! ls $(GPU_WHEELS)/*.whl > /dev/null 2>&1 || $(GPU_PYTHON) -m pip install -q --no-index --no-deps --upgrade \
		--target $(GPU_SITE) $(GPU_WHEELS)/*.whl
	$(GPU_RUN) -c "import pytest, xdist" || { echo "make gpu-wheels, with a network, gathers what is missing"; exit 1; }
	TORCH_CUDA_ARCH_LIST=$$($(GPU_PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") \
		$(GPU_RUN) -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target $(GPU_SITE) .

gpu-wheels: $(INSTALLED)
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(foreach glibc,17 24 27 28,--platform manylinux_2_$(glibc)_x86_64) --platform manylinux2014_x86_64 \
		-d $(GPU_WHEELS) $(GPU_PACKAGES)
	du -sh $(GPU_WHEELS)

# The C++ CPU kernels under the address and undefined-behaviour sanitizers.
asan: $(INSTALLED)
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" LDFLAGS="-fsanitize=address,undefined" \
		CUDA_HOME=/nonexistent $(PYTHON) setup.py -q build --build-base build/asan
	cd tests && PYTHONPATH=$$(echo $(CURDIR)/build/asan/lib*) ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		../$(PYTHON) -m pytest -q -p no:cacheprovider test_ops.py -k "budget or extreme or nan_inf or layout or bits"

# The CUDA kernels compiled as C++ (tests/emulation) and run by the tests on a CPU, in the place of its own kernels:
# exact, and with every approximate instruction as wrong as documented. emulate-some is a part of it.
EMULATED := build/emulated
EMULATED_NAMES := $(basename $(notdir $(wildcard csrc/cuda/*.cu)))
EMULATED_OBJECTS := $(EMULATED_NAMES:%=$(EMULATED)/%.o)
OPERATORS := $(basename $(notdir $(wildcard fastprob/ops/[a-z]*.py)))
EMULATED_KEY := not (own_ $(patsubst %,or %,$(filter-out $(EMULATED_NAMES),$(OPERATORS))))
TORCH = $(shell $(PYTHON) -c "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)")

emulate: ERRORS := exact up down mixed
emulate: CHOSEN := $(EMULATED_KEY)
emulate-some: ERRORS := exact mixed
emulate-some: CHOSEN := $(EMULATED_KEY) and (native or budget or extreme or nan or bits or blocks or asked or scale)
emulate emulate-some: emulated
	cd tests && for error in $(ERRORS); do \
		EMULATED_ERROR=$$error PYTHONPATH=$(abspath $(EMULATED)) OMP_NUM_THREADS=1 $(abspath $(PYTHON)) -m pytest -q \
			-p no:cacheprovider -n 2 --dist worksteal test_ops.py test_native.py test_cuda.py -k "$(CHOSEN)" || exit; done

emulated: $(EMULATED_OBJECTS)
	rm -rf $(EMULATED)/fastprob && mkdir $(EMULATED)/fastprob
	ln -s $(abspath $(filter-out %.so,$(wildcard fastprob/*)) kernels) $(EMULATED)/fastprob
	$(CXX) -shared -o $(EMULATED)/fastprob/_cpu_portable.abi3.so $^ -L$(TORCH)/lib -ltorch -ltorch_cpu -lc10

$(EMULATED)/%.o: csrc/cuda/%.cu $(SOURCES) $(INSTALLED)
	mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -march=native -ffp-contract=fast -fno-math-errno -fPIC -fvisibility=hidden -Wall \
		-Wno-unknown-pragmas -fsanitize=alignment -fsanitize-undefined-trap-on-error \
		-DTORCH_TARGET_VERSION=0x020a000000000000 -Itests/emulation -include cuda_runtime.h \
		-isystem $(TORCH)/include -isystem $(TORCH)/include/torch/csrc/api/include -x c++ -c $< -o $@

# The table of instructions per element, after a change that is meant to change it.
instructions: $(INSTALLED)
	$(PYTHON) tests/instructions.py

wheel: $(INSTALLED)
	$(PYTHON) -m pip wheel -q --no-build-isolation --no-deps -w dist .

# The wheel under the newest torch that pip finds, or that TORCH_INDEX has for the CPU, and a later Python.
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.1[2-9].*/bin/python3) python3.12)
TORCH_INDEX ?=
NEWEST := .venv-newest/bin/python
test-newest: wheel
	test -x $(NEWEST) || $(PYTHON312) -m venv .venv-newest
	$(NEWEST) -m pip install -q --upgrade $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(NEWEST) -m pip install -q numpy safetensors tqdm scipy mpmath hypothesis pytest pytest-timeout pytest-xdist
	$(NEWEST) -m pip install -q --no-deps --force-reinstall $$(ls -t dist/fastprob-*.whl | head -1)
	cd tests && OMP_NUM_THREADS=1 ../$(NEWEST) -m pytest -q -n 2 --dist worksteal -p no:cacheprovider \
		test_ops.py test_distributions.py test_nn.py

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info fastprob/*.so

$(INSTALLED): constraints.txt pyproject.toml setup.py $(SOURCES)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt torch torchvision "setuptools>=77" wheel ninja
	$(PYTHON) -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@
