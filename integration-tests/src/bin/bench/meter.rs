//! What a process has used: its processor time, from proc(5), and its syncs.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::process::scratch;
use tempfile::TempDir;

/// User and system time so far, in seconds (`/proc/PID/stat`, fields 14 and 15, in hundredths of a second), its ended threads included.
pub fn cpu(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name in /proc/PID/stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).context("a short /proc/PID/stat")?.parse::<f64>().context("not a number");
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

/// The same of a process and those that it has started.
pub fn cpu_of_family(pid: u32) -> Result<f64> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    // One that has ended meanwhile is none any more.
    let children = children.split_whitespace().filter_map(|child| cpu(child.parse().ok()?).ok());
    Ok(cpu(pid)? + children.sum::<f64>())
}

/// The library that counts a program's syncs and slows them down, of the queue's own benchmark.
pub struct Syncs {
    folder: TempDir,
}

impl Syncs {
    pub fn build() -> Result<Self> {
        let folder = scratch()?;
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../queue/benches/syncs.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-O2", "-shared", "-fPIC", "-o"]).arg(folder.path().join("syncs.so")).arg(source);
        ensure!(compiler.status().context("start cc")?.success(), "cc cannot compile {source}");
        Ok(Self { folder })
    }

    /// A count that begins with 0, and what to put into a program's environment to have its syncs counted there and slowed.
    pub fn watch(&self, slowed: Duration) -> Result<(Count, Vec<(&'static str, String)>)> {
        let file = self.folder.path().join(format!("count-{}", fastrand::u64(..)));
        fs::write(&file, 0_u64.to_ne_bytes())?;
        let environment = vec![
            ("LD_PRELOAD", self.folder.path().join("syncs.so").display().to_string()),
            ("SYNC_COUNT", file.display().to_string()),
            ("SYNC_DELAY", slowed.as_micros().to_string()),
        ];
        Ok((Count(file), environment))
    }
}

/// Of syncs, so far.
pub struct Count(PathBuf);

impl Count {
    pub fn read(&self) -> Result<u64> {
        let bytes = fs::read(&self.0)?;
        Ok(u64::from_ne_bytes(bytes.as_slice().try_into().context("the count of syncs is not 8 bytes")?))
    }
}
