//! penstock-demo-model
