# Every target sets up what it needs: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# The model of `make demo`: the bundled one, or a checkpoint file or folder, hf:ORG/NAME or timm:NAME.
MODEL ?= demo
OUT ?= out
# For the second part of `make figures`: DINOv2 ViT-S/14, and 128 photographs of ImageNet, one of a class, where they are at hand.
DINOV2 ?= $(wildcard ../shared/checkpoints/dinov2-small)
IMAGES ?= $(wildcard ../shared/imagenet-sample-128)

.PHONY: demo test test-oldest check bench figures clean

demo: .venv/installed
	$(BIN)/vit-probe figures --model $(MODEL) --out $(OUT)

test: .venv/installed-test
	$(BIN)/pytest -n 2

# The same tests with the oldest versions that pyproject.toml allows, in an environment of their own; not those of the benchmarks, which
# no user installs. The registry's builds of torch come with CUDA's libraries, several gigabytes.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/pytest -n 2 --ignore tests/benchmarks

check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tables in benchmarks/results: hours on two cores; `python -m benchmarks.attention --quick` takes minutes.
bench: .venv/installed-test
	$(BIN)/python -m benchmarks.attention

# The gallery in figures/: the bundled model on the sample photographs, the studies, and their part of the gallery's page; DINOv2 on
# IMAGES, and its rollout on the sample photographs.
figures: .venv/installed
	$(BIN)/vit-probe figures --out figures/demo --format png --format pdf
	$(BIN)/vit-probe rollout --out figures/demo --limit 6 --count 6 --format png --format pdf
	$(BIN)/python -m analyses.gallery
ifneq ($(DINOV2),)
	$(BIN)/vit-probe figures --model $(DINOV2) $(addprefix --images ,$(IMAGES)) --out figures/dinov2-small --format png --format pdf
	$(BIN)/vit-probe rollout --model $(DINOV2) --out figures/dinov2-small --kind heatmap --limit 6 --count 6 --format png --format pdf
	$(BIN)/python -m analyses.token_norms --model $(DINOV2) $(addprefix --images ,$(IMAGES)) --out figures/dinov2-small --format png --format pdf
	$(BIN)/python -m analyses.rollout --model $(DINOV2) --out figures/dinov2-small/class_attention --limit 6 --format png --format pdf
endif

# Not OUT: it may hold a training.
clean:
	rm -rf .venv .venv-oldest dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[hub]"
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch .venv/installed $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[test]"
	touch $@
