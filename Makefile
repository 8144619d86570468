# Face parsing with fewer than 1,821,085 parameters. `make` lists the targets.
# Settings are variables and become flags of the script behind the target: `make train NAME=a LR=8e-4 DICE=1.5` runs
# `train.py --name=a --lr=8e-4 --dice=1.5`. Any flag works, switches as LMSA=0 or OVERWRITE=1; an unknown one is an
# error. Only the command line counts, not the environment. Loops use .v, the name of no setting.

VENV = .venv
# PYTHON creates the environment; with VENV= (empty) it is the environment.
PYTHON = python3
ARGS =
WRONG := $(strip $(foreach .v,VENV PYTHON,$(if $(word 2,$($(.v))),$(.v))))
$(if $(WRONG),$(error $(WRONG): give one path without spaces))
PY := '$(if $(VENV),$(VENV)/bin/python,$(PYTHON))'
READY := $(if $(VENV),$(VENV)/.ready)

TARGETS := help install data check-data train resume sweep speedrun recipes runs predict evaluate check-params submit \
	check-submission report report-pdf report-zip release locator export try demo test faults bench clean
.DEFAULT_GOAL := help
.PHONY: $(TARGETS)
STRAY := $(firstword $(filter-out $(TARGETS) $(READY),$(MAKECMDGOALS)))
$(if $(STRAY),$(error no target $(STRAY); settings are NAME=value without spaces around "="; `make help` lists both))

given = $(sort $(foreach .v,$(.VARIABLES),$(if $(findstring command line,$(origin $(.v))),$(.v))))
SETTINGS := $(filter-out PYTHON VENV ARGS MAKE% -*-command-variables-*-,$(given))
EMPTY := $(firstword $(foreach .v,$(SETTINGS),$(if $(value $(.v)),,$(.v))))
$(if $(EMPTY),$(error $(EMPTY) is empty: give a value, or leave it out))
FIXED := $(firstword $(filter help install demo test clean,$(MAKECMDGOALS)))
$(if $(and $(FIXED),$(SETTINGS)),$(error $(firstword $(SETTINGS)) has no effect on `make $(FIXED)`))
ODD := $(shell printf %s '$(subst ','\'',$(SETTINGS))' | tr -d 'A-Za-z0-9_ ')
$(if $(ODD),$(error $(ODD) is in the name of no setting; names have letters, digits and _))
# Values reach the script as typed, whatever quotes, dollars or line breaks they contain: in variables of the shell,
# each as it is; make would expand what it exports itself.
$(foreach .v,$(SETTINGS),$(eval export typed_$(.v) := $$(value $(.v)))$(eval unexport $(.v)))
# $(call flags,A B) are the flags of all settings but A and B, and then ARGS, which is the shell's.
flags = $(foreach .v,$(filter-out $(1),$(SETTINGS)),--$(shell echo $(.v) | tr A-Z_ a-z-)="$$typed_$(.v)") $(value ARGS)
unexport ARGS
needs = $(foreach .v,$(1),$(if $(filter $(.v),$(SETTINGS))$(value ARGS),,$(error `make $@` needs $(.v)=, as in: $(2))))

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-20s%s\n", $$1, $$2}'
	@echo; echo "  Settings are flags in capitals: make train NAME=a LR=8e-4 DICE=1.5. For all flags of a target:"
	@echo "  make train ARGS=--help. PYTHON=python3 VENV= uses an installed environment."

$(VENV)/.ready: requirements.txt
	'$(PYTHON)' -m venv '$(VENV)'
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt && touch '$@'

install: $(READY) ## create the environment (every target does, once)

data: $(READY) ## prepare DATA from RAW: the challenge's zip or folder, or the CelebAMask-HQ release
	$(call needs,RAW,make data RAW=~/Downloads/challenge.zip)$(PY) -m tools.prepare $(flags)

check-data: $(READY) ## audit DATA: unpaired, damaged, wrong or duplicate files, reversed sides
	$(PY) -m tools.prepare --check $(flags)

train: $(READY) ## train a run
	$(PY) train.py $(flags)

resume: $(READY) ## continue run NAME exactly where it stopped
	$(call needs,NAME,make resume NAME=a)$(PY) train.py --resume="$$typed_NAME" $(call flags,NAME)

sweep: $(READY) ## one run for each value of a variable that lists several
	$(PY) -m tools.sweep $(flags)

speedrun: $(READY) ## from nothing (cache included) to an official score of 0.80, timed by the run
	$(if $(filter NAME,$(SETTINGS)),$(error NAME has no effect on `make speedrun`))rm -rf build/speedrun
	$(PY) train.py --recipe=speedrun --name=speedrun --overwrite --cache=build/speedrun $(flags)

recipes: $(READY) ## list the recipes with the reference's scores and ours
	$(PY) -m tools.report --recipes $(flags)

runs: $(READY) ## leaderboard of runs/; ALL=1 adds the experiments of docs/experiments.md
	$(PY) -m tools.report --table $(flags)

predict: $(READY) ## masks for IN (file or folder) into OUT
	$(call needs,IN OUT,make predict IN=photos OUT=masks)$(PY) predict.py $(flags)

evaluate: $(READY) ## official score of run NAME on its held-out pairs
	$(PY) evaluate.py $(flags)

check-params: $(READY) ## parameters by module; fails at the challenge's limit
	$(PY) -m tools.check_params $(flags)

submit: $(READY) ## Codabench zip of run NAME, verified by running its run.py
	$(PY) -m tools.package $(flags)

check-submission: $(READY) ## check any Codabench zip
	$(call needs,ZIP,make check-submission ZIP=theirs.zip)$(PY) -m tools.check_submission $(flags)

report: $(READY) ## runs/index.html, one page of all runs; with NAME, a draft of the course report
	$(PY) -m tools.$(if $(filter NAME,$(SETTINGS)),course_report,report) $(flags)

report-pdf: $(READY) ## print the draft of run NAME with Chromium, at most five pages
	$(call needs,NAME,make report-pdf NAME=a)$(PY) -m tools.course_report --pdf $(flags)

report-zip: $(READY) ## course zip of run NAME: report, masks, code, checkpoint; without MATRIC a first look
	$(PY) -m tools.report_zip $(flags)

release: $(READY) ## copy run NAME to runs/release, the default weights, in half precision
	$(call needs,NAME,make release NAME=a)$(PY) -m tools.export --release $(flags)

locator: $(READY) ## train the network that finds faces in photos, runs/release/locator.pt, on the pairs
	$(PY) -m tools.train_locator $(flags)

export: $(READY) ## one ONNX file of run NAME, compared with torch; needs tools/requirements.txt
	$(call needs,OUT,make export NAME=a OUT=parser.onnx)$(PY) -m tools.export $(flags)

try: $(READY) ## a page in your browser: drop a picture, see and save its mask
	$(PY) -m tools.serve $(flags)

demo: $(READY) ## no data needed: synthetic faces, a short training, masks, a verified zip
	$(PY) -m tools.synth --out=build/synthetic-faces
	$(PY) train.py --recipe=demo --overwrite --runs=build --name=demo --data=build/synthetic-faces
	$(PY) predict.py --weights=build/demo --in=build/synthetic-faces/dev/images --out=build/demo-masks --overlay --whole
	$(PY) -m tools.package --name=build/demo --data=build/synthetic-faces

test: $(READY) ## lint and tests
	$(PY) -m pip install --quiet --disable-pip-version-check -r checks/requirements.txt -r tools/requirements.txt
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q $(value ARGS)

faults: $(READY) ## kill trainings, fill disks, lock folders; feed damaged images and zips
	$(PY) -m pip install --quiet --disable-pip-version-check -r checks/requirements.txt
	OMP_WAIT_POLICY=PASSIVE $(PY) -m checks.faults $(flags)

bench: $(READY) ## speed and memory of MicroSegFormer against its layers one by one
	$(PY) -m checks.bench $(flags)

clean: ## remove the environment and caches; never runs/ or data
	test ! -f '$(VENV)/.ready' -o ! -f '$(VENV)/pyvenv.cfg' || rm -rf '$(VENV)'
	rm -rf build/cache build/speedrun build/synthetic-faces build/demo build/demo-masks .*_cache __pycache__ */__pycache__
