#!/bin/bash
# What `make demo` runs: a registry and countersign on this machine, one image pushed, and everybody's word on its signature.
# KEEP=1 leaves both running until Ctrl-C.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
registry_pid='' daemon_pid='' logged=0

# The commands below are shown as a user would type them.
docker-registry() { "$top/.tools/bin/docker-registry" "$@"; }
cosign() { "$top/.tools/bin/cosign3" "$@"; }
skopeo() { "$top/.tools/bin/skopeo" "$@"; }
push-image() { "$(dirname "$countersign")/push-image" "$@"; }
countersign=${COUNTERSIGN_BIN:-$top/target/debug/countersign}
countersign() { "$countersign" "$@"; }

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'; else bold='' dim='' green='' red='' plain=''; fi

title() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
note() { printf '%s\n' "$*"; }
command_line() { printf '%s$ %s%s\n' "$dim" "$*" "$plain"; }
indent() { sed 's/^/  /'; }

# Runs a command that must succeed, or (refused) must not, and shows what it says.
accepted() {
    command_line "$*"
    if "$@" > "$work/said" 2>&1; then
        indent < "$work/said"
        printf '  %s✔ accepted%s\n' "$green" "$plain"
    else
        indent < "$work/said"
        fail "this should have been accepted"
    fi
}

refused() {
    command_line "$*"
    if "$@" > "$work/said" 2>&1; then
        indent < "$work/said"
        fail "this should have been refused"
    fi
    indent < "$work/said"
    printf '  %s✔ refused, as it should be%s\n' "$green" "$plain"
}

shown() {
    command_line "$*"
    "$@" 2>&1 | indent || fail "this should have worked"
}

fail() {
    printf '%sdemo: %s%s\n' "$red" "$*" "$plain" >&2
    for log in registry.log countersign.log; do
        [ ! -s "$work/$log" ] || { printf -- '--- end of %s ---\n' "$log" && tail -n 10 "$work/$log" | cut -c 1-300; } >&2
    done
    exit 1
}

stop() {
    local pid
    trap - EXIT INT TERM
    for pid in $daemon_pid $registry_pid; do kill "$pid" 2> /dev/null || true; done
    for pid in $daemon_pid $registry_pid; do wait "$pid" 2> /dev/null || true; done
    cd /
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

# The first port from $1 on that nobody listens on.
free_port() {
    local port
    for ((port = $1; port < $1 + 1000; port++)); do
        (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || { echo "$port" && return; }
    done
    fail "no port from $1 on is free"
}

# until_ready PID URL WHAT
until_ready() {
    local tries
    for ((tries = 0; tries < 200; tries++)); do
        ! curl --silent --fail --output /dev/null "$2" || return 0
        kill -0 "$1" 2> /dev/null || fail "$3 ended at once"
        sleep 0.05
    done
    fail "$3 does not answer at $2"
}

# What countersign has logged since the last look.
new_log() {
    local lines
    lines=$(wc -l < countersign.log)
    sed -n "$((logged + 1)),${lines}p" countersign.log | indent
    logged=$lines
}

[ -x "$countersign" ] || fail "$countersign is not built; run it as \`make demo\`"
cd "$work"
registry_port=$(free_port 5000)
port=$(free_port 8080)
registry=127.0.0.1:$registry_port

title "1. A key (a real one stays in a KMS) and a rule"
shown countersign key generate --spec EC_P256 --out demo.key.pem
(umask 077 && head -c 24 /dev/urandom | base64 | tr -d '\n' > webhook-token)
cat > countersign.toml << END
[server]
listen = "127.0.0.1:$port"

[queue]
path = "$work/state"

[[registry]]
name = "$registry"
url = "http://$registry"

[[source]]
name = "main"
kind = "distribution"
registry = "$registry"
token = { file = "$work/webhook-token" }

[[witness]]
name = "demo"
description = "Signs what this demo pushes"
key = "file://$work/demo.key.pem"

[[rule]]
name = "team"
scope = "team"
witness = "demo"
algorithm = "ECDSA_SHA_256"
END
command_line "cat countersign.toml"
indent < countersign.toml
shown countersign check --config countersign.toml
countersign witness public-key demo --config countersign.toml > demo.pub

title "2. A registry that tells countersign of each push, and countersign"
cat > registry.yml << END
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: $work/registry}
http: {addr: '$registry', secret: demo}
notifications:
  events: {includereferences: true}
  endpoints:
    - name: countersign
      url: http://127.0.0.1:$port/events/main
      headers: {Authorization: [Bearer $(cat webhook-token)]}
      timeout: 5s
      threshold: 3
      backoff: 1s
      ignore: {mediatypes: [application/octet-stream], actions: [pull, mount, delete]}
END
chmod 600 registry.yml
command_line "docker-registry serve registry.yml &"
OTEL_TRACES_EXPORTER=none "$top/.tools/bin/docker-registry" serve registry.yml > registry.log 2>&1 &
registry_pid=$!
until_ready $registry_pid "http://$registry/v2/" docker-registry
command_line "countersign serve --config countersign.toml &"
"$countersign" serve --config countersign.toml > countersign.log 2>&1 &
daemon_pid=$!
until_ready $daemon_pid "http://127.0.0.1:$port/readyz" countersign
new_log

title "3. An image is pushed, for two platforms, and signed"
image=$registry/team/app:1.0
command_line "push-image $image"
push-image "$image" | tee pushed | indent
pushed=$(date +%s%N)
index=$(awk '$1 == "index" {print $2}' pushed)
sigtag=${index/:/-}.sig
for ((tries = 0; tries < 1000; tries++)); do
    ! curl --silent --fail --output signature.json --header 'Accept: application/vnd.oci.image.manifest.v1+json' \
        "http://$registry/v2/team/app/manifests/$sigtag" || break
    sleep 0.01
done
[ -s signature.json ] || fail "no signature after 10 s"
note "  its signature was in the registry $((($(date +%s%N) - pushed) / 1000000)) ms later, as team/app:$sigtag"
# The platforms' own signatures may be a moment behind the index's.
for ((tries = 0; tries < 100; tries++)); do
    ! countersign verify --config countersign.toml "$image" > /dev/null 2>&1 || break
    sleep 0.05
done
note "what countersign logged:"
new_log
accepted countersign verify --config countersign.toml "$image"
shown countersign explain --config countersign.toml "$image"

title "4. Other people's verifiers, with nothing but the public key"
cat > policy.json << END
{"default": [{"type": "reject"}],
 "transports": {"docker": {"$registry": [{"type": "sigstoreSigned", "keyPath": "$work/demo.pub"}]}}}
END
mkdir registries.d
echo "docker: {\"$registry\": {use-sigstore-attachments: true}}" > registries.d/demo.yaml
accepted cosign verify --key demo.pub --insecure-ignore-tlog "$image"
command_line "cat policy.json"
indent < policy.json
accepted skopeo --policy policy.json --registries.d registries.d copy --src-tls-verify=false "docker://$image" dir:copied

title "5. An image that no rule covers"
unsigned=$registry/scratch/app:1.0
command_line "push-image $unsigned"
push-image "$unsigned" | indent
refused countersign verify --config countersign.toml "$unsigned"
shown countersign explain --config countersign.toml "$unsigned"
refused cosign verify --key demo.pub --insecure-ignore-tlog "$unsigned"
refused skopeo --policy policy.json --registries.d registries.d copy --src-tls-verify=false "docker://$unsigned" dir:refused

if [ "${KEEP:-}" = 1 ]; then
    title "Both stay up until you press Ctrl-C"
    note "  push to           $registry/team/...   (plain HTTP; $top/target/debug/push-image $registry/team/app:2.0 pushes a new image)"
    note "  metrics           http://127.0.0.1:$port/metrics"
    note "  the files         $work"
    note "  the log           tail -f $work/countersign.log"
    note "  the story so far  $countersign explain --config $work/countersign.toml $image"
    wait -n $daemon_pid $registry_pid || true
    fail "one of the two has ended"
fi

title "What to try next"
note "  make demo KEEP=1     the same, and both stay up: push your own images, look at /metrics"
note "  make test            every test, beside real registries, verifiers and KMSs"
note "  $countersign --help"
