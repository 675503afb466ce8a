# Targets that CI calls too. Everything runs in .venv, made from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
RUN = . $(VENV)/bin/activate &&
STAMP = $(VENV)/.complete
CPUS ?= 2
FAMILIES = sm_80 sm_90 sm_100 gfx942 gfx1100
VERSIONS = 3.10 3.11 3.12 3.13
EXTRAS = --extra all --extra dev --extra zoo --extra docs --extra ray --extra slurm --extra optuna --extra s3
# An object store for tests.
FAKES = moto[server]
# A test reads a checkpoint with it. It asks for a torchvision, tied to one torch, which that test does without.
PEER = torchattacks==3.5.1
# They ask for a torch of their own, and do with this one.
TIED = timm torchvision accelerate lightning lightning-utilities pytorch-lightning torchmetrics
# A test that needs one thread gives the same bits on every machine; two pytest workers fill two cores.
TEST_ENV = OMP_NUM_THREADS=1 MPLBACKEND=Agg

.PHONY: setup quickstart test suites wheel zoo boards cluster browser docs resolve constraints lint format bench bench-ratios bench-modern bench-modern-full gpu gpu-quick kernel-report mutants clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]' -c constraints.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(PEER)
	touch $@

quickstart: setup
	$(RUN) ibp-triton run configs/quickstart.yaml

# tests/compiled needs Triton's CPU compiler in a process of its own.
test: setup
	$(RUN) $(TEST_ENV) pytest tests --ignore=tests/compiled --ignore=tests/zoo --ignore=tests/site --ignore=tests/cluster -n $(CPUS)
	if [ -d tests/compiled ]; then $(RUN) $(TEST_ENV) pytest tests/compiled -n $(CPUS); fi
	$(RUN) $(TEST_ENV) pytest benchmarks --benchmark-disable -k "cpu and not cifar10 and not 256" -n $(CPUS)

# On every Python that is found, each in an environment of its own.
suites:
	for version in $(VERSIONS); do if python$$version -c "" 2> /dev/null; then \
		$(MAKE) test PYTHON=python$$version VENV=$(VENV)-$$version || exit 1; fi; done

# The source archive, a wheel built from it, and that in an environment of its own, away from the checkout: a small part of
# the quickstart.
wheel: setup
	rm -rf dist $(VENV)/wheel
	$(RUN) python -m build --quiet --outdir dist
	$(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[harness,demo]" -c constraints.txt
	cd $(VENV)/wheel && OMP_NUM_THREADS=1 bin/ibp-triton run quickstart --only method=loss_ibp --set training.epochs=1 --set seeds=[0]
	cd $(VENV)/wheel && bin/python -m ibp_triton report runs/quickstart

# Other people's models against the oracle, in an environment of their own beside that of the tests.
zoo: $(VENV)/zoo/.complete
	. $(VENV)/zoo/bin/activate && $(TEST_ENV) python -m pytest tests/zoo -n $(CPUS)

# The pages of docs/ with the two notebooks executed (minutes; NOTEBOOK_EPOCHS=1 shortens it) into site/, which needs no network.
docs: $(VENV)/docs/.complete
	rm -rf site
	. $(VENV)/docs/bin/activate && PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
	$(RUN) pytest tests/site

# An environment beside that of the tests, which sees its packages.
define BESIDE
	$(VENV)/bin/python -m venv $(@D)
	$(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > \
		"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth"
endef

# One that has those of an extra.
$(VENV)/%/.complete: $(STAMP)
	$(BESIDE)
	$(VENV)/bin/python -m tests.zoo.packages $* > $(@D)/packages.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $(@D)/packages.txt -c constraints.txt
	if [ $* = zoo ]; then $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(TIED) -c constraints.txt; fi
	touch $@

# Runs on W&B and trackio by the real packages, offline, in an environment of their own.
boards: $(VENV)/boards/.complete
	. $(VENV)/boards/bin/activate && $(TEST_ENV) python -m pytest tests/harness/test_board.py -n $(CPUS)

$(VENV)/boards/.complete: $(STAMP)
	$(BESIDE)
	$(VENV)/boards/bin/python -m pip install --quiet --disable-pip-version-check wandb 'trackio>=0.20'
	touch $@

# Runs on a Ray cluster of two nodes, as a job array, as a search and in an object store, in an environment of their own.
cluster: $(VENV)/cluster/.complete
	. $(VENV)/cluster/bin/activate && $(TEST_ENV) python -m pytest tests/cluster -n 1

$(VENV)/cluster/.complete: $(STAMP)
	$(BESIDE)
	$(VENV)/cluster/bin/python -m pip install --quiet --disable-pip-version-check ray submitit optuna s3fs '$(FAKES)' \
		-c constraints.txt
	touch $@

# The report in a real browser. Debian's package chromium is wanted; EXPECT_CHROMIUM=1 makes its absence a failure.
browser: $(VENV)/browser/.complete
	. $(VENV)/browser/bin/activate && $(TEST_ENV) python -m pytest tests/harness/test_page.py

$(VENV)/browser/.complete: $(STAMP)
	$(BESIDE)
	$(VENV)/browser/bin/python -m pip install --quiet --disable-pip-version-check playwright
	touch $@

# What the constraints say is a whole for each version of Python: an index of packages is asked, nothing is installed.
resolve: setup
	printf '%s\n' $(TIED) '$(FAKES)' > $(VENV)/tied.txt
	for version in $(VERSIONS); do $(RUN) uv pip compile --quiet --python-version $$version --only-binary :all: \
		pyproject.toml $(VENV)/tied.txt $(EXTRAS) -c constraints.txt > $(VENV)/resolved-$$version.txt || exit 1; \
		echo "Python $$version: $$(grep -c '^[a-z]' $(VENV)/resolved-$$version.txt) packages"; done

# The constraints anew, one file for all versions, which keeps what it can of the old one. CUDA's come with torch.
constraints: setup
	printf '%s\n' $(TIED) '$(FAKES)' > $(VENV)/tied.txt
	cp constraints.txt $(VENV)/constraints.txt
	$(RUN) uv pip compile --quiet --universal --python-version $(firstword $(VERSIONS)) --no-annotate --no-header \
		pyproject.toml $(VENV)/tied.txt $(EXTRAS) -o $(VENV)/constraints.txt > /dev/null
	grep -v '^nvidia-\|^cuda-' $(VENV)/constraints.txt > constraints.txt

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: setup
	$(RUN) ruff check --fix . && ruff format .

bench: setup
	$(RUN) OMP_NUM_THREADS=1 pytest benchmarks --benchmark-only --benchmark-json=benchmarks/latest.json
	$(RUN) ibp-triton bench-report benchmarks/latest.json --plot benchmarks/latest.svg

# The tables of targets: the paper's networks (minutes), three modern ones (ten minutes), all of them (hours). They go on
# where they were stopped, and print a table.
bench-ratios bench-modern bench-modern-full: bench-%: setup
	$(RUN) OMP_NUM_THREADS=1 ibp-triton bench $(subst -,_,$*) --json benchmarks/$(subst -,_,$*).json

# All that there is to prove on a GPU, in 20 minutes, or the essential in 3: results in benchmarks/gpu, named by the card.
gpu gpu-quick: gpu%: setup
	$(RUN) python -m benchmarks.gpu $(if $*,--quick)

# What the compiler makes of each kernel for each chip family, which need not be there, and what a step launches: minutes.
kernel-report: setup
	$(RUN) ibp-triton kernels $(FAMILIES:%=--target %) --markdown docs/kernel_report.md --figure docs/kernels.svg > /dev/null

# A seeded sample of small faults, and whether the tests notice: 90 minutes at most, goes on where it stopped.
mutants: setup
	$(RUN) $(TEST_ENV) python -m tests.mutants

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
