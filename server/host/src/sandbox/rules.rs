//! What front and core may call in the kernel while they serve: the whole list, each entry with its reason.
//!
//! What is not here is denied. So there is no `socket`, `connect`, `bind`; no `execve`, `fork`, `clone` (threads exist before the filter);
//! no `ptrace`, no `process_vm_writev`, no signal to another process; no `open` or `openat`, in the front no file at all; no `chmod`, `chown`,
//! link, device node, xattr; no memory that can be executed; no mount, module, bpf, perf, io_uring, user namespace, keyring.
//!
//! A test runs both roles under a tracer and compares: an entry that is `Used::Always` and is not seen in its role, one that is `Used::Once` and
//! is seen in neither, one that is `Used::Never` and is seen, a command of fcntl that nobody gives, and a call that is seen and has no entry
//! fail it.

use super::Role;

/// One permission.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub call: i64,
    /// The library's name of the number: `SYS_` and the call's.
    constant: &'static str,
    /// Conditions on arguments; all must hold.
    pub only: &'static [Only],
    pub used: Used,
    pub why: &'static str,
}

impl Rule {
    /// The call's name, as strace(1) writes it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.constant.trim_start_matches("SYS_")
    }
}

/// A condition on an argument, counted from 0. (A filter sees numbers, not what pointers point to.)
#[derive(Debug, Clone, Copy)]
pub enum Only {
    /// It is one of these.
    OneOf(u8, &'static [u64]),
    /// It has none of these bits.
    Without(u8, u64),
    /// It is this process's number.
    OwnProcess(u8),
}

/// Whether a run of the tests makes the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Used {
    Always,
    /// By one role at least: something breaks, or is replaced.
    Once,
    /// It depends on time, sizes or the machine; the reason says on what.
    Varies,
    /// Only when something breaks, or on other machines; the reason says when.
    Never,
}

/// All of a role.
pub fn of(role: Role) -> impl Iterator<Item = &'static Rule> {
    let own = match role {
        Role::Front => FRONT,
        Role::Core => CORE,
    };
    own.iter().chain(BOTH)
}

macro_rules! rule {
    ($call:ident, $used:ident, $why:expr) => {
        rule!($call[], $used, $why)
    };
    ($call:ident [$($only:expr),*], $used:ident, $why:expr) => {
        Rule { call: libc::$call, constant: stringify!($call), only: &[$($only),*], used: Used::$used, why: $why }
    };
}

const fn number(value: i32) -> u64 {
    value as u64
}

/// No memory that can be executed, so that injected bytes stay bytes.
const NOT_EXECUTABLE: Only = Only::Without(2, libc::PROT_EXEC as u64);
/// Level, option: who a client is.
const PEER: &[Only] = &[
    Only::OneOf(1, &[number(libc::SOL_SOCKET)]),
    Only::OneOf(2, &[number(libc::SO_PEERCRED)]),
];

/// What any of our processes does: memory, threads that wait for each other, the log, its end.
const BOTH: &[Rule] = &[
    rule!(
        SYS_write,
        Always,
        "signals eventfds (the other role; the core: interrupts), writes the log"
    ),
    rule!(SYS_close, Always, "descriptors come and go with sessions"),
    rule!(
        SYS_recvmsg,
        Always,
        "packets of the other roles, and what clients say, with descriptors"
    ),
    rule!(
        SYS_sendmsg,
        Always,
        "packets for the other roles, with descriptors"
    ),
    rule!(
        SYS_sendto[Only::OneOf(4, &[0])],
        Always,
        "answers to clients, over connections only: without an address"
    ),
    rule!(
        SYS_accept4,
        Always,
        "clients come by sockets that the keeper made"
    ),
    rule!(SYS_epoll_wait, Always, "the event loop"),
    rule!(SYS_epoll_ctl, Always, "the event loop"),
    rule!(
        SYS_ppoll,
        Once,
        "an upgrade: a front that is handed over and a core on trial wait for the keeper's word"
    ),
    rule!(
        SYS_fstat,
        Always,
        "size and kind of memory and files that others gave"
    ),
    rule!(
        SYS_fstatfs,
        Always,
        "whether memory is of huge pages, whether a file is in memory"
    ),
    rule!(
        SYS_mmap[NOT_EXECUTABLE],
        Always,
        "pages between the roles, guest memory (the core), the heap"
    ),
    rule!(SYS_munmap, Always, "the same"),
    rule!(
        SYS_madvise,
        Always,
        "mapped pages are kept out of core dumps; the heap gives memory back"
    ),
    rule!(SYS_brk, Once, "the heap of the first thread, when it grows"),
    rule!(SYS_mremap, Varies, "large blocks of the heap, when they grow"),
    rule!(
        SYS_mprotect[NOT_EXECUTABLE],
        Once,
        "the heaps of other threads, when they grow"
    ),
    rule!(SYS_futex, Always, "locks and queues between threads"),
    rule!(
        SYS_sched_yield,
        Varies,
        "queues of the standard library, when two threads meet"
    ),
    rule!(SYS_exit_group, Always, "the end"),
    rule!(
        SYS_exit,
        Varies,
        "a thread that has nothing more to do, if it gets that far before the process ends"
    ),
    rule!(SYS_rt_sigprocmask, Once, "a thread that ends, as above; abort"),
    rule!(SYS_sigaltstack, Varies, "a thread that ends, as above"),
    rule!(
        SYS_restart_syscall,
        Never,
        "the kernel itself calls it when a sleeping process is stopped and continued"
    ),
    rule!(
        SYS_rt_sigreturn,
        Once,
        "the end of a signal handler: SIGTERM, SIGINT and faults have one"
    ),
    rule!(
        SYS_rt_sigaction,
        Once,
        "a fault's handler puts the default back and lets the process die of it; without that it would turn for ever"
    ),
    rule!(SYS_gettid, Once, "abort, which signals its own thread"),
    rule!(
        SYS_tgkill[Only::OwnProcess(0)],
        Once,
        "abort; no other process can be meant"
    ),
    rule!(
        SYS_clock_gettime,
        Never,
        "the clock, where the machine's cannot be read without the kernel"
    ),
    rule!(
        SYS_getrandom,
        Varies,
        "the seed of a hash table, at its first use in a thread"
    ),
];

/// What the core is refused (EACCES) instead of dying of it: the C library opens files by itself and goes on where it cannot.
/// `openat`: its heap looks at `/proc/sys/vm/overcommit_memory` when a thread's heap shrinks, and at `/sys/devices/system/cpu/online` when
/// many threads have one.
pub const REFUSED: &[i64] = &[libc::SYS_openat];
/// Their names.
pub const REFUSED_NAMES: &[&str] = &["openat"];

const FRONT: &[Rule] = &[
    rule!(
        SYS_preadv2[Only::OneOf(5, &[number(libc::RWF_NOWAIT)])],
        Always,
        "empties the eventfd by which a client unmasks INTx (QEMU's does not use one), without waiting for it"
    ),
    rule!(
        SYS_io_submit,
        Always,
        "signals clients' eventfds, where a write would wait if they liked; whether a descriptor is one"
    ),
    rule!(
        SYS_io_getevents,
        Varies,
        "the same: takes the outcomes away, once for 64 signals"
    ),
    rule!(SYS_io_destroy, Always, "the same: the end"),
    rule!(
        SYS_statx,
        Always,
        "size and kind of clients' memory, without asking whoever serves the file"
    ),
    rule!(
        SYS_shutdown,
        Always,
        "a session ends for its client at once; its socket is closed by a thread that may wait"
    ),
    rule!(SYS_getsockopt[PEER[0], PEER[1]], Always, "which process has connected"),
    rule!(
        SYS_setsockopt[
            Only::OneOf(1, &[number(libc::SOL_SOCKET)]),
            Only::OneOf(2, &[number(libc::SO_OOBINLINE)])
        ],
        Always,
        "urgent bytes of clients come in order: the kernel would drop them in a read, and close there what came with them"
    ),
    rule!(
        SYS_fcntl[Only::OneOf(
            1,
            &[
                number(libc::F_GETFL),
                number(libc::F_SETFL),
                number(libc::F_ADD_SEALS),
                number(libc::F_GET_SEALS),
                #[cfg(debug_assertions)] // the standard library's check of a descriptor before it closes it
                number(libc::F_GETFD),
            ]
        )],
        Always,
        "clients' descriptors: how they were opened, whether they are memory; listeners never block; seals of pages"
    ),
    rule!(SYS_memfd_create, Always, "a page for each session and core life"),
    rule!(SYS_ftruncate, Always, "its size"),
    rule!(SYS_getpid, Never, "abort, which signals its own process"),
];

const CORE: &[Rule] = &[
    rule!(SYS_read, Always, "empties eventfds: the front's and the workers'"),
    rule!(
        SYS_openat2,
        Always,
        "files beneath shares; by name nothing else is there: the root directory is empty, and landlock"
    ),
    rule!(SYS_newfstatat, Always, "kind and length of a name in a share"),
    rule!(
        SYS_statx,
        Always,
        "when a file was made: by that, its device and its number the next core knows it again"
    ),
    rule!(SYS_renameat2, Always, "a put appears; rename; make directory"),
    rule!(
        SYS_unlinkat,
        Always,
        "remove, and temporary files of puts that broke off"
    ),
    rule!(SYS_mkdirat, Always, "make directory"),
    rule!(SYS_getdents64, Always, "list"),
    rule!(SYS_lseek, Always, "list goes on where it was"),
    rule!(SYS_ftruncate, Always, "truncate, and the right length of a put"),
    rule!(SYS_fsync, Always, "durable puts"),
    rule!(
        SYS_preadv2,
        Always,
        "from files into guest memory, and only what needs no disk"
    ),
    rule!(SYS_pwritev, Always, "from guest memory into files"),
    rule!(
        SYS_pread64,
        Always,
        "checksums, and reading ahead into scratch memory"
    ),
    rule!(
        SYS_pwrite64,
        Always,
        "into files from memory of our own, where guest memory came by messages"
    ),
    rule!(
        SYS_process_vm_readv[Only::OwnProcess(0)],
        Always,
        "copies guest memory that could vanish: the kernel answers EFAULT; only within this process"
    ),
    rule!(
        SYS_fcntl[Only::OneOf(
            1,
            &[
                number(libc::F_GETFL),
                number(libc::F_GET_SEALS),
                #[cfg(debug_assertions)] // the standard library's check of a descriptor before it closes it
                number(libc::F_GETFD),
            ]
        )],
        Always,
        "whether memory can shrink, and may be written"
    ),
    rule!(SYS_getpid, Always, "the process to copy memory within; abort"),
    rule!(SYS_getppid, Always, "the keeper's number, for the status"),
    rule!(
        SYS_setpriority[
            Only::OneOf(0, &[libc::PRIO_PROCESS as u64]),
            Only::OneOf(1, &[0]),
            Only::OneOf(2, &[0])
        ],
        Always,
        "when it serves it goes back to an ordinary thread's priority; no other can be asked for"
    ),
];
