//! What revisions take of the machine's memory, and whether another one fits.

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What weights take in memory beyond their tensors: padding of packed matrices, rotary tables, workspace.
const PACKING_FACTOR: f64 = 1.05;

/// Memory for the weights and the KV of revisions. Clones share it: give the same one to every worker of a
/// process.
#[derive(Debug, Clone)]
pub struct MemoryBudget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// For all revisions together, in bytes.
    limit: Option<u64>,
    allocated: Mutex<Allocations>,
}

#[derive(Debug, Default)]
struct Allocations {
    next: u64,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    id: u64,
    name: String,
    need: Need,
}

/// Bytes that a revision takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) weights: u64,
    pub(crate) kv: u64,
}

/// A revision's share; given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    id: u64,
    budget: MemoryBudget,
}

/// A revision does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("needs {}, {} are free; retire a revision or raise --memory-limit", size(*needed), size(*free))]
pub struct MemoryError {
    /// Bytes of weights and KV.
    pub needed: u64,
    /// Bytes that are left for it.
    pub free: u64,
}

// === impl MemoryBudget ===

impl MemoryBudget {
    /// What the machine has, or its container, but at most `limit` bytes.
    pub fn new(limit: Option<u64>) -> Self {
        Self(Arc::new(Shared {
            limit,
            allocated: Mutex::default(),
        }))
    }

    /// Sets memory aside for a revision.
    pub(crate) fn reserve(&self, name: String, need: Need) -> Result<Reservation, MemoryError> {
        let needed = need.total();
        let mut allocated = self.allocated();
        let free = self.free(allocated.total());
        if needed > free {
            return Err(MemoryError { needed, free });
        }
        let id = allocated.next;
        allocated.next += 1;
        allocated.rows.push(Row { id, name, need });
        Ok(Reservation {
            id,
            budget: self.clone(),
        })
    }

    /// Bytes left beside those that are set aside. KV is touched as it fills, so that what is set aside and not
    /// yet resident still counts as available to the system.
    fn free(&self, reserved: u64) -> u64 {
        let resident = own_bytes().unwrap_or(0).min(reserved);
        let by_machine = available_bytes().map(|bytes| (bytes + resident).saturating_sub(reserved));
        let by_limit = self.0.limit.map(|limit| limit.saturating_sub(reserved));
        let both = [by_machine, by_limit];
        both.into_iter().flatten().min().unwrap_or(u64::MAX)
    }

    /// What was set aside, as lines.
    pub(crate) fn table(&self) -> String {
        let allocated = self.allocated();
        let mut text = format!("{:32} {:>12} {:>12}", "revision", "weights", "KV");
        let mut line = |name: &str, need: Need| {
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                "\n{name:32} {:>12} {:>12}",
                size(need.weights),
                size(need.kv)
            );
        };
        let mut sum = Need::default();
        for row in &allocated.rows {
            line(&row.name, row.need);
            sum = Need {
                weights: sum.weights + row.need.weights,
                kv: sum.kv + row.need.kv,
            };
        }
        line("all", sum);
        let free = self.free(allocated.total());
        let _ = write!(
            text,
            "\nlimit {}, free {}",
            self.0.limit.map_or("none".into(), size),
            size(free)
        );
        text
    }

    fn allocated(&self) -> MutexGuard<'_, Allocations> {
        self.0.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for MemoryBudget {
    fn default() -> Self {
        Self::new(None)
    }
}

// === impl Allocations ===

impl Allocations {
    fn total(&self) -> u64 {
        self.rows.iter().map(|row| row.need.total()).sum()
    }
}

// === impl Need ===

impl Need {
    fn total(self) -> u64 {
        self.weights.saturating_add(self.kv)
    }

    /// Weights of the checkpoint in `dir`, kept with `width` bytes an element where its files have `file_width`.
    pub(crate) fn weights(dir: &Path, width: u64, file_width: u64) -> u64 {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let weights =
            entries.filter(|entry| entry.path().extension().is_some_and(|end| end == "safetensors"));
        // Links are followed: a cache of checkpoints may be made of them.
        let bytes: u64 = weights
            .filter_map(|entry| fs::metadata(entry.path()).ok())
            .map(|file| file.len())
            .sum();
        (bytes as f64 * width as f64 / file_width as f64 * PACKING_FACTOR) as u64
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.allocated().rows.retain(|row| row.id != self.id);
    }
}

/// Bytes that can still be had without swapping: the machine's, or the container's if those are fewer.
fn available_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| kib(&text, "MemAvailable:"));
    let group = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| {
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        group_bytes(Path::new("/sys/fs/cgroup"), path)
    });
    [machine, group].into_iter().flatten().min()
}

/// The least that this control group and those above it have left.
fn group_bytes(root: &Path, path: &str) -> Option<u64> {
    let group = root.join(path.trim_start_matches('/'));
    let read = |directory: &Path, file| fs::read_to_string(directory.join(file)).ok();
    let levels = group
        .ancestors()
        .take_while(|directory| directory.starts_with(root));
    let left = levels.filter_map(|directory| {
        let limit: u64 = read(directory, "memory.max")?.trim().parse().ok()?;
        let used: u64 = read(directory, "memory.current")?.trim().parse().ok()?;
        // The page cache is given up before anything else.
        let cache = read(directory, "memory.stat").and_then(|text| number(&text, "inactive_file"));
        Some(limit.saturating_sub(used.saturating_sub(cache.unwrap_or(0))))
    });
    left.min()
}

/// Bytes of this process that are in memory and belong to no file.
fn own_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    kib(&status, "RssAnon:")
}

fn kib(text: &str, name: &str) -> Option<u64> {
    number(text, name).map(|kib| kib * 1024)
}

/// The number after `name` on its line.
fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    const GIB: f64 = 1_073_741_824.0;
    const MIB: f64 = 1_048_576.0;
    let bytes = bytes as f64;
    if bytes >= GIB / 10.0 {
        format!("{:.1} GiB", bytes / GIB)
    } else {
        format!("{:.1} MiB", bytes / MIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn need(weights: u64, kv: u64) -> Need {
        Need { weights, kv }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_figures_and_fits_once_another_is_gone() {
        let budget = MemoryBudget::new(Some(300 * MIB));
        let first = budget
            .reserve("demo@v1".into(), need(50 * MIB, 150 * MIB))
            .unwrap();
        let error = budget
            .reserve("demo@v2".into(), need(60 * MIB, 60 * MIB))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "needs 0.1 GiB, 100.0 MiB are free; retire a revision or raise --memory-limit"
        );
        drop(first);
        budget
            .reserve("demo@v2".into(), need(60 * MIB, 60 * MIB))
            .unwrap();
    }

    #[test]
    fn more_than_the_machine_has_is_refused_without_a_limit() {
        let error = MemoryBudget::new(None)
            .reserve("m@r".into(), need(1 << 60, 0))
            .unwrap_err();
        assert!(error.free > 0 && error.free < 1 << 50, "{error:?}");
    }

    #[test]
    fn the_table_tells_each_revision_and_the_sum() {
        let budget = MemoryBudget::new(Some(1 << 30));
        let _first = budget.reserve("demo@v1".into(), need(2 * MIB, 8 * MIB)).unwrap();
        let _second = budget.reserve("demo@v2".into(), need(3 * MIB, 8 * MIB)).unwrap();
        let table = budget.table();
        let row = |name: &str| {
            let line = table.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(row("demo@v2"), "3.0 MiB 8.0 MiB");
        assert_eq!(row("all"), "5.0 MiB 16.0 MiB");
        assert!(row("limit").starts_with("1.0 GiB, free"), "{table}");
    }

    #[test]
    fn the_tightest_control_group_counts_and_its_page_cache_does_not() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/memory.current", "700\n");
        write("a/memory.stat", "anon 100\ninactive_file 500\nactive_file 100\n");
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "600\n");
        assert_eq!(group_bytes(root.path(), "/a/b"), Some(800));
        assert_eq!(group_bytes(root.path(), "/c"), None);
    }

    #[test]
    fn the_kernels_figures_are_read() {
        let text = "MemTotal:  100 kB\nMemAvailable:   24 kB\n";
        assert_eq!(kib(text, "MemAvailable:"), Some(24 << 10));
        assert_eq!(kib(text, "Cached:"), None);
        assert!(available_bytes().is_some() && own_bytes().is_some());
    }

    #[test]
    fn weights_grow_with_the_width_that_they_are_kept_in() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.safetensors"), vec![0; 1000]).unwrap();
        fs::write(dir.path().join("b.safetensors"), vec![0; 1000]).unwrap();
        fs::write(dir.path().join("config.json"), vec![0; 1000]).unwrap();
        assert_eq!(Need::weights(dir.path(), 2, 2), 2100);
        assert_eq!(Need::weights(dir.path(), 4, 2), 4200);
    }
}
