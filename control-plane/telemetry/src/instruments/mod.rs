//! What each role measures: one struct a role, one method a fact, so that names and attributes live here and
//! nowhere else.

mod control_plane;
mod gateway;
mod requests;
mod worker;

pub use control_plane::ControlPlaneMetrics;
pub use gateway::GatewayMetrics;
pub use requests::{InFlight, RequestRecord, Served, TokenCounts};
pub use worker::{EngineObservation, EngineRegistration, WorkerMetrics};

#[cfg(test)]
mod tests;
