//! The caretaker's measuring room, the judge: what crash-consistency costs, from figures that were made in turns, and whether that is what it may cost.
//!
//! In: the same figure with and without, turn by turn. Out: lines. It must never call an aim met that was not measured, nor hide how sure that is.

use crate::bench::median;
use std::{collections::BTreeMap, fmt::Write};

/// What a figure is about, as far as aims go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    /// Files between a program's memory and the host, in QEMU.
    Transfer,
    /// A message there and back, in QEMU.
    MessageTrip,
    /// A request of a ring or the port window that needs no record, in QEMU.
    DeviceTrip,
    /// 64-byte messages at full rate.
    MessageRate,
    /// Shown without an aim.
    Other,
}

/// A figure, both ways: a turn gives one of each.
pub struct Pair {
    pub words: String,
    pub unit: String,
    pub subject: Subject,
    pub with: Vec<f64>,
    pub without: Vec<f64>,
}

/// By keys for machines.
pub type Pairs = BTreeMap<String, Pair>;

/// What something may cost.
struct Aim {
    subject: Subject,
    words: &'static str,
    at_most: f64,
}

const AIMS: [Aim; 4] = [
    Aim {
        subject: Subject::Transfer,
        words: "transfers in pieces of 64 KiB and 1 MiB, in QEMU",
        at_most: 0.05,
    },
    Aim {
        subject: Subject::MessageTrip,
        words: "round trips of messages, in QEMU",
        at_most: 0.05,
    },
    Aim {
        subject: Subject::DeviceTrip,
        words: "round trips of requests that need no record, in QEMU",
        at_most: 0.05,
    },
    Aim {
        subject: Subject::MessageRate,
        words: "64-byte messages at full rate, without VMs",
        at_most: 0.30,
    },
];

/// With fewer the middle may lie outside of all: the chance that so many coins all fall on one side is above 5 %.
const SURE_TURNS: usize = 6;

/// What is said above the lines.
pub const EXPLANATION: &str = "The cost of a turn is the time that it takes longer, or the rate that is missing, as a part of what it is without; of several figures together it is \
     their geometric mean. The middle of all turns is judged; beside it, between what the middle lies with 95 % certainty (of fewer than 6 turns: the least and the most). \
     \"Perhaps\": the aim lies between these, or there were fewer than 6 turns.";

impl Pair {
    /// With, as a part of without, turn by turn.
    fn ratios(&self) -> Vec<f64> {
        self.with
            .iter()
            .zip(&self.without)
            .map(|(with, without)| with / without)
            .collect()
    }

    /// Less of it is better.
    fn is_time(&self) -> bool {
        !self.unit.ends_with("/s")
    }
}

/// Of each turn the figures' geometric mean; only turns that all have.
fn together(pairs: &[&Pair]) -> Vec<f64> {
    let ratios: Vec<Vec<f64>> = pairs.iter().map(|pair| pair.ratios()).collect();
    let turns = ratios.iter().map(Vec::len).min().unwrap_or_default();
    (0..turns)
        .map(|turn| {
            let logarithms: f64 = ratios
                .iter()
                .filter_map(|ratios| ratios.get(turn))
                .map(|ratio| ratio.ln())
                .sum();
            (logarithms / ratios.len() as f64).exp()
        })
        .collect()
}

/// What it costs in the middle, and between what that lies.
struct Cost {
    middle: f64,
    least: f64,
    most: f64,
    turns: usize,
}

impl Cost {
    fn of(ratios: &[f64], is_time: bool) -> Option<Self> {
        let cost = |ratio: &f64| if is_time { ratio - 1.0 } else { 1.0 - ratio };
        let mut costs: Vec<f64> = ratios.iter().map(cost).collect();
        costs.sort_by(f64::total_cmp);
        let outer = left_out(costs.len());
        Some(Self {
            middle: median(&costs),
            least: *costs.get(outer)?,
            most: *costs.get(costs.len().checked_sub(1 + outer)?)?,
            turns: costs.len(),
        })
    }

    fn text(&self) -> String {
        let percent = |part: f64| format!("{:.1}", part * 100.0);
        format!(
            "{} % ({} to {}, {} turn{})",
            percent(self.middle),
            percent(self.least),
            percent(self.most),
            self.turns,
            if self.turns == 1 { "" } else { "s" }
        )
    }

    fn verdict(&self, at_most: f64) -> &'static str {
        // Of a few turns nothing is sure.
        let unsure = self.turns < SURE_TURNS || (self.least..=self.most).contains(&at_most);
        match (self.middle <= at_most, unsure) {
            (true, false) => "met",
            (true, true) => "perhaps met",
            (false, true) => "perhaps not met",
            (false, false) => "not met",
        }
    }
}

/// So many of the smallest and of the largest of `count` can be left out, and the true middle is still between what is left with 95 %
/// certainty: it is outside when so few coins of `count` fall on one side.
fn left_out(count: usize) -> usize {
    let mut ways = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut outside = 0.0;
    for few in 0..count {
        outside += 2.0 * ways;
        if outside > 0.05 {
            return few.saturating_sub(1);
        }
        ways *= (count - few) as f64 / (few + 1) as f64;
    }
    0
}

/// One line for each aim, and below it, indented, one for each figure.
pub fn lines(pairs: &Pairs) -> Vec<String> {
    let mut lines = vec![EXPLANATION.to_owned()];
    for aim in &AIMS {
        let about: Vec<&Pair> = pairs
            .values()
            .filter(|pair| pair.subject == aim.subject)
            .collect();
        let (times, rates): (Vec<&Pair>, Vec<&Pair>) = about.iter().partition(|pair| pair.is_time());
        // A mean of both would have no meaning; an aim is about one kind.
        let (kind, is_time) = if times.is_empty() {
            (rates, false)
        } else {
            (times, true)
        };
        let mut line = format!("{}, aim at most {:.0} %: ", aim.words, aim.at_most * 100.0);
        match Cost::of(&together(&kind), is_time) {
            Some(cost) => {
                let _ = write!(line, "{}: {}", cost.text(), cost.verdict(aim.at_most));
            }
            None => line += "not measured in this run",
        }
        lines.push(line);
        for pair in about {
            if let Some(cost) = Cost::of(&pair.ratios(), pair.is_time()) {
                lines.push(format!("    {}: {}", pair.words, cost.text()));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(subject: Subject, unit: &str, with: &[f64], without: &[f64]) -> Pair {
        Pair {
            words: "figure".into(),
            unit: unit.into(),
            subject,
            with: with.to_vec(),
            without: without.to_vec(),
        }
    }

    #[test]
    fn so_many_can_be_left_out_as_a_table_of_the_sign_test_has_it() {
        for (count, outer) in [
            (0, 0),
            (1, 0),
            (5, 0),
            (6, 0),
            (8, 0),
            (9, 1),
            (12, 2),
            (20, 5),
            (50, 17),
        ] {
            assert_eq!(left_out(count), outer, "{count}");
        }
    }

    #[test]
    fn a_slow_turn_of_both_costs_nothing() {
        // The machine is half as fast every other turn.
        let pair = pair(
            Subject::Transfer,
            "MB/s",
            &[98.0, 49.0, 98.0, 49.0, 98.0, 49.0],
            &[100.0, 50.0, 100.0, 50.0, 100.0, 50.0],
        );
        let cost = Cost::of(&pair.ratios(), pair.is_time());
        let cost = cost.map(|cost| (cost.text(), cost.verdict(0.05), cost.verdict(0.01)));
        assert_eq!(
            cost,
            Some(("2.0 % (2.0 to 2.0, 6 turns)".into(), "met", "not met"))
        );
        // Had it three turns, this would be chance.
        let few = Cost::of(&pair.ratios()[..3], false).map(|cost| cost.verdict(0.05));
        assert_eq!(few, Some("perhaps met"));
    }

    #[test]
    fn times_cost_when_they_are_longer_and_rates_when_they_are_smaller() {
        let told = |unit, with: f64| {
            let pair = pair(Subject::MessageTrip, unit, &[with], &[100.0]);
            let pairs = Pairs::from([("key".into(), pair)]);
            lines(&pairs)
                .into_iter()
                .find(|line| line.starts_with("round trips of messages"))
        };
        let says = |unit, with, end: &str| {
            let line = told(unit, with).unwrap_or_default();
            assert!(line.ends_with(end), "{line}");
        };
        says("us", 110.0, "10.0 % (10.0 to 10.0, 1 turn): perhaps not met");
        says("us", 90.0, "-10.0 % (-10.0 to -10.0, 1 turn): perhaps met");
        says("MB/s", 90.0, "10.0 % (10.0 to 10.0, 1 turn): perhaps not met");
        says("MB/s", 110.0, "-10.0 % (-10.0 to -10.0, 1 turn): perhaps met");
    }

    #[test]
    fn several_figures_are_judged_by_their_geometric_mean_and_told_one_by_one() {
        let pairs = Pairs::from([
            (
                "a".into(),
                pair(Subject::Transfer, "MB/s", &[80.0, 80.0], &[100.0, 100.0]),
            ),
            (
                "b".into(),
                pair(Subject::Transfer, "MB/s", &[125.0, 120.0], &[100.0, 100.0]),
            ),
        ]);
        let lines = lines(&pairs);
        let at = lines.iter().position(|line| line.starts_with("transfers"));
        let told = at
            .and_then(|at| lines.get(at..at + 3))
            .unwrap_or_default()
            .join("\n");
        assert!(
            told.contains("2.0 % (0.0 to 2.0, 2 turns): perhaps met\n"),
            "{told}"
        );
        assert!(
            told.contains("\n    figure: 20.0 % (20.0 to 20.0, 2 turns)\n"),
            "{told}"
        );
        assert!(
            told.contains("\n    figure: -20.0 % (-25.0 to -20.0, 2 turns)"),
            "{told}"
        );
    }

    #[test]
    fn what_the_spread_does_not_decide_and_what_was_not_measured_is_said() {
        let pair = pair(Subject::MessageRate, "/s", &[65.0, 72.0, 80.0], &[100.0; 3]);
        let lines = lines(&Pairs::from([("key".into(), pair)]));
        let ends = |end: &str| lines.iter().filter(|line| line.ends_with(end)).count();
        assert_eq!(
            ends("28.0 % (20.0 to 35.0, 3 turns): perhaps met"),
            1,
            "{lines:?}"
        );
        assert_eq!(ends("not measured in this run"), 3, "{lines:?}");
    }
}
