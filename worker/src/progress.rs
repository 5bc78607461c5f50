//! How far loading is, for whoever shows it.

use std::{collections::HashMap, fmt, sync::Mutex};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Where loading one revision stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress<'a> {
    /// Model being loaded.
    pub model: &'a str,
    /// Its revision.
    pub revision: &'a str,
    /// Bytes of tensors loaded.
    pub loaded_bytes: u64,
    /// Bytes of all its tensors.
    pub total_bytes: u64,
}

/// Is told how far loading is; called from the loading thread, often.
pub trait ObserveLoad: Send + Sync {
    /// Some bytes were loaded.
    fn loaded(&self, progress: LoadProgress<'_>);
    /// The revision serves from now on.
    fn ready(&self, model: &str, revision: &str);
}

/// Draws a bar per revision on stderr; nothing where stderr is no terminal.
#[derive(Debug, Default)]
pub struct ProgressBars {
    all: MultiProgress,
    bars: Mutex<HashMap<String, ProgressBar>>,
}

impl ProgressBars {
    /// No bars yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn bar(&self, model: &str, revision: &str) -> ProgressBar {
        let name = format!("{model}@{revision}");
        let mut bars = self
            .bars
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let new = || {
            let style = ProgressStyle::with_template("{prefix:20} {bar:32} {bytes}/{total_bytes} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            self.all
                .add(ProgressBar::new(0))
                .with_style(style)
                .with_prefix(name.clone())
        };
        bars.entry(name.clone()).or_insert_with(new).clone()
    }
}

impl ObserveLoad for ProgressBars {
    fn loaded(&self, progress: LoadProgress<'_>) {
        let bar = self.bar(progress.model, progress.revision);
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.loaded_bytes);
    }

    fn ready(&self, model: &str, revision: &str) {
        self.bar(model, revision).finish_with_message("ready");
    }
}

impl fmt::Debug for dyn ObserveLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ObserveLoad")
    }
}
