//! The control socket while no core serves it: `status`, `upgrade`, `reload` and `release` are answered, all else is told to come back.

use super::Keeper;
use crate::control::protocol::{Call, Done, ErrorCode, Failure, Hello, Status, Upgrading};
use crate::control::{Asked, ControlServer, Incoming};
use crate::messages::Notice;
use std::collections::BTreeMap;

/// Where its tokens begin: those below only wake the loop.
const CONTROL_TOKENS: usize = 16;

impl Keeper {
    /// While no core is READY the keeper answers the operators, so that they never wait in vain. In the turn in which one becomes it, what has come
    /// in until then is answered still; then their connections end.
    pub(super) fn serve_fallback(&mut self) {
        let is_served = self.core.as_ref().is_some_and(|core| core.ready.is_some());
        if is_served && self.fallback.is_none() {
            return;
        }
        let server = self.fallback.take().map_or_else(|| self.new_fallback(), Ok);
        match server {
            Ok(mut server) => {
                self.answer(&mut server);
                self.fallback = (!is_served).then_some(server);
            }
            Err(error) => tracing::debug!("the control socket is not served now: {error}"),
        }
    }

    fn new_fallback(&self) -> std::io::Result<ControlServer> {
        let mut server = ControlServer::new(self.control.fd.try_clone()?)?;
        server.register(self.poll.registry(), CONTROL_TOKENS)?;
        Ok(server)
    }

    /// Answers all that came in.
    fn answer(&mut self, server: &mut ControlServer) {
        let failed = |text: String| Failure::new(ErrorCode::Failed, text, "");
        while let Some(incoming) = server.poll_request() {
            let Incoming::Request(Asked { client, id, call, .. }) = incoming else {
                continue;
            };
            match call {
                Call::Hello => server.reply(client, id, &Hello::of_this_version()),
                Call::Status => server.reply(client, id, &self.status()),
                Call::Upgrade(_) | Call::Reload => {
                    let begun = match &call {
                        Call::Upgrade(wish) => self.begin_upgrade(wish),
                        _ => self.begin_reload(),
                    };
                    match begun {
                        Ok(number) => server.reply(client, id, &Upgrading { number }),
                        Err(text) => server.fail(client, id, failed(text)),
                    }
                }
                Call::Release(release) => match self.release(&release.vm) {
                    Ok(()) => server.reply(client, id, &Done {}),
                    Err(text) => server.fail(client, id, failed(text)),
                },
                _ => {
                    let message = "the core is being started; devices stay connected meanwhile";
                    let remedy = "ask again in a moment; `vmgmtctl status` tells how it goes";
                    server.fail(client, id, Failure::new(ErrorCode::Restarting, message, remedy));
                }
            }
        }
    }

    fn status(&self) -> Status {
        let state = match (self.stop_at, self.announced) {
            (Some(_), _) => "stopping",
            (None, false) => "starting",
            (None, true) => "restarting",
        };
        Status {
            state: state.into(),
            answered_by: "keeper".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            life: self.last_life,
            uptime_seconds: self.begin.elapsed().as_secs(),
            vms: self.vms.iter().count() as u64,
            sessions: self.vms.session_count() as u64,
            notices: Notice::save(&self.notices).0,
            counters: BTreeMap::from([
                ("core deaths".to_owned(), self.restarts.total()),
                (
                    "quarantined devices".to_owned(),
                    self.restarts.quarantined() as u64,
                ),
            ]),
            upgrade: self.upgrades.report().cloned(),
            sandbox: self.front_sandbox.iter().cloned().collect(),
            ..Status::default()
        }
    }
}

#[cfg(test)]
#[path = "fallback_tests.rs"]
mod tests;
