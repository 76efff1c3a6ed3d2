# Two commands do everything: `make run` sets up and runs the main job, `make test` sets up and runs the tests.
PY := .venv/bin/python
RUN_DIR ?= runs/main
PYTEST_ARGS ?=
# Three files at a time: on two cores one of them mostly waits.  The tests of one file may share what they started.
BESIDE := -n 3 --dist loadfile --no-loadscope-reorder
COVERED := tests/unit/wal tests/unit/toolcall_dsl tests/golden tests/faults/test_wal_retention.py \
    tests/faults/test_wal_storage_calls.py tests/properties/test_wal_laws.py tests/properties/test_token_laws.py \
    tests/properties/test_retention_laws.py tests/properties/test_dsl_laws.py tests/properties/test_encode_laws.py
PIP := .venv/bin/pip install --disable-pip-version-check
logged = $(1) > build/setup.log 2>&1 || { tail -n 30 build/setup.log; exit 1; }
# Tests start hundreds of commands, and each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-external coverage covered check bench protos baseline lock setup setup-dev native clean

run: setup ## set up, then run the main job on the bundled tasks; run again to finish or to see the result
	.venv/bin/dsec run --resume --out "$(RUN_DIR)"

test: setup-dev ## set up, then run the tests (root; eight to twelve minutes on two cores)
	$(PY) -m pytest tests --ignore tests/external $(BESIDE) $(PYTEST_ARGS)

test-external: setup ## third-party tools in a virtual environment of their own; needs the package index
	bash tests/external/run

coverage: setup-dev ## wal/ and toolcall_dsl/ have no line and no branch that their own tests do not reach
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -q $(BESIDE) $(PYTEST_ARGS) $(COVERED)
	$(PY) -m coverage combine -q
	$(PY) -m coverage report

covered: ## say which tests `make coverage` runs
	@echo $(COVERED)

check: setup-dev ## lint, types, import contracts, gRPC contracts, house rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/buf lint proto
	.venv/bin/buf breaking proto --against proto/baseline.binpb
	$(PY) -m pytest -q tests/tidy

bench: setup-dev ## every benchmark, quickly; docs in benchmarks/RESULTS.md
	for script in benchmarks/*.py; do $(PY) $$script --quick || exit 1; done

protos: setup-dev ## generate dsec/pb and rollout/pb from proto/
	$(PY) -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. $$(find proto -name '*.proto')

baseline: setup-dev ## agree on the rollout service's gRPC contract as it is: what breaks it fails from now on
	.venv/bin/buf build proto --path proto/rollout --exclude-source-info -o proto/baseline.binpb

lock: setup-dev ## pin the newest versions that pyproject.toml allows
	.venv/bin/pip-compile -q --upgrade --strip-extras --generate-hashes --allow-unsafe --extra build \
	    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links -o requirements.lock pyproject.toml
	.venv/bin/pip-compile -q --upgrade --strip-extras --allow-unsafe --extra build --extra dev -c requirements.lock \
	    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links -o requirements-dev.lock pyproject.toml
	sed -i -E 's/^([a-z0-9-]+==[^ +]+)\+[^ ]+/\1/' requirements-dev.lock  # a local build's suffix is nobody else's

setup: .venv/.installed native

setup-dev: .venv/.installed-dev native

native: .venv/.installed ## compile the C parts if their sources are newer
	@$(PY) setup.py -q build_ext

.venv/.installed: requirements.lock pyproject.toml setup.py deploy/host.sh
	@bash deploy/host.sh
	@echo "setting up .venv from requirements.lock (output in build/setup.log)"
	@mkdir -p build && python3 -m venv .venv
	@$(call logged,$(PIP) --require-hashes -r requirements.lock)
	@$(call logged,$(PIP) --no-deps --no-build-isolation -e .)
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.lock
	@bash deploy/host.sh dev
	@echo "adding what the tests need (torch and transformers among it; output in build/setup.log)"
	@mkdir -p build
	@$(call logged,$(PIP) -r requirements-dev.lock)
	@touch $@

clean: ## remove what was built here; runs/ stays
	rm -rf .venv build *.egg-info dsec/native/dsec-sandbox rollout/engines/embedded/v4.so
