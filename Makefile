# Two commands do all the set-up: `make run` and `make test`. Both may be repeated; finished steps are skipped.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Both vendor modules, with and without a second dimension of paging; `soft` is kvm_intel with EPT. And kvm_intel without
# unrestricted guest.
MATRIX := soft-svm soft-vmx-shadow soft-svm-shadow soft-vmx-restricted
SOURCES := $(shell find src -name '*.py' -o -name '*.pxd') setup.py pyproject.toml

.PHONY: run test test-debian test-install check rig screenshots stress packages clean

run: $(VENV)/built
	@$(PY) -m vmonty run

test: packages $(VENV)/built check
	@echo "==> the test suite"
	@$(PY) -m pytest
	@for provider in $(MATRIX); do echo "==> the ABI suite on $$provider"; \
		$(PY) -m pytest -q tests/kvm_abi --provider=$$provider || exit 1; done
	@for provider in soft $(MATRIX); do echo "==> the ABI suite on $$provider, two vCPUs"; \
		$(PY) -m pytest -q tests/kvm_abi --provider=$$provider --vcpus 2 || exit 1; done
	@echo "==> the Debian guest"
	@$(MAKE) --no-print-directory test-debian

check: $(VENV)/built
	@echo "==> ruff, cython-lint, mypy"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint src
	@$(PY) -m mypy

rig: packages $(VENV)/built
	@$(PY) -m tests.rig --npt both

packages:
	@sh tools/packages.sh

test-debian: packages $(VENV)/built
	@VMONTY_DEBIAN=1 $(PY) -m pytest -q tests/guests/test_debian_guest.py

# Half an hour and more; the log stays.
INSTALL_LOG ?= build/install
test-install: packages $(VENV)/built
	@mkdir -p $(INSTALL_LOG)
	@VMONTY_INSTALL=1 VMONTY_INSTALL_LOG=$(INSTALL_LOG) $(PY) -m pytest -q tests/guests/test_installation.py

screenshots: packages $(VENV)/built
	@$(PY) tools/screenshots.py

stress: packages $(VENV)/built
	@VMONTY_STRESS_S=120 $(PY) -m pytest -q tests/kvm_soft/test_stress.py tests/kvm_soft/test_ioctl_fuzz.py \
		tests/kvm_soft/test_life_machine.py

$(VENV)/dependencies: pyproject.toml tools/venv.sh
	@PYTHON="$(PYTHON)" sh tools/venv.sh $(VENV)
	@touch $@

$(VENV)/built: $(VENV)/dependencies $(SOURCES)
	@echo "==> compiling the hot modules"
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build src/vmonty/cpu/opcodes.tables
	find src -name '*.so' -delete
