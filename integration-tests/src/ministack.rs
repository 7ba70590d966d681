//! ministack: a KMS, IAM and STS as AWS speaks them, that checks the signature of each request.

use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hmac::{Hmac, Mac};
use reqwest::Url;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::process::{Process, free_port, http_client, scratch, tool};

pub const REGION: &str = "us-east-1";

/// Who asks.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub access_key_id: String,
    pub secret_access_key: String,
}

#[derive(Debug)]
pub struct Ministack {
    port: u16,
    _folder: TempDir,
    _process: Process,
}

impl Ministack {
    pub async fn start() -> Result<Self> {
        let (port, folder, root) = (free_port()?, scratch()?, Self::root());
        let mut command = Command::new(tool("ministack/bin/ministack")?);
        command.current_dir(folder.path()).env("HOME", folder.path()).env("TMPDIR", folder.path());
        // Without these it listens on every address, and for mail and things besides.
        command.env("BIND_HOST", "127.0.0.1").env("GATEWAY_PORT", port.to_string()).env("SERVICES", "kms,sts,iam");
        command.env("IOT_MTLS_ENABLED", "false").env("SFTP_ENABLED", "false").env("AUTH", "true");
        command.env("AWS_ACCESS_KEY_ID", root.access_key_id).env("AWS_SECRET_ACCESS_KEY", root.secret_access_key);
        let mut process = Process::start("ministack", &mut command, &folder.path().join("log"))?;
        let (http, probe) = (http_client()?, format!("http://127.0.0.1:{port}/_ministack/health"));
        process.wait_ready(Duration::from_secs(60), || async { http.get(&probe).send().await.is_ok() }).await?;
        Ok(Self { port, _folder: folder, _process: process })
    }

    /// `127.0.0.1:PORT`, as it stands in `awskms://HOST/KEY`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A new IAM user that may do these actions (`kms:Sign`) on every key, and its credentials.
    /// Those of the root user would prove nothing: ministack does not check them.
    pub async fn user(&self, name: &str, actions: &[&str]) -> Result<Credentials> {
        let policy = json!({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]});
        self.iam(&[("Action", "CreateUser"), ("UserName", name)]).await?;
        let policy = policy.to_string();
        let attach = [("Action", "PutUserPolicy"), ("UserName", name), ("PolicyName", "all"), ("PolicyDocument", &policy)];
        self.iam(&attach).await?;
        self.access_key(name).await
    }

    /// Further credentials of a user.
    pub async fn access_key(&self, user: &str) -> Result<Credentials> {
        let answer = self.iam(&[("Action", "CreateAccessKey"), ("UserName", user)]).await?;
        let element = |name: &str| {
            let (_, rest) = answer.split_once(&format!("<{name}>")).with_context(|| format!("no {name} in {answer}"))?;
            let (value, _) = rest.split_once('<').with_context(|| format!("{name} does not end in {answer}"))?;
            anyhow::Ok(value.to_owned())
        };
        Ok(Credentials { access_key_id: element("AccessKeyId")?, secret_access_key: element("SecretAccessKey")? })
    }

    /// From now on nobody knows these credentials of the user.
    pub async fn delete_access_key(&self, user: &str, credentials: &Credentials) -> Result<()> {
        let id = credentials.access_key_id.as_str();
        self.iam(&[("Action", "DeleteAccessKey"), ("UserName", user), ("AccessKeyId", id)]).await.map(drop)
    }

    /// A new role that may do these actions on every key, for whom the statement of its trust policy lets take it; returns its ARN.
    pub async fn role(&self, name: &str, trust: &Value, actions: &[&str]) -> Result<String> {
        let trust = json!({"Version": "2012-10-17", "Statement": [trust]}).to_string();
        let create = [("Action", "CreateRole"), ("RoleName", name), ("AssumeRolePolicyDocument", trust.as_str())];
        self.iam(&create).await?;
        let policy = json!({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]});
        let policy = policy.to_string();
        let attach =
            [("Action", "PutRolePolicy"), ("RoleName", name), ("PolicyName", "all"), ("PolicyDocument", policy.as_str())];
        self.iam(&attach).await?;
        Ok(format!("arn:aws:iam::000000000000:role/{name}"))
    }

    /// A new signing key (`RSA_2048`, `ECC_NIST_P256`) with an alias; returns its id.
    pub async fn key(&self, spec: &str, alias: &str) -> Result<String> {
        let answer = self.kms("CreateKey", &json!({"KeySpec": spec, "KeyUsage": "SIGN_VERIFY"})).await?;
        let id = answer["KeyMetadata"]["KeyId"].as_str().context("a key without an id")?.to_owned();
        self.kms("CreateAlias", &json!({"AliasName": format!("alias/{alias}"), "TargetKeyId": id})).await?;
        Ok(id)
    }

    /// Asks the KMS as the root user.
    pub async fn kms(&self, operation: &str, body: &Value) -> Result<Value> {
        self.kms_as(&Self::root(), operation, body).await
    }

    /// Asks the KMS; an error with its words if it refuses.
    pub async fn kms_as(&self, who: &Credentials, operation: &str, body: &Value) -> Result<Value> {
        let target = format!("TrentService.{operation}");
        let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", target.as_str())];
        Ok(serde_json::from_str(&self.ask(who, "kms", &headers, body.to_string()).await?)?)
    }

    async fn iam(&self, form: &[(&str, &str)]) -> Result<String> {
        let mut url = Url::parse("http://form/")?;
        url.query_pairs_mut().extend_pairs(form).append_pair("Version", "2010-05-08");
        let body = url.query().unwrap_or_default().to_owned();
        self.ask(&Self::root(), "iam", &[("content-type", "application/x-www-form-urlencoded")], body).await
    }

    /// The headers of a `POST /` with this body that asks the KMS, signed now; they are good for some minutes.
    pub fn kms_headers(&self, who: &Credentials, operation: &str, body: &str) -> Vec<(String, String)> {
        let target = format!("TrentService.{operation}");
        self.headers(who, "kms", &[("content-type", "application/x-amz-json-1.1"), ("x-amz-target", &target)], body)
    }

    async fn ask(&self, who: &Credentials, service: &str, headers: &[(&str, &str)], body: String) -> Result<String> {
        let mut request = http_client()?.post(format!("http://{}/", self.host()));
        for (name, value) in self.headers(who, service, headers, &body) {
            request = request.header(name, value);
        }
        let response = request.body(body).send().await?;
        let (status, answer) = (response.status(), response.text().await?);
        ensure!(status.is_success(), "{service} answers {status}: {answer}");
        Ok(answer)
    }

    /// These headers and what signs them.
    fn headers(&self, who: &Credentials, service: &str, headers: &[(&str, &str)], body: &str) -> Vec<(String, String)> {
        #[expect(clippy::disallowed_methods, reason = "the other side compares it with its own clock")]
        let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
        let host = self.host();
        let mut signed = headers.to_vec();
        signed.extend([("host", host.as_str()), ("x-amz-date", &time)]);
        signed.sort_unstable();
        let authorization = sigv4(who, service, &time, &signed, body.as_bytes());
        let headers = signed.into_iter().chain([("authorization", authorization.as_str())]);
        headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn root() -> Credentials {
        Credentials { access_key_id: "AKIAROOT000000000000".to_owned(), secret_access_key: "root-of-the-test".to_owned() }
    }
}

/// The `Authorization` header of a `POST /` without a query. `headers` are sorted, their names in lower case.
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html>
fn sigv4(who: &Credentials, service: &str, time: &str, headers: &[(&str, &str)], body: &[u8]) -> String {
    let mut request = "POST\n/\n\n".to_owned();
    for (name, value) in headers {
        writeln!(request, "{name}:{value}").expect("a String takes everything");
    }
    let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
    write!(request, "\n{names}\n{}", hex::encode(Sha256::digest(body))).expect("a String takes everything");

    let day = &time[..8];
    let scope = format!("{day}/{REGION}/{service}/aws4_request");
    let statement = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex::encode(Sha256::digest(request)));
    let secret = format!("AWS4{}", who.secret_access_key).into_bytes();
    let key = [day, REGION, service, "aws4_request", &statement].iter().fold(secret, |key, part| hmac(&key, part));
    format!("AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={}", who.access_key_id, hex::encode(key))
}

fn hmac(key: &[u8], message: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of every length");
    mac.update(message.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_signed_as_botocore_signs_it() {
        let who = Credentials {
            access_key_id: "AKIDEXAMPLE".to_owned(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".to_owned(),
        };
        let headers = [
            ("content-type", "application/x-amz-json-1.1"),
            ("host", "kms.us-east-1.amazonaws.com"),
            ("x-amz-date", "20260101T000000Z"),
            ("x-amz-target", "TrentService.Sign"),
        ];
        let body = br#"{"KeyId":"alias/witness","Message":"+H00AJqLJ4pkCe1V1ZGHyNktm3KE+hUCMxkXSvzg2wk=","MessageType":"DIGEST","SigningAlgorithm":"RSASSA_PSS_SHA_256"}"#;
        let authorization = sigv4(&who, "kms", "20260101T000000Z", &headers, body);
        assert!(
            authorization.ends_with("Signature=9b318d7da6a3429afe4a24dfa225ede25249f6e877bf04fb188a376f5d3fe7f0"),
            "{authorization}"
        );
    }
}
