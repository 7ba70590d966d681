//! What one event costs with few rules and with many.

use anyhow::Result;
use integration_tests::house::{Keys, rule};
use integration_tests::process::memory;

use crate::Scale;
use crate::events::Silence;
use crate::report::{Aim, Table, float, median, number, text};
use crate::stage::{Flood, Plan, Stage};

pub async fn measure(scale: Scale) -> Result<Table> {
    let columns = ["rules", "CPU us/event", "of the first", "events/s", "VmRSS MiB"];
    let mut table = Table::new("rules", "CPU of the daemon per event by the number of rules", &columns);
    // Nobody asks it anything: no event gets further than the rules.
    let silence = Silence::bind()?;
    let numbers = [10, 1_000, 10_000];
    let mut stages = Vec::new();
    for rules in numbers {
        let text: String = (0..rules).map(one_rule).collect();
        stages.push((rules, Stage::start(Plan::new(&silence.host, 8, text)).await?, Vec::new()));
    }
    let count = scale.of(4000);
    for _ in 0..scale.rounds {
        for (rules, stage, rounds) in &mut stages {
            // A repository that one of the rules covers, each time another; the tag is none that it signs.
            let floods: Vec<Flood> = (0..*rules.min(&mut 100))
                .map(|team| Flood::new(&silence.host, &format!("team-{}/app/web", team * *rules / 100)))
                .collect();
            let events = (0..count).map(|number| floods[number % floods.len()].event(number)).collect();
            let before = stage.cpu()?;
            let took = stage.work_off(events, 8, "skipped").await?;
            let cpu = (stage.cpu()? - before) * 1e6 / float(count);
            rounds.push((cpu, float(count) / took.as_secs_f64()));
        }
    }
    let first: Vec<f64> = stages[0].2.iter().map(|(cpu, _)| *cpu).collect();
    for (rules, stage, rounds) in &stages {
        table.row([
            text(rules.to_string()),
            number(median(rounds.iter().map(|(cpu, _)| *cpu)), 0),
            number(median(rounds.iter().zip(&first).map(|((cpu, _), first)| cpu / first)), 2),
            number(median(rounds.iter().map(|(_, rate)| *rate)), 0),
            number(memory(stage.pid()?, "VmRSS")?, 1),
        ]);
        if *rules > 10 {
            table.aim("of the first", Aim::AtMost(1.25), format!("cost of an event with {rules} rules, of that with 10"));
        }
    }
    table.note("whole events, from the request to the ledger; each repository is covered by one rule, whose tags do not match");
    table.note("nine rules of ten are namespaces, the tenth is a pattern below one");
    table.close();
    Ok(table)
}

fn one_rule(number: usize) -> String {
    let scope = if number % 10 == 9 { format!("team-{number}/**/web") } else { format!("team-{number}") };
    format!("{}tags = [\"v*\", \"latest\"]\n\n", rule(&format!("rule-{number}"), &scope, Keys::P256))
}
