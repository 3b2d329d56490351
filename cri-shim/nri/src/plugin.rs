//! A plugin that has registered: its name, what it wants to hear, and how it is asked.

use std::time::Duration;

use prost::Message;

use crate::api::{self, Event};
use crate::connection::{CallError, Connection};
use crate::error::{Error, by_state_change, method};
use crate::ttrpc::{MAX_MESSAGE, code};

/// Every event there is.
pub(crate) const ALL_EVENTS: i32 = (1 << (Event::Last as i32 - 1)) - 1;
/// Room for a Synchronize message's own fields and ttrpc's.
const SYNC_ROOM: usize = 1024;

/// What a plugin says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    /// Two digits. Plugins are asked in their order.
    pub index: String,
    pub base: String,
}

impl Name {
    /// Checks both parts as upstream does.
    pub fn new(index: &str, base: &str) -> Result<Name, String> {
        if index.len() != 2 || !index.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("the index {index:?} is not of two digits"));
        }
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.+".contains(&b);
        if base.is_empty() || base.len() > 255 || !base.bytes().all(fits) {
            return Err(format!("the name {base:?} is not of letters, digits and -_.+"));
        }
        Ok(Name { index: index.to_owned(), base: base.to_owned() })
    }

    /// From a program's: `NN-name`.
    pub fn of_program(file: &str) -> Result<Name, String> {
        let (index, base) =
            file.split_once('-').ok_or_else(|| format!("the name {file:?} is not of the form NN-name"))?;
        Name::new(index, base)
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.index, self.base)
    }
}

pub(crate) struct Plugin {
    pub name: Name,
    pub connection: Connection,
    events: i32,
    policy: api::FailurePolicy,
    timeout: Duration,
    /// Plugins are written for one call at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Plugin {
    /// Configures a plugin that has registered.
    pub async fn configure(
        name: Name,
        connection: Connection,
        request: &api::ConfigureRequest,
        timeout: Duration,
    ) -> Result<Plugin, String> {
        let answer = connection
            .call("Configure", request.encode_to_vec(), timeout)
            .await
            .map_err(|e| format!("it could not be configured: {e}"))?;
        let answer = api::ConfigureResponse::decode(&*answer)
            .map_err(|e| format!("its answer to Configure cannot be read: {e}"))?;
        let unknown = answer.events & !ALL_EVENTS;
        if unknown != 0 {
            return Err(format!("it wants events that there are not: {unknown:#x}"));
        }
        let events = if answer.events == 0 { ALL_EVENTS } else { answer.events };
        let policy = answer.failure_policy.unwrap_or_default();
        Ok(Plugin { name, connection, events, policy, timeout, turn: Default::default() })
    }

    pub fn wants(&self, event: Event) -> bool {
        self.events & (1 << (event as i32 - 1)) != 0 && !self.connection.is_closed()
    }

    /// Tells the plugin of all pods and containers, in several messages when one would be too long.
    pub async fn synchronize(
        &self,
        mut pods: Vec<api::PodSandbox>,
        mut containers: Vec<api::Container>,
    ) -> Result<Vec<api::ContainerUpdate>, String> {
        loop {
            let (more_pods, more_containers) = split(&mut pods, &mut containers)?;
            let more = !more_pods.is_empty() || !more_containers.is_empty();
            let request = api::SynchronizeRequest { pods, containers, more };
            let answer = self
                .connection
                .call("Synchronize", request.encode_to_vec(), self.timeout)
                .await
                .map_err(|e| format!("it could not be synchronized: {e}"))?;
            let answer = api::SynchronizeResponse::decode(&*answer)
                .map_err(|e| format!("its answer to Synchronize cannot be read: {e}"))?;
            if !more {
                return Ok(answer.update);
            }
            if !answer.more || !answer.update.is_empty() {
                return Err("it does not take pods and containers in several messages".to_owned());
            }
            (pods, containers) = (more_pods, more_containers);
        }
    }

    /// Asks the plugin. `None`: it failed, and its policy lets the request go on without it. `old` is what a plugin of an older
    /// interface is told instead.
    pub async fn ask<A: Message + Default>(
        &self,
        event: Event,
        request: &impl Message,
        old: Option<&api::StateChangeEvent>,
    ) -> Result<Option<A>, Error> {
        let request_name = method(event);
        match self.exchange::<A>(event, request, old).await {
            Ok(answer) => Ok(Some(answer)),
            Err(CallError::Status { message, .. }) => {
                Err(Error::Refused { plugin: self.name.to_string(), request: request_name, message })
            }
            Err(e) => {
                self.failed(request_name, &e);
                if self.policy.fail_request {
                    let plugin = self.name.to_string();
                    return Err(Error::Failed { plugin, request: request_name, why: e.to_string() });
                }
                Ok(None)
            }
        }
    }

    /// As [`Plugin::ask`], of a validator: one that does not answer accepts nothing.
    pub async fn validate(&self, request: &api::ValidateContainerAdjustmentRequest) -> Result<(), Error> {
        let event = Event::ValidateContainerAdjustment;
        let plugin = || self.name.to_string();
        match self.exchange::<api::ValidateContainerAdjustmentResponse>(event, request, None).await {
            Ok(answer) if answer.reject => Err(Error::Rejected { plugin: plugin(), reason: answer.reason }),
            Ok(_) => Ok(()),
            Err(CallError::Status { message, .. }) => {
                Err(Error::Refused { plugin: plugin(), request: method(event), message })
            }
            Err(e) => {
                self.failed(method(event), &e);
                Err(Error::Failed { plugin: plugin(), request: method(event), why: e.to_string() })
            }
        }
    }

    /// What becomes of the plugin after a call without an answer.
    fn failed(&self, request: &'static str, e: &CallError) {
        let waits = matches!(e, CallError::Timeout(_)) && self.policy.keep_connected;
        // One that is too long for the wire is not the plugin's fault.
        if waits || matches!(e, CallError::TooLong(_)) {
            tracing::warn!(plugin = %self.name, request, error = %e, "an NRI plugin did not handle a request");
        } else {
            self.connection.close(&format!("{request}: {e}"));
        }
    }

    async fn exchange<A: Message + Default>(
        &self,
        event: Event,
        request: &impl Message,
        old: Option<&api::StateChangeEvent>,
    ) -> Result<A, CallError> {
        let _turn = self.turn.lock().await;
        let answer = self.connection.call(method(event), request.encode_to_vec(), self.timeout).await;
        let answer = match (answer, old) {
            (Err(CallError::Status { code: code::UNIMPLEMENTED, .. }), Some(old))
                if by_state_change(event) =>
            {
                self.connection.call("StateChange", old.encode_to_vec(), self.timeout).await?;
                return Ok(A::default());
            }
            (answer, _) => answer?,
        };
        A::decode(&*answer).map_err(|e| CallError::Garbage(e.to_string()))
    }
}

/// Takes off what does not fit into one message. An error when a single one does not.
fn split(
    pods: &mut Vec<api::PodSandbox>,
    containers: &mut Vec<api::Container>,
) -> Result<(Vec<api::PodSandbox>, Vec<api::Container>), String> {
    let mut room = MAX_MESSAGE - SYNC_ROOM;
    let fitting = |lengths: &mut dyn Iterator<Item = usize>, room: &mut usize| {
        let mut count = 0;
        for length in lengths {
            // The field's number and its length.
            let Some(left) = room.checked_sub(length + 8) else { break };
            *room = left;
            count += 1;
        }
        count
    };
    let first = fitting(&mut pods.iter().map(Message::encoded_len), &mut room);
    let rest_of_pods = pods.split_off(first);
    let second = if rest_of_pods.is_empty() {
        fitting(&mut containers.iter().map(Message::encoded_len), &mut room)
    } else {
        0
    };
    let rest_of_containers = containers.split_off(second);
    if first + second == 0 && !(rest_of_pods.is_empty() && rest_of_containers.is_empty()) {
        return Err("a pod or container is larger than a message may be".to_owned());
    }
    Ok((rest_of_pods, rest_of_containers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Name::of_program("10-device-injector").unwrap().to_string(), "10-device-injector");
        assert_eq!(Name::of_program("10-device-injector").unwrap().base, "device-injector");
        for bad in ["1-a", "100-a", "1a-b", "10-", "10", "10-a/b", "10-a b", "\u{661}1-a"] {
            assert!(Name::of_program(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn much_is_told_in_pieces() {
        let pod = |n: usize| api::PodSandbox {
            id: format!("{n:064}"),
            uid: "u".repeat(10_000),
            ..Default::default()
        };
        let container = |n: usize| api::Container {
            id: format!("{n:064}"),
            name: "c".repeat(50_000),
            ..Default::default()
        };
        let mut pods: Vec<_> = (0..600).map(pod).collect();
        let mut containers: Vec<_> = (0..200).map(container).collect();
        let (mut messages, mut seen) = (0, (0, 0));
        while !pods.is_empty() || !containers.is_empty() {
            let rest = split(&mut pods, &mut containers).unwrap();
            let request = api::SynchronizeRequest { pods, containers, more: true };
            assert!(request.encoded_len() <= MAX_MESSAGE - 256);
            // No container before the last pod.
            assert!(request.containers.is_empty() || rest.0.is_empty());
            seen = (seen.0 + request.pods.len(), seen.1 + request.containers.len());
            messages += 1;
            (pods, containers) = rest;
        }
        assert_eq!((seen, messages), ((600, 200), 4));
        assert_eq!(split(&mut Vec::new(), &mut Vec::new()).unwrap(), Default::default());
        let huge = api::Container { name: "c".repeat(MAX_MESSAGE), ..Default::default() };
        assert!(split(&mut Vec::new(), &mut vec![huge]).is_err());
    }
}
