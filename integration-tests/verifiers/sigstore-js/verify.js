// `node verify.js KEY.pem HOST/REPOSITORY:TAG`, or `@DIGEST`: asks sigstore-js whether an image in a registry without TLS has a bundle
// that a public key signed, and says what it answers.
//
// sigstore-js verifies bundles and knows nothing of registries: finding them, and that they are about this image, is done here.
'use strict';

const { createHash, createPublicKey } = require('node:crypto');
const { readFileSync } = require('node:fs');
const { bundleFromJSON } = require('@sigstore/bundle');
const { Verifier, toSignedEntity, toTrustMaterial } = require('@sigstore/verify');

const BUNDLE = 'application/vnd.dev.sigstore.bundle.v0.3+json';
const IMAGE = 'application/vnd.oci.image.manifest.v1+json';
const INDEX = 'application/vnd.oci.image.index.v1+json';

const sha256 = (bytes) => createHash('sha256').update(bytes).digest();

/** The bundles that refer to an image, and the digest of the image. */
async function bundles(reference) {
  const [, host, repository, name] = /^([^/]+)\/([^:@]+)[:@](.+)$/.exec(reference);
  // Undefined if there is none.
  const get = async (path, accept) => {
    const answer = await fetch(`http://${host}/v2/${repository}/${path}`, { headers: { accept } });
    if (!answer.ok && answer.status !== 404) throw new Error(`${path}: ${answer.status}`);
    return answer.ok ? Buffer.from(await answer.arrayBuffer()) : undefined;
  };
  const digest = `sha256:${sha256(await get(`manifests/${name}`, `${IMAGE}, ${INDEX}`)).toString('hex')}`;
  const referrers = (await get(`referrers/${digest}`, INDEX)) ?? (await get(`manifests/${digest.replace(':', '-')}`, INDEX));
  const found = [];
  for (const referrer of referrers ? JSON.parse(referrers).manifests : []) {
    if (referrer.artifactType !== BUNDLE) continue;
    const manifest = JSON.parse(await get(`manifests/${referrer.digest}`, IMAGE));
    found.push(JSON.parse(await get(`blobs/${manifest.layers[0].digest}`, '*/*')));
  }
  return { digest, found };
}

/** Throws sigstore-js's error if it is not signed by the key. */
function verify(json, key, digest) {
  const bundle = bundleFromJSON(json);
  const rawBytes = key.export({ type: 'spki', format: 'der' });
  // A bundle names its key by this hint.
  const keys = { [sha256(rawBytes).toString('base64')]: { rawBytes } };
  const nobody = { certificateAuthorities: [], timestampAuthorities: [], tlogs: [], ctlogs: [] };
  const without = { tlogThreshold: 0, ctlogThreshold: 0, timestampThreshold: 0 };
  new Verifier(toTrustMaterial(nobody, keys), without).verify(toSignedEntity(bundle));
  const { subject } = JSON.parse(bundle.content.dsseEnvelope.payload);
  if (!subject.some((one) => `sha256:${one.digest.sha256}` === digest)) throw new Error('the bundle is about another image');
}

async function main([keyFile, reference]) {
  const key = createPublicKey(readFileSync(keyFile));
  const { digest, found } = await bundles(reference);
  const refusals = [];
  for (const bundle of found) {
    try {
      verify(bundle, key, digest);
      return 0;
    } catch (error) {
      refusals.push(error.message);
    }
  }
  console.error(refusals.length ? `Error: ${refusals.join('; ')}` : 'not asked: there is no bundle');
  return 1;
}

main(process.argv.slice(2)).then(
  (code) => (process.exitCode = code),
  (error) => {
    console.error(`cannot judge: ${error.stack}`);
    process.exitCode = 3;
  },
);
