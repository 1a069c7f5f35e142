# make demo       the main job on the embedded digits: five schemes, three seeds; prints where plot and table are
# make study-first-light, study-wireless, study-compression, study-information, study-adversarial, study-privacy, study-unlearning
#                 all figures of that page under docs/: 1, 1.5, 1.5, 2, 2, 2 and 3 hours on one core; make study does all
# make test       the tests, on two cores (TEST_JOBS=4 for more)           make test-slow   the long reproductions as well
# make lint       ruff and mypy       make clean       remove the environments
# Each sets up an environment of its own. Needed beforehand: Python 3.11 or later with venv and pip, and make.

PYTHON ?= python3
DEMO_VENV := .venv
TEST_VENV := .venv-test
TEST_JOBS ?= 2
FIRST_LIGHT := iid_500 by_label_500 iid_200 by_label_200 power bandwidth decoders fedavg
COMPRESSION := compression_iid compression_dirichlet quantisers layers feedback optimizers
INFORMATION := cmic ncmi_and_error students knockoffs
ADVERSARIAL := adversarial fal
WIRELESS := fading fading_by_label fading_power csi blind mimo lfl noisy_downlink downlink_selection update_aware \
	scheduled_devices fairness
PRIVACY := dp_sgd device_privacy
UNLEARNING := unlearning_lr_logistic unlearning_lr_random unlearning_lr_class unlearning_logistic unlearning_random \
	unlearning_class unlearning_text
SOURCES := $(shell find plugins callbacks datamodules recipes src -name '*.py' -o -name '*.yaml' -o -name '*.md')
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo study study-first-light study-wireless study-compression study-information study-adversarial study-privacy study-unlearning test test-slow lint clean

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/groundwire compare --study docs/studies/demo.yaml --output runs/compare/demo
	@echo
	@cat runs/compare/demo/table.md
	@echo
	@echo "plot:  runs/compare/demo/plot.png"
	@echo "table: runs/compare/demo/table.md"

study: study-first-light study-wireless study-compression study-information study-adversarial study-privacy study-unlearning

study-first-light: $(FIRST_LIGHT:%=study/%)
	$(DEMO_VENV)/bin/python docs/studies/first_light.py

study-wireless: $(WIRELESS:%=study/%)
	$(DEMO_VENV)/bin/python docs/studies/wireless.py

study-compression: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/pip install --quiet -c constraints.txt ".[entropy,text,optimizers]"
	$(MAKE) $(COMPRESSION:%=study/%)
	$(DEMO_VENV)/bin/python docs/studies/compression.py

study-information: $(INFORMATION:%=study/%)
	$(DEMO_VENV)/bin/python docs/studies/information.py

study-adversarial: $(ADVERSARIAL:%=study/%)
	$(DEMO_VENV)/bin/pip install --quiet -c constraints.txt pyautoattack
	$(DEMO_VENV)/bin/python docs/studies/adversarial.py

study-privacy: $(PRIVACY:%=study/%)
	$(DEMO_VENV)/bin/python docs/studies/opacus_by_hand.py --output docs/studies/results/opacus_by_hand.csv
	$(DEMO_VENV)/bin/python docs/studies/few_shot.py --output docs/studies/results/few_shot.csv
	$(DEMO_VENV)/bin/python docs/studies/audits.py --output docs/studies/results/audits.csv
	$(DEMO_VENV)/bin/python docs/studies/privacy.py

study-unlearning: $(UNLEARNING:%=study/%)
	$(DEMO_VENV)/bin/python docs/studies/unlearning.py
	$(DEMO_VENV)/bin/python docs/studies/influence.py --output docs/studies/results/influence.csv --picture docs/unlearning_influence.png

study/%: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/groundwire compare --study docs/studies/$*.yaml --output runs/compare/$*

test: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/pytest -n $(TEST_JOBS) --dist worksteal

test-slow: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/pytest -n $(TEST_JOBS) --dist worksteal -m "slow or not slow"

lint: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/ruff check
	$(TEST_VENV)/bin/ruff format --check
	$(TEST_VENV)/bin/mypy

clean:
	rm -rf $(DEMO_VENV) $(TEST_VENV)

# torch first and by its exact version, so that an index that holds a CPU build of it is not passed over
%/.environment: constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

$(DEMO_VENV)/.installed: $(DEMO_VENV)/.environment pyproject.toml README.md $(SOURCES)
	$(DEMO_VENV)/bin/pip install --quiet -c constraints.txt .
	touch $@

$(TEST_VENV)/.installed: $(TEST_VENV)/.environment pyproject.toml
	$(TEST_VENV)/bin/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
