//! The control socket while no core serves it: `status` is answered, all else is told to come back.

use crate::control::protocol::{Call, ErrorCode, Failure, Hello, Status};
use crate::control::{Asked, ControlServer, Incoming};

/// Answers all that came in.
pub(super) fn answer(server: &mut ControlServer, status: &dyn Fn() -> Status) {
    while let Some(incoming) = server.poll_request() {
        let Incoming::Request(Asked { client, id, call, .. }) = incoming else {
            continue;
        };
        match call {
            Call::Hello => server.reply(client, id, &Hello::of_this_version()),
            Call::Status => server.reply(client, id, &status()),
            _ => {
                let message = "the core is being started; devices stay connected meanwhile";
                let remedy = "ask again in a moment; `vmgmtctl status` tells how it goes";
                server.fail(client, id, Failure::new(ErrorCode::Restarting, message, remedy));
            }
        }
    }
}
