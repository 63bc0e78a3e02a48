//! The gate that every computation passes: it runs on a pool of the asked size without the GIL, lets Ctrl-C through, and
//! lets no panic out.

use std::any::Any;
use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::LapsError;

/// Calls below this much work (see `run`) are over before a Ctrl-C could matter.
const LONG: f64 = 1e9;

/// The pool of `threads` workers of this process.
///
/// A fork copies the table but not the workers, so entries are keyed by process and never dropped: dropping one in a
/// child would wait for threads that are not there. The lock is only ever held with the GIL, so no fork copies it locked.
fn pool(threads: usize) -> Result<Arc<ThreadPool>, LapsError> {
    type Pools = HashMap<(u32, usize), ManuallyDrop<Arc<ThreadPool>>>;
    static POOLS: Mutex<Option<Pools>> = Mutex::new(None);
    let threads = threads.clamp(1, 1024);
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pools = pools.get_or_insert_with(HashMap::new);
    let key = (std::process::id(), threads);
    if let Some(pool) = pools.get(&key) {
        return Ok(Arc::clone(pool));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("laps-{i}"))
        .build()
        .map_err(|error| LapsError::value("laps", "num_threads", "threads that can be started", error))?;
    let pool = Arc::new(pool);
    pools.insert(key, ManuallyDrop::new(Arc::clone(&pool)));
    Ok(pool)
}

/// Runs `job` on `threads` threads. `work` is about its number of pairs times patches times channels times words; a long
/// job looks at the flag that it is given, which Ctrl-C sets.
pub(super) fn run<R: Send>(
    py: Python<'_>,
    threads: usize,
    work: f64,
    job: impl FnOnce(&AtomicBool) -> Result<R, LapsError> + Send,
) -> PyResult<R> {
    let pool = pool(threads)?;
    let stop = AtomicBool::new(false);
    let guarded = || catch_unwind(AssertUnwindSafe(|| pool.install(|| job(&stop))));
    let result = if work < LONG {
        py.detach(guarded)
    } else {
        let (result, interrupt) = py.detach(|| wait(guarded, &stop));
        if let Some(interrupt) = interrupt {
            return Err(interrupt);
        }
        result
    };
    match result {
        Ok(result) => Ok(result?),
        Err(panic) => Err(PyRuntimeError::new_err(format!(
            "laps: internal error, please report it: {}",
            message(&panic)
        ))),
    }
}

/// Runs `job` on another thread while this one, which Python sends its signals to, looks out for them.
fn wait<R: Send>(job: impl FnOnce() -> R + Send, stop: &AtomicBool) -> (R, Option<PyErr>) {
    std::thread::scope(|scope| {
        let waiter = std::thread::current();
        let worker = scope.spawn(move || {
            let result = job();
            waiter.unpark();
            result
        });
        let mut interrupt = None;
        while !worker.is_finished() {
            std::thread::park_timeout(Duration::from_millis(100));
            if interrupt.is_none() && !worker.is_finished() {
                interrupt = Python::attach(|py| py.check_signals()).err();
                stop.store(interrupt.is_some(), Ordering::Relaxed);
            }
        }
        match worker.join() {
            Ok(result) => (result, interrupt),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn message(panic: &Box<dyn Any + Send>) -> &str {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else {
        "a panic without a message"
    }
}
