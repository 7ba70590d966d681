#!/bin/sh
# Makes what compose.yaml hands out as secrets: passwords, the witness's key, a certificate. Once, before the first start:
#
#     sudo config/compose/make-secrets.sh            # into the folder secrets beside compose.yaml
#
# Each file belongs to the one user that reads it in its container, which takes root to arrange (with rootless engines:
# podman unshare config/compose/make-secrets.sh). Whoever is not root gets files that everybody may read, in a folder that
# nobody else may enter; countersign warns of such files.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/../../secrets}
if [ -e "$folder" ]; then
    echo "$folder is there already: remove it first, and with it the volumes that know its passwords" >&2
    exit 1
fi
umask 077
rm -rf "$folder.new"
mkdir -p "$folder.new"
cd "$folder.new"

random() { openssl rand -hex 32; }
key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }

random > webhook_token
random > postgres_password
rabbitmq_password=$(random)
# The key that signs. In earnest it stays in a KMS: see config/examples/aws-kms.toml.
key release_key
# The certificate that countersign shows to the registry, for the name that both replicas share.
key tls_key
openssl req -x509 -key tls_key -days 3650 -subj /CN=countersign -addext basicConstraints=critical,CA:FALSE \
    -addext subjectAltName=DNS:countersign -out tls_certificate

# Without TLS: whoever is between these containers is on this machine.
printf 'amqp://countersign:%s@rabbitmq:5672/%%2f\n' "$rabbitmq_password" > amqp_url
printf 'postgres://countersign:%s@postgres:5432/countersign?sslmode=disable\n' "$(cat postgres_password)" > ledger_url
printf 'default_user = countersign\ndefault_pass = %s\n' "$rabbitmq_password" > rabbitmq_config
sed "s/THE-TOKEN/$(cat webhook_token)/" "$here/registry.yml" > registry_config

# own USER FILE...: who they are in their images.
own() {
    owner=$1
    shift
    if [ "$(id -u)" = 0 ]; then
        chmod 0400 "$@"
        chown "$owner" "$@"
    else
        chmod 0444 "$@"
    fi
}
own 65532 webhook_token release_key tls_key amqp_url ledger_url
own 999 postgres_password rabbitmq_config
own 0 registry_config
chmod 0444 tls_certificate
cd - > /dev/null
# There at once or not at all.
mv "$folder.new" "$folder"
