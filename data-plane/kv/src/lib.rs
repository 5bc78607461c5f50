//! penstock-kv
