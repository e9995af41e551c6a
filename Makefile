# Overkeep. "make" or "make help" lists what there is to do.

PREFIX  ?= /usr/local
DESTDIR ?=
BIN     ?= bin/overkeep

# Go 1.21 or newer; it fetches the release that go.mod asks for by itself.
# Looked for anew each time it is used: "make deps" may have just installed it.
GO = $(shell .ci/deps --go)
export GOTOOLCHAIN ?= auto

# One binary without shared libraries: it works in a view whose /nix/store is an
# overlay, and on a rescue system. cgo is for SQLite and google/fscrypt.
export CGO_ENABLED = 1
TAGS    = osusergo,netgo,sqlite_omit_load_extension
VERSION = $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS = -s -w -linkmode external -extldflags -static -X main.version=$(VERSION)

.PHONY: help deps build test fuzz demo bench install clean fmt
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

deps: ## install what building and testing need (Debian, root), only if missing
	@.ci/deps

# Test packages that run side by side each build it: one at a time, and a binary that
# is up to date is not written again under the hands of who copies it.
build: ## the static binary bin/overkeep
	@mkdir -p bin
	flock bin/.lock $(GO) build -trimpath -buildvcs=false -tags $(TAGS) -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/overkeep

test: deps ## everything; as root, else what needs it is skipped; CI=true lets nothing be skipped
	$(GO) vet -tags $(TAGS) ./...
	$(GO) test -tags $(TAGS) -timeout 45m ./...
	$(if $(CI),$(MAKE) fuzz)

# What decides about paths, and moves them, is read from files that others made: each parser on the way
# gets random input for a while, beyond its committed corpus.
FUZZTIME ?= 60s
FUZZMORE ?= 20s
fuzz: ## random policies, .drv files, database rows, FUZZTIME each; NARs, plans, journals, FUZZMORE each
	$(GO) test -tags $(TAGS) -run '^$$' -fuzz '^FuzzParse$$' -fuzztime $(FUZZTIME) ./policy
	$(GO) test -tags $(TAGS) -run '^$$' -fuzz '^FuzzParse$$' -fuzztime $(FUZZTIME) ./overlay/drv
	$(GO) test -tags $(TAGS) -run '^$$' -fuzz '^FuzzRows$$' -fuzztime $(FUZZTIME) ./overlay/facts
	$(GO) test -tags $(TAGS) -run '^$$' -fuzz '^FuzzRead$$' -fuzztime $(FUZZMORE) ./overlay/nar
	$(GO) test -tags $(TAGS) -run '^$$' -fuzz '^FuzzDecode$$' -fuzztime $(FUZZMORE) ./overlay/plan
	$(GO) test -tags $(TAGS) -run '^$$' -fuzz '^FuzzJournal$$' -fuzztime $(FUZZMORE) ./overlay/move

demo: deps build ## see it work on a throw-away laptop (root)
	tests/demo/run

bench: deps build ## measure (root); ratios count, not seconds
	$(GO) test -tags $(TAGS) -timeout 60m -run '^$$' -bench . ./tests/bench/...

# Manual pages and completions come out of the binary itself, so they cannot lag.
install: build ## into DESTDIR/PREFIX, with manual pages and completions
	install -D -m 0755 $(BIN) '$(DESTDIR)$(PREFIX)/bin/overkeep'
	rm -rf bin/man && mkdir -p bin/man
	$(BIN) docs --man bin/man
	for page in bin/man/*.[1-9]; do \
		install -D -m 0644 "$$page" "$(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}" || exit 1; \
	done
	$(BIN) completion bash >bin/completion.bash
	$(BIN) completion zsh >bin/completion.zsh
	$(BIN) completion fish >bin/completion.fish
	install -D -m 0644 bin/completion.bash '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/overkeep'
	install -D -m 0644 bin/completion.zsh '$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_overkeep'
	install -D -m 0644 bin/completion.fish '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/overkeep.fish'

clean: ## remove what was built here (not the image cache, see tests/bed/rootfs)
	rm -rf bin

fmt: ## gofmt
	$(dir $(GO))gofmt -w cmd crypt overlay policy systemd tests
