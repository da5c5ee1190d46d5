# Every target sets up what it needs: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# The model of `make demo`: a checkpoint file or folder, hf:ORG/NAME or timm:NAME.
MODEL ?= $(firstword $(wildcard ../shared/checkpoints/dinov2-small) hf:facebook/dinov2-small)
OUT ?= out
# Photographs of `make figures`: 128 of ImageNet's, one of a class, where they are at hand.
IMAGES ?= $(wildcard ../shared/imagenet-sample-128)

.PHONY: demo test check figures clean

demo: .venv/installed
	$(BIN)/vit-probe figures --model $(MODEL) --out $(OUT)

test: .venv/installed-test
	$(BIN)/pytest -n 2

check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The gallery in figures/: attention, filters and positions from IMAGES, rollout on the sample photographs.
figures: .venv/installed
	$(BIN)/vit-probe figures --model $(MODEL) $(addprefix --images ,$(IMAGES)) --out figures/dinov2-small --format png --format pdf
	$(BIN)/vit-probe rollout --model $(MODEL) --out figures/dinov2-small --kind heatmap --limit 6 --count 6 --format png --format pdf

clean:
	rm -rf .venv out dist .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[hub]"
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch .venv/installed $@
