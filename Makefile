# The human face of Orlop; `make help` lists it. Everything runs as root on Debian 12 with rustup's stable Rust.

.DEFAULT_GOAL := help
.PHONY: help deps build up down purge test bench fmt clean

help: ## what can be made
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install what building needs (Debian packages, the BPF linker)
	@scripts/deps.sh build

build: deps ## target/release/{orlop,orlop-monitor,orlop-cni}
	@scripts/build.sh

up: build ## start a cluster with the demo on this machine
	@scripts/up.sh

down: ## stop it and take back all of it but the data folder
	@scripts/down.sh

purge: down ## also delete the data folder
	@rm -rf /var/lib/orlop
	@echo "purge: /var/lib/orlop is deleted"

test: ## the whole gate
	@scripts/test.sh

bench: build ## latency and memory, beside what Orlop replaces where that is installed
	@scripts/bench.sh

fmt: ## format the sources
	@cargo fmt

clean: ## delete what was built
	@cargo clean
