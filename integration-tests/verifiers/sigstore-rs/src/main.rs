//! `sigstore-rs KEY.pem HOST/REPOSITORY:TAG`, or `@DIGEST`: asks the crate sigstore whether an image in a registry without TLS is
//! signed by a public key, and says what it answers.
//!
//! It does what the crate's documentation and its example `verify` do: all is fetched and judged by the crate.

use std::error::Error;
use std::process::ExitCode;
use std::{env, fs, io};

use sigstore::cosign::verification_constraint::{PublicKeyVerifier, VerificationConstraint};
use sigstore::cosign::{ClientBuilder, CosignCapabilities, verify_constraints};
use sigstore::registry::{Auth, ClientConfig, ClientProtocol, OciReference};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // Why it passes a signature over, the crate only logs.
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).without_time().with_target(false).init();
    match verify().await {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(refusal)) => {
            eprintln!("Error: {refusal}");
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("cannot judge: {error}");
            ExitCode::from(3)
        }
    }
}

/// Why it is refused, if it is.
async fn verify() -> Result<Option<String>> {
    let [key, image] = env::args().skip(1).collect::<Vec<_>>().try_into().map_err(|_| "wants KEY.pem IMAGE")?;
    let image: OciReference = image.parse()?;
    let key: Box<dyn VerificationConstraint> = Box::new(PublicKeyVerifier::try_from(&fs::read(key)?)?);
    let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
    let mut client = ClientBuilder::default().with_oci_client_config(config).build()?;
    let signatures = client.trusted_signature_layers(&Auth::Anonymous, &image).await?;
    Ok(verify_constraints(&signatures, [key].iter()).err().map(|refusal| refusal.to_string()))
}
