# The same commands people and CI use. `make demo` and `make test` set everything up on a machine with Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
OUT ?= demo-out
# two workers with one thread each beat one worker with two on these sizes
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help install demo test slow environments interop lint types format check clean

help:
	@echo "make demo [DATA=FOLDER] [OUT=FOLDER]   the whole road on generated phantoms, or on a labelled folder"
	@echo "make test                              install and run the default test suite"
	@echo "make slow                              the longer tests"
	@echo "make interop [NNUNET=SOURCES]          exports in environments of MONAI, transformers and nnU-Net of their own, under .interop"
	@echo "make lint types format                 ruff, mypy --strict, ruff format"

install: $(VENV)/.installed

# torch and torchvision are named together with the constraints file: pip left alone with either picks gigabytes of CUDA packages
# compiled on two cores after pip, which would take one, and without what nobody imports
$(VENV)/.installed: setup.cfg pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints-cpu.txt torch torchvision -e ".[test,all]"
	-$(BIN)/python -m compileall -qq -j 2 -x '/tests/|/torch/testing/|/pip/' $(VENV)/lib
	touch $@

demo: install
	$(BIN)/medssl demo $(if $(DATA),--data $(DATA)) --out $(OUT)

test: install
	$(PYTEST) -m "not slow" --durations=15

slow: install
	$(PYTEST) -m slow --durations=15

# medssl and nnU-Net do not live in one environment, and a bundle has to run where MONAI is alone; what each holds is said in benchmarks/interop
.interop/monai/.installed: PACKAGES := monai==1.6.1 nibabel einops pytorch-ignite fire jsonschema
.interop/transformers/.installed: PACKAGES := transformers==5.23.0 safetensors
.interop/nnunet/.installed: PACKAGES := torchvision nnunetv2==2.8.1 fire

.interop/%/.installed: constraints-cpu.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --no-compile --disable-pip-version-check -c constraints-cpu.txt torch $(PACKAGES)
	$(if $(and $(NNUNET),$(findstring nnunet,$@)),$(@D)/bin/python -m pip install -q --no-deps --force-reinstall $(NNUNET))
	touch $@

environments: .interop/monai/.installed .interop/transformers/.installed .interop/nnunet/.installed

interop: install environments
	$(BIN)/python -m pytest -m slow tests/benchmarks/test_interop.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test slow

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
