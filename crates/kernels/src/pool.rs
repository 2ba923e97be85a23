//! Worker threads that wait awake for the next parallel loop.
//!
//! A decoder's layer is half a dozen loops of some ten microseconds each. Putting a thread to sleep
//! and waking it again costs as much as such a loop, so the workers here look for the next one for a
//! while (`SPINS`) before they sleep. Tasks are claimed one by one from a counter: which thread runs
//! a task is left to chance, what it computes is not.
//!
//! A loop that starts while another runs (from a task, or from another thread of the program) runs on
//! its own thread alone: the machine is busy already, and no number depends on it.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, TryLockError};

/// Looks at the state before a worker goes to sleep: some fifty microseconds.
const SPINS: usize = 3000;
/// Looks before a waiting thread offers its core to others.
const SPINS_BEFORE_YIELD: usize = 500;

/// Runs `task(0) .. task(tasks - 1)`, in any order, on all threads.
///
/// # Panics
/// If a task does, with its message.
pub fn for_each(tasks: usize, task: impl Fn(usize) + Sync) {
    static POOL: OnceLock<Pool> = OnceLock::new();
    if tasks <= 1 {
        (0..tasks).for_each(task);
        return;
    }
    let pool = POOL.get_or_init(|| Pool::new(crate::threads()));
    pool.run(tasks, &task);
}

/// Runs `task(i, row)` for each row of `width` values (the last may be shorter).
pub fn for_each_row<T: Send>(x: &mut [T], width: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    let width = width.max(1);
    let (rows, length) = (x.len().div_ceil(width), x.len());
    let x = SharedMut(x.as_mut_ptr());
    for_each(rows, |i| {
        let end = ((i + 1) * width).min(length);
        // SAFETY: the rows are disjoint parts of the slice, which is borrowed for the whole loop,
        // and each index is run once.
        let row = unsafe { std::slice::from_raw_parts_mut(x.at(i * width), end - i * width) };
        task(i, row);
    });
}

/// A pointer that tasks share.
struct SharedMut<T>(*mut T);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// # Safety
    /// In bounds of what the pointer was made from.
    unsafe fn at(self, i: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(i) }
    }
}

// SAFETY: tasks take disjoint parts, and `T` may be sent to other threads.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// The loop at hand.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    tasks: usize,
}

/// Set in the state while workers may join the loop at hand.
const OPEN: u64 = 1 << 31;
/// One loop further; the low half counts the workers in the loop.
const EPOCH: u64 = 1 << 32;

struct State {
    /// Epoch, [`OPEN`], workers inside.
    word: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Job>,
    failure: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
}

// SAFETY: `job` is written only while the state is closed and no worker is inside, and read only by
// workers inside; its pointer outlives the loop, as `Pool::run` waits for them.
unsafe impl Sync for State {}
// SAFETY: as above.
unsafe impl Send for State {}

struct Pool {
    state: Arc<State>,
    workers: usize,
    busy: Mutex<()>,
}

impl Pool {
    /// A pool in which `threads` threads work, the caller's included. Its workers live as long as
    /// the program.
    fn new(threads: usize) -> Self {
        let nothing: &'static Task<'static> = &|_| {};
        let state = Arc::new(State {
            word: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(Job {
                task: nothing,
                tasks: 0,
            }),
            failure: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            bell: Condvar::new(),
        });
        let start = |i: &usize| {
            let state = Arc::clone(&state);
            let named = std::thread::Builder::new().name(format!("demur-{i}"));
            // Where no more threads can be had, those that are there do the work.
            named.spawn(move || state.work()).is_ok()
        };
        let workers = (1..threads).filter(start).count();
        Self {
            state,
            workers,
            busy: Mutex::new(()),
        }
    }

    fn run(&self, tasks: usize, task: &Task<'_>) {
        let turn = match self.busy.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(_turn) = turn.filter(|_| self.workers > 0) else {
            (0..tasks).for_each(task);
            return;
        };
        let state = &*self.state;
        // SAFETY: it is closed and nobody is inside, as the loop before it was waited for. The
        // lifetime is erased; nobody reads the pointer after this function.
        unsafe {
            *state.job.get() = Job {
                task: std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task),
                tasks,
            };
        }
        state.next.store(0, Ordering::Relaxed);
        let epoch = state.word.load(Ordering::Relaxed) / EPOCH;
        let open = ((epoch + 1) * EPOCH) | OPEN;
        state.word.store(open, Ordering::SeqCst);
        if state.sleepers.load(Ordering::SeqCst) > 0 {
            let _bed = state.bed.lock().unwrap_or_else(PoisonError::into_inner);
            state.bell.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| state.claim(task, tasks)));
        state.word.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while !state.word.load(Ordering::Acquire).is_multiple_of(OPEN) {
            wait(&mut looks);
        }
        let mut failure = state.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let theirs = failure.take();
        drop(failure);
        if let Some(panic) = mine.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl State {
    fn claim(&self, task: &Task<'_>, tasks: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            task(i);
        }
    }

    /// A worker's life.
    fn work(&self) {
        let mut last = 0;
        let mut looks = 0;
        loop {
            let word = self.word.load(Ordering::Acquire);
            if !is_new(word, last) {
                looks += 1;
                if looks < SPINS {
                    std::hint::spin_loop();
                } else {
                    self.sleep(last);
                    looks = 0;
                }
                continue;
            }
            let enter = (word, word + 1);
            let entered =
                self.word
                    .compare_exchange(enter.0, enter.1, Ordering::AcqRel, Ordering::Relaxed);
            if entered.is_err() {
                continue;
            }
            last = word / EPOCH;
            // SAFETY: this worker is inside, so the job stays until it leaves.
            let job = unsafe { *self.job.get() };
            // SAFETY: as above: the closure that it points to is borrowed by `Pool::run`.
            let task = unsafe { &*job.task };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.claim(task, job.tasks))) {
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(panic);
            }
            self.word.fetch_sub(1, Ordering::AcqRel);
            looks = 0;
        }
    }

    /// Sleeps until there is a loop after `last`.
    fn sleep(&self, last: u64) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !is_new(self.word.load(Ordering::SeqCst), last) {
            bed = self.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether the state is open for a loop that a worker has not been in.
fn is_new(word: u64, last: u64) -> bool {
    word & OPEN != 0 && word / EPOCH != last
}

fn wait(looks: &mut usize) {
    *looks += 1;
    if *looks < SPINS_BEFORE_YIELD {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for round in 0..300 {
                let tasks = round % 40;
                let seen: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    seen[i].fetch_add(1, Ordering::Relaxed);
                });
                let once = seen.iter().all(|s| s.load(Ordering::Relaxed) == 1);
                assert!(once, "{threads} threads, {tasks} tasks");
                if round % 100 == 99 {
                    // Long enough for the workers to fall asleep.
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
        }
    }

    #[test]
    fn loops_inside_and_beside_a_loop() {
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        for_each(7, |_| {
                            for_each(3, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 50 * 7 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        for bad in [0, 5, 9] {
            let run = || pool.run(10, &|i| assert_ne!(i, bad, "task {bad}"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        let count = AtomicUsize::new(0);
        pool.run(10, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 10);
    }

    #[test]
    fn rows_are_disjoint() {
        let mut x = vec![0usize; 23];
        for_each_row(&mut x, 5, |i, row| row.iter_mut().for_each(|v| *v += i + 1));
        let expected: Vec<usize> = (0..23).map(|at| at / 5 + 1).collect();
        assert_eq!(x, expected);
    }
}
