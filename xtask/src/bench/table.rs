//! Figures as a section reports them, and how they are printed.

use std::fmt;
use std::time::Duration;

/// What one section found.
#[derive(Debug)]
pub struct Table {
    title: String,
    /// Whose figures stand beside ours; none when nothing comparable is installed.
    counterpart: Option<String>,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    what: String,
    unit: Unit,
    ours: f64,
    theirs: Option<f64>,
    goal: Option<Goal>,
}

/// How a figure is counted, and whether less of it is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Ms,
    MiB,
    /// Events per second; more is better.
    PerSecond,
    /// How many, of what should not be there.
    Count,
}

/// What the project promises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most so much of a unit of which less is better, else at least.
    Figure(f64),
    /// So many times as good as the counterpart.
    Times(f64),
}

impl Unit {
    fn less_is_better(self) -> bool {
        self != Unit::PerSecond
    }

    fn show(self, value: f64) -> String {
        let digits = match (self, value.abs()) {
            (Unit::Count, _) => 0,
            (_, v) if v >= 100.0 => 0,
            (_, v) if v >= 10.0 => 1,
            _ => 2,
        };
        let unit = match self {
            Unit::Ms => " ms",
            Unit::MiB => " MiB",
            Unit::PerSecond => " /s",
            Unit::Count => "",
        };
        format!("{value:.digits$}{unit}")
    }
}

impl Row {
    /// How many times as good as the counterpart we are.
    fn ratio(&self) -> Option<f64> {
        let theirs = self.theirs?;
        let (more, less) = if self.unit.less_is_better() { (theirs, self.ours) } else { (self.ours, theirs) };
        (less > 0.0).then(|| more / less)
    }

    /// Whether the goal is reached; unknown without a counterpart to a goal that names one.
    fn met(&self) -> Option<bool> {
        match self.goal? {
            Goal::Figure(most) if self.unit.less_is_better() => Some(self.ours <= most),
            Goal::Figure(least) => Some(self.ours >= least),
            Goal::Times(n) => self.ratio().map(|r| r >= n),
        }
    }
}

impl Table {
    pub fn new(title: impl Into<String>, counterpart: Option<&str>) -> Table {
        Table { title: title.into(), counterpart: counterpart.map(str::to_owned), rows: Vec::new() }
    }

    pub fn row(
        &mut self,
        what: impl Into<String>,
        unit: Unit,
        ours: f64,
        theirs: Option<f64>,
        goal: Option<Goal>,
    ) {
        self.rows.push(Row { what: what.into(), unit, ours, theirs, goal });
    }

    /// Medians of rates that were taken in turn, with what the middle half of ours differs by.
    pub fn compare(&mut self, what: String, ours: &Rates, theirs: &Rates, goal: Option<Goal>) {
        let what = format!("{what} (\u{b1}{:.1} %)", ours.spread() * 50.0);
        self.row(what, Unit::PerSecond, ours.at(0.5), Some(theirs.at(0.5)), goal);
    }

    /// Median and 99th percentile of measured times.
    pub fn times(&mut self, what: &str, ours: &Times, theirs: Option<&Times>, goals: [Option<Goal>; 2]) {
        for ((name, p), goal) in [("p50", 0.5), ("p99", 0.99)].into_iter().zip(goals) {
            self.row(format!("{what}, {name}"), Unit::Ms, ours.at(p), theirs.map(|t| t.at(p)), goal);
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let none = || "-".to_owned();
        let mut cells = vec![[
            self.title.clone(),
            "orlop".to_owned(),
            self.counterpart.clone().unwrap_or_else(none),
            "ratio".to_owned(),
            "goal".to_owned(),
        ]];
        for r in &self.rows {
            let goal = r.goal.map(|g| match g {
                Goal::Figure(v) => r.unit.show(v),
                Goal::Times(n) => format!("{n}x"),
            });
            let met = match r.met() {
                Some(true) => " met",
                Some(false) => " MISSED",
                None => "",
            };
            cells.push([
                r.what.clone(),
                r.unit.show(r.ours),
                r.theirs.map_or_else(none, |v| r.unit.show(v)),
                r.ratio().map_or_else(none, |v| format!("{v:.2}x")),
                goal.map_or_else(none, |g| g + met),
            ]);
        }
        let width = |i: usize| cells.iter().map(|c| c[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..5).map(width).collect();
        for [what, ours, theirs, ratio, goal] in &cells {
            writeln!(
                f,
                "{what:<0$}  {ours:>1$}  {theirs:>2$}  {ratio:>3$}  {goal}",
                widths[0], widths[1], widths[2], widths[3]
            )?;
        }
        Ok(())
    }
}

/// Rates of one thing, in order.
#[derive(Clone, Debug)]
pub struct Rates(Vec<f64>);

impl Rates {
    pub fn new(mut all: Vec<f64>) -> Rates {
        all.sort_unstable_by(f64::total_cmp);
        Rates(all)
    }

    /// The rate at a quantile; 0 when nothing was measured.
    fn at(&self, quantile: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get((last as f64 * quantile).round() as usize).copied().unwrap_or(0.0)
    }

    /// How far the quartiles lie apart, in parts of the median.
    fn spread(&self) -> f64 {
        if self.at(0.5) > 0.0 { (self.at(0.75) - self.at(0.25)) / self.at(0.5) } else { 0.0 }
    }
}

/// Measured times of one thing.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    pub fn extend(&mut self, other: Times) {
        self.0.extend(other.0);
    }

    /// Milliseconds at a quantile, by nearest rank; 0 when nothing was measured.
    pub fn at(&self, quantile: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() as f64 * quantile).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).map_or(0.0, |t| t.as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let mut times = Times::default();
        assert_eq!(times.at(0.5), 0.0);
        (1..=100).for_each(|ms| times.add(Duration::from_millis(ms)));
        assert_eq!((times.at(0.5), times.at(0.99)), (50.0, 99.0));
        assert_eq!((times.at(0.0), times.at(1.0)), (1.0, 100.0));
    }

    #[test]
    fn a_ratio_says_how_many_times_as_good() {
        let mut t = Table::new("title", Some("other"));
        t.row("start", Unit::Ms, 10.0, Some(160.0), Some(Goal::Times(10.0)));
        t.row("rate", Unit::PerSecond, 40.0, Some(20.0), Some(Goal::Figure(50.0)));
        t.row("memory", Unit::MiB, 0.8, None, Some(Goal::Figure(1.0)));
        t.row("more", Unit::Ms, 1.0, None, Some(Goal::Times(2.0)));
        let rates = |n: [f64; 5]| Rates::new(n.to_vec());
        let (ours, theirs) = (rates([104.0, 96.0, 98.0, 102.0, 100.0]), rates([200.0; 5]));
        t.compare("in turn".into(), &ours, &theirs, Some(Goal::Times(0.5)));
        let text = t.to_string();
        let squeezed: Vec<String> =
            text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            squeezed,
            [
                "title orlop other ratio goal",
                "start 10.0 ms 160 ms 16.00x 10x met",
                "rate 40.0 /s 20.0 /s 2.00x 50.0 /s MISSED",
                "memory 0.80 MiB - - 1.00 MiB met",
                "more 1.00 ms - - 2x",
                "in turn (\u{b1}2.0 %) 100 /s 200 /s 0.50x 0.5x met",
            ]
        );
    }
}
