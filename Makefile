# Face parsing with under 1,821,085 parameters. `make` lists what there is.
#
# Settings are variables: make train NAME=a LR=8e-4 DICE=1.5. An empty one passes no flag, so that the scripts own
# their defaults; ARGS= takes any other flag of the script behind a target.

VENV ?= .venv
# PYTHON makes the environment; with VENV= (empty) it is the environment.
PYTHON ?= python3

# Settings that are flags of train.py of the same name.
TRAIN_VARS := RECIPE MODEL DROPOUT EPOCHS SIZES BATCH OPTIMISER LR SCHEDULE WARMUP PATIENCE CE DICE FOCAL SMOOTHING EMA \
	AUGMENT FLIP ROTATE SCALE SHIFT MIXUP CUTMIX SEED CLIP AMP DEVICE THREADS
##@ Settings
##= NAME      a run: folder below runs/
##= DATA      folder with train/, dev/, test/ (default: data, else drawn faces)
##= RECIPE    named settings of recipes.toml (make recipes)
##= FROM      run or checkpoint whose weights a training starts from
##= NPROC     processes of a training (default: one a GPU; one on a CPU)
##= LMSA      1 or 0: with or without LMSA
##= MODEL DROPOUT EPOCHS SIZES BATCH OPTIMISER LR SCHEDULE WARMUP PATIENCE CE DICE FOCAL SMOOTHING EMA AUGMENT
##=           FLIP ROTATE SCALE SHIFT MIXUP CUTMIX SEED CLIP AMP DEVICE THREADS: flags of train.py of the same name
##= OVERWRITE 1 replaces a run of the same name
##= IN OUT    images to predict (file or folder), folder for their masks
##= WEIGHTS   checkpoint to predict with (default: release, else best run)
##= VIEWS     views to average: flip, scales, or numbers
##= PHASE     test or dev: which images a submission is for
##= ZIP       submission to write or check
##= RUN       images on which check-submission runs the zip's run.py
##= AUTHOR MATRIC  name and matriculation number on the course report; MATRIC names the course zip
##= REPORT    PDF for the course zip (default: the run's report.pdf)
##= RAW       downloaded data, as a zip or folder
##= PYTHON VENV  interpreter and environment; VENV= uses PYTHON as it is
##= ARGS      any other flags of the script
# What each target takes. A variable that is misspelt, or that the target would ignore, is an error.
TAKES_data := RAW DATA ARGS
TAKES_check-data := DATA ARGS
TAKES_train := $(TRAIN_VARS) NAME DATA FROM NPROC LMSA OVERWRITE ARGS
TAKES_sweep := $(TAKES_train)
TAKES_resume := NAME DATA NPROC DEVICE THREADS ARGS
TAKES_speedrun := DATA ARGS
TAKES_recipes := ARGS
TAKES_runs := ARGS
TAKES_predict := IN OUT NAME WEIGHTS VIEWS DEVICE ARGS
TAKES_evaluate := NAME WEIGHTS DATA VIEWS DEVICE ARGS
TAKES_check-params := MODEL LMSA ARGS
TAKES_submit := NAME WEIGHTS DATA PHASE ZIP VIEWS ARGS
TAKES_check-submission := ZIP DATA PHASE RUN ARGS
TAKES_report := NAME AUTHOR MATRIC OVERWRITE ARGS
TAKES_report-pdf := NAME ARGS
TAKES_report-zip := MATRIC REPORT NAME DATA ARGS
TAKES_test := ARGS
TAKES_faults := ARGS
TAKES_bench := ARGS
# What a target cannot do without, unless ARGS gives it.
NEEDS_data := RAW
NEEDS_resume := NAME
NEEDS_predict := IN OUT
NEEDS_check-submission := ZIP
NEEDS_report-zip := MATRIC
VARS := $(sort $(foreach v,$(filter TAKES_%,$(.VARIABLES)),$($(v))))

TARGETS := help install data check-data train resume sweep speedrun recipes runs predict evaluate check-params submit \
	check-submission report report-pdf report-zip demo test faults bench clean

GOALS := $(or $(MAKECMDGOALS),help)
GIVEN := $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $(v))),$(v)))
GIVEN := $(filter-out PYTHON VENV MAKEFLAGS MAKEOVERRIDES -*-command-variables-*-,$(GIVEN))
UNKNOWN := $(firstword $(filter-out $(VARS),$(GIVEN)))
UNUSED := $(firstword $(filter-out $(foreach g,$(GOALS),$(TAKES_$(g))),$(GIVEN)))
NO_SUCH := $(firstword $(filter-out $(TARGETS) $(VENV)/.ready,$(GOALS)))
$(if $(UNKNOWN),$(error unknown variable $(UNKNOWN); `make help` lists them))
$(if $(NO_SUCH),$(error no target $(NO_SUCH); settings are NAME=value, without spaces; `make help` lists both))
$(if $(UNUSED),$(error $(UNUSED) does nothing in `make $(GOALS)`, which takes: $(or \
	$(strip $(foreach g,$(GOALS),$(TAKES_$(g)))),no settings)))

# A setting is what is typed: an exported NAME or DEVICE of the shell is somebody else's.
$(foreach v,$(VARS),$(if $(filter environment,$(origin $(v))),$(eval $(v) :=)))
$(if $(and $(NAME),$(WEIGHTS),$(filter predict evaluate submit,$(GOALS))),$(error NAME and WEIGHTS both name weights: give one))
MISSING := $(if $(ARGS),,$(foreach g,$(GOALS),$(foreach v,$(NEEDS_$(g)),$(if $(value $(v)),,$(v)=))))
$(if $(strip $(MISSING)),$(error `make $(GOALS)` needs $(strip $(MISSING)); `make help` lists the settings))

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY := $(if $(VENV),$(VENV)/.ready)
# A setting reaches the script as it was typed, whatever quotes or dollars it holds.
quoted = '$(subst ','\'',$(value $(1)))'
flag = $(if $(strip $(value $(1))),--$(or $(2),$(shell echo $(1) | tr A-Z_ a-z-)) $(call quoted,$(1)))
# "yes" of a switch that is on, nothing of one that is off or not given.
switch = $(if $(word 2,$($(1)))$(filter-out 1 yes on true 0 no off false,$($(1))),$(error $(1)=$($(1)): give 1 or \
	0),$(if $(filter 1 yes on true,$($(1))),yes))
DATA_FLAG = $(call flag,DATA)
TRAIN_FLAGS = $(foreach v,$(TRAIN_VARS),$(call flag,$(v))) $(DATA_FLAG) $(call flag,FROM) \
	$(if $(call switch,LMSA),--lmsa,$(if $(LMSA),--no-lmsa)) $(if $(call switch,OVERWRITE),--overwrite)
TRAIN = $(PY) launch.py $(call flag,NPROC)

.DEFAULT_GOAL := help
.PHONY: $(TARGETS)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "  %-20s%s\n", $$1, $$2}'
	@echo; echo "  Settings, as in: make train NAME=a LR=8e-4 DICE=1.5"
	@sed -n 's/^##= /  /p' Makefile

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

install: $(READY) ## make the environment (any target does, once)

# make data RAW=~/Downloads/CelebAMask-HQ.zip
data: $(READY) ## prepare DATA from RAW: the challenge's zip or folder, or the CelebAMask-HQ release
	$(PY) prepare.py $(call flag,RAW) $(or $(call flag,DATA,out),--out data) $(ARGS)

check-data: $(READY) ## audit DATA: unpaired, damaged, wrong size or labels, duplicates, reversed sides
	$(PY) audit.py $(DATA_FLAG) $(ARGS)

# make train NAME=a LR=8e-4 DICE=1.5
train: $(READY) ## train a run
	$(TRAIN) $(call flag,NAME) $(TRAIN_FLAGS) $(ARGS)

# make resume NAME=a
resume: $(READY) ## go on with run NAME exactly where it stopped
	$(TRAIN) --resume $(call quoted,NAME) $(DATA_FLAG) $(call flag,DEVICE) $(call flag,THREADS) $(ARGS)

# make sweep DICE="0.5 1.0 1.5 2.0"
sweep: $(READY) ## one run for each value of a variable that holds several
	$(PY) sweep.py $(call flag,NPROC) $(call flag,NAME) $(TRAIN_FLAGS) $(ARGS)

# The cache is made anew: the minutes are those from nothing.
speedrun: $(READY) ## from nothing to an official score of 0.80, timed by the run itself
	rm -rf build/speedrun
	$(PY) train.py --recipe speedrun --name speedrun --overwrite --cache build/speedrun $(DATA_FLAG) $(ARGS)

recipes: $(READY) ## list the recipes with the reference's figures and ours
	$(PY) leaderboard.py --recipes $(ARGS)

runs: $(READY) ## leaderboard of runs/
	$(PY) leaderboard.py $(ARGS)

# make predict IN=photos OUT=masks NAME=a VIEWS=flip,scales
predict: $(READY) ## masks for IN (file or folder) into OUT
	$(PY) predict.py $(call flag,IN,input) $(call flag,OUT,output) $(call flag,$(if $(WEIGHTS),WEIGHTS,NAME),weights) \
		$(call flag,VIEWS) $(call flag,DEVICE) $(ARGS)

# make evaluate NAME=a VIEWS=flip,scales
evaluate: $(READY) ## official score of run NAME on the held-out pairs
	$(PY) evaluate.py $(call flag,$(if $(WEIGHTS),WEIGHTS,NAME),weights) $(DATA_FLAG) $(call flag,VIEWS) \
		$(call flag,DEVICE) $(ARGS)

# make check-params MODEL=microsegformer LMSA=0
check-params: $(READY) ## parameters by module; fails at the challenge's limit
	$(PY) parameters.py $(call flag,MODEL) $(if $(LMSA),$(if $(call switch,LMSA),--lmsa,--no-lmsa)) $(ARGS)

# make submit NAME=a PHASE=test ZIP=a.zip
submit: $(READY) ## Codabench zip of run NAME, proven by running what is in it
	$(PY) package.py $(call flag,NAME) $(call flag,WEIGHTS) $(DATA_FLAG) $(call flag,PHASE) $(call flag,ZIP) \
		$(call flag,VIEWS) $(ARGS)

# make check-submission ZIP=theirs.zip RUN=5
check-submission: $(READY) ## judge any Codabench zip
	$(PY) check_submission.py $(call flag,ZIP) $(DATA_FLAG) $(call flag,PHASE) $(call flag,RUN) $(ARGS)

# make report NAME=a AUTHOR="A. Author" MATRIC=A12345678B
report: $(READY) ## runs/index.html, one page of all runs; with NAME, a draft of the course report on it
	$(PY) report.py $(call flag,NAME) $(call flag,AUTHOR) $(call flag,MATRIC) $(if $(call switch,OVERWRITE),--overwrite) \
		$(ARGS)

# make report-pdf NAME=a
report-pdf: $(READY) ## print the draft of run NAME through Chromium, at most five pages
	$(PY) report_pdf.py $(call flag,NAME) $(ARGS)

# make report-zip MATRIC=A12345678B NAME=a
report-zip: $(READY) ## course zip of run NAME
	$(PY) report_zip.py $(call flag,MATRIC) $(call flag,REPORT) $(call flag,NAME) $(DATA_FLAG) $(ARGS)

demo: $(READY) ## no data needed: drawn faces, a short training, masks, a proven zip
	$(PY) synth.py --out build/drawn-faces
	$(PY) train.py --recipe demo --overwrite --name demo --data build/drawn-faces
	$(PY) predict.py --weights demo --input build/drawn-faces/dev/images --output build/demo-masks --overlay --whole
	$(PY) package.py --name demo --data build/drawn-faces

test: $(READY) ## lint and tests
	$(PY) -m pip install --quiet --disable-pip-version-check -r checks/requirements.txt
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q $(ARGS)

faults: $(READY) ## attack trainings, disks, images, checkpoints, zips and numbers; below 15 minutes
	$(PY) -m pip install --quiet --disable-pip-version-check -r checks/requirements.txt
	$(PY) -m checks.faults $(ARGS)

# make bench ARGS="--only network,views"
bench: $(READY) ## throughput, memory and scale, each beside its limit; under 10 minutes on 2 idle cores
	$(PY) -m checks.bench $(ARGS)

clean: ## remove the environment, caches and drawn faces; never runs/ or data
	rm -rf $(patsubst %/.ready,%,$(wildcard $(or $(VENV),.venv)/.ready)) build/cache build/speedrun build/drawn-faces build/bench-faces build/demo-masks .pytest_cache .ruff_cache __pycache__ checks/__pycache__
