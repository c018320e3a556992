# Everyday commands; each sets up .venv first if it has to (tools/setup_env.py). `make help` lists them.
SHELL := /bin/sh
VENV ?= .venv
export VENV
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
# The first Python that edgellm supports; another one: make PYTHON=/path/to/python3
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	command -v $$p >/dev/null 2>&1 && $$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)
RUN := $(VENV)/bin/python

.PHONY: help setup demo chat test lint clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST))

setup:  ## Create .venv with everything pinned in constraints.txt, build the ROS interfaces
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { echo "edgellm: missing: python3 (3.10 to 3.13); on Debian/Ubuntu: sudo apt install python3 python3-venv python3-dev" >&2; exit 1; }
	@"$(PYTHON)" tools/setup_env.py

demo: setup  ## Build the tiny model's engine, start camera and model, ask ten questions over ROS (writes demo.png)
	@$(RUN) -m edgellm_ros.demo

chat: setup  ## The same system, left running for you to type questions
	@$(RUN) -m edgellm_ros.demo --chat

lint: setup  ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

test: lint  ## Linters, then all tests; ARGS="-k name" passes arguments to pytest
	@$(RUN) -m pytest $(ARGS)

clean:  ## Remove .venv, builds, caches and generated ROS interfaces
	rm -rf $(VENV) build dist install log *.egg-info .mypy_cache .ruff_cache .pytest_cache demo.png
	rm -rf edgellm_ros/msg edgellm_ros/srv edgellm_ros/action edgellm_ros/*.so edgellm_ros/.interfaces.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
