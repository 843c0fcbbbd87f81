//! Front and core under the model checker: neither sleeps over what the other has for it.

use crate::{caught, checked_fence};
use std::sync::Arc;
use vmgmt_device::page::{LifePage, PlainWords, TouchedPage, Words};
use vmgmt_mem::order as host;

/// The two words of the scheme that one side writes and the other reads, as the checker knows them.
#[derive(Clone, Debug)]
struct CheckedPage {
    words: Arc<[loom::sync::atomic::AtomicU64; 2]>,
    plain: PlainWords,
    /// Indexes of the two words.
    places: [usize; 2],
    weak: bool,
}

impl CheckedPage {
    fn new(places: [usize; 2], weak: bool) -> Self {
        Self {
            words: Arc::new(std::array::from_fn(|_| loom::sync::atomic::AtomicU64::new(0))),
            plain: PlainWords::new(TouchedPage::<PlainWords>::WORDS),
            places,
            weak,
        }
    }
    fn word(&self, index: usize) -> Option<&loom::sync::atomic::AtomicU64> {
        let at = self.places.iter().position(|place| *place == index)?;
        self.words.get(at)
    }
}

impl Words for CheckedPage {
    fn len(&self) -> usize {
        self.plain.len()
    }
    fn load(&self, index: usize) -> u64 {
        self.word(index)
            .map_or_else(|| self.plain.load(index), |word| word.load(host::LOAD))
    }
    fn store(&self, index: usize, value: u64) {
        match self.word(index) {
            Some(word) => word.store(value, host::STORE),
            None => self.plain.store(index, value),
        }
    }
    fn fence(&self) {
        checked_fence(vmgmt_device::page::FENCE, self.weak);
    }
}

/// Touched page: total and front asleep; life page: asleep and kicks.
fn pages(
    weak_waker: bool,
    weak_sleeper: bool,
    front_sleeps: bool,
) -> (TouchedPage<CheckedPage>, LifePage<CheckedPage>) {
    // Each fence is made on the page that its side writes or asks: see page/shared.rs.
    let (touched, life) = if front_sleeps {
        // must_wake_front and front_falls_asleep are both the touched page's.
        (weak_waker || weak_sleeper, false)
    } else {
        (false, weak_waker || weak_sleeper)
    };
    (
        TouchedPage::new(CheckedPage::new([1, 2], touched)),
        LifePage::new(CheckedPage::new([1, 3], life)),
    )
}

fn core_sleeps(weak: bool) {
    loom::model(move || {
        let (touched, life) = pages(weak, weak, false);
        let (core_touched, core_life) = (touched.clone(), life.clone());
        let core = loom::thread::spawn(move || core_life.core_falls_asleep(&core_touched, 0));
        touched.touch(5);
        let wakes = life.must_wake_core();
        let sleeps = core.join().unwrap();
        assert!(wakes || !sleeps, "lost: the core sleeps over a touch");
    });
}

fn front_sleeps(weak: bool) {
    loom::model(move || {
        let (touched, life) = pages(weak, weak, true);
        let (front_touched, front_life) = (touched.clone(), life.clone());
        let front = loom::thread::spawn(move || front_touched.front_falls_asleep(&front_life, 0));
        life.kick(5);
        let wakes = touched.must_wake_front();
        let sleeps = front.join().unwrap();
        assert!(wakes || !sleeps, "lost: the front sleeps over a kick");
    });
}

#[test]
fn neither_front_nor_core_sleeps_over_work_in_any_order() {
    core_sleeps(false);
    front_sleeps(false);
}

#[test]
fn a_weaker_fence_of_front_and_core_is_caught() {
    caught("the core's sleep with weaker fences", || core_sleeps(true));
    caught("the front's sleep with weaker fences", || front_sleeps(true));
}
