//! GARDEN, clockwork: virtual time, and the steps between which a core may die or be overtaken by the world.
//!
//! In: how many steps a core still has. Out: an unwinding [`Death`] at one of its stores; a call of the world at one of its accesses. Must
//! never know what the stores mean.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use vmgmt_device::Tick;
use vmgmt_device::page::Words;

/// What a dying core unwinds with.
pub struct Death;

/// Virtual time: everybody's.
#[derive(Clone, Debug, Default)]
pub struct Clock(Rc<Cell<u64>>);

impl Clock {
    /// What time it is.
    #[must_use]
    pub fn now(&self) -> Tick {
        Tick(self.0.get())
    }
    /// Time never goes back.
    pub fn advance_to(&self, tick: Tick) {
        self.0.set(self.0.get().max(tick.0));
    }
}

/// Steps of the core that runs now. A *step* is a store that somebody else can see: a word, a write into guest memory, a packet, a
/// signal. An *access* is a step or a load.
#[derive(Default)]
pub struct Steps {
    running: Cell<bool>,
    taken: Cell<u64>,
    die_in: Cell<Option<u64>>,
    overtaken_in: Cell<Option<u64>>,
    overtakes: Cell<u64>,
    world: RefCell<Option<Box<dyn FnMut()>>>,
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steps").field("taken", &self.taken).finish()
    }
}

impl Steps {
    /// What is called when the world overtakes the core between two of its accesses.
    pub fn set_world(&self, world: Box<dyn FnMut()>) {
        *self.world.borrow_mut() = Some(world);
    }
    /// The core runs from here on (or does not): only then steps count.
    pub fn set_running(&self, running: bool) {
        self.running.set(running);
    }
    /// The core dies before its step number `steps` from now (0: the next).
    pub fn die_in(&self, steps: Option<u64>) {
        self.die_in.set(steps);
    }
    /// The world gets a turn before access number `accesses` from now.
    pub fn overtake_in(&self, accesses: Option<u64>) {
        self.overtaken_in.set(accesses);
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
        if !self.running.get() {
            return;
        }
        match self.overtaken_in.get() {
            None => {}
            Some(0) => {
                self.overtaken_in.set(None);
                self.overtakes.set(self.overtakes.get() + 1);
                self.running.set(false);
                if let Some(world) = self.world.borrow_mut().as_mut() {
                    world();
                }
                self.running.set(true);
            }
            Some(left) => self.overtaken_in.set(Some(left - 1)),
        }
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
}

/// Shared words. A view with steps is the core's: each access counts.
#[derive(Clone)]
pub struct SimWords {
    words: Rc<[Cell<u64>]>,
    steps: Option<Rc<Steps>>,
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
            steps: Some(Rc::clone(steps)),
        }
    }
}

impl Words for SimWords {
    fn len(&self) -> usize {
        self.words.len()
    }
    fn load(&self, index: usize) -> u64 {
        if let Some(steps) = &self.steps {
            steps.access();
        }
        self.words.get(index).map_or(0, Cell::get)
    }
    fn store(&self, index: usize, value: u64) {
        if let Some(steps) = &self.steps {
            steps.step();
        }
        if let Some(word) = self.words.get(index) {
            word.set(value);
        }
    }
}
