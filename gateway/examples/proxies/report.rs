//! Medians and ratios, as a table.

/// What one round saw of one proxy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// CPU seconds of the proxy per 1,000 requests.
    pub(crate) cpu: f64,
    pub(crate) per_second: f64,
    /// p50 and p99 of the time to the first part of a reply, in µs.
    pub(crate) first: [f64; 2],
    /// p50 and p99 of the time to the end of a reply, in µs.
    pub(crate) whole: [f64; 2],
    /// Peak of resident memory so far, in MiB.
    pub(crate) rss: f64,
}

/// A proxy in a cell.
#[derive(Debug)]
pub(crate) struct Row {
    name: String,
    pub(crate) samples: Vec<Sample>,
}

impl Row {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            samples: Vec::new(),
        }
    }

    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(of).collect())
    }

    /// The median of the ratios to another proxy, round by round.
    fn ratio(&self, to: &Self) -> f64 {
        let rounds = self.samples.iter().zip(&to.samples);
        median(rounds.map(|(this, other)| this.cpu / other.cpu).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Prints a cell: the rows, and the CPU of each to that of nginx, or of Envoy where nginx has no part.
pub(crate) fn print(cell: &str, rows: &[Row]) {
    println!("{cell}");
    println!(
        "  {:<14} {:>12} {:>6} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "", "CPU s/1,000", "ratio", "a second", "first50", "first99", "p50 µs", "p99 µs", "RSS MiB"
    );
    let named = |name: &str| rows.iter().find(|row| row.name == name);
    let base = named("nginx").or(named("envoy"));
    for row in rows {
        println!(
            "  {:<14} {:>12.4} {:>6.2} {:>9.0} {:>8.0} {:>8.0} {:>8.0} {:>8.0} {:>8.1}",
            row.name,
            row.median(|sample| sample.cpu),
            base.map_or(f64::NAN, |base| row.ratio(base)),
            row.median(|sample| sample.per_second),
            row.median(|sample| sample.first[0]),
            row.median(|sample| sample.first[1]),
            row.median(|sample| sample.whole[0]),
            row.median(|sample| sample.whole[1]),
            row.median(|sample| sample.rss),
        );
    }
    println!();
}
