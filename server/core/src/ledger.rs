//! ATTIC: the state that survives a core's death: VM table, presence, mailboxes, and who was told what.
//!
//! In: [`Record`]s, live from the hub and again in replay: this is the only way it changes. Out: look-ups.
//! It never knows submissions, budgets or effects.

pub(crate) mod books;
mod keys;

use self::books::{Books, NOBODY};
use self::keys::KeyWindow;
use crate::journal::{Message, Presence, Record};
use crate::kept::{Kept, SavedKept, Settled};
use crate::modes::mailbox::{Held, Mailbox, SavedMailbox};
use crate::policy::VmConfig;
use crate::table::Table;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use vmgmt_abi::chat::{HOST_NAME, PEER_HOST};
use vmgmt_device::rings::{Channel, Token};

/// What is kept of one VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Account {
    pub config: VmConfig,
    /// Its name, as messages carry it.
    pub name: Arc<str>,
    pub presence: Option<Presence>,
    /// Number of its last message.
    pub sequence: u64,
    pub mailbox: Mailbox,
    keys: KeyWindow,
}

/// A completion with (a part of) a message, not known to be published yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Delivering {
    pub target: u64,
    pub position: u64,
    pub end: u64,
    pub last: bool,
}

/// The state that survives.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ledger {
    pub(crate) vms: Table<Account>,
    pub(crate) host: Mailbox,
    pub(crate) host_sequence: u64,
    host_keys: KeyWindow,
    pub(crate) delivering: BTreeMap<Token, Delivering>,
    pub(crate) kept: Kept,
    /// Derived: name to number.
    names: BTreeMap<Arc<str>, u64>,
    /// Derived: which message a channel has a part of.
    bound: BTreeMap<(u64, Channel), (u64, u64)>,
    /// Derived: channels to which a part, but not the end, of a message is on its way.
    parts: BTreeSet<(u64, Channel)>,
    /// Derived: what all that takes at most when it is saved.
    pub(crate) books: Books,
}

/// One VM as it is saved.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedAccount {
    config: VmConfig,
    presence: Option<Presence>,
    sequence: u64,
    mailbox: SavedMailbox,
    /// Oldest first: as asked, key, result.
    keys: Vec<(u64, u64, u64)>,
}

/// The ledger as it is saved.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedLedger {
    accounts: Vec<SavedAccount>,
    host: SavedMailbox,
    host_sequence: u64,
    /// As a VM's.
    #[serde(default)]
    host_keys: Vec<(u64, u64, u64)>,
    delivering: Vec<(Token, Delivering)>,
    #[serde(default)]
    kept: SavedKept,
    /// Sends whose answer is not known to be published, in the form that version 1 knows.
    #[serde(default)]
    origins: Vec<(Token, Origin)>,
}

/// An accepted send.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Origin {
    tag: u32,
    result: u64,
}

impl SavedLedger {
    /// What is in use that version 1 would lose, by name.
    #[must_use]
    pub fn features(&self) -> BTreeSet<&'static str> {
        self.kept.features()
    }
}

impl Ledger {
    /// Number of a VM.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        self.names.get(name).copied()
    }

    /// A mailbox; [`PEER_HOST`]: the host's.
    #[must_use]
    pub fn mailbox(&self, number: u64) -> Option<&Mailbox> {
        if number == PEER_HOST {
            Some(&self.host)
        } else {
            self.vms.get(&number).map(|account| &account.mailbox)
        }
    }

    fn mailbox_mut(&mut self, number: u64) -> Option<&mut Mailbox> {
        if number == PEER_HOST {
            Some(&mut self.host)
        } else {
            self.vms.get_mut(&number).map(|account| &mut account.mailbox)
        }
    }

    /// The message of which a channel has a part: its mailbox and position.
    #[must_use]
    pub fn bound(&self, session: u64, channel: Channel) -> Option<(u64, u64)> {
        if self.bound.is_empty() {
            return None;
        }
        self.bound.get(&(session, channel)).copied()
    }

    /// Whether a part, but not the end, of a message is on its way to this channel.
    #[must_use]
    pub fn part_on_its_way(&self, session: u64, channel: Channel) -> bool {
        !self.parts.is_empty() && self.parts.contains(&(session, channel))
    }

    /// Whether some channel has a part of a message.
    #[must_use]
    pub fn has_bound(&self) -> bool {
        !self.bound.is_empty()
    }

    /// The youngest stamp in any mailbox.
    #[must_use]
    pub fn youngest_stamp_ns(&self) -> u64 {
        let mailboxes = self
            .vms
            .values()
            .map(|account| &account.mailbox)
            .chain([&self.host]);
        mailboxes
            .flat_map(Mailbox::iter)
            .map(|(_, held)| held.message.stamp_ns)
            .max()
            .unwrap_or(0)
    }

    /// Channels of a session that have a part of a message.
    #[must_use]
    pub fn bound_channels(&self, session: u64) -> Vec<Channel> {
        self.bound
            .range((session, Channel::Ring(0))..=(session, Channel::Port))
            .map(|((_, channel), _)| *channel)
            .collect()
    }

    /// Sessions with a channel that has a part of a message.
    pub fn sessions_bound(&self) -> impl Iterator<Item = u64> {
        self.bound.keys().map(|(session, _)| *session)
    }

    /// VMs, each with a session that has, or is about to get, (a part of) a message of that VM's mailbox.
    #[must_use]
    pub fn sessions_with_messages(&self) -> BTreeSet<(u64, u64)> {
        let bound = self.bound.iter().map(|((session, _), (vm, _))| (*vm, *session));
        let delivering = self.delivering.iter();
        bound
            .chain(delivering.map(|(token, delivering)| (delivering.target, token.session)))
            .collect()
    }

    /// The VM that a session has published.
    #[must_use]
    pub fn vm_published_by(&self, session: u64) -> Option<u64> {
        let by = |presence: &Presence| presence.session == session;
        self.vms
            .iter()
            .find(|(_, account)| account.presence.as_ref().is_some_and(by))
            .map(|(vm, _)| vm)
    }

    /// What a repeated send was answered.
    #[must_use]
    pub fn repeated(&self, source: u64, asked: u64, key: u64) -> Option<u64> {
        let keys = match source {
            PEER_HOST => &self.host_keys,
            vm => &self.vms.get(&vm)?.keys,
        };
        keys.result(asked, key)
    }

    /// Applies one change. A record that fits nothing (its VM is gone) changes nothing.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Vm(config) => self.apply_vm(config),
            Record::VmGone { vm } => self.apply_vm_gone(*vm),
            Record::Presence { vm, presence } => {
                if let Some(account) = self.vms.get_mut(vm) {
                    self.books.remove(NOBODY, books::account(account));
                    account.presence.clone_from(presence);
                    self.books.add(NOBODY, books::account(account));
                }
            }
            Record::Accepted {
                message,
                targets,
                asked,
                key,
                result,
                origin,
            } => {
                self.apply_source(message, *asked, *key, *result);
                if let Some((token, tag)) = origin {
                    self.settle_send(*token, *tag, *result);
                }
                for &target in targets.numbers() {
                    if let Some(mailbox) = self.mailbox_mut(target) {
                        mailbox.push(Arc::clone(message));
                        self.books.add(message.source, books::message(message));
                    }
                }
            }
            Record::Delivering {
                token,
                target,
                position,
                end,
                last,
            } => {
                let (end, last) = (*end, *last);
                if !last {
                    self.parts.insert((token.session, token.channel));
                }
                let delivering = Delivering {
                    target: *target,
                    position: *position,
                    end,
                    last,
                };
                self.delivering.insert(*token, delivering);
                if let Some(mailbox) = self.mailbox_mut(*target) {
                    mailbox.update(*position, |held| held.delivering = true);
                }
            }
            Record::Published { token, published } => self.apply_published(*token, *published),
            Record::Kept { settled, change } => {
                let books = &mut self.books;
                books::about(&self.kept, settled, change, |owner, bytes| {
                    books.remove(owner, bytes);
                });
                self.kept.apply(settled, change);
                books::about(&self.kept, settled, change, |owner, bytes| {
                    books.add(owner, bytes)
                });
            }
            Record::Readdressed { from, to } => {
                if let Some(settled) = self.kept.settled.remove(from) {
                    let settled = Settled {
                        token: *to,
                        ..settled
                    };
                    if let Some(before) = self.kept.settled.insert(*to, settled) {
                        self.books.remove(NOBODY, books::settled(&before));
                    }
                }
            }
            Record::Taken { position } => {
                let taken = self.host.remove(*position);
                self.book_out(taken.as_ref());
            }
            Record::Dropped { target, position } => self.take_out(*target, *position),
            Record::Unbound { session, channel } => {
                if let Some((target, position)) = self.bound.remove(&(*session, *channel))
                    && let Some(mailbox) = self.mailbox_mut(target)
                {
                    mailbox.update(position, |held| {
                        held.bound = None;
                        held.offset = 0;
                    });
                }
            }
        }
    }

    /// A message leaves a mailbox for good.
    fn take_out(&mut self, target: u64, position: u64) {
        let taken = self
            .mailbox_mut(target)
            .and_then(|mailbox| mailbox.remove(position));
        self.book_out(taken.as_ref());
    }

    fn book_out(&mut self, held: Option<&Held>) {
        if let Some(Held { message, .. }) = held {
            self.books.remove(message.source, books::message(message));
        }
    }

    fn settle_send(&mut self, token: Token, tag: u32, result: u64) {
        self.unsettle(token);
        self.kept.settle_send(token, tag, result);
        self.books.add(NOBODY, books::ANSWER_BYTES);
    }

    /// An answer is known to be published.
    fn unsettle(&mut self, token: Token) {
        if let Some(settled) = self.kept.settled.remove(&token) {
            self.books.remove(NOBODY, books::settled(&settled));
        }
    }

    fn apply_vm(&mut self, config: &VmConfig) {
        let name: Arc<str> = Arc::from(config.name.as_str());
        if let Some(account) = self.vms.get_mut(&config.vm) {
            if account.name != name && self.names.get(&account.name) == Some(&config.vm) {
                self.names.remove(&account.name);
            }
            self.books.remove(NOBODY, books::account(account));
            account.config = config.clone();
            account.name = Arc::clone(&name);
            self.books.add(NOBODY, books::account(account));
        } else {
            let account = Account {
                config: config.clone(),
                name: Arc::clone(&name),
                presence: None,
                sequence: 0,
                mailbox: Mailbox::default(),
                keys: KeyWindow::default(),
            };
            self.books.add(NOBODY, books::account(&account));
            self.vms.insert(config.vm, account);
        }
        self.names.insert(name, config.vm);
    }

    fn apply_vm_gone(&mut self, vm: u64) {
        if let Some(account) = self.vms.remove(&vm) {
            if self.names.get(&account.name) == Some(&vm) {
                self.names.remove(&account.name);
            }
            self.books.remove(NOBODY, books::account(&account));
            self.books.remove(NOBODY, account.keys.bytes());
            for (_, held) in account.mailbox.iter() {
                self.book_out(Some(held));
            }
        }
        let parts = &mut self.parts;
        self.delivering.retain(|token, delivering| {
            let stays = delivering.target != vm;

            if !stays && !delivering.last {
                parts.remove(&(token.session, token.channel));
            }
            stays
        });
        self.bound.retain(|_, (target, _)| *target != vm);
    }

    fn apply_source(&mut self, message: &Message, asked: u64, key: u64, result: u64) {
        let keys = if message.source == PEER_HOST {
            self.host_sequence = message.sequence;
            &mut self.host_keys
        } else if let Some(source) = self.vms.get_mut(&message.source) {
            source.sequence = message.sequence;
            &mut source.keys
        } else {
            return;
        };
        if key != 0 {
            self.books.remove(NOBODY, keys.bytes());
            keys.insert(asked, key, result);
            self.books.add(NOBODY, keys.bytes());
        }
    }

    fn apply_published(&mut self, token: Token, published: bool) {
        self.unsettle(token);
        let Some(Delivering {
            target,
            position,
            end,
            last,
        }) = self.delivering.remove(&token)
        else {
            return;
        };
        let place = (token.session, token.channel);
        if !last {
            self.parts.remove(&place);
        }
        if published && last {
            self.take_out(target, position);
        }
        let Some(mailbox) = self.mailbox_mut(target) else {
            return;
        };
        if published && last {
            // The channel may meanwhile have a part of another message.
            if self.bound.get(&place) == Some(&(target, position)) {
                self.bound.remove(&place);
            }
        } else if published {
            mailbox.update(position, |held| {
                held.delivering = false;
                held.offset = end;
                held.bound = Some(place);
            });
            self.bound.insert(place, (target, position));
        } else {
            mailbox.update(position, |held| held.delivering = false);
        }
    }

    #[must_use]
    pub fn save(&self) -> SavedLedger {
        let Self {
            vms,
            host,
            host_sequence,
            host_keys,
            delivering,
            kept,
            names: _,
            bound: _,
            parts: _,
            books: _,
        } = self;
        SavedLedger {
            accounts: vms.values().map(save_account).collect(),
            host: host.save(),
            host_sequence: *host_sequence,
            host_keys: host_keys.save(),
            delivering: delivering
                .iter()
                .map(|(token, delivering)| (*token, *delivering))
                .collect(),
            kept: kept.save(),
            origins: kept
                .sends()
                .map(|(token, tag, result)| (token, Origin { tag, result }))
                .collect(),
        }
    }

    /// # Errors
    /// What is wrong with the saved state.
    pub fn restore(saved: SavedLedger) -> Result<Self, &'static str> {
        let SavedLedger {
            accounts,
            host,
            host_sequence,
            host_keys,
            delivering,
            kept,
            origins,
        } = saved;
        let mut ledger = Self {
            host: Mailbox::restore(host)?,
            host_sequence,
            host_keys: KeyWindow::restore(host_keys),
            ..Self::default()
        };
        for SavedAccount {
            config,
            presence,
            sequence,
            mailbox,
            keys,
        } in accounts
        {
            if config.vm >= PEER_HOST - 1 || config.name == HOST_NAME || ledger.vms.contains_key(&config.vm) {
                return Err("a VM is there twice or has a reserved number or name");
            }
            let vm = config.vm;
            ledger.apply_vm(&config);
            let Some(account) = ledger.vms.get_mut(&vm) else {
                return Err("a VM is not there");
            };
            account.presence = presence;
            account.sequence = sequence;
            account.mailbox = Mailbox::restore(mailbox)?;
            account.keys = KeyWindow::restore(keys);
        }
        ledger.restore_deliveries(delivering)?;
        ledger.kept = Kept::restore(kept)?;
        for (token, Origin { tag, result }) in origins {
            ledger.kept.settle_send(token, tag, result);
        }
        ledger.books = ledger.book_anew();
        Ok(ledger)
    }

    /// The books of what is there.
    fn book_anew(&self) -> Books {
        let mut books = Books::default();
        books.add(NOBODY, self.host_keys.bytes());
        for account in self.vms.values() {
            books.add(NOBODY, books::account(account));
            books.add(NOBODY, account.keys.bytes());
        }
        let mailboxes = self.vms.values().map(|account| &account.mailbox);
        for (_, held) in mailboxes.chain([&self.host]).flat_map(Mailbox::iter) {
            books.add(held.message.source, books::message(&held.message));
        }
        books::everything(&self.kept, |owner, bytes| books.add(owner, bytes));
        books
    }

    fn restore_deliveries(&mut self, delivering: Vec<(Token, Delivering)>) -> Result<(), &'static str> {
        for (token, entry) in delivering {
            let held = self
                .mailbox(entry.target)
                .and_then(|mailbox| mailbox.get(entry.position));
            if !held.is_some_and(|held| held.delivering && entry.end <= held.message.body.len() as u64) {
                return Err("a message is on its way that is not in the mailbox");
            }
            if !entry.last {
                self.parts.insert((token.session, token.channel));
            }
            self.delivering.insert(token, entry);
        }
        let mailboxes = self
            .vms
            .values()
            .map(|account| &account.mailbox)
            .chain([&self.host]);
        let marked = mailboxes
            .flat_map(Mailbox::iter)
            .filter(|(_, held)| held.delivering)
            .count();
        if marked != self.delivering.len() {
            return Err("a message in a mailbox is on its way to nobody");
        }
        let places = self.vms.iter().flat_map(|(vm, account)| {
            account
                .mailbox
                .iter()
                .filter_map(move |(position, held)| Some((held.bound?, (vm, position))))
        });
        self.bound = places.collect();
        Ok(())
    }
}

fn save_account(account: &Account) -> SavedAccount {
    let Account {
        config,
        name: _,
        presence,
        sequence,
        mailbox,
        keys,
    } = account;
    SavedAccount {
        config: config.clone(),
        presence: presence.clone(),
        sequence: *sequence,
        mailbox: mailbox.save(),
        keys: keys.save(),
    }
}
