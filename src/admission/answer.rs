//! What people read: of a denial, of a warning, in the audit log.

use std::collections::BTreeMap;

use super::judge::{Unmet, Verdict};
use crate::policy::Mode;

/// Bytes of one answer. What does not fit is counted.
const LONGEST_ANSWER: usize = 64 << 10;
/// The API server cuts warnings at this many characters.
const LONGEST_WARNING: usize = 256;
const LONGEST_AUDIT: usize = 4096;

/// The answer that denies, or None if nothing keeps the images from running. For each image that is not attested the line
/// that its users know, and then every policy that it does not meet, with the reason and the cure.
#[must_use]
pub fn denial(verdicts: &[Verdict]) -> Option<String> {
    let mut text = String::new();
    let mut left_out = 0;
    for verdict in verdicts.iter().filter(|verdict| verdict.enforced().next().is_some()) {
        let one = of_image(verdict, verdict.enforced());
        if text.len() + one.len() > LONGEST_ANSWER {
            left_out += 1;
            continue;
        }
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&one);
    }
    if left_out > 0 {
        text.push_str(&format!("\nand {left_out} more"));
    }
    (!text.is_empty()).then(|| cut(&text, LONGEST_ANSWER))
}

/// The same for manifests that are judged on the command line, whatever the policies' modes.
#[must_use]
pub fn of_image<'a>(verdict: &'a Verdict, unmet: impl Iterator<Item = &'a Unmet>) -> String {
    let mut text = format!("image {} is not attested", shown(&verdict.text));
    // Many policies mostly have the same against an image.
    let mut by_reason: Vec<(String, Vec<&str>)> = vec![];
    for unmet in unmet {
        let (why, name) = (unmet.why.to_string(), unmet.bound.policy.name.as_str());
        match by_reason.iter_mut().find(|(known, _)| *known == why) {
            Some((_, names)) => names.push(name),
            None => by_reason.push((why, vec![name])),
        }
    }
    for (why, names) in by_reason {
        let policies = if names.len() == 1 { "policy" } else { "policies" };
        text.push_str(&format!("\n  {policies} {}: {why}", names.join(", ")));
    }
    if let Some(pending) = verdict.pending {
        text.push_str(&format!("\n  {pending}"));
    }
    text
}

/// One line for each image that does not meet a policy whose mode is `warn`.
#[must_use]
pub fn warnings(verdicts: &[Verdict]) -> Vec<String> {
    const MOST: usize = 32;
    let warning = |verdict: &Verdict| {
        let first = verdict.of_mode(Mode::Warn).next()?;
        let (image, name, why) = (shown(&verdict.text), &first.bound.policy.name, &first.why);
        Some(cut(&format!("image {image} is not attested (policy {name}): {why}"), LONGEST_WARNING))
    };
    verdicts.iter().filter_map(warning).take(MOST).collect()
}

/// What the audit log keeps.
#[must_use]
pub fn audit(verdicts: &[Verdict]) -> BTreeMap<String, String> {
    let mut audit = BTreeMap::new();
    for mode in [Mode::Warn, Mode::Audit] {
        let lines = verdicts.iter().filter(|verdict| verdict.of_mode(mode).next().is_some());
        let lines: Vec<_> = lines.map(|verdict| of_image(verdict, verdict.of_mode(mode))).collect();
        if !lines.is_empty() {
            audit.insert(format!("unmet-{mode}"), cut(&lines.join("\n"), LONGEST_AUDIT));
        }
    }
    audit
}

/// Text of others as it may be repeated.
#[must_use]
pub fn shown(text: &str) -> String {
    const READABLE: usize = 400;
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut shown: String = text.chars().take(READABLE).map(printable).collect();
    if text.chars().nth(READABLE).is_some() {
        shown.push('…');
    }
    shown
}

/// At most so many bytes, in whole characters.
fn cut(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let room = most - '…'.len_utf8();
    let end = text.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= room).last().unwrap_or_default();
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        admission::{
            daemon::Pending,
            why::{Fault, Why},
        },
        policy::{Bound, Patterns, Policy},
    };

    fn unmet(policy: &str, mode: Mode, why: Why) -> Unmet {
        let policy = Policy { mode, ..Policy::new(policy, "release", "default") };
        Unmet { bound: Arc::new(Bound { policy, allow: Patterns::default(), refused: None }), why }
    }

    fn unsigned() -> Why {
        Why::Unsigned { witness: "release".into(), fault: Fault::Nothing }
    }

    fn verdict(text: &str, unmet: Vec<Unmet>) -> Verdict {
        Verdict { text: text.into(), unmet, pinned: None, asked: 1, pending: None }
    }

    #[test]
    fn the_first_line_is_the_one_that_users_know_and_every_image_and_policy_is_listed() {
        let digest = format!("docker.io/library/alpine:3.11@sha256:{}", "d".repeat(64));
        let tag = Why::Tag { pinned: Box::new(digest.parse().unwrap()), otherwise: None };
        let mut pending = verdict("r.example.com/b", vec![unmet("one", Mode::Enforce, unsigned())]);
        pending.pending = Some(Pending { seconds: 2 });
        let text = denial(&[
            verdict("alpine:3.11", vec![unmet("one", Mode::Enforce, tag.clone()), unmet("two", Mode::Enforce, tag)]),
            verdict("fine", vec![]),
            verdict("only-warned", vec![unmet("warned", Mode::Warn, unsigned())]),
            pending,
        ]);
        let expected = format!(
            "image alpine:3.11 is not attested\n  \
             policies one, two: it is used by a tag, and tags can be moved; use the digest, which is attested: {digest}\n\
             image r.example.com/b is not attested\n  \
             policy one: it is not signed, and witness release must have signed it\n  \
             pushed 2 s ago, being signed: retry"
        );
        assert_eq!(text, Some(expected));
        assert_eq!(denial(&[verdict("only-warned", vec![unmet("warned", Mode::Warn, unsigned())])]), None);
    }

    #[test]
    fn answers_warnings_and_audit_texts_have_bounds_and_hold_no_control_characters() {
        let long = "é\u{1b}[31m".repeat(10_000);
        let many: Vec<_> = (0..500)
            .flat_map(|_| [Mode::Enforce, Mode::Warn, Mode::Audit])
            .map(|mode| verdict(&long, vec![unmet("p", mode, unsigned())]))
            .collect();
        let text = denial(&many).unwrap();
        assert!(text.len() <= LONGEST_ANSWER + 64 && text.ends_with(" more"), "{}", text.len());
        assert!(!text.contains('\u{1b}'));
        assert!(warnings(&many).iter().all(|warning| warning.len() <= LONGEST_WARNING));
        let audit = audit(&many);
        assert_eq!(audit.keys().collect::<Vec<_>>(), ["unmet-audit", "unmet-warn"]);
        assert!(audit.values().all(|text| text.len() <= LONGEST_AUDIT));
    }
}
