//! `mistakes.txt` holds a mistake of each kind, and what is said about it, word for word.

use std::{fmt::Write as _, fs, path::Path};

use super::{super::problem::in_full, parse};

const GOLDEN: &str = include_str!("mistakes.txt");
const CASE: &str = "\n════ ";
const ANSWER: &str = "\n──── \n";

#[test]
fn every_mistake_is_reported_with_its_line_and_its_cure() {
    let mut answered = GOLDEN.split(CASE).next().unwrap().to_owned();
    for case in GOLDEN.split(CASE).skip(1) {
        let (title, rest) = case.split_once('\n').unwrap();
        let text = rest.split(ANSWER).next().unwrap();
        let answer = match parse(text) {
            Ok((_, warnings)) if warnings.is_empty() => "nothing is wrong".to_owned(),
            Ok((_, warnings)) => in_full(&warnings),
            Err(problems) => problems.to_string(),
        };
        assert!(!answer.contains("hunter2"), "{title}: a secret is shown:\n{answer}");
        write!(answered, "{CASE}{title}\n{text}{ANSWER}{answer}\n").unwrap();
    }
    if std::env::var_os("BLESS").is_some() {
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config/tests/mistakes.txt"), &answered).unwrap();
    } else if let Some((is, should)) = answered.lines().zip(GOLDEN.lines()).find(|(is, should)| is != should) {
        panic!("mistakes.txt says\n{should}\nand the answer is\n{is}\nIf that is better, run this test with BLESS=1.");
    } else {
        assert_eq!(answered.len(), GOLDEN.len());
    }
}
