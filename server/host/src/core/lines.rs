//! The daemon's last lines, for `vmgmtctl log`: what the hub refused, what happened to the other roles.
//!
//! In: lines. Out: the last [`LINES_MAX`] of them, and the new ones for who follows. Must never know what they say.

use std::collections::VecDeque;

/// Lines kept: a screenful of trouble for each of a few dozen VMs.
pub const LINES_MAX: usize = 1000;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// The VM it is about.
    pub vm: Option<String>,
    pub text: String,
}

/// The last lines, numbered from 0 since this core life began.
#[derive(Debug, Default)]
pub struct Lines {
    lines: VecDeque<Line>,
    first: u64,
}

impl Lines {
    /// Adds one; the oldest goes when there are too many. Whoever has it from its source writes it to the daemon's log.
    pub fn push(&mut self, line: Line) {
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
            self.first += 1;
        }
        self.lines.push_back(line);
    }

    /// Lines from number `from` on (or the oldest there is), and the number to ask for next.
    pub fn since(&self, from: u64) -> (impl Iterator<Item = &Line>, u64) {
        let skip = from.saturating_sub(self.first) as usize;
        (self.lines.iter().skip(skip), self.first + self.lines.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_gets_each_line_once() {
        let mut lines = Lines::default();
        let line = |number: usize| Line {
            time_ns: 0,
            vm: None,
            text: number.to_string(),
        };
        (0..3).for_each(|number| lines.push(line(number)));
        let next = lines.since(0).1;
        (3..LINES_MAX + 5).for_each(|number| lines.push(line(number)));
        let texts: Vec<_> = lines.since(next).0.map(|line| line.text.clone()).collect();
        // The first five have gone; what is still there comes once.
        assert_eq!(
            (texts.first().map(String::as_str), texts.len()),
            (Some("5"), LINES_MAX)
        );
        let next = lines.since(next).1;
        assert_eq!(lines.since(next).0.count(), 0);
    }
}
