#!/bin/bash
# `make image` and `make image-test`: the container image, as it is released and as it is tested.
# LTO=off makes a build that is fast to make, for trying things out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml)
image=localhost/countersign:$version
# The same commit gives the same files.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
arguments=(--build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" --build-arg "VERSION=$version"
    --build-arg "REVISION=$(git describe --always --dirty --abbrev=40 --exclude='*')"
    --build-arg "CARGO_PROFILE_RELEASE_LTO=${LTO:-fat}")
# Only Docker's own format has a health check.
buildah=(--format docker --timestamp "$SOURCE_DATE_EPOCH")

build() {
    if command -v docker > /dev/null; then
        SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH docker buildx build "${arguments[@]}" --tag "$image" --load .
    elif command -v buildah > /dev/null; then
        buildah bud "${buildah[@]}" "${arguments[@]}" --tag "$image" .
    else
        echo "neither docker nor buildah is here: install one" >&2
        exit 1
    fi
    echo "built $image"
}

# What the recipe begins with, made of Debian's packages and of the toolchain that runs here: no image is pulled.
base() {
    local name toolchain
    name=docker.io/library/rust:$(sed -n 's/^ARG RUST=//p' Dockerfile)-slim-bookworm
    ! .tools/bin/buildah inspect --type image "$name" > /dev/null 2>&1 || return 0
    toolchain=$(rustc --print sysroot)
    root=$(mktemp -d)
    echo "making $name"
    debootstrap --variant=minbase --include=ca-certificates,gcc,libc6-dev bookworm "$root" > "$root.log" 2>&1 ||
        { tail "$root.log" >&2 && exit 1; }
    rm "$root.log"
    cp -a "$toolchain/bin" "$toolchain/lib" "$root/usr/local/"
    # Whom this machine trusts, so that cargo in there reaches what it reaches here.
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    tar -C "$root" -c . | .tools/bin/podman import --quiet --change ENV=CARGO_HOME=/usr/local/cargo - "$name" > /dev/null
}

run_tests() {
    [ "$(id -u)" = 0 ] || { echo "make image-test needs root: it makes a Debian to build on" >&2 && exit 1; }
    trap 'rm -rf "${root:-}" "${caches:-}"' EXIT
    base
    buildah+=(--isolation chroot --pull-never)
    .tools/bin/buildah bud "${buildah[@]}" "${arguments[@]}" --tag "$image" .
    # And once more with nothing that the first build, or an older one, has left: its caches are under TMPDIR.
    caches=$(mktemp -d)
    TMPDIR=$caches .tools/bin/buildah bud --no-cache "${buildah[@]}" "${arguments[@]}" --tag "$image-again" .
    COUNTERSIGN_IMAGE=$image cargo test --package integration-tests --test image
}

case ${1:-} in
    build) build ;;
    test) run_tests ;;
    *) echo "usage: $0 build|test" >&2 && exit 2 ;;
esac
