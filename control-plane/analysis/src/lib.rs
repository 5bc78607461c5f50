//! Sequential tests, verdicts and quantile sketches: pure functions of counts.
//!
//! ```text
//! counts of both sides ──exceedance | attribution──▶ Evidence ──verdict──▶ Pass | Fail | Insufficient
//! ```
//!
//! The tests are *always valid*: their evidence is an e-value, a process whose expectation under the null
//! hypothesis never exceeds 1, so that by Ville's inequality the chance that it **ever** reaches 1/α is at most α,
//! however often somebody looks. A fixed-sample test that is looked at every minute has no such bound.
//! Precedent: Lindon, Sanden, Shirikian, "Rapid regression detection in software deployments through sequential
//! testing", KDD 2022, arXiv 2205.14762.
//!
//! What the caller has to see to, for no test can: a request is counted on one side whatever becomes of it, at most
//! one bad event per key and window is counted (sticky users cluster their errors), and requests that had a different
//! chance to go to the canary lie in different strata.
//!
//! This crate does no I/O, reads no clock, and draws random numbers only from a seed that it is given.
//!
//! ```
//! use penstock_analysis::{Counts, Stratum, Verdict, attribution, verdict};
//!
//! let counts = Stratum {
//!     canary: Counts { n: 500, bad: 25 },
//!     stable: Counts { n: 9_500, bad: 48 },
//! };
//! let evidence = attribution(&[counts], 1.0);
//! assert_eq!(verdict(&evidence, 0.01, 500, 100), Verdict::Fail);
//! ```

pub mod power;
mod sequential;
mod sketch;

pub use sequential::{
    Attribution, Counts, Evidence, Stratum, Verdict, attribution, bounds, exceedance, ratio_bounds, verdict,
};
pub use sketch::{Bins, Sketch};
