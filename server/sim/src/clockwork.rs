//! GARDEN, clockwork: virtual time, and the steps between which a core may die or be overtaken by the world.
//!
//! In: how many steps a core still has. Out: an unwinding [`Death`] at one of its stores; a call of the world at one of its accesses, of the core
//! at one of the front's; a panic where an action has no end. Must never know what the stores mean.

use crate::limits::ACTION_ACCESSES_MAX;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;
use vmgmt_device::Tick;
use vmgmt_device::page::Words;

/// What a dying core unwinds with.
pub struct Death;

/// Virtual time: everybody's. And how much was done within one action, so that none goes on for ever.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    now: Rc<Cell<u64>>,
    spent: Rc<Cell<u64>>,
}

impl Clock {
    /// What time it is.
    #[must_use]
    pub fn now(&self) -> Tick {
        self.spend();
        Tick(self.now.get())
    }
    /// Time never goes back.
    pub fn advance_to(&self, tick: Tick) {
        self.now.set(self.now.get().max(tick.0));
    }
    /// Another action begins.
    pub fn begin_action(&self) {
        self.spent.set(0);
    }
    /// Somebody looks at or does something. An action of which there is no end ends here, as a panic that is told with its seed.
    pub fn spend(&self) {
        let spent = self.spent.get() + 1;
        self.spent.set(spent);
        if spent == ACTION_ACCESSES_MAX {
            // Whoever unwinds looks at things too, and must not end here again.
            panic!("an action does not end: {spent} accesses in it");
        }
    }
}

/// Who looks at shared words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Who {
    Core,
    Front,
}

/// Steps of the core that runs now. A *step* is a store that somebody else can see: a word, a write into guest memory, a packet, a
/// signal. An *access* is a step or a load. The front's accesses are counted too: the core may have a round before each.
#[derive(Default)]
pub struct Steps {
    clock: Clock,
    running: Cell<bool>,
    taken: Cell<u64>,
    die_in: Cell<Option<u64>>,
    overtaken_in: RefCell<VecDeque<u64>>,
    overtakes: Cell<u64>,
    world: RefCell<Option<Hook>>,
    /// Accesses of the front until the core has a round, one after the other.
    cuts: RefCell<VecDeque<u64>>,
    /// Without an end.
    cut_every: Cell<Option<u64>>,
    in_a_cut: Cell<bool>,
    core: RefCell<Option<Hook>>,
}

type Hook = Box<dyn FnMut()>;

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steps").field("taken", &self.taken).finish()
    }
}

impl Steps {
    pub fn new(clock: &Clock) -> Self {
        Self {
            clock: clock.clone(),
            ..Self::default()
        }
    }
    /// What is called when the world overtakes the core between two of its accesses.
    pub fn set_world(&self, world: Hook) {
        *self.world.borrow_mut() = Some(world);
    }
    /// What is called when the core overtakes the front between two of its accesses.
    pub fn set_core(&self, core: Hook) {
        *self.core.borrow_mut() = Some(core);
    }
    /// Nobody overtakes anybody any more. What is called holds the world, which holds these steps: without this no world would ever be given back.
    pub fn disconnect(&self) {
        let hooks = (self.world.take(), self.core.take());
        drop(hooks);
    }
    /// The core runs from here on (or does not): only then steps count.
    pub fn set_running(&self, running: bool) {
        self.running.set(running);
    }
    /// The core dies before its step number `steps` from now (0: the next).
    pub fn die_in(&self, steps: Option<u64>) {
        self.die_in.set(steps);
    }
    /// The world gets a turn before access number so many from now, another so many accesses later, and so on.
    pub fn overtake_in(&self, accesses: impl IntoIterator<Item = u64>) {
        *self.overtaken_in.borrow_mut() = accesses.into_iter().collect();
    }
    /// The core gets a round before so many accesses of the front from now, another so many later, and so on.
    pub fn cut_in(&self, accesses: impl IntoIterator<Item = u64>) {
        *self.cuts.borrow_mut() = accesses.into_iter().collect();
    }
    /// The core gets a round (if it has something to do) before each so manieth access of the front, without an end.
    /// Gives what held before.
    pub fn cut_every(&self, accesses: Option<u64>) -> Option<u64> {
        self.cut_every.replace(accesses)
    }
    /// How often the world has overtaken a core.
    #[must_use]
    pub fn overtakes(&self) -> u64 {
        self.overtakes.get()
    }
    /// Steps since the beginning.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken.get()
    }

    /// The core looks at something shared.
    pub fn access(&self) {
        self.clock.spend();
        if !self.running.get() || !is_due(&self.overtaken_in) {
            return;
        }
        self.overtakes.set(self.overtakes.get() + 1);
        self.running.set(false);
        // (Within a cut of the front there is nobody else to have a turn.)
        if !self.in_a_cut.get()
            && let Some(world) = self.world.borrow_mut().as_mut()
        {
            world();
        }
        self.running.set(true);
    }

    /// The core is about to do something that others can see.
    pub fn step(&self) {
        self.access();
        if !self.running.get() {
            return;
        }
        self.taken.set(self.taken.get() + 1);
        match self.die_in.get() {
            None => {}
            Some(0) => {
                self.die_in.set(None);
                self.running.set(false);
                std::panic::resume_unwind(Box::new(Death));
            }
            Some(left) => self.die_in.set(Some(left - 1)),
        }
    }

    /// The front looks at something shared, or is about to do something that the core can see.
    pub fn front_access(&self) {
        self.clock.spend();
        if self.in_a_cut.get() {
            return;
        }
        if let Some(every) = self.cut_every.get()
            && self.cuts.borrow().is_empty()
        {
            self.cut_in([every]);
        }
        if !is_due(&self.cuts) {
            return;
        }
        self.in_a_cut.set(true);
        if let Ok(mut core) = self.core.try_borrow_mut()
            && let Some(core) = core.as_mut()
        {
            core();
        }
        self.in_a_cut.set(false);
    }
}

/// Counts down the first of them; true: it is due now.
fn is_due(list: &RefCell<VecDeque<u64>>) -> bool {
    let mut list = list.borrow_mut();
    match list.front_mut() {
        None => false,
        Some(0) => list.pop_front().is_some(),
        Some(left) => {
            *left -= 1;
            false
        }
    }
}

/// Shared words. A view with steps is the core's or the front's: each access counts.
#[derive(Clone)]
pub struct SimWords {
    words: Rc<[Cell<u64>]>,
    steps: Option<(Who, Rc<Steps>)>,
}

impl fmt::Debug for SimWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} words", self.words.len())
    }
}

impl SimWords {
    /// `count` zeros.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self {
            words: (0..count).map(|_| Cell::new(0)).collect(),
            steps: None,
        }
    }
    /// Other words that say the same.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self {
            words: self.words.iter().map(|word| Cell::new(word.get())).collect(),
            steps: None,
        }
    }
    /// The same words as one sees them who can die.
    #[must_use]
    pub fn mortal(&self, steps: &Rc<Steps>) -> Self {
        Self {
            words: Rc::clone(&self.words),
            steps: Some((Who::Core, Rc::clone(steps))),
        }
    }
    /// The same words as the front sees them, which the core can overtake.
    #[must_use]
    pub fn of_front(&self, steps: &Rc<Steps>) -> Self {
        Self {
            words: Rc::clone(&self.words),
            steps: Some((Who::Front, Rc::clone(steps))),
        }
    }
    /// What they say.
    #[must_use]
    pub fn said(&self) -> Vec<u64> {
        self.words.iter().map(Cell::get).collect()
    }
}

impl Words for SimWords {
    fn len(&self) -> usize {
        self.words.len()
    }
    fn load(&self, index: usize) -> u64 {
        match &self.steps {
            Some((Who::Core, steps)) => steps.access(),
            Some((Who::Front, steps)) => steps.front_access(),
            None => {}
        }
        self.words.get(index).map_or(0, Cell::get)
    }
    fn store(&self, index: usize, value: u64) {
        match &self.steps {
            Some((Who::Core, steps)) => steps.step(),
            Some((Who::Front, steps)) => steps.front_access(),
            None => {}
        }
        if let Some(word) = self.words.get(index) {
            word.set(value);
        }
    }
}
