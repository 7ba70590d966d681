# countersign in an image of its own: one static binary, the certificate authorities, and nothing else.
#
#     docker build --tag countersign .                 BuildKit; for another platform: --platform linux/arm64
#     make image                                       buildah, or docker
#
# The same source and the same SOURCE_DATE_EPOCH give the same files.

ARG RUST=1.95.0

FROM docker.io/library/rust:${RUST}-slim-bookworm AS build
WORKDIR /src
COPY . .
# "fat" with one unit is what is released, because it is the smallest; "off" builds in half of the time.
ARG CARGO_PROFILE_RELEASE_LTO=fat
# What every file is dated: seconds since 1970.
ARG SOURCE_DATE_EPOCH=0
# "s": every node pulls this image, and the time of a signature is that of the registry and the KMS.
ENV CARGO_PROFILE_RELEASE_OPT_LEVEL=s \
    CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 \
    CARGO_PROFILE_RELEASE_STRIP=symbols \
    CARGO_TARGET_DIR=/target \
    RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=/src=countersign --remap-path-prefix=/usr/local/cargo=cargo"
# The target is named, or procedural macros would be asked to be static as well.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/target \
    # cargo goes by dates, and what is in the cache may be younger than a source that it was not built from.
    touch src/*.rs queue/src/*.rs \
 && target="$(rustc --print host-tuple)" \
 # A static program loads no PKCS#11 modules, and there is none here to be loaded.
 && cargo build --release --locked --package countersign --no-default-features --target "$target" \
 && install -D --mode=0755 "/target/$target/release/countersign" /image/countersign \
 && install -D --mode=0644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt \
 # Without it glibc asks the name servers first, and /etc/hosts only when none answers.
 && printf 'hosts: files dns\n' > /image/etc/nsswitch.conf \
 && mkdir --parents /image/var/lib \
 && install --directory --mode=0700 /state/countersign \
 && find /image /state -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +

FROM scratch
COPY --from=build --chown=0:0 /image/ /
# A volume takes its owner from this folder.
COPY --from=build --chown=65532:65532 /state/ /var/lib/

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="countersign" \
      org.opencontainers.image.description="Signs what is pushed to a container registry, and verifies it before it runs" \
      org.opencontainers.image.source="https://github.com/countersign/countersign" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER 65532:65532
WORKDIR /var/lib/countersign
VOLUME ["/var/lib/countersign"]
EXPOSE 8080
# Alive, not ready: a daemon whose registry is down needs no restart.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["/countersign", "health"]
ENTRYPOINT ["/countersign"]
CMD ["serve", "--config", "/etc/countersign/countersign.toml"]
