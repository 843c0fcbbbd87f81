//! The control socket while no core serves it: `status`, `upgrade` and `release` are answered, all else is told to come back.

use super::Keeper;
use crate::control::protocol::{Call, Done, ErrorCode, Failure, Hello, Upgrading};
use crate::control::{Asked, ControlServer, Incoming};

impl Keeper {
    /// Answers all that came in.
    pub(super) fn answer(&mut self, server: &mut ControlServer) {
        let failed = |text: String| Failure::new(ErrorCode::Failed, text, "");
        while let Some(incoming) = server.poll_request() {
            let Incoming::Request(Asked { client, id, call, .. }) = incoming else {
                continue;
            };
            match call {
                Call::Hello => server.reply(client, id, &Hello::of_this_version()),
                Call::Status => server.reply(client, id, &self.status()),
                Call::Upgrade(wish) => match self.begin_upgrade(&wish) {
                    Ok(number) => server.reply(client, id, &Upgrading { number }),
                    Err(text) => server.fail(client, id, failed(text)),
                },
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
}
