//! vmgmt: the guest's command line for its management device.
//!
//! Comes in: arguments. Goes out: text or JSON, and an exit code (`ending`). The work is the driver's; a file here is a
//! group of commands. Nothing here touches a register.

mod arguments;
mod bench;
mod bind;
mod ending;
mod files;
mod info;
mod local;
mod messages;
mod offers;
mod output;
mod progress;
mod selftest;
mod session;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use vmgmt_driver::Mode;

use arguments::{Arguments, Command, General};
use session::Session;

fn main() -> ExitCode {
    let Arguments { general, command } = Arguments::parse();
    match run(&general, command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ending::report(&error, general.json),
    }
}

fn run(general: &General, command: Command) -> Result<()> {
    if let Command::Bind { driver } = command {
        return bind::bind(general, driver);
    }
    let session = Session::open(general)?;
    match command {
        Command::Bind { .. } => Ok(()),
        Command::Info => info::info(&session),
        Command::Selftest => selftest::selftest(&session),
        Command::Put {
            local,
            target,
            existing,
            resume,
            durable,
            mode,
            no_check,
        } => {
            let order = files::PutOrder {
                existing,
                resume,
                durable,
                mode,
                check: !no_check,
            };
            files::put(&session, &local, &target, &order)
        }
        Command::Get {
            source,
            local,
            force,
            no_check,
        } => files::get(&session, &source, local.as_deref(), force, !no_check),
        Command::Ls { path } => files::list(&session, path.as_deref()),
        Command::Rm { paths } => files::remove(&session, &paths),
        Command::Stat { path } => {
            let mut client = session.client(Mode::FILE)?;
            files::stat(&session, &mut client, &path)
        }
        Command::Mkdir { path } => files::make_directory(&session, &path),
        Command::Mv {
            source,
            target,
            existing,
            durable,
        } => files::rename(&session, &source, &target, existing, durable),
        Command::Cp {
            local,
            target,
            timeout,
            no_check,
        } => offers::copy(&session, &local, &target, timeout, !no_check),
        Command::Accept {
            from,
            once,
            into,
            serve,
            no_check,
        } => {
            let order = offers::AcceptOrder {
                from: from.as_deref(),
                once,
                into: &into,
                serve: serve.as_deref(),
                check: !no_check,
            };
            offers::accept(&session, &order)
        }
        Command::Send { target, text, key } => messages::send(&session, &target, &text, key),
        Command::Recv {
            count,
            timeout,
            follow,
            raw,
        } => messages::receive(
            &session,
            &messages::ReceiveOrder {
                count,
                timeout,
                follow,
                raw,
            },
        ),
        Command::Peers => messages::peers(&session),
        Command::Publish {
            description,
            plain,
            stay,
        } => messages::publish(&session, description.as_deref(), plain, stay),
        Command::Bench {
            share,
            mib,
            memory_only,
            repeat,
            count,
            tmpfs,
            skip_rings,
            partner,
            answer,
            peer_directory,
            peer_port,
        } => {
            let order = bench::BenchOrder {
                share: share.as_deref(),
                mib,
                memory_only,
                repeat,
                count,
                tmpfs: &tmpfs,
                skip_rings,
                partner: partner.as_deref(),
                answer,
                peer_directory: peer_directory.as_deref(),
                peer_port: peer_port.as_deref(),
            };
            bench::bench(&session, &order)
        }
    }
}
