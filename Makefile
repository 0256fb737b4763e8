PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
CORES := $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test test-slow test-fuzz test-faults test-browser lint types docs clean

# Ends with demo/report.html, and prints where it is.
demo: .venv/installed
	.venv/bin/advmoe demo --out demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 .venv/bin/pytest -m "not slow and not fuzz and not faults" -n $(CORES) --dist worksteal

test-slow: .venv/installed-dev
	$(PIP) -e '.[ray,slurm,wandb]'
	.venv/bin/pytest -m "slow or extra"

# Hostile files, ten thousand for each reader; FUZZ_SEED=... repeats a failure. A few of them run in `make test`.
test-fuzz: .venv/installed-dev
	OMP_NUM_THREADS=1 FUZZ_REPORT=results/fuzz.json .venv/bin/pytest -m fuzz -n $(CORES) tests/fuzz

# Kills, full disks, NaNs and the rest of the table in docs/reliability.md, done to real processes: about half an hour.
test-faults: .venv/installed-dev
	OMP_NUM_THREADS=1 FAULTS_REPORT=results/faults.json .venv/bin/pytest -m faults -n $(CORES) tests/faults

# The report in Debian's Chromium, installed where it is missing.
test-browser: .venv/installed-dev
	command -v chromium && command -v chromedriver || \
	  { $(SUDO) apt-get update && $(SUDO) apt-get install --yes chromium chromium-driver; }
	$(PIP) -e '.[browser]'
	OMP_NUM_THREADS=1 .venv/bin/pytest -rs tests/browser

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/installed-dev
	.venv/bin/mypy

# The site in build/docs; a warning is an error. Then the tests of its hooks, scripts/docs_site.py.
docs: .venv/installed-dev
	$(PIP) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	.venv/bin/pytest tests/test_docs_site.py

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) -e '.[autoattack]'
	touch $@

.venv/installed-dev: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
