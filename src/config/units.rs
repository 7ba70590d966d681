//! Lengths of time and sizes, as people write them: `"500ms"`, `"24h"`, `"5MiB"`.

use std::time::Duration;

const TIMES: [(&str, u64); 5] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const SIZES: [(&str, u64); 4] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

/// For the schema.
pub(crate) const DURATION_PATTERN: &str = "^[0-9]+(ms|s|m|h|d)$";
/// For the schema.
pub(crate) const SIZE_PATTERN: &str = "^[0-9]+(B|KiB|MiB|GiB)$";

/// A whole number and one unit. None if it is anything else, or too long to count in milliseconds.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    read(text, &TIMES).map(Duration::from_millis)
}

/// A whole number and one unit, in bytes.
pub(crate) fn size(text: &str) -> Option<u64> {
    read(text, &SIZES)
}

/// The shortest way to write a length of time.
pub(crate) fn show_duration(milliseconds: u64) -> String {
    show(milliseconds, &TIMES)
}

/// The shortest way to write a size.
pub(crate) fn show_size(bytes: u64) -> String {
    show(bytes, &SIZES)
}

fn read(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

fn show(value: u64, units: &[(&str, u64)]) -> String {
    let (name, factor) =
        units.iter().rev().find(|(_, factor)| value >= *factor && value.is_multiple_of(*factor)).unwrap_or(&units[0]);
    format!("{}{name}", value / factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_read_and_shown_the_same() {
        for text in ["0ms", "500ms", "1s", "90s", "10m", "25h", "7d"] {
            let time = duration(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(show_duration(u64::try_from(time.as_millis()).unwrap()), text);
        }
        for text in ["0B", "1000B", "5MiB", "3KiB", "1GiB"] {
            assert_eq!(show_size(size(text).unwrap_or_else(|| panic!("{text}"))), text);
        }
    }

    #[test]
    fn what_has_no_number_or_no_unit_is_not_read() {
        for text in
            ["", "5", "s", "-1s", "1.5s", "1 s", "1S", "1s ", "1h30m", "99999999999999999999s", "18446744073709551615d", "５s"]
        {
            assert_eq!(duration(text), None, "{text}");
        }
        for text in ["5MB", "5", "MiB", "5mib"] {
            assert_eq!(size(text), None, "{text}");
        }
    }
}
