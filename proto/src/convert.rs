//! Conversions between wire messages and the plan's types. Each refuses what the plan's types cannot hold.
