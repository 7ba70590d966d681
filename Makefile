# Each target does its own set-up; `make help` lists them.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: help demo test rabbitmq4 story partition cluster-test manifests check build image image-test bench fuzz tools

INSTALL := integration-tests/tools/install.sh
# Where the tests find countersign; another build of it can be named: make test COUNTERSIGN_BIN=/usr/bin/countersign
export COUNTERSIGN_BIN ?= $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)/debug/countersign

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r target words; do printf '  make %-12s %s\n' "$$target" "$$words"; done

demo: ## a registry, a key and countersign on this machine: push an image, see it signed and verified (KEEP=1: leave it running)
	@$(INSTALL) docker-registry cosign3 skopeo
	@cargo build --quiet --workspace
	@integration-tests/demo.sh

test: ## every test, the ones beside real registries, verifiers and KMSs included
	@$(INSTALL) docker-registry ferro-oci-server cosign2 cosign3 notation oras skopeo podman5 sigstore-rs sigstore-js ministack openbao softhsm postgresql rabbitmq hadolint helm
	cargo build --workspace
	cargo test --workspace --no-fail-fast
	@echo "NOT RUN by this: make rabbitmq4 (the queue on RabbitMQ 4), make partition (root and network namespaces), make story (20,000 events), make image-test (root), make cluster-test (a kube-apiserver built from source); and distribution 3 and zot, unless their programs \`registry\` and \`zot\` are in PATH"

rabbitmq4: ## the queue's tests on RabbitMQ 4 (four minutes)
	@$(INSTALL) rabbitmq4
	RABBITMQ=4 cargo test --package countersign-queue --no-fail-fast --test contract --test amqp --test amqp_tls

story: ## 20,000 events, three replicas and their broker killed at random (five minutes; STORY_EVENTS=… STORY_SEED=…)
	@$(INSTALL) docker-registry postgresql rabbitmq
	cargo build --workspace
	STORY_EVENTS=$(or $(STORY_EVENTS),20000) cargo test --package integration-tests --test replicas -- --nocapture kill_9

partition: ## a minute without the broker for one of three replicas, each in a network namespace of its own (two minutes, root)
	@$(INSTALL) docker-registry postgresql rabbitmq namespaces
	cargo build --workspace
	cargo test --package integration-tests --test partition -- --nocapture

cluster-test: ## admission asked by a real kube-apiserver, and what kubectl says; deploy/kubernetes in it (builds the server once: 6 minutes)
	@$(INSTALL) docker-registry kubernetes
	cargo build --workspace
	cargo test --package integration-tests --no-fail-fast --test cluster --test cluster_api

manifests: ## deploy/kubernetes, made anew from the Helm chart
	@$(INSTALL) helm
	BLESS=1 cargo test --quiet --package integration-tests --test chart deploy_kubernetes

check: ## format, lints, documentation, licences and advisories of dependencies
	@$(INSTALL) cargo-deny
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@# Those that `make test` leaves out are no targets to it.
	cargo clippy --package integration-tests --test cluster --test cluster_api --test image --test partition -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps
	.tools/bin/cargo-deny --all-features check --hide-inclusion-graph bans licenses sources
	@if timeout 120 .tools/bin/cargo-deny fetch db > /dev/null 2>&1; then \
	    echo ".tools/bin/cargo-deny check advisories"; \
	    .tools/bin/cargo-deny check --disable-fetch --hide-inclusion-graph advisories; \
	else \
	    echo "NOT CHECKED: known vulnerabilities of dependencies; the RustSec advisory database cannot be reached from here."; \
	fi

build: ## the optimised binary, target/release/countersign
	cargo build --release --package countersign

image: ## the container image, with docker or buildah
	@integration-tests/image.sh build

image-test: ## the image, built twice on a base made here (half an hour, root), and run with nothing but what it needs
	@$(INSTALL) docker-registry containers
	@integration-tests/image.sh test

bench: export COUNTERSIGN_BIN = $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)/release/countersign
bench: ## signatures, events and bytes: how many, how fast, beside bare clients (ARGS="--quick --only signing")
	@$(INSTALL) docker-registry cosign2 cosign3 notation skopeo ministack postgresql rabbitmq
	cargo build --release --workspace
	cargo run --release --quiet --package integration-tests --features kms --bin bench -- $(ARGS)

fuzz: ## each fuzzing target for SECONDS=60
	@$(INSTALL) cargo-fuzz
	@export PATH="$(CURDIR)/.tools/bin:$$PATH"; for target in $$(cargo fuzz list); do \
	    echo "fuzzing $$target for $(or $(SECONDS),60) s"; \
	    ASAN_OPTIONS=detect_odr_violation=0 RUSTC_BOOTSTRAP=1 cargo fuzz run "$$target" -- -max_total_time=$(or $(SECONDS),60); \
	done

tools: ## what the other targets run beside countersign, into .tools/
	@$(INSTALL)
