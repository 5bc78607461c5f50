//! The process's threads for kernels.
//!
//! Callers (one engine each) share the threads: every parallel region is a job in a queue, threads take tasks from
//! the front job until it has none left, and the caller takes tasks of its own job as well. So a caller always gets
//! on, even when every thread is busy with another engine's job, and nothing can deadlock.

use std::{
    any::Any,
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, Thread},
};

/// How often an idle thread looks for work before it sleeps: some 20 µs, which bridges the gap between two kernels
/// of one step but does not hold a core against other processes.
const IDLE_SPINS: usize = 400;
/// How often a caller looks whether others have finished its last tasks before it sleeps.
const WAIT_SPINS: usize = 2000;

/// Threads that run the tasks of parallel regions.
pub struct Pool {
    shared: Arc<Shared>,
    workers: usize,
}

struct Shared {
    queue: Mutex<VecDeque<Arc<Job>>>,
    wake: Condvar,
    /// Jobs ever queued; idle threads watch it.
    queued: AtomicUsize,
}

/// One parallel region.
struct Job {
    /// Runs one task. Valid until the last task has finished, and called for claimed tasks only.
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    /// First task that nobody has claimed.
    next: AtomicUsize,
    finished: AtomicUsize,
    /// The first panic of a task that ran on another thread.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

// SAFETY: `run` points to a `Sync` closure that outlives its last call (see `Pool::run`); the rest is Send + Sync.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

// === impl Pool ===

impl Pool {
    /// The process's pool: one thread fewer than there are cores, because callers work as well.
    pub fn process() -> &'static Self {
        static POOL: OnceLock<Pool> = OnceLock::new();
        POOL.get_or_init(|| {
            Self::with_workers(thread::available_parallelism().map_or(1, |cores| cores.get()) - 1)
        })
    }

    fn with_workers(wanted: usize) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            wake: Condvar::new(),
            queued: AtomicUsize::new(0),
        });
        // A thread that cannot be had is done without: callers work themselves.
        let started = (0..wanted).map_while(|index| {
            let shared = shared.clone();
            thread::Builder::new()
                .name(format!("kernels-{index}"))
                .spawn(move || shared.work())
                .ok()
        });
        let workers = started.count();
        Self { shared, workers }
    }

    /// Threads that can work at once, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers + 1
    }

    /// Runs `run(0)` to `run(tasks - 1)`, in any order and at once, and returns when all have returned. The first
    /// panic of a task is passed on.
    pub fn run(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers == 0 {
            (0..tasks).for_each(run);
            return;
        }
        let run: *const (dyn Fn(usize) + Sync + '_) = run;
        // SAFETY: this only makes the lifetime longer. `run` is called for claimed tasks alone, and this function
        // returns only after `Job::wait` has seen every task finish.
        let run = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(
                run,
            )
        };
        let job = Arc::new(Job {
            run,
            tasks,
            next: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            panic: Mutex::new(None),
            caller: thread::current(),
        });
        self.shared.push(job.clone());
        while job.run_next() {}
        self.shared.remove(&job);
        job.wait();
        let panic = lock(&job.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Runs `run` for parts of `0..items` in parallel, each at least `least` long.
    pub(crate) fn run_ranges(
        &self,
        items: usize,
        least: usize,
        run: &(dyn Fn(std::ops::Range<usize>) + Sync),
    ) {
        /// Parts per thread, so that one that is held up delays the others little.
        const PARTS: usize = 4;
        let size = items.div_ceil(self.threads() * PARTS).max(least).max(1);
        self.run(items.div_ceil(size), &|part| {
            run(part * size..((part + 1) * size).min(items))
        });
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

// === impl Shared ===

impl Shared {
    fn push(&self, job: Arc<Job>) {
        // Engines queue one job each, so the queue is as long as there are engines at most.
        lock(&self.queue).push_back(job);
        self.queued.fetch_add(1, Ordering::Release);
        self.wake.notify_all();
    }

    fn remove(&self, job: &Arc<Job>) {
        lock(&self.queue).retain(|queued| !Arc::ptr_eq(queued, job));
    }

    fn work(&self) -> ! {
        loop {
            let job = self.take();
            while job.run_next() {}
        }
    }

    /// A job that has tasks left. Waits for one.
    fn take(&self) -> Arc<Job> {
        let mut seen = self.queued.load(Ordering::Acquire);
        if let Some(job) = first_open(&mut lock(&self.queue)) {
            return job;
        }
        for _ in 0..IDLE_SPINS {
            std::hint::spin_loop();
            let queued = self.queued.load(Ordering::Acquire);
            if queued != seen {
                seen = queued;
                if let Some(job) = first_open(&mut lock(&self.queue)) {
                    return job;
                }
            }
        }
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = first_open(&mut queue) {
                return job;
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The first job that has tasks left; those before it have none and leave the queue.
fn first_open(queue: &mut VecDeque<Arc<Job>>) -> Option<Arc<Job>> {
    while let Some(job) = queue.front() {
        if job.next.load(Ordering::Relaxed) < job.tasks {
            return Some(job.clone());
        }
        queue.pop_front();
    }
    None
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics while it holds a lock, and what the locks guard is whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Job ===

impl Job {
    /// Runs one task, if one is left.
    fn run_next(&self) -> bool {
        let task = self.next.fetch_add(1, Ordering::Relaxed);
        if task >= self.tasks {
            return false;
        }
        // SAFETY: the task is claimed and not finished, so the caller still waits and its closure lives.
        let run = unsafe { &*self.run };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(task))) {
            lock(&self.panic).get_or_insert(panic);
        }
        // The handle is taken before the task counts as finished: after that the caller may be gone.
        let caller = self.caller.clone();
        if self.finished.fetch_add(1, Ordering::Release) + 1 == self.tasks {
            caller.unpark();
        }
        true
    }

    /// Waits until every task has finished.
    fn wait(&self) {
        let mut spins = 0;
        while self.finished.load(Ordering::Acquire) < self.tasks {
            if spins < WAIT_SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                thread::park();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::with_workers(3);
        for tasks in [0, 1, 2, 7, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                "{tasks} tasks"
            );
        }
    }

    #[test]
    fn ranges_cover_all_items_once() {
        let pool = Pool::with_workers(2);
        for (items, least) in [(0, 1), (1, 8), (17, 1), (100, 64)] {
            let covered = Mutex::new(Vec::new());
            pool.run_ranges(items, least, &|range| lock(&covered).extend(range));
            let mut covered = covered.into_inner().unwrap();
            covered.sort_unstable();
            assert_eq!(covered, (0..items).collect::<Vec<_>>());
        }
    }

    #[test]
    fn callers_at_once_and_nested_regions_do_not_deadlock() {
        let pool = Pool::with_workers(1);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, &|_| {
                            pool.run(3, &|_| {
                                sum.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4 * 200 * 5 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::with_workers(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|task| assert!(task != 5, "task five"));
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(8, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 8);
    }
}
